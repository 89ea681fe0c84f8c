"""Several sources, streams, objects in memory, and the cache of a long check."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy
import pandas
import pytest
from datasets import Dataset, DatasetDict, IterableDataset

from llmrl import Trainer
from llmrl.config import check, from_dotted
from llmrl.data import checks
from llmrl.data.chat import Chat
from llmrl.data.checks import Checks
from llmrl.data.mixture import MixtureSampler, make_sampler
from llmrl.data.options import DataConfig, SourceConfig
from llmrl.data.prompts import PromptCheck
from llmrl.data.report import RowReport
from llmrl.data.sampler import STREAM_BLOCK, TaskSampler
from llmrl.data.tasks import load_tasks, tasks_from_rows
from llmrl.errors import UserError
from llmrl.run.data import dry_run
from llmrl.tiny import byte_tokenizer
from llmrl.types import ModelLimits, Task
from llmrl.verify.rubric import Part, Rubric

ROWS = [{"question": f"q{i}", "answer": f"a{i}"} for i in range(7)]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def write(file: Path, rows: list[dict[str, Any]]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


# --- mixtures ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def mixture(tmp_path: Path) -> DataConfig:
    sums = [{"question": f"{i}+{i}?", "answer": str(i + i)} for i in range(40)]
    facts = [{"q": f"fact {i}?", "gold": f"g{i}"} for i in range(9)]
    return DataConfig(
        sources=[
            SourceConfig(path=write(tmp_path / "sums.jsonl", sums), weight=3.0),
            SourceConfig(
                path=write(tmp_path / "facts.jsonl", facts), name="qa", prompt_column="q", answer_column="gold"
            ),
        ]
    )


def sampler_of(config: DataConfig, seed: int = 0) -> Any:
    return make_sampler(load_tasks(config), config.sources, seed=seed, shuffle=True, streams=False)


def test_every_batch_has_its_share_of_each_source(mixture: DataConfig) -> None:
    sampler = sampler_of(mixture)
    assert isinstance(sampler, MixtureSampler)
    drawn: Counter[str] = Counter()
    for step in range(1, 40):
        batch = sampler.next(6)
        assert len({task.id for task in batch}) == 6
        drawn.update(task.source for task in batch)
        assert abs(drawn["qa"] - 6 * step / 4) < 1 and drawn["sums"] + drawn["qa"] == sampler.position == 6 * step
    assert set(drawn) == {"sums", "qa"}


def test_a_mixture_resumes_where_it_was(mixture: DataConfig) -> None:
    first, again = sampler_of(mixture), sampler_of(mixture)
    for _ in range(5):
        first.next(5)
    again.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert [first.next(5) for _ in range(9)] == [again.next(5) for _ in range(9)]
    changed = DataConfig(sources=[mixture.sources[0], SourceConfig(**vars(mixture.sources[1]) | {"weight": 2.0})])
    with pytest.raises(UserError, match="data.sources had the shares"):
        sampler_of(changed).load_state_dict(first.state_dict())


def test_sources_that_cannot_be_mixed_are_refused(mixture: DataConfig) -> None:
    with pytest.raises(UserError, match=r"data.sources qa: it has 9 tasks, and up to 11 of the 40"):
        sampler_of(mixture).check(40)
    twice = DataConfig(sources=[mixture.sources[0], mixture.sources[0]])
    with pytest.raises(UserError, match="give each source a `name` of its own"):
        sampler_of(twice)
    with pytest.raises(UserError) as caught:
        check(from_dotted({"data.path": "x", "data.sources": [{"path": "y"}, {}], "data.limit": 3}))
    for text in ("data.path x and data.sources both", r"data.sources[1].path is not set", "data.limit is set beside"):
        assert text in str(caught.value)


def test_rewards_score_their_sources(mixture: DataConfig) -> None:
    rubric = Rubric([Part(fn=lambda completion: 1.0, sources=["qa"]), Part(fn=lambda answer: 2.0, sources=["sums"])])
    assert rubric.accuracy_name is None, "no single reward tells right from wrong"
    by_source = {task.source: [reward.name for reward in rubric.of(task)] for task in load_tasks(mixture)}
    assert by_source == {"sums": ["lambda_2"], "qa": ["lambda"]}
    with pytest.raises(UserError, match=r"no task comes from its source 'qa'\. Did you mean 'q'\? Sources: q"):
        rubric.check_sources({"q"})
    (alone,) = tasks_from_rows([{"question": "x", "data_source": "other"}], DataConfig(), "t")
    assert rubric.findings(alone) == [
        "no reward with a weight scores tasks of the source 'other': see `sources` of the rewards"
    ]


def test_a_run_on_two_sources(mixture: DataConfig, tmp_path: Path) -> None:
    def short(completion: str) -> float:
        return -float(len(completion))

    def ascii_only(completion: str) -> float:
        return float(completion.isascii())

    options = {
        "data.sources": [vars(source) for source in mixture.sources],
        "train.output_dir": str(tmp_path / "run"),
        "train.max_steps": 2,
        "train.save_steps": 0,
        "rollout.num_prompts": 4,
        "rollout.num_generations": 2,
        "rollout.max_completion_length": 4,
        "track.console": "quiet",
    }
    rewards = [Part(fn=short, sources=["sums"]), Part(fn=ascii_only, sources=["qa"])]
    metrics = Trainer(options, model="tiny:qwen2", reward=rewards).train()
    assert metrics["reward/short/mean"] < 0 <= metrics["reward/ascii_only/mean"]
    assert metrics["source/qa/reward"] == metrics["reward/ascii_only/mean"]
    assert metrics["source/sums/reward"] == metrics["reward/short/mean"]
    rows = [json.loads(line) for line in (tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()]
    assert {frozenset(row["parts"]) for row in rows} == {frozenset({"short"}), frozenset({"ascii_only"})}


# --- streams ----------------------------------------------------------------------------------------------------------


def forever() -> Any:
    return ({"question": f"q{i}", "answer": "a"} for i in itertools.count())


def test_endless_rows_are_read_as_far_as_a_run_needs(tmp_path: Path) -> None:
    options = {
        "train.output_dir": str(tmp_path / "run"),
        "train.max_steps": 3,
        "rollout.num_prompts": 2,
        "rollout.num_generations": 2,
        "rollout.max_completion_length": 4,
        "track.console": "quiet",
    }
    dataset = IterableDataset.from_generator(forever)
    trainer = Trainer(options, model="tiny:qwen2", reward=lambda completion: len(completion), train_dataset=dataset)
    assert len(trainer.tasks) == STREAM_BLOCK


def test_a_generator_in_a_file_streams_too(tmp_path: Path) -> None:
    file = tmp_path / "made.py"
    file.write_text(
        "import itertools\ndef rows(split):\n    yield from ({'text': f'{i}'} for i in itertools.count())\n"
    )
    report = RowReport()
    assert len(load_tasks(DataConfig(path=str(file)), report, needed=11)) == 11
    assert report.streams
    assert len(load_tasks(DataConfig(path=str(file), limit=5), report)) == 5
    plain = write(tmp_path / "rows.jsonl", ROWS)
    assert len(load_tasks(DataConfig(path=plain, stream=True), needed=3)) == 3
    assert len(load_tasks(DataConfig(path=plain), needed=3)) == 7


def test_rows_without_an_end_that_all_are_needed_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmrl.data.rows.MAX_ROWS_WITHOUT_LENGTH", 50)
    with pytest.raises(UserError, match="mine: 50 rows and no end; set a limit"):
        tasks_from_rows(forever(), DataConfig(), "mine")
    assert len(tasks_from_rows(iter(ROWS), DataConfig(), "mine")) == 7


def test_a_longer_run_continues_a_stream_exactly() -> None:
    def tasks(count: int) -> list[Task]:
        return [Task(id=str(i), messages=[]) for i in range(count)]

    short = TaskSampler(tasks(STREAM_BLOCK), seed=1, streams=True)
    longer = TaskSampler(tasks(3 * STREAM_BLOCK), seed=1, streams=True)
    expected = [longer.next(100) for _ in range(20)]
    assert [short.next(100) for _ in range(10)] == expected[:10]
    resumed = TaskSampler(tasks(3 * STREAM_BLOCK), seed=1, streams=True)
    resumed.load_state_dict(json.loads(json.dumps(short.state_dict())))
    assert [resumed.next(100) for _ in range(10)] == expected[10:]
    other = TaskSampler([Task(id=f"x{i}", messages=[]) for i in range(2 * STREAM_BLOCK)], seed=1, streams=True)
    with pytest.raises(UserError, match="fingerprint was"):
        other.load_state_dict(short.state_dict())
    fixed = TaskSampler(tasks(2 * STREAM_BLOCK), seed=1)
    with pytest.raises(UserError, match="num_tasks was 1024 and is 2048"):
        fixed.load_state_dict(short.state_dict())


# --- objects in memory ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        ROWS,
        Dataset.from_list(ROWS),
        DatasetDict(train=Dataset.from_list(ROWS), test=Dataset.from_list(ROWS[:1])),
        IterableDataset.from_generator(lambda: iter(ROWS)),
        pandas.DataFrame(ROWS),
        {"question": [row["question"] for row in ROWS], "answer": numpy.array([row["answer"] for row in ROWS])},
        (row for row in ROWS),
        [{"question": (user(f"q{i}"),), "answer": f"a{i}"} for i in range(7)],
        [{"question": numpy.array([user(f"q{i}")], dtype=object), "answer": numpy.str_(f"a{i}")} for i in range(7)],
    ],
    ids=["list", "Dataset", "DatasetDict", "IterableDataset", "DataFrame", "columns", "generator", "tuples", "arrays"],
)
def test_rows_come_in_any_form(data: Any) -> None:
    tasks = tasks_from_rows(data, DataConfig(), "mine")
    assert [(task.messages[0]["content"], task.answer) for task in tasks] == [(f"q{i}", f"a{i}") for i in range(7)]


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (DatasetDict(a=Dataset.from_list(ROWS), b=Dataset.from_list(ROWS)), r"the splits 'a', 'b': give one of them"),
        ({"question": ["a", "b"], "answer": ["c"]}, "lists of one length"),
        ({"question": "a"}, "lists of one length"),
        ("rows.jsonl", "a str holds no rows"),
        (5, "a int holds no rows"),
    ],
)
def test_what_holds_no_rows_is_refused(data: Any, text: str) -> None:
    with pytest.raises(UserError, match=text):
        tasks_from_rows(data, DataConfig(), "mine")


def test_no_split_is_guessed_for_an_evaluation(tmp_path: Path) -> None:
    splits = DatasetDict(train=Dataset.from_list(ROWS), test=Dataset.from_list(ROWS[:1]))
    options = {"train.output_dir": str(tmp_path / "run"), "eval.steps": 1, "rollout.num_prompts": 2}

    def run(eval_dataset: Any) -> Trainer:
        return Trainer(
            options, model="tiny:qwen2", reward=lambda answer: 1.0, train_dataset=splits, eval_dataset=eval_dataset
        )

    with pytest.raises(UserError, match=r"eval_dataset has the splits 'train', 'test': .*datasets\['test'\]"):
        run(splits)
    assert len(run(splits["test"]).eval_tasks) == 1
    with pytest.raises(UserError, match="all rewards have weight 0"):
        check(from_dotted({"model.path": "m", "data.path": "d", "rewards": [{"fn": "length", "weight": 0}]}))


# --- the cache, the dry run -------------------------------------------------------------------------------------------


def test_a_second_check_reads_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMRL_CACHE", str(tmp_path))
    monkeypatch.setattr(checks, "WORTH_CACHING_S", 0.0)
    rows = [{"question": f"q{i}", "answer": None if i == 3 else str(i)} for i in range(checks.CHUNK + 1)]
    asked: list[str] = []

    def columns(task: Task) -> list[str]:
        asked.append(task.id)
        return ["no answer"] if task.answer is None else []

    def run(*, fingerprint: str | None = "v1", template: str | None = None) -> tuple[int, list[int]]:
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = template or tokenizer.chat_template
        tasks = [Task(id=row["question"], messages=[{"role": "user", "content": row["question"]}], answer=row["answer"])
                 for row in rows]  # fmt: skip
        prompts = PromptCheck(Chat(tokenizer), ModelLimits(context=99), max_completion_length=1)
        report = RowReport(num_rows=len(tasks))
        kept = Checks(prompts=prompts, columns=columns, fingerprint=fingerprint).run(tasks, report)
        assert [finding.reason for finding in report.found] == ["no answer"]
        before, count = len(asked), len(kept)
        asked.clear()
        return before, [count, kept[0][1].length]

    first = run()
    assert first[0] == len(rows)
    assert run() == (0, first[1]), "nothing is looked at again"
    assert run(fingerprint="v2")[0] == len(rows), "other rewards"
    assert run(fingerprint=None)[0] == run(fingerprint=None)[0] == len(rows), "rewards without a file"
    assert run(template="{% for m in messages %}{{ m['content'] }}<|eos|>{% endfor %}")[0] == len(rows)
    rows[5]["question"] = "another"
    assert run()[0] == len(rows)
    for file in (tmp_path / "rows").iterdir():
        file.write_text("{")
    assert run()[0] == len(rows), "a broken cache is made again"


def test_a_dry_run_shows_the_first_row_and_loads_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("llmrl.model.load.load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    common = {"model.path": "tiny:qwen2", "rollout.num_prompts": 2, "data.path": write(tmp_path / "rows.jsonl", ROWS)}
    shown = dry_run(from_dotted(common | {"rewards": [{"fn": "math_answer"}]}))
    assert "7 rows to train on, 0 to evaluate on" in shown
    assert "<|im_start|>user\nq0<|eos|>\n<|im_start|>assistant" in shown
    pairs = [{"prompt": "Sky?", "chosen": f" blue {i}", "rejected": " red"} for i in range(3)]
    common["data.path"] = write(tmp_path / "pairs.jsonl", pairs)
    shown = dry_run(from_dotted(common | {"algo.name": "dpo"}))
    assert "[prompt]\nSky?\n[chosen]\n blue 0<|eos|>\n[rejected]\n red<|eos|>" in shown
    assert sorted(file.name for file in tmp_path.iterdir()) == ["pairs.jsonl", "rows.jsonl"]
