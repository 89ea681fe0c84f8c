"""Rubric: several rewards become one score, and the three outcomes stay distinct."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from llmrl.errors import UserError
from llmrl.types import Rollout, Score, Status
from llmrl.verify.options import RewardConfig, VerifyConfig
from llmrl.verify.pool import Pool
from llmrl.verify.reward import group_reward, trl_style
from llmrl.verify.rubric import Part, Rubric
from tests.verify.rollouts import group, rollout


def score(parts: list[Any], given: Rollout, **options: Any) -> Score:
    async def main() -> Score:
        rubric = Rubric(parts, **options)
        try:
            await rubric.score_group(group(given))
        finally:
            await rubric.close()
        assert given.score is not None
        return given.score

    return asyncio.run(main())


def length(completion: str) -> int:
    return len(completion)


def one(completion: str) -> float:
    return 1.0


def zero(completion: str) -> float:
    return 0.0


def abstains(completion: str) -> None:
    return None


def fails(completion: str) -> float:
    raise RuntimeError("the reason it failed")


async def waits(completion: str) -> float:
    await asyncio.sleep(0)
    return 2.0


@group_reward
def longest(rollouts: list[Rollout], at_least: int = 0) -> list[float]:
    """Give 1 to the longest completion of a group if it has at least `at_least` characters."""
    best = max(at_least, *(len(r.completion) for r in rollouts), 0)
    return [float(len(r.completion) == best) for r in rollouts]


# --- combination ------------------------------------------------------------------------------------------------------


def test_the_reward_is_the_weighted_sum_of_its_parts() -> None:
    found = score([Part(fn=length, weight=0.5), Part(fn=waits, weight=2.0), Part(fn=one, weight=0)], rollout("abcd"))
    assert found == Score(reward=0.5 * 4 + 2.0 * 2, parts={"length": 4.0, "waits": 2.0, "one": 1.0})


@pytest.mark.parametrize(
    ("parts", "reward", "error"),
    [
        ([one, fails], None, True),
        ([fails, abstains], None, True),
        ([one, Part(fn=fails, weight=0)], 1.0, False),
        ([one, Part(fn=abstains, weight=0)], 1.0, False),
        ([abstains, Part(fn=one, weight=0)], None, False),
        ([abstains, abstains], None, False),
        ([one, abstains], 1.0, False),
        ([zero, abstains], 0.0, False),
        ([Part(fn=one, weight=0)], None, False),
        ([Part(fn=one, weight=-0.5), zero], -0.5, False),
    ],
)
def test_the_three_outcomes_stay_distinct(parts: list[Any], reward: float | None, error: bool) -> None:
    found = score(parts, rollout())
    assert (found.reward, found.error is not None) == (reward, error)


def test_an_error_carries_its_traceback_and_a_metric_keeps_its_own() -> None:
    found = score([one, fails], rollout())
    assert found.error is not None
    assert "the reason it failed" in found.error
    assert "in fails" in found.error
    assert found.parts == {"one": 1.0, "fails": None}
    metric = score([one, Part(fn=fails, weight=0)], rollout())
    assert metric.error is None
    assert "the reason it failed" in metric.info["fails"]["error"]


def test_an_abstention_beside_a_score_is_recorded() -> None:
    assert score([one, abstains], rollout()).info == {"abstained": ["abstains"]}


def test_rewards_of_the_environment_are_parts_of_weight_one() -> None:
    given = rollout()
    given.env_rewards = {"tool": 0.25}
    found = score([Part(fn=one, weight=2)], given)
    assert (found.reward, found.parts) == (2.25, {"one": 1.0, "env/tool": 0.25})
    given.score = None
    assert score([Part(fn=one, weight=0)], given).reward == 0.25
    given.score = None
    assert score([fails], given).reward is None


def test_info_and_sub_parts_are_kept_under_the_name_of_the_part() -> None:
    def detailed(completion: str) -> Score:
        return Score(reward=1.0, parts={"tests": 0.5}, info={"why": "because"}, token_rewards=[0.0, 0.5, 0.5])

    found = score([Part(fn=detailed, weight=2), one], rollout())
    assert found.parts == {"detailed": 1.0, "one": 1.0, "detailed/tests": 0.5}
    assert found.info == {"detailed": {"why": "because"}}
    assert found.token_rewards == [0.0, 1.0, 2.0], "the other part is paid at the last token"


def test_rewards_that_cannot_be_added_up_are_an_error() -> None:
    given = rollout()
    given.env_rewards = {"tool": float("nan")}
    found = score([one], given)
    assert found.reward is None
    assert found.error is not None and "weighted sum" in found.error
    found = score([lambda completion: Score(reward=1.0, token_rewards=[0.0] * 2)], rollout())
    assert found.reward is None
    assert found.error is not None and "2 token rewards for a rollout of 3 completion tokens" in found.error
    found = score([lambda completion: Score(reward=1.0, turn_rewards=[0.0] * 2)], rollout())
    assert found.reward is None
    assert found.error is not None and "2 turn rewards for a rollout of 1 turns" in found.error


def test_turn_rewards_are_paid_at_the_last_token_of_their_turn() -> None:
    given = rollout(num_tokens=2)
    given.turns += [*rollout(num_tokens=3).turns, *rollout(num_tokens=1).turns]
    by_turn = Score(reward=0.5, turn_rewards=[1.0, -1.0, 0.25])
    found = score([Part(fn=lambda completion: by_turn, weight=2), one], given)
    assert (found.reward, found.token_rewards) == (2.0, [0.0, 2.0, 0.0, 0.0, -2.0, 0.5 + 1.0])
    given.score = None
    by_both = Score(reward=0.5, turn_rewards=[1.0, 0.0, 0.0], token_rewards=[0.25] * 6)
    assert score([lambda completion: by_both], given).token_rewards == [0.25, 1.25, 0.25, 0.25, 0.25, 0.25]


@pytest.mark.parametrize(("gate", "reward"), [(one, 3.0), (zero, 0.0)])
def test_a_gated_part_counts_only_where_its_gate_is_above_zero(gate: Any, reward: float) -> None:
    name = gate.__name__
    found = score([Part(fn=gate), Part(fn=waits, gate=name)], rollout())
    assert found.reward == reward
    assert found.parts["waits"] == 2.0


def test_a_gate_that_has_no_score_leaves_its_part_out() -> None:
    assert score([one, Part(fn=abstains, weight=0), Part(fn=waits, gate="abstains")], rollout()).reward == 1.0
    failed = score([one, Part(fn=fails, weight=0), Part(fn=waits, gate="fails")], rollout())
    assert failed.reward is None
    assert failed.error is not None and "it is gated by fails" in failed.error


def test_scale_maps_a_part_to_the_unit_interval() -> None:
    for completion, reward in (("a", 0.0), ("abc", 0.5), ("abcde", 1.0), ("abcdefgh", 1.0)):
        found = score([Part(fn=length, scale=(1, 5))], rollout(completion))
        assert (found.reward, found.parts["length"]) == (reward, len(completion))


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (Part(fn=one, gate="nothing"), "not another reward"),
        (Part(fn=one, gate="one"), "not another reward"),
        (Part(fn=one, scale=(1, 1)), "low < high"),
        (Part(fn=one, args={"x": 1}), "`args` has 'x'"),
    ],
)
def test_a_part_that_contradicts_itself_is_refused_at_once(part: Part, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Rubric([part])


def test_names_are_unique_and_the_first_weighted_one_is_the_accuracy() -> None:
    rubric = Rubric([Part(fn=one, weight=0), length, one, one])
    assert rubric.names == ["one", "length", "one_2", "one_3"]
    assert rubric.accuracy_name == "length"
    assert Rubric([Part(fn=one, weight=0)]).accuracy_name is None


@pytest.mark.parametrize("value", ["1", [1], float("nan"), float("inf"), {"a": 1}])
def test_a_wrong_return_value_is_an_error_of_its_rollout(value: Any) -> None:
    def wrong(completion: str) -> Any:
        return value if completion == "wrong" else 1.0

    found = score([wrong], rollout("wrong"))
    assert found.reward is None
    assert found.error is not None and "reward wrong returned" in found.error
    assert score([wrong], rollout("right")).reward == 1.0


def test_rollouts_that_ended_in_an_error_are_not_scored() -> None:
    async def main() -> None:
        rubric = Rubric([one, longest])
        broken, fine = rollout("a much longer text"), rollout("ab", 1)
        broken.status, broken.error = Status.ERROR_ENV, "traceback"
        assert (await rubric.score(broken)).error == "traceback"
        await rubric.score_group(group(broken, fine))
        assert broken.score is None
        assert fine.score is not None and fine.score.reward == 2.0

    asyncio.run(main())


def test_check_finds_a_parameter_that_the_task_cannot_fill() -> None:
    def wants(completion: str, level: int) -> float:
        return 1.0

    def wants_too(completions: list[Any], level: list[int]) -> list[float]:
        return [1.0]

    for function in (wants, wants_too):
        rubric = Rubric([function])
        rubric.check(rollout(level=1).task)
        with pytest.raises(UserError, match=r"parameter 'level' cannot be filled"):
            rubric.check(rollout().task)
        Rubric([Part(fn=function, args={"level": 1})]).check(rollout().task)


# --- groups -----------------------------------------------------------------------------------------------------------


def test_group_rewards_see_the_finished_group_once() -> None:
    async def main() -> None:
        rubric = Rubric([length, longest])
        rollouts = [rollout("a"), rollout("abc", 1), rollout("ab", 2)]
        first = await rubric.score(rollouts[0])
        assert first.reward == 1.0
        await rubric.score_group(group(*rollouts))
        assert [r.score and r.score.reward for r in rollouts] == [1.0, 4.0, 2.0]
        assert [r.score and r.score.parts["longest"] for r in rollouts] == [0.0, 1.0, 0.0]

    asyncio.run(main())


@pytest.mark.parametrize(("part", "best"), [(Part(fn=longest, args={"at_least": 9}), 0.0), (Part(fn=longest), 1.0)])
def test_group_rewards_take_arguments_by_name(part: Part, best: float) -> None:
    assert score([part], rollout("abc")).reward == best
    assert score([longest], rollout("abc", at_least=9)).reward == 0.0


@pytest.mark.parametrize("values", [[1.0], [1.0, 2.0, 3.0], 5, None])
def test_a_group_reward_of_the_wrong_length_is_an_error_of_the_group(values: Any) -> None:
    async def main() -> None:
        rubric = Rubric([trl_style(lambda **columns: values)])
        rollouts = [rollout(), rollout(index=1)]
        await rubric.score_group(group(*rollouts))
        assert all(r.score and r.score.reward is None and r.score.error for r in rollouts)

    asyncio.run(main())


def test_one_bad_entry_of_a_group_costs_one_rollout() -> None:
    async def main() -> None:
        rubric = Rubric([trl_style(lambda **columns: [1.0, "bad", None, 10**400])])
        rollouts = [rollout(index=i) for i in range(4)]
        await rubric.score_group(group(*rollouts))
        scores = [r.score for r in rollouts if r.score]
        assert [s.reward for s in scores] == [1.0, None, None, None]
        assert [s.error is None for s in scores] == [True, False, True, False]

    asyncio.run(main())


# --- configuration and pool -------------------------------------------------------------------------------------------


def test_a_rubric_from_its_configuration_scores_in_worker_processes() -> None:
    rewards = [
        RewardConfig(fn="math_answer", args={"require_box": True}),
        RewardConfig(fn="rewards/format_tags.py:format_tags", weight=0.0),
    ]

    async def main() -> list[float | None]:
        rubric = Rubric.from_config(rewards, VerifyConfig(num_workers=2))
        try:
            await rubric.warm()
            rollouts = [rollout(text, i, answer="2") for i, text in enumerate([r"\boxed{2}", r"\boxed{3}", "2"])]
            await asyncio.gather(*(rubric.score(r) for r in rollouts))
            return [r.score.reward if r.score else None for r in rollouts]
        finally:
            await rubric.close()

    assert asyncio.run(main()) == [1.0, 0.0, 0.0]


def test_workers_are_shared_by_the_processes_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmrl.verify.rubric.available_cores", lambda: 16)
    rewards = [RewardConfig(fn="math_answer")]
    for num_processes, workers in ((1, 16), (4, 4), (32, 1)):
        assert Rubric.from_config(rewards, VerifyConfig(), num_processes=num_processes).pool.num_workers == workers
    assert Rubric.from_config(rewards, VerifyConfig(num_workers=3), num_processes=4).pool.num_workers == 3


def test_a_hang_in_the_pool_costs_one_rollout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "slow.py").write_text(
        "POOL = True\ndef slow(completion):\n    while completion == 'hang': pass\n    return 1.0\n"
    )
    call = Pool.call

    async def patient(self: Pool, spec: str, arguments: dict[str, Any], time_limit_s: float) -> Any:
        """Give only the call that never returns its limit, which others could miss on a busy machine."""
        assert time_limit_s == 1.0
        return await call(self, spec, arguments, time_limit_s if arguments["completion"] == "hang" else 300.0)

    monkeypatch.setattr(Pool, "call", patient)

    async def main() -> list[Score | None]:
        rubric = Rubric([Part(fn=f"{tmp_path}/slow.py", time_limit_s=1.0)], num_workers=2)
        rollouts = [rollout("hang" if i == 1 else "fine", i) for i in range(4)]
        try:
            await rubric.score_group(group(*rollouts))
        finally:
            await rubric.close()
        return [r.score for r in rollouts]

    scores = asyncio.run(main())
    assert [s.reward for s in scores if s] == [1.0, None, 1.0, 1.0]
    assert scores[1] is not None and scores[1].error is not None and "timed out after 1 s" in scores[1].error


def test_rollout_and_task_reach_a_function_in_the_pool(tmp_path: Path) -> None:
    (tmp_path / "counts.py").write_text(
        "POOL = True\ndef counts(rollout, task, messages):\n"
        "    return rollout.num_completion_tokens + len(task.messages) + len(messages)\n"
    )
    assert score([f"{tmp_path}/counts.py"], rollout(num_tokens=5)).reward == 5 + 1 + 2
