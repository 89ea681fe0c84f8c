"""Rewards handed over in Python act as those named by file, and are recorded as they are."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmrl import Trainer
from llmrl.config import Config, RewardConfig, VerifyConfig
from llmrl.errors import UserError
from llmrl.run.given import Given, resolve_config
from llmrl.verify.rubric import Part, Rubric

ROWS = [{"prompt": f"Count to {i}", "answer": str(i)} for i in range(8)]
NEEDED = {"model.path": "tiny:qwen2", "data.path": "rows.jsonl"}


def settings(folder: Path, **more: Any) -> dict[str, Any]:
    return {
        "train.output_dir": str(folder),
        "train.max_steps": 1,
        "rollout.num_prompts": 2,
        "rollout.num_generations": 4,
        "rollout.max_completion_length": 12,
        "track.console": "quiet",
        **{key.replace("__", "."): value for key, value in more.items()},
    }


def text_length(completions: list[Any], **_: Any) -> list[float]:
    """A function in TRL's form, which sees strings (length in characters) or lists of one message (length 1)."""
    return [float(len(completion)) for completion in completions]


def letters(completion: str) -> float:
    return sum(character.isalpha() for character in completion) / 16


class Longest:
    """A reward of groups that is an object."""

    def score_group(self, rollouts: list[Any]) -> list[float]:
        most = max(len(rollout.completion) for rollout in rollouts)
        return [float(len(rollout.completion) == most) for rollout in rollouts]


def resolve(args: Any = None, **given: Any) -> Config:
    config = resolve_config({**NEEDED, **args} if isinstance(args, dict) else args, Given(**given)).config
    assert isinstance(config, Config)
    return config


@pytest.mark.slow
@pytest.mark.parametrize(("prompt_format", "as_messages"), [("text", False), ("chat", True)])
def test_a_trl_function_gets_the_same_by_name_and_as_an_object(
    prompt_format: str, as_messages: bool, tmp_path: Path
) -> None:
    file = tmp_path / "length_trl.py"
    file.write_text("def text_length(completions, **kwargs):\n    return [float(len(c)) for c in completions]\n")
    found = []
    for k, reward in enumerate([text_length, f"{file}:text_length", Rubric([text_length])]):
        options = settings(tmp_path / str(k), data__prompt_format=prompt_format)
        run = Trainer(options, model="tiny:qwen2", reward=reward, train_dataset=ROWS)
        found.append(run.train()["reward/mean"])
    assert found[0] == found[1] == found[2]
    assert (found[0] == 1.0) == as_messages


def test_options_of_the_pool_hold_for_rewards_given_in_python(tmp_path: Path) -> None:
    options = settings(tmp_path / "run", verify__num_workers=3, verify__memory_limit_gb=2.5)
    run = Trainer(options, model="tiny:qwen2", reward=[letters, "format_tags"], train_dataset=ROWS)
    pool = run.source.rubric.pool  # pyright: ignore[reportAttributeAccessIssue]
    assert (pool.num_workers, pool.memory_limit_bytes) == (3, int(2.5 * 2**30))


def test_parts_are_recorded_as_they_are(tmp_path: Path) -> None:
    reward = [
        RewardConfig(fn="math_answer"),
        Part(fn=letters, weight=0.2, gate="math_answer", scale=(0.0, 2.0), time_limit_s=7.0),
        functools.partial(letters),
    ]
    Trainer(settings(tmp_path / "run"), model="tiny:qwen2", reward=reward, train_dataset=ROWS).train()
    recorded = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["rewards"]
    assert [row["fn"] for row in recorded] == ["math_answer", "letters", "letters"]
    assert [row["weight"] for row in recorded] == [1.0, 0.2, 1.0]
    assert recorded[1]["gate"] == "math_answer" and recorded[1]["scale"] == [0.0, 2.0]
    assert recorded[1]["time_limit_s"] == 7.0


def test_a_rubric_brings_its_parts_and_its_workers() -> None:
    rubric = Rubric([Part(fn=letters, weight=0.5), "format_tags"], num_workers=2)
    config = resolve({}, reward=rubric)
    assert [(part.name, part.weight) for part in config.rewards] == [("letters", 0.5), ("format_tags", 1.0)]
    assert config.verify == VerifyConfig(num_workers=2)
    assert resolve({"verify.num_workers": 3}, reward=Rubric([letters])).verify.num_workers == 3
    with pytest.raises(UserError, match=r"a Rubric with num_workers 2, but verify.num_workers is 3: choose one"):
        resolve({"verify.num_workers": 3}, reward=rubric)
    with pytest.raises(UserError, match=r"strict=True or conversational=False"):
        resolve({}, reward=Rubric([letters], conversational=False))

    class Mine(Rubric):
        pass

    with pytest.raises(UserError, match="a Mine, a subclass of Rubric"):
        resolve({}, reward=Mine([letters]))


def test_an_object_that_scores_groups_is_a_reward(tmp_path: Path) -> None:
    run = Trainer(settings(tmp_path / "run"), model="tiny:qwen2", reward=Longest(), train_dataset=ROWS)
    assert 0 < run.train()["reward/mean"] <= 1


def test_what_is_no_reward_is_refused_with_the_forms_there_are() -> None:
    for wrong in (5, [letters, 5.0], {"fn": letters}):
        with pytest.raises(UserError, match=r"give a function, a spec .* RewardConfig"):
            resolve({}, reward=wrong)
    with pytest.raises(UserError, match=r"reward is the class Longest: give an object of it, Longest\(...\)"):
        resolve({}, reward=[Longest])


def test_a_name_of_a_model_is_a_reward_model_as_in_trl(tmp_path: Path) -> None:
    for name in ("someone/reward-model", str(tmp_path)):
        (part,) = resolve({}, reward=name).rewards
        assert part == RewardConfig(fn="reward_model", args={"model": name})
    (part,) = resolve({}, reward="rewards/math_answer.py:math_answer").rewards
    assert part == RewardConfig(fn="rewards/math_answer.py:math_answer")


def test_functions_in_a_configuration_survive_another_algorithm() -> None:
    config = resolve({"rewards": [{"fn": letters, "weight": 0.5}]})
    assert config.rewards[0].fn is letters
    other = resolve(config, algorithm="dapo")
    assert other.algo.name == "dapo" and other.rewards == config.rewards


def test_arguments_that_yaml_cannot_hold_do_not_stop_the_record(tmp_path: Path) -> None:
    def scaled(completion: str, table: object, factor: float) -> float:
        return letters(completion) * factor

    part = RewardConfig(fn=scaled, args={"table": object(), "factor": 2.0})
    Trainer(settings(tmp_path / "run"), model="tiny:qwen2", reward=part, train_dataset=ROWS).train()
    recorded = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["rewards"]
    assert recorded[0]["args"] == {"table": "(given in Python)", "factor": 2.0}
