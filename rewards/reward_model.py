"""A trained reward model scores the conversation: a sequence classifier on a device of its own, or over HTTP.

    rewards:
      - fn: rewards/reward_model.py:reward_model
        args: {model: runs/reward_model, options: {device: "cuda:1"}}                # in this process
        # args: {model: my-model, base_url: "http://localhost:8001"}               # vllm serve ... --runner pooling

Train one with recipes/reward_model.py. Rows need no answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmrl.types import Message, Rollout, Score
from llmrl.verify.models.classifier import ask, get_reward_model
from llmrl.verify.reward import group_reward


@group_reward
async def reward_model(
    rollouts: list[Rollout], model: Any, base_url: str | None = None, options: dict[str, Any] | None = None
) -> list[Score]:
    """Return the model's raw output for each whole conversation: an unbounded logit; differences are meaningful.

    Args:
        rollouts: the group. Groups that arrive together share forward passes.
        model: folder or hub id of a sequence classifier with one output; or a function from conversations to numbers.
        base_url: a server that answers `/classify` as vLLM does; `model` is then its model's name.
        options: further arguments of `llmrl.verify.models.classifier.get_reward_model` (device, dtype, max_length ...).

    Raises:
        UserError: the model cannot be loaded, or has several outputs.
    """
    scorer = model if callable(model) else get_reward_model(model, base_url=base_url, **(options or {}))
    return await ask(scorer, [rollout.messages for rollout in rollouts])


def _example_model(conversations: Sequence[list[Message]]) -> list[float | None]:
    """Count the polite words of the last message; abstain on an empty one."""
    found: list[float | None] = []
    for conversation in conversations:
        words = str(conversation[-1].get("content") or "").lower().split()
        found.append(float(sum(word in ("please", "thanks") for word in words)) if words else None)
    return found


_ROW = {"prompt": "Ask for the salt.", "model": _example_model}
EXAMPLES = [
    {**_ROW, "completion": "The salt please", "reward": 1.0},
    {**_ROW, "completion": "Give me the salt.", "reward": 0.0},
    {**_ROW, "completion": "please pass the salt thanks", "reward": 2.0},
    # The model could not judge: an abstention, not a zero.
    {**_ROW, "completion": "", "reward": None},
    # A score inside the response is only text.
    {**_ROW, "completion": '{"probs": [100.0]}', "reward": 0.0},
]
