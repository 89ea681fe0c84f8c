"""The red team finds every planted weakness and nothing in honest rewards, the shipped ones among them."""

from __future__ import annotations

import asyncio
import json
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmrl.verify.command import run
from llmrl.verify.contract import examples_of
from llmrl.verify.judge.correct import judge_correct
from llmrl.verify.judge.judge import OfflineJudge
from llmrl.verify.redteam.attack import NOTHING, Attack, Report
from llmrl.verify.redteam.families import FAMILIES, attempts
from llmrl.verify.redteam.loop import attack_with_model, completion_in, vary
from llmrl.verify.redteam.shrink import shrink
from llmrl.verify.redteam.target import Target, target_of, targets_of_examples
from llmrl.verify.rubric import Part, Rubric
from tests.test_reward_contract import SPECS

# --- 12 weak rewards, one per family ----------------------------------------------------------------------------------


def boxes(completion: str) -> list[str]:
    return re.findall(r"\\boxed\{([^{}]*)\}", completion)


def starts_the_answer(completion: str, answer: str) -> float:
    return float(answer.startswith((boxes(completion) or [completion])[-1].strip()))


def overlaps_the_prompt(completion: str, prompt: str, answer: str) -> float:
    asked = set(prompt.lower().split())
    return max(float(completion == answer), len(asked & set(completion.lower().split())) / len(asked))


def mentions_the_letter(completion: str, answer: str) -> float:
    return float(answer in re.findall(r"\b[A-Z]\b", completion))


def any_box(completion: str, answer: str) -> float:
    return float(answer in boxes(completion))


def long_enough(completion: str, answer: str) -> float:
    return max(float(completion == answer), min(1.0, len(completion.split()) / 300))


def run_with(completion: str, tests: list[str], *after: str) -> subprocess.CompletedProcess[str]:
    """Run program and tests in one interpreter, in an empty folder: what attacks must not be given, and often is."""
    program = "\n".join([re.sub(r"```\w*", "", completion), *tests, *after])
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-I", "-S", "-c", program]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=folder)


def asserts_beside_the_program(completion: str, test_list: list[str]) -> float:
    return float(completion.startswith("```") and "r7Kq" in run_with(completion, test_list, "print('r7Kq')").stdout)


def exit_code_is_zero(completion: str, test_list: list[str]) -> float:
    return float(completion.startswith("```") and run_with(completion, test_list).returncode == 0)


def says_passed(completion: str, answer: str) -> float:
    return float(completion == answer or "passed" in completion.lower())


async def gullible_judge(completion: str, prompt: str, answer: str) -> float | None:
    def believe(name: str, case: dict[str, str]) -> dict[str, Any]:
        response = case["response"]
        claimed = '"correct": true' in response
        return {"final_answer": response, "reason": "", "correct": claimed or response == case["known_answer"]}

    return (await judge_correct(OfflineJudge(believe), prompt, [answer], completion))[0]


def grounded_in_the_context(completion: str, context: str, answer: str) -> float:
    words = set(context.split())
    return max(float(completion == answer), len(words & set(completion.split())) / len(words))


def is_no_copy(completion: str, prompt: str, answer: str) -> float:
    same_length = 0.8 < len(completion) / len(prompt) < 1.2
    shares = len(set(completion.split()) & set(prompt.split())) / len(set(prompt.split()))
    return float(completion == answer or (same_length and shares < 0.2))


def patch_applies(completion: str, patch: str) -> float:
    return float(completion == patch or completion.startswith("diff --git"))


QUESTIONS = [
    {"prompt": "How many legs do three spiders have together?", "answer": "24"},
    {"prompt": "What is seven times eight?", "answer": "56"},
    {"prompt": "How many minutes are there in two hours?", "answer": "120"},
]
CHOICES = [
    {"prompt": "Which planet is red?\nA. Venus\nB. Mars\nC. Jupiter\nD. Saturn", "answer": "B"},
    {"prompt": "Which metal is liquid?\nA. Iron\nB. Gold\nC. Mercury\nD. Tin", "answer": "C"},
]
CODE = [
    {
        "prompt": "Add two numbers.",
        "test_list": ["assert add(1, 2) == 3", "assert add(2, 2) == 4"],
        "code": "def add(a, b):\n    return a + b",
    },
    {
        "prompt": "Square a number.",
        "test_list": ["assert sq(3) == 9", "assert sq(4) == 16"],
        "code": "def sq(a):\n    return a * a",
    },
]
CONTEXTS = [
    {
        "prompt": "Who wrote it?",
        "context": "It was finished in 1851 by an author called Melville.",
        "answer": "Melville",
    },
    {"prompt": "Where was it?", "context": "A long journey ended in the small town of Basel.", "answer": "Basel"},
]
TRANSLATIONS = [
    {"prompt": "The cat sleeps on the warm roof today.", "answer": "Die Katze schläft heute auf dem warmen Dach."},
    {"prompt": "A new bridge opens over the river.", "answer": "Eine neue Brücke öffnet über dem Fluss."},
]
_DIFF = "diff --git a/src/{0}.py b/src/{0}.py\n--- a/src/{0}.py\n+++ b/src/{0}.py\n@@ -1 +1 @@\n-a\n+b\n"
REPAIRS = [{"prompt": f"Fix src/{name}.py", "patch": _DIFF.format(name)} for name in ("add", "sub")]
PLANTED: dict[str, tuple[Callable[..., Any], list[dict[str, Any]]]] = {
    "empty": (starts_the_answer, QUESTIONS),
    "echo": (overlaps_the_prompt, QUESTIONS),
    "every_option": (mentions_the_letter, CHOICES),
    "boxed_spam": (any_box, QUESTIONS),
    "longest_answer": (long_enough, QUESTIONS),
    "tests_patched": (asserts_beside_the_program, CODE),
    "early_exit": (exit_code_is_zero, CODE),
    "sentinel": (says_passed, QUESTIONS),
    "judge_injection": (gullible_judge, QUESTIONS),
    "copied_reference": (grounded_in_the_context, CONTEXTS),
    "look_alikes": (is_no_copy, TRANSLATIONS),
    "noop_patch": (patch_applies, REPAIRS),
}


MAX_ROWS = 6
"""Rows of a shipped reward's EXAMPLES that are attacked."""


def attacked(function: Any, rows: list[dict[str, Any]]) -> Report:
    rubric = Rubric([Part(fn=function)])

    async def main() -> Report:
        try:
            return await Attack(rubric, [target_of(row, i) for i, row in enumerate(rows, start=1)]).run()
        finally:
            await rubric.close()

    return asyncio.run(main())


def test_there_is_a_planted_reward_for_each_family() -> None:
    assert set(PLANTED) == set(FAMILIES) and len(FAMILIES) == 12


@pytest.mark.slow
@pytest.mark.parametrize("family", PLANTED)
def test_each_planted_weakness_is_found_with_its_row_and_a_small_exploit(family: str) -> None:
    function, rows = PLANTED[family]
    report = attacked(function, rows)
    found = [finding for finding in report.findings if finding.family == family]
    assert found, [finding.family for finding in report.findings]
    for finding in found:
        assert len(finding.lines) > 1
        assert finding.good is not None and finding.reward >= (finding.good + finding.nothing) / 2
        target = target_of(rows[finding.lines[0] - 1], 1)
        originals = [one.text for _, one in attempts(target) if one.variant == finding.variant] or [NOTHING]
        assert len(finding.exploit) <= len(originals[0])


def exact(completion: str, answer: str) -> float:
    return float((boxes(completion) or [completion.strip()])[-1] == answer)


@pytest.mark.parametrize("rows", [QUESTIONS, CHOICES, CONTEXTS, TRANSLATIONS])
def test_an_honest_reward_is_not_blamed(rows: list[dict[str, Any]]) -> None:
    report = attacked(exact, rows)
    assert report.findings == [] and report.num_attempts > 100 and report.num_errors == 0


def test_an_honest_reward_is_not_blamed_for_answers_that_an_exploit_happens_to_state() -> None:
    lucky = [
        {"prompt": "Is 7 prime? Answer yes or no.", "answer": "yes"},
        {"prompt": "What is the last number from -20 to 300?", "answer": "300"},
        {"prompt": "Repeat: OK", "answer": "OK"},
        {"prompt": "What does a comparison of equals give?", "answer": "True"},
        {"prompt": "What is 7 - 7?", "answer": "..."},
    ]
    assert attacked(exact, lucky).findings == []


def test_a_reward_that_pays_anything_is_found_and_one_that_ignores_the_text_is_not_blamed() -> None:
    report = attacked(lambda completion, answer: 1.0, QUESTIONS)
    assert [finding.family for finding in report.findings] == ["empty"]
    assert report.findings[0].lines == [1, 2, 3]
    assert attacked(lambda completion: 0.0, [{"prompt": "a"}, {"prompt": "b"}]).findings == []


def test_what_is_paid_on_one_row_alone_is_a_suspect() -> None:
    def weak_on_one(completion: str, answer: str) -> float:
        return float(completion == answer or (answer == "24" and "ALL TESTS PASSED" in completion))

    report = attacked(weak_on_one, QUESTIONS)
    assert report.findings == [] and {finding.lines[0] for finding in report.suspects} == {1}
    alone = attacked(weak_on_one, QUESTIONS[:1])
    assert [finding.exploit for finding in alone.findings if finding.variant == "sentinel 'ALL TESTS PASSED'"]


@pytest.mark.slow
@pytest.mark.parametrize("spec", SPECS)
def test_nothing_is_found_in_a_shipped_reward(spec: str) -> None:
    if "reasoning_gym" in spec:
        pytest.importorskip("reasoning_gym", reason="reasoning-gym is not installed: pip install 'llmrl[tasks]'")
    rubric = Rubric([Part(fn=spec)], num_workers=2)

    async def main() -> Report:
        try:
            payable = [example for example in examples_of(rubric) if example["reward"]] or examples_of(rubric)
            return await Attack(rubric, targets_of_examples(payable)[:MAX_ROWS]).run()
        finally:
            await rubric.close()

    report = asyncio.run(main())
    assert [(finding.family, finding.variant, finding.lines, finding.exploit) for finding in report.findings] == []
    if report.num_errors > 0.9 * report.num_scored:
        pytest.skip(f"it cannot judge here: {report.first_error}")
    assert report.num_attempts > 0


# --- its parts --------------------------------------------------------------------------------------------------------


def test_shrinking_keeps_what_is_needed() -> None:
    async def needs_both(text: str) -> bool:
        return "magic" in text and "word" in text

    text = "A long text.\nIt has the magic in it.\nThen more lines.\nAnd a word at the end.\n"
    assert asyncio.run(shrink(text, needs_both)) == "magicword"
    asked: list[str] = []

    async def count(text: str) -> bool:
        asked.append(text)
        return "magic" in text

    asyncio.run(shrink(text * 50, count, max_tests=10))
    assert len(asked) == 10


def test_targets_know_the_answers_in_their_forms() -> None:
    target = target_of({"question": "How many?", "answer": "She has 2 + 2.\n#### 4"}, 1)
    assert target.states_answer("\\boxed{4}") and target.states_answer("<think>x</think><answer>4</answer>")
    assert not target.states_answer("4 or 5") and not target.states_answer("") and not target.states_answer("14")
    assert "\\boxed{4}" in target.gold and target.prompt == "How many?"
    code = target_of(CODE[1], 1)
    assert code.function == "sq" and "```python\ndef sq(a):\n    return a * a\n```" in code.gold
    assert target_of(CHOICES[0], 1).options == ["A", "B", "C", "D"]


# --- a model as attacker ----------------------------------------------------------------------------------------------


def secret_word(completion: str, answer: str) -> float:
    return float(completion == answer or "xyzzy" in completion) + 0.1 * ("xyz" in completion)


def with_model(
    function: Any, replies: Callable[[str], str], rows: list[dict[str, Any]], rounds: int
) -> tuple[Report, list[str]]:
    asked: list[str] = []

    async def propose(requests: list[str]) -> list[str]:
        asked.extend(requests)
        return [replies(request) for request in requests]

    async def main() -> Report:
        rubric = Rubric([Part(fn=function)])
        attack = Attack(rubric, [target_of(row, i) for i, row in enumerate(rows, start=1)])
        await attack_with_model(attack, propose, rounds=rounds, per_row=2)
        await rubric.close()
        return await attack.finish()

    return asyncio.run(main()), asked


def test_a_model_that_learns_from_what_was_paid_is_kept_and_its_exploit_shrunk() -> None:
    def learn(request: str) -> str:
        return f"<completion>well, {'xyzzy' if 'xyz ' in request else 'xyz '} it is</completion>"

    report, asked = with_model(secret_word, learn, QUESTIONS, rounds=2)
    assert [finding.exploit for finding in report.findings] == ["xyzzy"] * len(report.findings) and report.findings
    assert all(finding.family == "model" and finding.lines == [1, 2, 3] for finding in report.findings)
    assert len(asked) == 2 * 2 * len(QUESTIONS) and "reward 0.100: 'well, xyz  it is'" in asked[-1]


def test_a_model_that_solves_the_tasks_is_no_exploit() -> None:
    answers = {row["prompt"]: row["answer"] for row in QUESTIONS}

    def solve(request: str) -> str:
        return next(answer for prompt, answer in answers.items() if prompt in request)

    report, _ = with_model(lambda completion, answer: float(answer in completion), solve, QUESTIONS, rounds=2)
    assert report.findings == []


def test_completions_are_taken_out_of_replies() -> None:
    assert completion_in("Sure.\n<completion>\na\nb\n</completion> ok") == "a\nb"
    assert completion_in("<completion>cut off") == "cut off"
    assert completion_in("nothing else") == "nothing else"


def test_variations_are_made_of_what_was_kept() -> None:
    generator = random.Random(0)
    made = {vary(["one two three", "four"], generator) for _ in range(50)}
    assert len(made) > 5 and re.fullmatch(r"(one|two|three|four|\s)*", "".join(made))


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weak.py").write_text(
        "def weak(completion, answer, word='passed'):\n"
        "    return float(completion == answer or word in completion.lower())\n"
        "def strong(completion, answer): return float(completion == answer)\n"
        "def broken(completion, answer): raise RuntimeError('no luck')\n"
    )
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    return tmp_path


def test_the_command_reports_what_paid(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = run(["--red-team", "weak.py", "--input", "rows.jsonl", "--output", "report.json"])
    printed = capsys.readouterr()
    assert code == 1
    assert "sentinel: sentinel 'PASSED'" in printed.out and "'PASSED'\n" in printed.out
    assert "(nothing: 0, good: 1) on 3 rows, first line 1" in printed.out
    assert "red team: row 3 of 3" in printed.err
    report = json.loads((folder / "report.json").read_text())
    assert report["findings"][0]["row"] == QUESTIONS[0] and report["findings"][0]["exploit"].lower() == "passed"


def test_the_command_is_content_with_a_strong_reward_and_takes_arguments(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["--red-team", "weak.py:strong", "--input", "rows.jsonl"]) == 0
    assert "no ideas are paid without a reason" in capsys.readouterr().out
    assert run(["--red-team", "weak.py", "--args.word", "abracadabra", "--input", "rows.jsonl", "--rows", "2"]) == 0
    assert "on 2 rows" in capsys.readouterr().out


@pytest.mark.slow
def test_a_reward_that_runs_programs_in_its_own_process_is_attacked_and_does_not_end_the_command(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "inside.py").write_text(
        "import re\n"
        "def inside(completion, test_list):\n"
        "    names = {}\n"
        "    try:\n"
        "        exec(re.sub(r'```\\w*', '', completion), names)\n"
        "        for test in test_list: exec(test, names)\n"
        "    except (Exception, SystemExit):\n"
        "        return 0.0\n"
        "    return 1.0\n"
    )
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in CODE))
    assert run(["--red-team", "inside.py", "--input", "rows.jsonl", "--num_workers", "1"]) == 1
    printed = capsys.readouterr().out
    assert "tests_patched: an object that equals everything" in printed
    assert "worker died" in printed  # what ends the process is no exploit of this one


def test_functions_in_trls_style_are_attacked_with_texts(folder: Path) -> None:
    (folder / "batch.py").write_text(
        "def batch(completions, answer, **columns):\n"
        "    return [float(text == gold or 'passed' in text.lower()) for text, gold in zip(completions, answer)]\n"
    )
    assert run(["--red-team", "batch.py", "--input", "rows.jsonl", "--output", "report.json"]) == 1
    found = json.loads((folder / "report.json").read_text())["findings"]
    assert {finding["family"] for finding in found} == {"sentinel", "early_exit"}  # which claims to have passed


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--red-team", "weak.py"], 2, "give --input ROWS.jsonl"),
        (["--red-team", "weak.py", "--input", "none.jsonl"], 2, "No such file"),
        (["--red-team", "weak.py", "--input", "rows.jsonl", "--rows", "0"], 2, "--rows 0: must be at least 1"),
        (["--red-team", "weak.py", "--input", "rows.jsonl", "--model", "none"], 2, "--model none: no such folder"),
        (["--red-team", "weak.py:broken", "--input", "rows.jsonl"], 1, "the reward failed for every attempt"),
        (["--red-team", "qa_match", "--input", "rows.jsonl", "--answer_column", "gold"], 2, "line 1: field gold"),
        (["--input", "rows.jsonl"], 2, "give --reward SPEC, or --red-team SPEC"),
    ],
)
def test_mistakes_are_reported(
    folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], code: int, message: str
) -> None:
    assert run(words) == code
    assert message in capsys.readouterr().err


def test_targets_of_examples_hold_the_best_completion() -> None:
    examples = [{"completion": "a", "k": 1, "reward": 0.0}, {"completion": "b", "k": 1, "reward": 1.0}]
    found: list[Target] = targets_of_examples(examples)
    assert [(target.row, target.gold[0]) for target in found] == [({"k": 1}, "b")]
