"""`llmrl eval`: its numbers by hand, the same samples as the trainer's own evaluation, and what it refuses."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from llmrl import Trainer
from llmrl.cli import run
from llmrl.config import DataConfig
from llmrl.data.tasks import load_tasks
from llmrl.run.evaluation import evaluate, read_arguments, sample_row
from llmrl.track.files import read_jsonl
from llmrl.track.metrics import majority, majority_rates
from llmrl.track.ranking import mean_logprob_scores, order, ranking_rates
from llmrl.types import Rollout, RolloutGroup, Score, Task, Turn

pytestmark = pytest.mark.slow

ROWS = [{"prompt": f"Count to {i}", "answer": str(i), "tests": ["x"]} for i in range(6)]
REWARD = "rewards/length.py:length"
HERE = Path(__file__).resolve()


def digits(completion: str) -> float:
    """A reward for a random model: is there a digit in what it says?"""
    return float(any(character.isdigit() for character in completion))


SPEC = f"{HERE}:digits"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return file


def arguments(data: Path, *more: str) -> list[str]:
    return [
        *("--model", "tiny:qwen2", "--data", str(data), "--reward", SPEC, "--samples", "4"),
        *("--rollout.max_completion_length", "8", *more),
    ]


def group(*samples: tuple[str | None, float | None], logprobs: list[float] | None = None) -> RolloutGroup:
    """Samples given as (extracted answer, reward)."""
    task = Task(id="t", messages=[])
    rollouts = [
        Rollout(
            task=task,
            index=i,
            score=Score(reward=right, parts={"acc": right}, info={"acc": {"extracted": answer}}),
            turns=[
                Turn(
                    prompt_ids=[1],
                    completion_ids=[2, 3],
                    rollout_logprobs=[(logprobs or [0.0] * len(samples))[i], 0.0],
                    finish="stop",
                    policy_version=(0, 0),
                    message={"role": "assistant", "content": str(answer)},
                )
            ],
        )
        for i, (answer, right) in enumerate(samples)
    ]
    return RolloutGroup(task=task, rollouts=rollouts)


def test_majority_by_hand() -> None:
    assert majority([("4", True), ("5", False), ("4", True), (None, False)]) == 1
    assert majority([("4", True), ("5", False)]) == 0.5  # a tie is shared
    assert majority([("5", False), ("5", False), ("4", True)]) == 0
    assert majority([(None, False)]) == 0  # nobody voted


def test_majority_of_subsets_is_close_to_its_expectation() -> None:
    # Of 3 samples 2 are right and alike: every pair has at least one right; a mixed pair (2 of 3 of them) is a tie.
    votes = group(("4", 1.0), ("4", 1.0), ("5", 0.0))
    rates = majority_rates([votes], accuracy="acc", ks=[1, 2, 3, 4], draws=3000)
    assert rates.keys() == {"reward/maj@2", "reward/maj@3"}
    assert rates["reward/maj@3"] == 1
    assert rates["reward/maj@2"] == pytest.approx(1 / 3 + 2 / 3 * 0.5, abs=0.03)
    assert majority_rates([group((None, 1.0), (None, 0.0))], accuracy="acc", ks=[2]) == {}


def test_ranking_rates_by_hand() -> None:
    groups = [
        group(("a", 0.0), ("b", 1.0), ("c", 1.0), ("d", None)),  # the first by score is right
        group(("a", 0.0), ("b", 0.0), ("c", 1.0)),  # the first is wrong, the second right
        group(("a", 0.0), ("b", 0.0)),  # nothing is right
    ]
    scores = [[0.0, 2.0, 1.0, 9.0], [3.0, 1.0, 2.0], [0.0, 0.0]]
    rates = ranking_rates(groups, scores, accuracy="acc")
    assert rates["ranked"] == pytest.approx(1 / 3)
    assert rates["ranked@2"] == pytest.approx(2 / 3)
    assert rates["random"] == pytest.approx((2 / 3 + 1 / 3 + 0) / 3)
    assert rates["oracle"] == pytest.approx(2 / 3)


def test_equal_scores_are_ordered_by_likelihood() -> None:
    assert order([1.0, 1.0, 2.0], ties=[-3.0, -1.0, -9.0]) == [2, 1, 0]
    assert mean_logprob_scores([group(("a", 1.0), ("b", 0.0), logprobs=[-2.0, -1.0])]) == [[-1.0, -0.5]]


def test_the_command_writes_numbers_and_samples(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    output, samples = tmp_path / "numbers.json", tmp_path / "samples.jsonl"
    more = ("--output", str(output), "--save_samples", str(samples), "--rerank", "logprob", "--seed", "3")
    assert run(["eval", *arguments(data, *more)]) == 0
    report, rows = json.loads(output.read_text()), read_jsonl(samples)
    assert "pass@4" in capsys.readouterr().out
    assert report["num_tasks"] == len(rows) == len(ROWS)
    rewards = [[sample["reward"] for sample in row["samples"]] for row in rows]
    assert report["mean@4"] == pytest.approx(sum(map(sum, rewards)) / 24) == report["rerank"]["random"]
    assert report["pass@4"] == pytest.approx(sum(map(max, rewards)) / 6) == report["rerank"]["oracle"]
    assert 0 < report["mean@4"] < 1, "a random model says a digit sometimes"
    assert not any(key.startswith("maj@") for key in report), "this reward reports no answers"
    again = load_tasks(DataConfig(path=str(samples)))
    assert [t.messages[0]["content"] for t in again] == [row["prompt"] for row in ROWS]
    assert again[0].meta["tests"] == ["x"] and again[1].answer == "1" and len(again[0].meta["samples"]) == 4


def test_numbers_to_standard_output_and_seeds(data: Path, capsys: pytest.CaptureFixture) -> None:
    found = []
    for seed in ("1", "1", "2"):
        assert run(["eval", *arguments(data, "--output", "-", "--seed", seed)]) == 0
        report = json.loads(capsys.readouterr().out)
        found.append({k: v for k, v in report.items() if k not in ("seconds", "seed")})
    assert found[0] == found[1] != found[2]


def test_the_samples_are_those_of_the_trainer(data: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "train.output_dir": str(tmp_path / "run"),
        "rollout.max_completion_length": 8,
        "rollout.num_prompts": 2,
        "track.console": "quiet",
    }
    trainer = Trainer(settings, model="tiny:qwen2", reward=SPEC, train_dataset=str(data))

    async def trained() -> list[RolloutGroup]:
        async with trainer:
            return (await trainer.evaluate(load_tasks(trainer.config.data), num_generations=4, temperature=1.0))[1]

    saved = tmp_path / "samples.jsonl"
    asyncio.run(evaluate(read_arguments(arguments(data, "--save_samples", str(saved)))))
    expected = [[s["completion_ids"] for s in sample_row(group)["samples"]] for group in asyncio.run(trained())]
    assert [[s["completion_ids"] for s in row["samples"]] for row in read_jsonl(saved)] == expected


def test_adapters_are_evaluated_too(data: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    from llmrl.tiny import build_tiny_model, byte_tokenizer

    tokenizer = byte_tokenizer()
    build_tiny_model("qwen2", vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id).save_pretrained(base)
    tokenizer.save_pretrained(base)
    settings = {
        "train.output_dir": str(tmp_path / "run"),
        "train.max_steps": 2,
        "train.learning_rate": 1e-2,
        "model.lora": {"r": 4},
        "rollout.max_completion_length": 8,
        "rollout.num_prompts": 4,
        "rollout.num_generations": 4,
        "track.console": "quiet",
    }
    trainer = Trainer(settings, model=str(base), reward=digits, train_dataset=ROWS)
    trainer.train()
    probe = [[5, 6, 7, 8]]
    from llmrl.run.evaluation import Evaluator

    async def served() -> list[list[float]]:
        more = ["--model", str(tmp_path / "run" / "model")]
        async with Evaluator(read_arguments([*arguments(data), *more])) as evaluator:
            return await evaluator.collector.engine.logprobs(probe)

    assert asyncio.run(served())[0] == pytest.approx(trainer.policy.sequence_logprobs(probe)[0], abs=1e-4)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--samples", "0"], "--samples is 0"),
        (["--rollout.temperature", "0"], "all samples of a task are the same"),
        (["--ks", "[8]"], "between 1 and the 4 samples"),
        (["--rerank", "bcoder"], "--rerank_model RUN_DIR/model"),
        (["--rerank_model", "x"], "only read with --rerank bcoder"),
        (["--rerank_exact", "true"], "only read with --rerank bcoder"),
        (["--rollout.num_prompts", "3"], "rollout.num_prompts: there is no such option"),
        (["--rollout.top_p", "0"], "rollout.top_p"),
        (["--output", "/nowhere/at/all.json"], "there is no folder"),
        (["--train.max_steps", "3"], "train"),
        (["--reward", "rewards/nothing.py:nothing"], "no file"),
    ],
)
def test_what_it_refuses(data: Path, capsys: pytest.CaptureFixture, more: list[str], said: str) -> None:
    assert run(["eval", *arguments(data, *more)]) == 2
    assert said in capsys.readouterr().err


def test_a_reward_that_fails_is_no_score(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("def broken(completion):\n    raise ValueError('out of order')\n")
    argv = [a if a != SPEC else f"{broken}:broken" for a in arguments(data)]
    assert run(["eval", *argv]) == 1
    assert "out of order" in capsys.readouterr().err
