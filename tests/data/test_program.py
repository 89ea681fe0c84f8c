"""Datasets that a Python file makes: `rows(split)` is called, and what is wrong with it is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmrl.data.options import DataConfig
from llmrl.data.tasks import load_tasks
from llmrl.errors import UserError

PROGRAM = """
def rows(split):
    return [{"question": f"{split} {i} + 1 =", "answer": str(i + 1)} for i in range(4)]
"""


def write(folder: Path, text: str) -> str:
    (folder / "sums.py").write_text(text)
    return str(folder / "sums.py")


@pytest.mark.parametrize("split", ["train", "test"])
def test_its_rows_become_tasks(split: str, tmp_path: Path) -> None:
    tasks = load_tasks(DataConfig(path=write(tmp_path, PROGRAM), split=split, limit=3))
    assert [task.messages[0]["content"] for task in tasks] == [f"{split} {i} + 1 =" for i in range(3)]
    assert [task.answer for task in tasks] == ["1", "2", "3"]
    assert all(task.id.startswith("sums-") for task in tasks)


def test_a_generator_may_make_them(tmp_path: Path) -> None:
    text = "def rows(split):\n    yield {'question': 'a', 'answer': 'b'}\n"
    assert len(load_tasks(DataConfig(path=write(tmp_path, text)))) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", r"has no function `rows\(split\)`"),
        ("def rows(): return []", r"`rows` takes no argument; write `def rows\(split\)"),
        ("def rows(split): return 3", r"rows\('train'\) returned int, not a list of rows"),
        ("def rows(split): return {'question': 'a'}", "returned dict, not a list of rows"),
        ("def rows(split): raise KeyError(split)", r"failed: KeyError: 'train'"),
        ("import nothing_like_this", "failed: ModuleNotFoundError"),
        ("def rows(split): return []", "there are no rows"),
    ],
)
def test_what_is_wrong_with_it_is_named(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        load_tasks(DataConfig(path=write(tmp_path, text)))


def test_a_missing_file_is_not_looked_for_on_the_hub(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file or folder"):
        load_tasks(DataConfig(path=str(tmp_path / "none.py")))


def test_a_shipped_one_is_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"data.split 'none': there are train and test"):
        load_tasks(DataConfig(path="recipes/smollm2_sums.py", split="none"))


def test_no_question_of_the_sums_is_in_both_splits() -> None:
    pytest.importorskip("reasoning_gym", reason="reasoning-gym is not installed: pip install 'llmrl[tasks]'")
    train, test = (load_tasks(DataConfig(path="recipes/smollm2_sums.py", split=split)) for split in ("train", "test"))
    questions = [task.messages[0]["content"] for task in train + test]
    assert (len(train), len(test)) == (143, 57) and len(set(questions)) == 200
    for task in train[:20] + test[:20]:
        first, sign, second, _ = task.messages[0]["content"].rpartition(": ")[2].split()
        assert int(task.answer) == int(first) + (int(second) if sign == "+" else -int(second))
