"""TRL reward functions get TRL's keywords, and TRL's own rewards keep their values."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from llmrl.types import Message, Rollout, Turn
from llmrl.verify.rubric import Part, Rubric
from tests.verify.rollouts import group, rollout


def test_trl_functions_get_exactly_trls_keywords() -> None:
    seen: dict[str, Any] = {}

    async def reward(prompts: Any, completions: Any, **keywords: Any) -> list[float | None]:
        seen.update(keywords, prompts=prompts, completions=completions)
        keywords["log_extra"]("note", ["first", "second"])
        keywords["log_metric"]("seen", 2.0)
        return [0.5, None]

    async def main(conversational: bool) -> tuple[list[Rollout], dict[str, float]]:
        rubric = Rubric([reward], conversational=conversational)
        rubric.trainer_state.global_step = 7
        rollouts = [rollout("a", prompt="q", level=1, answer="x"), rollout("b", 1, prompt="q", level=1, answer="x")]
        await rubric.score_group(group(*rollouts))
        return rollouts, rubric.take_metrics()

    rollouts, metrics = asyncio.run(main(conversational=True))
    assert set(seen) == {
        "prompts", "completions", "completion_ids", "level", "answer", "trainer_state", "log_extra", "log_metric",
    }  # fmt: skip
    assert seen["prompts"] == [[{"role": "user", "content": "q"}]] * 2
    assert seen["completions"] == [[{"role": "assistant", "content": "a"}], [{"role": "assistant", "content": "b"}]]
    assert seen["completion_ids"] == [[0, 1, 2]] * 2
    assert (seen["level"], seen["answer"], seen["trainer_state"].global_step) == ([1, 1], ["x", "x"], 7)
    # Judges that other tests of this process used report their metrics too.
    assert {name: value for name, value in metrics.items() if not name.startswith("judge/")} == {"seen": 2.0}
    first, second = (r.score for r in rollouts)
    assert first is not None and (first.reward, first.info) == (0.5, {"reward": {"note": "first"}})
    assert second is not None and (second.reward, second.error) == (None, None)
    asyncio.run(main(conversational=False))
    assert (seen["prompts"], seen["completions"]) == (["q", "q"], ["a", "b"])


def test_trl_completions_hold_the_whole_conversation_after_the_prompt() -> None:
    seen: dict[str, Any] = {}

    def reward(completions: Any, completion_ids: Any, **keywords: Any) -> list[float]:
        seen.update(completions=completions, completion_ids=completion_ids)
        return [1.0]

    given = rollout("call")
    given.turns[0].replies = [{"role": "tool", "content": "result"}]
    last: Message = {"role": "assistant", "content": "done"}
    given.turns.append(
        Turn(
            prompt_ids=[1, 2, 0, 1, 2, 50, 51],
            completion_ids=[60],
            rollout_logprobs=[0.0],
            finish="stop",
            policy_version=(0, 0),
            message=last,
        )
    )
    asyncio.run(Rubric([reward]).score_group(group(given)))
    assert [m["content"] for m in seen["completions"][0]] == ["call", "result", "done"]
    assert seen["completion_ids"] == [[0, 1, 2, 50, 51, 60]]


COMPLETIONS = [
    r"<think>half</think> The answer is \boxed{\frac{1}{2}}",
    r"<think>a third</think> \boxed{\frac{1}{3}}",
    "<think>no end, no answer",
    r"no thinking: $\frac{1}{2}$ or \boxed{0.5}",
    "one two one two one two one two",
    "",
]
SOLUTIONS = [r"$\frac{1}{2}$", r"\boxed{\frac{1}{2}}", "not mathematics at all"]
TRL_REWARDS: list[tuple[str, dict[str, Any]]] = [
    ("accuracy_reward", {}),
    ("reasoning_accuracy_reward", {}),
    ("reasoning_accuracy_reward", {"reasoning_delimiters": ["half"]}),
    ("think_format_reward", {}),
    ("get_soft_overlong_punishment()", {"max_completion_len": 100, "soft_punish_cache": 20}),
    ("get_cosine_scaled_reward()", {"max_len": 100}),
    ("get_repetition_penalty_reward()", {"ngram_size": 2, "max_penalty": -1.0}),
]


def test_the_list_has_every_reward_of_trl() -> None:
    import trl.rewards

    shipped = {name for names in trl.rewards._import_structure.values() for name in names}
    assert {name.removesuffix("()") for name, _ in TRL_REWARDS} == shipped


@pytest.mark.parametrize("solution", SOLUTIONS)
@pytest.mark.parametrize(("name", "args"), TRL_REWARDS, ids=lambda value: str(value)[:40])
def test_every_reward_of_trl_keeps_its_value_in_a_rubric(name: str, args: dict[str, Any], solution: str) -> None:
    import trl.rewards

    rollouts = [
        rollout(text, i, num_tokens=tokens, solution=solution)
        for i, (text, tokens) in enumerate(zip(COMPLETIONS, [10, 50, 85, 95, 100, 150], strict=True))
    ]
    for r in rollouts:
        r.turns[0].completion_ids = [t % (r.index + 2) for t in r.turns[0].completion_ids]
    is_factory = name.endswith("()")
    function = getattr(trl.rewards, name.removesuffix("()"))
    expected = (function(**args) if is_factory else function)(
        completions=[[{"role": "assistant", "content": text}] for text in COMPLETIONS],
        completion_ids=[r.turns[0].completion_ids for r in rollouts],
        solution=[solution] * len(rollouts),
        **({} if is_factory else args),
    )

    async def main() -> None:
        rubric = Rubric([Part(fn=f"trl.rewards:{name}", args=args)])
        rubric.check(rollouts[0].task)
        await rubric.score_group(group(*rollouts))

    asyncio.run(main())
    assert [r.score and r.score.error for r in rollouts] == [None] * len(rollouts)
    assert [r.score and r.score.reward for r in rollouts] == expected
