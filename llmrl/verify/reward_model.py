"""Reward models: conversations in, one number each out; from a sequence classifier on a device of its own, or a server.

A server is asked in the words of vLLM's `/classify` (`vllm serve MODEL --runner pooling`):

    POST URL    {"model": NAME, "messages": [...], "use_activation": false}
    reply       {"data": [{"probs": [SCORE]}]}
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from llmrl.errors import UserError
from llmrl.types import Message, Score

if TYPE_CHECKING:
    from torch import Tensor

Conversation = list[Message]
CHARACTERS_PER_TOKEN = 100
"""Text beyond max_length times this is not even tokenised."""


class RewardModel:
    """A sequence classifier with one output, as `trl.RewardTrainer` trains and saves it.

    Conversations that are asked for while a batch is computed wait and form the next one, so groups of rollouts that
    finish at about the same time share a forward pass.

    Args:
        path: hub id or folder.
        device: such as `cuda:1`; by default the current accelerator, or the CPU.
        dtype: of the weights.
        max_length: tokens of a conversation; longer ones are cut off at the end.
        max_tokens: tokens (padding included) of one forward pass.

    Raises:
        UserError: there is no such model, or it has more than one output.
    """

    def __init__(self, path: str, *, device: str | None, dtype: str, max_length: int, max_tokens: int) -> None:
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(path)
            model = AutoModelForSequenceClassification.from_pretrained(path, dtype=getattr(torch, dtype))
        except (OSError, ValueError) as error:
            raise UserError(f"reward model {path!r}: cannot be loaded: {error}") from error
        if model.config.num_labels != 1:
            raise UserError(f"reward model {path!r}: has {model.config.num_labels} outputs, a reward needs exactly one")
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        model.config.pad_token_id = self.tokenizer.pad_token_id
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        self.device = torch.device(device) if device else found or torch.device("cpu")
        self.model = model.to(self.device).eval()
        self.max_length, self.max_tokens = max_length, max_tokens
        self._waiting: list[tuple[list[list[int]], asyncio.Future[list[float]]]] = []
        self._worker: asyncio.Task[None] | None = None

    def encode(self, conversation: Conversation) -> list[int]:
        """Token ids: rendered with the chat template; without one, the contents one after the other and eos."""
        if self.tokenizer.chat_template:
            text = self.tokenizer.apply_chat_template(conversation, tokenize=False)
            ids = self.tokenizer(self._short(text), add_special_tokens=False)["input_ids"]
        else:
            text = "".join(str(message.get("content") or "") for message in conversation)
            ids = [*self.tokenizer(self._short(text))["input_ids"], self.tokenizer.eos_token_id]
        return ids[: self.max_length]

    def _short(self, text: str) -> str:
        # Text of a policy may hold lone surrogates, which no tokenizer takes.
        return text[: self.max_length * CHARACTERS_PER_TOKEN].encode(errors="replace").decode()

    def scores(self, sequences: Sequence[list[int]]) -> list[float]:
        """The classifier's output for each sequence; sequences of like length share a forward pass."""
        order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))
        found = [0.0] * len(sequences)
        while order:
            count = max(1, self.max_tokens // max(1, len(sequences[order[0]])))
            batch, order = order[:count], order[count:]
            for i, score in zip(batch, self._forward([sequences[i] for i in batch]).tolist(), strict=True):
                found[i] = score
        return found

    def _forward(self, sequences: list[list[int]]) -> Tensor:
        import torch

        width, pad = len(sequences[0]), self.tokenizer.pad_token_id
        ids = torch.tensor([ids + [pad] * (width - len(ids)) for ids in sequences], device=self.device)
        lengths = torch.tensor([len(ids) for ids in sequences], device=self.device)
        mask = torch.arange(width, device=self.device)[None] < lengths[:, None]
        with torch.inference_mode():
            return self.model(input_ids=ids, attention_mask=mask.long()).logits[:, 0].float()

    async def __call__(self, conversations: Sequence[Conversation]) -> list[float]:
        """Scores of conversations, in batches with whatever else is asked for meanwhile."""
        future: asyncio.Future[list[float]] = asyncio.get_running_loop().create_future()
        self._waiting.append(([self.encode(conversation) for conversation in conversations], future))
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        return await future

    async def _work(self) -> None:
        while self._waiting:
            taken, self._waiting = self._waiting, []
            everything = [ids for sequences, _ in taken for ids in sequences]
            try:
                scores = iter(await asyncio.to_thread(self.scores, everything))
            except Exception as error:
                for _, future in taken:
                    if not future.done():
                        future.set_exception(error)
                continue
            for sequences, future in taken:
                result = [next(scores) for _ in sequences]
                if not future.done():
                    future.set_result(result)


class RewardServer:
    """The same over HTTP: each conversation is one request.

    Args:
        base_url: where `/classify` is, such as `http://localhost:8001`.
        model: the name the server knows it by.
    """

    def __init__(self, base_url: str, model: str, *, timeout_s: float, retries: int, max_concurrency: int) -> None:
        self.url, self.model = base_url.rstrip("/") + "/classify", model
        self.limits: dict[str, Any] = {"timeout_s": timeout_s, "retries": retries, "max_concurrency": max_concurrency}

    async def __call__(self, conversations: Sequence[Conversation]) -> list[float | Exception]:
        """Scores of conversations; in the place of one that got none, what went wrong."""
        return await asyncio.gather(*(self._one(c) for c in conversations), return_exceptions=True)  # pyright: ignore

    async def _one(self, conversation: Conversation) -> float:
        from llmrl.verify.judge_http import EndpointError, shared_endpoint

        body = {"model": self.model, "messages": conversation, "use_activation": False}
        reply = await shared_endpoint(self.url, **self.limits).post(body)
        try:
            (score,) = reply["data"][0]["probs"]
            return float(score)
        except (KeyError, IndexError, TypeError, ValueError):
            raise EndpointError(
                f"{self.url}: expected data[0].probs with one number, found {str(reply)[:200]}"
            ) from None


Scorer = Callable[[Sequence[Conversation]], Any]


@functools.cache
def get_reward_model(
    model: str,
    *,
    base_url: str | None = None,
    device: str | None = None,
    dtype: str = "float32",
    max_length: int = 2048,
    max_tokens: int = 16384,
    timeout_s: float = 60.0,
    retries: int = 4,
    max_concurrency: int = 64,
) -> Scorer:
    """The reward model of these options, loaded once per process; with `base_url` the one that a server holds."""
    if base_url is not None:
        return RewardServer(base_url, model, timeout_s=timeout_s, retries=retries, max_concurrency=max_concurrency)
    return RewardModel(model, device=device, dtype=dtype, max_length=max_length, max_tokens=max_tokens)


async def ask(scorer: Scorer, conversations: Sequence[Conversation]) -> list[Score]:
    """What a scorer (or any function of conversations) says, as scores; a failure is the error of its conversation."""
    found = scorer(conversations)
    values = await found if asyncio.iscoroutine(found) else found
    return [
        Score(reward=None, error=f"{type(value).__name__}: {value}")
        if isinstance(value, BaseException)
        else Score(reward=None if value is None else float(value))
        for value in values
    ]
