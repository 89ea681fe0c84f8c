"""`llmrl verify`: stored rows come back scored and in the same order; errors name file, line and field."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llmrl.verify.command import run

pytestmark = pytest.mark.slow
REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(
        "import asyncio\n"
        "def mine(completion, bonus=0.0): return 'good' if completion == 'text' else len(completion) + bonus\n"
        "async def slow_first(completion, delay):\n"
        "    await asyncio.sleep(delay)\n"
        "    return delay\n"
        "def fails(completion):\n"
        "    if completion == 'fail': raise RuntimeError('the reason')\n"
        "    return None if completion == 'abstain' else 0.5\n"
        "def parts(completion):\n"
        "    from llmrl.types import Score\n"
        "    return Score(reward=1.0, parts={'why': 'because'})\n"
        "def score_group(rollouts): return [float(len(rollouts))] * len(rollouts)\n"
        "def conversation(completions, **columns): return [len(c) if type(c) is list else -1 for c in completions]\n"
        "def code(completion, entry_point, test, prompt): return float(entry_point in test and 'def' in prompt)\n"
    )
    return tmp_path


def write(file: Path, rows: list[Any]) -> Path:
    file.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return file


OK = {"completion": "abc"}


def verify(
    folder: Path, rows: list[Any], *rewards: str, extra: tuple[str, ...] = ()
) -> tuple[int, list[dict[str, Any]]]:
    source, target = write(folder / "rows.jsonl", rows), folder / "scores.jsonl"
    specs = [word for reward in rewards for word in ("--reward", reward)]
    code = run([*specs, "--input", str(source), "--output", str(target), "--num_workers", "2", *extra])
    return code, [json.loads(line) for line in target.read_text().splitlines()] if target.exists() else []


def test_rows_come_back_in_order_with_their_scores(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"question": "q", "answer": "#### 72", "completion": r"\boxed{72}", "id": 1},
        {"question": "q", "answer": "#### 72", "completion": r"\boxed{73}", "id": 2},
        {"question": "q", "answer": "???", "completion": r"\boxed{73}", "id": 3},
    ]
    code, scores = verify(folder, rows, "math_answer")
    assert code == 0
    assert [row["reward"] for row in scores] == [1.0, 0.0, None]
    assert [{k: row[k] for k in rows[0]} for row in scores] == rows
    assert scores[0]["parts"] == {"math_answer": 1.0}
    assert scores[1]["info"] == {"math_answer": {"extracted": "73", "gold": "72"}}
    assert [row["error"] for row in scores] == [None] * 3
    assert "3 rows: mean reward 0.5000, 2 scored, 1 abstained, 0 errors" in capsys.readouterr().out


def test_order_does_not_depend_on_how_long_each_row_takes(folder: Path) -> None:
    rows = [{"completion": str(i), "delay": 0.1 if i % 7 == 0 else 0.0} for i in range(200)]
    code, scores = verify(folder, rows, "mine.py:slow_first")
    assert code == 0
    assert [row["completion"] for row in scores] == [row["completion"] for row in rows]
    assert [row["reward"] for row in scores] == [row["delay"] for row in rows]


def test_several_rewards_add_up_and_errors_stay_with_their_row(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"completion": text, "bonus": 1.0} for text in ("ab", "fail", "abstain", "abcd")]
    code, scores = verify(folder, rows, "mine.py", "mine.py:fails")
    assert code == 1
    assert [row["reward"] for row in scores] == [3.5, None, 8.0, 5.5]
    assert "the reason" in scores[1]["error"]
    assert scores[1]["parts"] == {"mine": 5.0, "fails": None}
    printed = capsys.readouterr()
    assert "1 errors" in printed.out
    assert "the rewards failed for 1 of 4 rows; the first:\n[fails] RuntimeError: the reason (" in printed.err
    assert "if completion == 'fail': raise RuntimeError('the reason')" in printed.err


def test_a_reward_gets_its_arguments(folder: Path) -> None:
    (folder / "takes.py").write_text("def takes(completion, judge, bonus=0):\n    return judge['grade'] + bonus\n")
    (folder / "args.yaml").write_text("judge: {grade: 3, model: m}\nbonus: 1\n")
    rows = [{"completion": "a"}]

    def reward(*words: str) -> float:
        code, scores = verify(folder, rows, "takes.py", extra=words)
        assert code == 0
        return scores[0]["reward"]

    assert reward("--args", "{judge: {grade: 2}, bonus: 5}") == 7
    assert reward("--args", '{"judge": {"grade": 2}}') == 2
    assert reward("--args.judge.grade", "4", "--args.bonus=0.5") == 4.5
    assert reward("--args", "args.yaml", "--args.judge.grade", "10") == 11


def test_each_reward_gets_its_own_arguments(folder: Path) -> None:
    write(folder / "rows.jsonl", [{"completion": "abc"}])
    words = ["--reward", "mine.py", "--args.bonus", "1", "--reward", "mine.py", "--args", "{bonus: 10}"]
    assert run([*words, "--input", "rows.jsonl", "--output", "scores.jsonl"]) == 0
    assert json.loads((folder / "scores.jsonl").read_text())["parts"] == {"mine": 4.0, "mine_2": 13.0}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--args", "{bonus: 1}", "--reward", "mine.py"], "it must come after the --reward"),
        (["--reward", "mine.py", "--args", "{bonus: [}"], "not valid YAML or JSON"),
        (["--reward", "mine.py", "--args", "bonus"], "must be a mapping"),
        (["--reward", "mine.py", "--args", "none.yaml"], "No such file"),
        (["--reward", "mine.py", "--args.bonus"], "give it as --args.KEY VALUE"),
        (["--reward", "mine.py", "--args.bonsu", "1"], "`args` has 'bonsu'"),
        (["--reward", "mine.py", "--time_limit_s", "0"], "--time_limit_s 0.0: must be above 0"),
    ],
)
def test_wrong_arguments_of_rewards_are_reported(
    folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    write(folder / "rows.jsonl", [OK])
    assert run([*words, "--input", "rows.jsonl", "--output", "scores.jsonl"]) == 2
    assert message in capsys.readouterr().err


def test_a_reward_that_hangs_or_exits_costs_its_rows_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "bad.py").write_text(
        "import asyncio, sys\n"
        "async def bad(completion):\n"
        "    if completion == 'hang': await asyncio.Event().wait()\n"
        "    if completion == 'exit': sys.exit(3)\n"
        "    return 1\n"
    )
    rows = [{"completion": text} for text in ("fine", "hang", "exit", "fine")]
    code, scores = verify(folder, rows, "bad.py", extra=("--time_limit_s", "0.3"))
    assert (code, [row["reward"] for row in scores]) == (1, [1.0, None, None, 1.0])
    assert scores[1]["error"].startswith("reward bad: timed out after 0.3 s (time_limit_s)")
    assert scores[2]["error"].startswith("reward bad: it ended with sys.exit(3)")
    assert "the rewards failed for 2 of 4 rows; the first:\nreward bad: timed out" in capsys.readouterr().err


def test_rows_that_differ_in_their_completion_alone_are_a_group(folder: Path) -> None:
    rows = [{"completion": c, "question": q} for q, c in (("a", "1"), ("a", "2"), ("b", "3"), ("a", "4"))]
    code, scores = verify(folder, rows, "mine.py:score_group")
    assert (code, [row["reward"] for row in scores]) == (0, [2.0, 2.0, 1.0, 1.0])


def test_completions_may_be_messages(folder: Path) -> None:
    messages = [
        {"role": "assistant", "content": "let me look"},
        {"role": "tool", "content": "\\boxed{1}"},
        {"role": "assistant", "content": "\\boxed{2}"},
    ]
    code, scores = verify(folder, [{"completion": messages, "answer": "2"}], "math_answer", "mine.py:conversation")
    assert (code, scores[0]["parts"]) == (0, {"math_answer": 1.0, "conversation": 3.0})
    assert verify(folder, [{"completion": "text"}], "mine.py:conversation")[1][0]["reward"] == -1.0


def test_columns_of_known_datasets_are_found_by_their_own_names(folder: Path) -> None:
    human_eval = {"prompt": "def f():", "entry_point": "f", "test": "f()", "canonical_solution": "x", "completion": "c"}
    assert verify(folder, [human_eval], "mine.py:code")[1][0]["reward"] == 1.0
    math = {"problem": "p", "solution": r"thus $\boxed{5}$", "completion": r"\boxed{5}"}
    assert verify(folder, [math], "math_answer")[1][0]["reward"] == 1.0
    named = {"answer": "1", "label": "5", "completion": r"\boxed{5}"}
    assert verify(folder, [named], "math_answer")[1][0]["reward"] == 0.0
    assert verify(folder, [named], "math_answer", extra=("--answer_column", "label"))[1][0]["reward"] == 1.0


@pytest.mark.parametrize(
    "text", ["\ud800 surrogate", "NUL \x00", "\u2028 line separator", "\u00e9", "x" * 2_000_000, ""]
)
def test_any_text_is_read_and_written(folder: Path, text: str) -> None:
    code, scores = verify(
        folder, [{"completion": text, "answer": "5"}, {"completion": text + "5", "answer": "5"}], "math_answer"
    )
    assert code == 0
    assert [row["completion"] for row in scores] == [text, text + "5"]


@pytest.mark.parametrize(
    ("rows", "rewards", "extra", "message"),
    [
        ([OK, '{"completion": \n'], ["mine.py"], (), "rows.jsonl, line 2: not valid JSON"),
        ([OK, "[1, 2]\n"], ["mine.py"], (), "rows.jsonl, line 2: a row must be a JSON object"),
        ([OK, "\n", {"text": "a"}], ["mine.py"], (), "rows.jsonl, line 3, field completion: missing"),
        ([OK, {"completion": None}], ["mine.py"], (), "rows.jsonl, line 2, field completion: must be text"),
        (
            [OK, {"completion": [{"content": "a"}]}],
            ["mine.py"],
            (),
            "rows.jsonl, line 2, field completion: must be text",
        ),
        ([{"completion": [{"role": "user"}]}], ["mine.py"], (), "line 1, field completion: its first message"),
        (
            [OK, OK | {"x": 1}],
            ["mine.py:slow_first"],
            (),
            "rows.jsonl, line 1: reward slow_first: its parameter 'delay'",
        ),
        ([OK], ["mine.py"], ("--answer_column", "gold"), "rows.jsonl, line 1: field gold: missing"),
        (
            [OK, {"completion": "text"}],
            ["mine.py"],
            (),
            "line 2, field reward: reward mine returned 'good' of type str",
        ),
        (
            [{"test_list": [], **OK}, {"pairs": [], **OK}],
            ["unit_tests"],
            (),
            "rows.jsonl, line 2, unit_tests: the row has no tests in a known format",
        ),
        (
            [{"question": "?", **OK}, {"answer": "1", **OK}],
            ["qa_match"],
            (),
            "rows.jsonl, line 1, the row has no gold answer",
        ),
        ([OK], ["mine.py:parts"], (), "line 1, field reward: reward parts returned, as its part 'why', 'because'"),
        ([], ["mine.py"], (), "it has no rows"),
        ([OK], ["no_such_reward"], (), "no reward is called"),
        ([OK], ["mine.py"], ("--num_workers", "0"), "--num_workers 0"),
        ([OK], ["mine.py"], ("--output", "no/such/folder/x"), "--output no/such/folder/x: cannot be written"),
        ([OK], ["mine.py"], ("--input", "missing.jsonl"), "--input missing.jsonl: No such file"),
    ],
)
def test_a_mistake_is_reported_and_nothing_is_written(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    rows: list[Any],
    rewards: list[str],
    extra: tuple[str, ...],
    message: str,
) -> None:
    code, scores = verify(folder, rows, *rewards, extra=extra)
    assert (code, scores) == (2, [])
    assert message in capsys.readouterr().err
    assert sorted(p.name for p in folder.iterdir() if p.name != "__pycache__") == ["mine.py", "rows.jsonl"]


def test_bytes_that_are_not_text_are_refused_with_their_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "rows.jsonl").write_bytes(b'{"completion": "a"}\n{"completion": "\xff"}\n')
    assert run(["--reward", "mine.py", "--input", "rows.jsonl", "--output", "o.jsonl"]) == 2
    assert "rows.jsonl, line 2: not UTF-8" in capsys.readouterr().err


def test_a_failed_run_keeps_the_output_of_the_one_before(folder: Path) -> None:
    verify(folder, [OK], "mine.py")
    before = (folder / "scores.jsonl").read_text()
    code, _ = verify(folder, [OK, {"completion": "text"}], "mine.py")
    assert (code, (folder / "scores.jsonl").read_text()) == (2, before)


def test_nothing_scored_is_a_failed_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, scores = verify(folder, [{"completion": "fail"}] * 3, "mine.py:fails")
    assert (code, len(scores)) == (1, 3)
    error = capsys.readouterr().err
    assert "no row could be scored; the first of 3 errors:\nRuntimeError: the reason" in error
    code, scores = verify(folder, [{"completion": "1", "answer": "???"}] * 2, "math_answer")
    assert (code, len(scores)) == (1, 2)
    assert "no row could be scored: the rewards abstained from all of them" in capsys.readouterr().err


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_reported(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _ = verify(folder, [OK], "mine.py", extra=("--output", "/dev/full"))
    assert code == 1
    assert "No space left" in capsys.readouterr().err


def test_missing_arguments_are_reported(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--reward", "math_answer"]) == 2
    assert "--self-test" in capsys.readouterr().err


# --- self-test --------------------------------------------------------------------------------------------------------


def self_test(folder: Path, examples: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    (folder / "tested.py").write_text(
        f"def tested(completion, bonus=0): return len(completion) + bonus or None\n{examples}\n"
    )
    for name in [name for name in sys.modules if name.startswith("llmrl_plugin_") and name.endswith(".tested")]:
        del sys.modules[name]
    code = run(["--reward", "tested.py", "--self-test"])
    captured = capsys.readouterr()
    return code, captured.out + captured.err


@pytest.mark.parametrize(
    ("examples", "code", "message"),
    [
        ("EXAMPLES = [{'completion': 'ab', 'bonus': 1, 'reward': 3}, {'completion': '', 'reward': None}]", 0, "2 of 2"),
        ("EXAMPLES = {'tested': [{'completion': 'ab', 'reward': 2}], 'other': []}", 0, "1 of 1"),
        ("EXAMPLES = [{'completion': 'ab', 'reward': 2.1}]", 1, "0 of 1"),
        ("EXAMPLES = [{'completion': 'ab', 'reward': None}]", 1, "FAILED"),
        ("EXAMPLES = [{'completion': 'ab', 'bonus': 'x', 'reward': None}]", 1, "TypeError"),
        ("EXAMPLES = []", 2, "no EXAMPLES"),
        ("", 2, "no EXAMPLES"),
        ("EXAMPLES = [{'completion': 'ab'}]", 2, "EXAMPLES[0], field reward"),
        ("EXAMPLES = [{'reward': 1}]", 2, "EXAMPLES[0], field completion"),
        ("EXAMPLES = 'ab'", 2, "EXAMPLES must be a list of dicts, not str"),
        ("EXAMPLES = [['ab', 1]]", 2, "EXAMPLES[0]: must be a dict with"),
    ],
)
def test_self_test_runs_the_examples(
    folder: Path, capsys: pytest.CaptureFixture[str], examples: str, code: int, message: str
) -> None:
    found, printed = self_test(folder, examples, capsys)
    assert found == code, printed
    assert message in printed


@pytest.mark.parametrize(
    ("pays", "message"),
    [
        ("1.0", "constant.py: FAILED no-op: the completion 'I do not know.' earns 1, as much as a good one"),
        ("float(bool(completion))", "constant.py: FAILED no-op: the completion 'I do not know.' earns 1"),
        ("0.0", "constant.py: FAILED gold: on no row of the EXAMPLES does a good completion earn more"),
        ("float(answer in completion)", ""),
    ],
)
def test_self_test_looks_for_gold_that_is_not_paid_and_for_nothing_that_is(
    folder: Path, capsys: pytest.CaptureFixture[str], pays: str, message: str
) -> None:
    reward = "1.0" if pays != "0.0" else "0.0"
    (folder / "constant.py").write_text(
        f"def constant(completion, answer): return {pays}\n"
        f"EXAMPLES = [{{'completion': 'it is 4', 'answer': '4', 'reward': {reward}}}]\n"
    )
    assert run(["--reward", "constant.py", "--self-test"]) == (1 if message else 0)
    assert message in capsys.readouterr().out


# --- real data --------------------------------------------------------------------------------------------------------


def test_gsm8k_rows_work_with_their_own_columns(folder: Path, shared_data: Path) -> None:
    file = shared_data / "gsm8k" / "test.jsonl"
    if not file.is_file():
        pytest.skip("no GSM8K beside this checkout")
    rows = [json.loads(line) for line in file.read_text().splitlines()[:100]]
    answered = [row | {"completion": f"So \\boxed{{{row['answer'].split('####')[1].strip()}}}."} for row in rows]
    code, scores = verify(folder, answered, "math_answer")
    assert (code, {row["reward"] for row in scores}) == (0, {1.0})


# --- what is stopped goes on ------------------------------------------------------------------------------------------

COUNTED = """
import os, signal
from pathlib import Path

CALLS = Path(__file__).with_name("calls")

def counted(completion, stops=False):
    with CALLS.open("a") as calls:
        calls.write(completion + "\\n")
    if stops and not CALLS.with_name("went_on").exists():
        os.kill(os.getpid(), getattr(signal, stops))
    return float(completion)
"""


def scored(folder: Path) -> list[str]:
    return (folder / "calls").read_text().split()


@pytest.mark.parametrize("stop", ["SIGINT", "SIGTERM"])
def test_a_command_that_is_stopped_goes_on_from_there(
    folder: Path, capsys: pytest.CaptureFixture[str], stop: str
) -> None:
    (folder / "counted.py").write_text(COUNTED)
    rows: list[Any] = [{"completion": str(i), "id": i // 2} for i in range(300)]
    rows[200]["stops"] = stop
    command = [sys.executable, "-m", "llmrl", "verify", "--reward", "counted.py:counted", "--num_workers", "1"]
    command += ["--input", str(write(folder / "rows.jsonl", rows)), "--output", str(folder / "scores.jsonl")]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}

    def start() -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)

    stopped = start()
    assert stopped.returncode == {"SIGINT": 130, "SIGTERM": 143}[stop], stopped.stderr
    assert "finished rows are in" in stopped.stderr and "Traceback" not in stopped.stderr
    partial = folder / "scores.jsonl.partial"
    finished = len(partial.read_text().splitlines()) - 1
    assert finished > 0 and not (folder / "scores.jsonl").exists()
    with partial.open("a") as file:
        file.write('{"half a li')
    (folder / "went_on").touch()
    before = len(scored(folder))
    done = start()
    assert done.returncode == 0, done.stderr
    assert f"going on behind the {finished} rows" in done.stderr
    found = [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]
    assert [row["reward"] for row in found] == [float(i) for i in range(300)]
    assert sorted(map(int, scored(folder)[before:])) == list(range(finished, 300)), "finished rows are not paid again"
    assert "300 rows: mean reward 149.5000, 300 scored" in done.stdout
    assert not partial.exists()


def test_the_part_of_another_command_is_not_taken_over(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = folder / "scores.jsonl.partial"
    target.write_text('{"partial": "of something else"}\n{"completion": "abc", "reward": 7}\n')
    code, scores = verify(folder, [OK], "mine.py")
    assert (code, scores) == (2, [])
    assert "is the unfinished output of another command" in capsys.readouterr().err
    target.unlink()
    assert verify(folder, [OK], "mine.py")[0] == 0


def test_a_bad_row_costs_that_row(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"answer": "abc", **OK}, {"question": "?", **OK}, {"answer": "x", **OK}]
    code, scores = verify(folder, rows, "qa_match")
    assert code == 1
    assert [row["reward"] for row in scores] == [0.0, None, 0.0]
    assert "rows.jsonl, line 2, the row has no gold answer" in scores[1]["error"]
    assert "3 rows: mean reward 0.0000, 2 scored, 0 abstained, 1 errors" in capsys.readouterr().out
    code, scores = verify(folder, [{"delay": 0, **OK}, OK, {"delay": 0.5, **OK}], "mine.py:slow_first")
    assert code == 1 and [row["reward"] for row in scores] == [0.0, None, 0.5]
    assert "line 2: reward slow_first: its parameter 'delay'" in scores[1]["error"]
