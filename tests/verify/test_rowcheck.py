"""Checks of rows: what a reward says about a dataset before the first step."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmrl.errors import UserError
from llmrl.types import Message, Rollout, RolloutGroup, Task
from llmrl.verify.judge.verdict import OfflineJudge
from llmrl.verify.reward import load_reward
from llmrl.verify.rows import row_to_rollout
from llmrl.verify.rubric import Part, Rubric


def task(prompt: str = "a question", answer: Any = None, **meta: Any) -> Task:
    return Task(id="t", messages=[{"role": "user", "content": prompt}], answer=answer, meta=meta)


def findings(spec: Any, found: Task, **args: Any) -> list[str]:
    return Rubric([Part(fn=spec, args=args)]).findings(found)


def write(folder: Path, text: str, name: str = "mine.py") -> str:
    (folder / name).write_text(text)
    return str(folder / name)


# --- declaring a check ------------------------------------------------------------------------------------------------


def test_a_check_gets_the_columns_the_prompt_the_answer_and_the_args(tmp_path: Path) -> None:
    spec = write(
        tmp_path,
        "def check(row): return str(sorted(row.items()))\ndef mine(completion, level, limit=1): return 1.0\n",
    )
    assert findings(spec, task(answer="4", level=3), limit=2) == [
        "reward mine: [('answer', '4'), ('level', 3), ('limit', 2), ('prompt', 'a question')]"
    ]
    assert findings(spec, task(answer="4", level=3, prompt="column"), level=9) == [
        "reward mine: [('answer', '4'), ('level', 9), ('prompt', 'column')]"
    ]


def test_checks_names_the_check_of_each_reward_of_a_file(tmp_path: Path) -> None:
    functions = "def one(completion): return 1\ndef two(completion): return 2\ndef three(completion): return 3\n"
    file = write(tmp_path, functions + "CHECKS = {'one': lambda row: 'bad', 'two': lambda row: None}\n")
    assert [findings(f"{file}:{name}", task()) for name in ("one", "two", "three")] == [["reward one: bad"], [], []]


def test_a_reward_named_by_its_file_has_both_names(tmp_path: Path) -> None:
    for key in ("whole", "score_group"):
        (tmp_path / key).mkdir()
        text = f"def score_group(rollouts): return []\nCHECKS = {{'{key}': lambda row: 'bad'}}\n"
        assert findings(write(tmp_path / key, text, "whole.py"), task()) == ["reward whole: bad"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("CHECKS = {'onne': lambda row: None}", "nothing of that name. Did you mean 'one'"),
        ("CHECKS = {'one': 3}", "must be an ordinary function `check\\(row\\)`"),
        ("async def slow(row): ...\nCHECKS = {'one': slow}", "must be an ordinary function"),
    ],
)
def test_wrong_checks_are_refused_when_the_reward_is_loaded(tmp_path: Path, line: str, message: str) -> None:
    file = write(tmp_path, f"def one(completion): return 1\n{line}\n")
    with pytest.raises(UserError, match=message):
        load_reward(f"{file}:one")


def test_objects_and_functions_carry_a_check_as_an_attribute(tmp_path: Path) -> None:
    text = (
        "class Counts:\n    def __init__(self, least): self.least = least\n"
        "    def __call__(self, completion): return 1.0\n"
        "    def check(self, row): return None if len(row['answer']) >= self.least else 'too short'\n"
        "def made(least):\n    def inner(completion): return 1.0\n"
        "    inner.check = Counts(least).check\n    return inner\n"
        "def check(row): return 'the module speaks'\n"
    )
    file = write(tmp_path, text)
    for name in ("Counts", "made"):
        assert findings(f"{file}:{name}()", task(answer="ab"), least=2) == []
        assert len(findings(f"{file}:{name}()", task(answer="a"), least=2)) == 1

    class Group:
        def score_group(self, rollouts: list[Any]) -> list[float]:
            return [1.0] * len(rollouts)

        def check(self, row: dict[str, Any]) -> str | None:
            return f"level {row['level']}"

    assert findings(Group(), task(level=7)) == ["reward Group: level 7"]


def test_a_helper_that_is_called_check_is_not_a_check_of_rows(tmp_path: Path) -> None:
    for helper in ("def check(answer, gold): return 'no'", "check = 3", "def check(text): return 'no'"):
        spec = write(tmp_path, f"{helper}\ndef mine(completion): return 1.0\n", f"{abs(hash(helper))}.py")
        assert findings(f"{spec}:mine", task()) == []
    spec = write(tmp_path, "def check(row): return 1.0 if row else None\n", "check.py")
    assert load_reward(spec).check is None, "the reward itself"


def test_trl_and_group_rewards_are_checked_too(tmp_path: Path) -> None:
    text = "def check(row): return f'level {row[\"level\"]}'\ndef {}: return [1.0]\n"
    for signature in ("trl(completions, level, **kwargs)", "score_group(rollouts, level)"):
        name = signature.partition("(")[0]
        spec = write(tmp_path, text.replace("{}", signature), f"{name}_file.py")
        assert findings(f"{spec}:{name}", task(level=2))[0].endswith("level 2")
        (missing,) = findings(f"{spec}:{name}", task())
        assert "its parameter 'level' cannot be filled" in missing, "the check is not asked about a row that lacks it"


# --- what comes out ---------------------------------------------------------------------------------------------------


def test_a_check_that_fails_is_a_finding() -> None:
    def mine(completion: str) -> float:
        return 1.0

    for check, text in (
        (lambda row: row["levle"], "reward mine: its check failed: KeyError: 'levle'"),
        (lambda row: True, "reward mine: its check returned True of type bool; it must return a text, or None"),
        (lambda row: "", None),
    ):
        mine.check = check  # type: ignore[attr-defined]
        assert findings(mine, task()) == ([] if text is None else [text])


def test_all_findings_of_all_rewards_and_the_first_as_an_error() -> None:
    def wants(completion: str, level: int) -> float:
        return 1.0

    rubric = Rubric([wants, "math_answer"])
    first, second = rubric.findings(task(answer="???"))
    assert first.startswith("reward wants: its parameter 'level' cannot be filled")
    assert second == (
        "reward math_answer: the answer '???' has no part that can be compared: no number, word or closed \\boxed{...}"
    )
    with pytest.raises(UserError) as raised:
        rubric.check(task(answer="???"))
    assert str(raised.value) == first
    rubric.require(task(answer="???", level=1))  # arguments alone
    assert rubric.findings(task(answer="7", level=1)) == []


# --- the shipped rewards ----------------------------------------------------------------------------------------------

JUDGE = OfflineJudge(lambda question, case: None)
BOX = {"bbox_2d": [0, 0, 9, 9], "label": "cat"}
PAIR = {"source": "Guten Tag", "source_language": "de", "target_language": "zh"}
GOOD: list[tuple[str, dict[str, Any], Any, dict[str, Any]]] = [
    ("math_answer", {}, "so 1 + 1 = 2\n#### 1,234", {}),
    ("math_answer", {}, 3.5, {}),
    ("math_answer", {}, ["", r"\frac{1}{2}"], {}),
    ("math_answer", {}, r"\operatorname{lcm}(2,3)", {}),
    ("math_answer", {}, "no solution", {}),
    ("unit_tests", {"test_list": ["assert f(1) == 2"]}, None, {}),
    ("unit_tests", {"test": "def check(c): assert c(1)", "entry_point": "f"}, None, {}),
    ("unit_tests", {"input_output": '{"inputs": ["1"], "outputs": ["1"]}'}, None, {}),
    ("qa_match", {"golden_answers": ["Paris"]}, None, {}),
    ("qa_match", {"reward_model": {"ground_truth": {"target": ["Paris"]}}}, None, {}),
    ("box_iou", {}, [0, 0, 9, 9], {}),
    ("box_iou", {"solution": [BOX]}, None, {"measure": "map"}),
    ("translation_compare", PAIR | {"exemplar": "x"}, None, {"judge": JUDGE}),
    ("translation_compare", PAIR, None, {"options": {"mode": "light"}}),
    ("citation_rubric", {"rubrics": ["<E0> is old."]}, "Basel", {"judge": "lexical"}),
    ("citation_rubric", {"label": "Basel"}, None, {"alpha": 0.0, "server_url": "http://x"}),
    ("judge", {}, "Canberra", {"judge": JUDGE}),
    ("judge", {"criteria": "short"}, None, {"judge": {"base_url": "http://x", "model": "m"}}),
    ("ircoco", {"evaluator": len}, "y = 1", {}),
]
BAD: list[tuple[str, dict[str, Any], Any, dict[str, Any], str]] = [
    ("math_answer", {}, None, {}, "its parameter 'answer' cannot be filled"),
    ("math_answer", {}, r"so \boxed{3", {}, "no number, word or closed"),
    ("math_answer", {}, r"\frac{1}{\unknown", {}, "cannot be read as a number, words or LaTeX"),
    ("math_answer", {}, True, {}, "the answer True has no part"),
    ("unit_tests", {"test_list": []}, None, {}, "the row has no tests"),
    ("unit_tests", {"test_list": ["assert f(1 == 2"]}, None, {}, "does not compile"),
    ("unit_tests", {"input_output": '{"inputs": ["1"'}, None, {}, "input_output: not JSON"),
    ("unit_tests", {"input_output": {"inputs": ["1", "2"], "outputs": ["1"]}}, None, {}, "2 inputs but 1 outputs"),
    ("unit_tests", {"checks": ["assert 1"]}, None, {}, "no tests in a known format"),
    ("unit_tests", {"test_list": ["assert f()"]}, None, {"outcome": "most"}, "outcome 'most' is unknown"),
    ("qa_match", {"golden_answers": [" "]}, None, {}, "no gold answer"),
    ("qa_match", {}, "Paris", {"normalizer": "squad"}, "normalizer 'squad' is unknown"),
    ("box_iou", {}, [9, 9, 0, 0], {}, "expected a box"),
    ("box_iou", {}, [0, 0, 9, 9], {"coordinates": "thousand"}, "image_size is None"),
    ("translation_compare", PAIR, None, {}, "mode compare needs the column `exemplar`"),
    ("translation_compare", PAIR | {"target_language": "xx"}, None, {"options": {"mode": "light"}}, "'xx' is unknown"),
    ("translation_compare", PAIR | {"source": None}, None, {}, "the column source is None; it must be a text"),
    ("citation_rubric", {"rubrics": ["<E0> is old."]}, None, {}, "no gold answer"),
    ("citation_rubric", {}, "Basel", {}, "the row has no rubrics"),
    ("citation_rubric", {"rubrics": "old"}, "Basel", {}, "must be a list of texts"),
    ("judge", {}, None, {}, "rows need `answer`"),
    ("judge", {}, "Canberra", {}, "this reward needs a judge"),
    ("judge", {}, "Canberra", {"judge": {"model": "m"}}, "missing keys ['base_url']"),
    ("citation_rubric", {"rubrics": ["<E0> is old."]}, "Basel", {}, "set args.judge"),
    ("translation_compare", PAIR | {"exemplar": "x"}, None, {}, "this reward needs a judge"),
    ("ircoco", {"evaluator": len}, "  ", {}, "it must be the text that completions are compared with"),
]


@pytest.mark.parametrize(("name", "meta", "answer", "args"), GOOD)
def test_good_rows_of_shipped_rewards(name: str, meta: dict[str, Any], answer: Any, args: dict[str, Any]) -> None:
    assert findings(name, task(answer=answer, **meta), **args) == []


@pytest.mark.parametrize(("name", "meta", "answer", "args", "text"), BAD)
def test_bad_rows_of_shipped_rewards(
    name: str, meta: dict[str, Any], answer: Any, args: dict[str, Any], text: str
) -> None:
    (found,) = findings(name, task(answer=answer, **meta), **args)
    assert found.startswith(f"reward {name}: ")
    assert text in found
    assert found.count(f"{name}: ") == 1
    assert "\n" not in found


def test_a_hundred_thousand_gsm8k_rows_parse_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmrl.verify.checks.math.parse", lambda answer: pytest.fail(f"parsed {answer}"))
    rubric = Rubric(["math_answer"])
    for answer in (
        r"\begin{pmatrix} -1 \\ 2 \end{pmatrix}",
        r"15\mbox{ cm}^2",
        "steps\n#### 1,200",
        "72",
        "-3.5",
        "1/2",
        "50%",
        "$4",
        r"\frac{3}{4}",
        r"\boxed{2\sqrt{3}}",
        "(1, 2)",
    ):
        assert rubric.findings(task(answer=answer)) == [], answer


# --- parameters that could mean a column or an object of ours ---------------------------------------------------------


def test_a_column_with_the_name_of_an_object_is_refused_or_annotated() -> None:
    def plain(completion: str, task: str) -> float:
        return 1.0

    def annotated(completion: str, task: Task, rollout: Rollout | None = None) -> float:
        return 1.0

    found = task(task="math", rollout=1)
    (text,) = findings(plain, found)
    assert text == (
        "reward plain: its parameter 'task' could mean the row's column 'task' or llmrl's own 'task' "
        "(docs/rewards.md). For llmrl's own, write `task: Task` (from llmrl.types). For the column, rename it in the "
        "data, or take `rollout: Rollout` and read rollout.task.meta['task']."
    )
    with pytest.raises(UserError, match="could mean"):
        Rubric([plain]).require(found)
    assert findings(plain, task()) == [], "no such column"
    assert findings(plain, found, task="fixed") == [], "the argument is fixed"
    assert findings(annotated, found) == []
    assert findings(lambda completions, task, **rest: [1.0], found) == [], "TRL functions get columns only"
    assert findings(lambda completion, **rest: 1.0, found) == []


def test_completion_and_messages_mean_the_policys() -> None:
    def plain(completion: str, messages: Any) -> float:
        return 1.0

    def annotated(completion: str, messages: list[Message]) -> float:
        return 1.0

    question = [{"role": "user", "content": "q"}]
    answered = [*question, {"role": "assistant", "content": "a"}]
    assert findings(plain, task(completion="reference", messages=question)) == []
    assert len(findings(plain, task(messages=answered))) == 1
    assert findings(plain, Task(id="t", messages=answered, meta={"messages": answered})) == [], "the prompt itself"
    assert findings(annotated, task(messages=answered)) == []


def test_double_star_gets_the_column_and_not_the_object() -> None:
    def rest(completion: str, **columns: Any) -> float:
        return float(columns["task"] == "math" and "rollout" not in columns)

    rollout = row_to_rollout({"completion": "x", "task": "math", "prompt": "q"}, name="t")
    assert load_reward(rest).function(**load_reward(rest).arguments(rollout)) == 1.0


@pytest.mark.slow
def test_judges_without_their_packages_name_the_extra(tmp_path: Path) -> None:
    """And whatever asks no server works without them."""
    program = (
        "import sys\n"
        "sys.modules['httpx'] = sys.modules['tenacity'] = None\n"
        "from llmrl.verify.command import run\n"
        "codes = [run(['--reward', name, '--self-test']) for name in ('citation_rubric', 'judge')]\n"
        "from llmrl.types import Task\n"
        "from llmrl.verify.rubric import Part, Rubric\n"
        "args = {'judge': {'base_url': 'http://x', 'model': 'm'}}\n"
        "task = Task(id='t', messages=[{'role': 'user', 'content': 'q'}], answer='a')\n"
        "print(codes, Rubric([Part(fn='judge', args=args)]).findings(task))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1] == (
        '[0, 0] ["reward judge: asking a judge or another server needs httpx and tenacity: '
        "pip install 'llmrl[judge]'\"]"
    ), done.stderr


@pytest.mark.parametrize(
    ("spec", "args"),
    [
        ("rewards/heron.py:heron", {"levels": [{"part": "correct"}]}),
        ("rewards/length.py:cosine_length", {"max_length": 9, "accuracy": "correct"}),
    ],
)
def test_a_part_that_is_neither_a_reward_nor_a_column_stops_the_run(spec: str, args: dict[str, Any]) -> None:
    rollout = row_to_rollout({"completion": "x", "level": 1}, name="t")
    rubric = Rubric([Part(fn=spec, args=args)])
    with pytest.raises(
        UserError, match="'correct' is neither another reward of this run nor a column; there are level"
    ):
        asyncio.run(rubric.score_group(RolloutGroup(task=rollout.task, rollouts=[rollout])))


def test_numbers_of_numpy_are_references() -> None:
    for answer in (np.int64(4), np.float32(4.0), np.array([4, 5]), np.array(["4"])):
        assert findings("math_answer", task(answer=answer)) == []
    assert findings("math_answer", task(answer=np.array([]))) == ["reward math_answer: the row has no answer"]
