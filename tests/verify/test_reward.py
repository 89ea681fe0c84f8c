"""Loading a reward by spec, filling its arguments by name, and checking what it returns."""

from __future__ import annotations

import asyncio
import functools
import math
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmrl.errors import UserError
from llmrl.types import Rollout, Score, Task, Turn
from llmrl.verify import spec as spec_module
from llmrl.verify.reward import RewardTypeError, as_score, group_reward, load_reward, trl_style
from llmrl.verify.spec import resolve, shipped_names


def rollout(completion: str = "text", answer: Any = None, **meta: Any) -> Rollout:
    turn = Turn(
        prompt_ids=[1, 2],
        completion_ids=[3, 4, 5],
        rollout_logprobs=[0.0] * 3,
        finish="stop",
        policy_version=(0, 0),
        message={"role": "assistant", "content": completion},
    )
    task = Task(id="t", messages=[{"role": "user", "content": "a question"}], answer=answer, meta=meta)
    return Rollout(task=task, index=0, turns=[turn])


# --- specs ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "rewards").mkdir()
    (tmp_path / "rewards" / "math.py").write_text("import math as standard\ndef math(completion): return standard.pi\n")
    (tmp_path / "rewards" / "several.py").write_text("def one(completion): return 1\ndef two(completion): return 2\n")
    (tmp_path / "whole_group.py").write_text("def score_group(rollouts): return [1.0] * len(rollouts)\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_form_of_spec_finds_its_function(folder: Path) -> None:
    assert resolve("rewards/several.py:two")(completion="") == 2
    assert resolve(f"{folder}/rewards/several.py:one")(completion="") == 1
    assert resolve("math:sqrt") is math.sqrt
    assert resolve("os.path:join").__name__ == "join"
    assert resolve("math_answer").__name__ == "math_answer"
    assert resolve("rewards/math_answer.py:math_answer") is resolve("math_answer")
    assert resolve("rewards/math_answer.py") is resolve("math_answer")
    assert load_reward("whole_group.py").name == "whole_group"
    assert load_reward("whole_group.py").kind == "group"


def test_a_file_does_not_shadow_the_standard_library(folder: Path) -> None:
    assert resolve("rewards/math.py:math")(completion="") == math.pi
    assert sys.modules["math"] is math
    assert resolve("rewards/math.py:math").__module__.startswith("llmrl_plugin_")


def test_the_working_directory_comes_before_the_shipped_copy(folder: Path) -> None:
    (folder / "rewards" / "math_answer.py").write_text("def math_answer(completion): return 'mine'\n")
    assert resolve("rewards/math_answer.py")(completion="") == "mine"
    assert resolve("math_answer")(completion="1", answer="2").reward == 0.0


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("math_anser", "Did you mean 'math_answer'"),
        ("rewards/math_anser.py:f", "Did you mean 'rewards/math_answer.py'"),
        ("rewards/several.py:tow", "Did you mean 'two'"),
        ("no.such.module:f", "no module 'no.such.module'"),
        ("math:nothing", "has no 'nothing'"),
        ("math:", "add the function's name"),
        ("math:pi", "is a float, not a function"),
        ("pathlib:Path", "is a class: append `()`"),
        ("", "no reward is called"),
        ("rewards/broken.py:f", "line 2: importing it failed"),
        ("rewards/syntax.py:f", "line 1: importing it failed"),
    ],
)
def test_an_unknown_spec_gets_a_hint(folder: Path, spec: str, message: str) -> None:
    (folder / "rewards" / "broken.py").write_text("x = 1\nimport no_such_thing\n")
    (folder / "rewards" / "syntax.py").write_text("def f(:\n")
    with pytest.raises(UserError) as caught:
        load_reward(spec)
    assert message in str(caught.value)


def test_an_unknown_name_lists_the_forms_and_the_shipped_names() -> None:
    with pytest.raises(UserError) as caught:
        resolve("nothing_like_it")
    assert all(name in str(caught.value) for name in shipped_names())
    assert "package.module:function" in str(caught.value)


def test_entry_points_count_only_where_nothing_is_shipped(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [
        EntryPoint(name, value, "llmrl.rewards") for name, value in (("root", "math:sqrt"), ("math_answer", "math:exp"))
    ]

    def entry_points(group: str, name: str | None = None) -> list[EntryPoint]:
        return [entry for entry in entries if name in (None, entry.name)]

    monkeypatch.setattr(spec_module, "entry_points", entry_points)
    assert resolve("root") is math.sqrt
    assert resolve("math_answer") is not math.exp
    entries.append(EntryPoint("root", "math:cos", "llmrl.rewards"))
    with pytest.raises(UserError, match="more than one installed package"):
        resolve("root")


def test_parentheses_call_a_factory_or_class_with_args() -> None:
    reward = load_reward(
        "trl.rewards:get_soft_overlong_punishment()", {"max_completion_len": 100, "soft_punish_cache": 20}
    )
    assert (reward.kind, reward.args) == ("trl", {})
    assert reward.function(completion_ids=[[1] * 90]) == [-0.5]
    with pytest.raises(UserError, match="soft_punish_cache"):
        load_reward("trl.rewards:get_soft_overlong_punishment()", {"max_completion_len": 100})


# --- arguments --------------------------------------------------------------------------------------------------------


def call(function: Any, given: Rollout, args: dict[str, Any] | None = None) -> Any:
    reward = load_reward(function, args)
    return reward.function(**reward.arguments(given))


def test_arguments_are_filled_by_name() -> None:
    given = rollout("hello", "gold", level=3)

    def f(completion: str, messages: Any, rollout: Any, task: Any, answer: Any, level: int, prompt: str) -> bool:
        assert (completion, answer, level, prompt) == ("hello", "gold", 3, "a question")
        assert messages == [{"role": "user", "content": "a question"}, {"role": "assistant", "content": "hello"}]
        return rollout is given and task is given.task

    assert call(f, given) is True


def test_a_column_named_prompt_or_answer_is_found() -> None:
    assert call(lambda prompt: prompt, rollout(prompt="the column")) == "the column"
    assert call(lambda answer=None: answer, rollout(answer=None)) is None
    with pytest.raises(UserError, match="'answer' cannot be filled"):
        call(lambda answer: answer, rollout(answer=None))
    assert call(lambda answer: answer, rollout(answer="the task's", solution="x")) == "the task's"


def test_columns_override_defaults_and_fixed_args_override_columns() -> None:
    def f(completion: str, level: int = 0, other: int = 7) -> tuple[int, int]:
        return level, other

    assert call(f, rollout()) == (0, 7)
    assert call(f, rollout(level=1)) == (1, 7)
    assert call(f, rollout(level=1), {"level": 2}) == (2, 7)


def test_double_star_receives_the_rest_of_the_row() -> None:
    assert call(lambda completion, **rest: rest, rollout("c", "a", level=1, other=2), {"fixed": 3}) == {
        "level": 1,
        "other": 2,
        "prompt": "a question",
        "answer": "a",
        "fixed": 3,
    }


def test_the_error_names_a_parameter_that_cannot_be_filled() -> None:
    with pytest.raises(UserError, match=r"parameter 'levle' cannot be filled.*Did you mean 'level'"):
        call(lambda levle: 1, rollout(level=1))


def test_the_error_names_an_unknown_key_in_args() -> None:
    with pytest.raises(UserError, match=r"`args` has 'levle'.*completion, level"):
        load_reward(lambda completion, level: 1, {"levle": 1})


# --- kinds and names --------------------------------------------------------------------------------------------------


class Judge:
    def __init__(self, bonus: float = 0.0) -> None:
        self.bonus = bonus

    async def __call__(self, completion: str) -> float:
        await asyncio.sleep(0)
        return len(completion) + self.bonus


class Diversity:
    def score_group(self, rollouts: list[Rollout], scale: float = 1.0) -> list[float]:
        return [scale] * len(rollouts)


def plain(completion: str, scale: float = 1.0) -> float:
    return scale


def trl(prompts: Any, completions: Any, **columns: Any) -> list[float]:
    return []


def only_columns(**columns: Any) -> list[float]:
    return []


@pytest.mark.parametrize(
    ("function", "kind", "name"),
    [
        (plain, "rollout", "plain"),
        (functools.partial(plain, scale=2), "rollout", "plain"),
        (lambda completion: 1, "rollout", "lambda"),
        (Judge(), "rollout", "Judge"),
        (trl, "trl", "trl"),
        (functools.partial(trl, extra=1), "trl", "trl"),
        (only_columns, "rollout", "only_columns"),
        (trl_style(lambda **columns: []), "trl", "lambda"),
        (Diversity(), "group", "Diversity"),
        (group_reward(lambda rollouts: []), "group", "lambda"),
    ],
)
def test_kind_and_name_come_from_what_is_declared(function: Any, kind: str, name: str) -> None:
    reward = load_reward(function)
    assert (reward.kind, reward.name) == (kind, name)


def test_pool_marks_a_module_whose_functions_run_in_workers(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(
        "POOL = True\ndef slow(completion): return 1\ndef group(completions): return [1]\n"
    )
    reward = load_reward(f"{tmp_path}/slow.py")
    assert reward.spec == f"{tmp_path}/slow.py:slow" or reward.spec == f"{tmp_path}/slow.py"
    assert load_reward(reward.function).spec is not None
    assert load_reward(plain).spec is None
    with pytest.raises(UserError, match="per-rollout"):
        load_reward(f"{tmp_path}/slow.py:group")
    with pytest.raises(UserError, match="only by its spec"):
        load_reward(functools.partial(reward.function))


# --- return values ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "reward"),
    [
        (1, 1.0),
        (True, 1.0),
        (0.5, 0.5),
        (None, None),
        (Score(reward=2), 2.0),
        (np.float32(0.5), 0.5),
        (np.bool_(True), 1.0),
    ],
)
def test_numbers_bools_none_and_scores_are_scores(value: Any, reward: float | None) -> None:
    score = as_score(value, "f")
    assert score.reward == reward
    assert score.reward is None or type(score.reward) is float


WRONG_TYPES: list[Any] = ["1.0", [1.0], {"reward": 1}, object(), Score(reward="1"), np.array([1.0])]  # type: ignore[arg-type]
WRONG_INSIDE: list[Any] = [{"parts": {"a": "1"}}, {"token_rewards": ["1"]}, {"token_rewards": [None]}]
INFINITE: list[Any] = [math.nan, math.inf, -math.inf, Score(reward=math.nan), np.float64("nan"), 10**400]
INFINITE_INSIDE: list[Any] = [{"parts": {"a": math.nan}}, {"token_rewards": [0.0, math.inf]}]


@pytest.mark.parametrize("value", [*WRONG_TYPES, *(Score(reward=1, **inside) for inside in WRONG_INSIDE)])
def test_other_types_are_type_errors(value: Any) -> None:
    with pytest.raises(RewardTypeError, match="reward f returned"):
        as_score(value, "f")


@pytest.mark.parametrize("value", [*INFINITE, *(Score(reward=1, **inside) for inside in INFINITE_INSIDE)])
def test_numbers_that_are_not_finite_are_errors(value: Any) -> None:
    with pytest.raises(ValueError, match="finite"):
        as_score(value, "f")


def test_parts_and_token_rewards_become_plain_numbers() -> None:
    score = as_score(Score(reward=1, parts={"a": np.float32(0.5), "b": None}, token_rewards=[1, True]), "f")
    assert (score.parts, score.token_rewards) == ({"a": 0.5, "b": None}, [1.0, 1.0])
    assert type(score.parts["a"]) is float


def test_a_score_that_a_reward_keeps_is_not_changed() -> None:
    kept = Score(reward=1)
    as_score(kept, "f").info["x"] = 1
    assert type(kept.reward) is int
