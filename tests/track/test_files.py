"""JSON-lines files: rows are there at once, and truncating drops later ones. Replaced files are whole or not there."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from llmrl.errors import RunFailed, UserError
from llmrl.track.files import MAX_BEHIND, BackgroundJsonlFile, JsonlFile, read_jsonl, replacing


def test_rows_are_readable_before_the_file_is_closed(tmp_path: Path) -> None:
    file = JsonlFile(tmp_path / "deep" / "rows.jsonl")
    file.append({"a": 1}, {"b": [1.5, None, True]})
    file.append()
    file.append({"text": 'line\nbreak, "quote", \u00e9\u4e2d\U0001f600'})
    rows = [{"a": 1}, {"b": [1.5, None, True]}, {"text": 'line\nbreak, "quote", \u00e9\u4e2d\U0001f600'}]
    assert read_jsonl(file.path) == rows
    assert "\u4e2d" in file.path.read_text(encoding="utf-8"), "people read these files"
    JsonlFile(file.path).append({"again": True})
    assert read_jsonl(file.path) == [*rows, {"again": True}]


def test_values_json_does_not_know(tmp_path: Path) -> None:
    file = JsonlFile(tmp_path / "rows.jsonl")
    file.append({"error": ValueError("no"), "lone surrogate": "a\ud800b"})
    assert read_jsonl(file.path) == [{"error": "no", "lone surrogate": "a\ud800b"}]


def test_truncating_drops_later_rows_and_continues_there(tmp_path: Path) -> None:
    file = JsonlFile(tmp_path / "rows.jsonl")
    file.append({"step": 1})
    length = file.sync()
    assert length == file.path.stat().st_size
    file.append({"step": 2}, {"step": 3})
    file.close()
    with file.path.open("ab") as half:
        half.write(b'{"step": ')  # killed while writing
    resumed = JsonlFile(file.path)
    resumed.truncate(length)
    resumed.append({"step": "2 again"})
    assert read_jsonl(file.path) == [{"step": 1}, {"step": "2 again"}]
    assert resumed.sync() == file.path.stat().st_size
    resumed.truncate(0)
    assert read_jsonl(file.path) == []


def test_a_file_shorter_than_the_checkpoint_says_is_an_error(tmp_path: Path) -> None:
    file = JsonlFile(tmp_path / "rows.jsonl")
    file.append({"step": 1})
    with pytest.raises(RunFailed, match=r"rows\.jsonl is shorter .* \(1000 bytes\)"):
        file.truncate(1000)
    assert read_jsonl(file.path) == [{"step": 1}]


def test_a_full_disk_is_named() -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no /dev/full")
    with pytest.raises(RunFailed, match="/dev/full cannot be written"):
        JsonlFile(full).append({"a": 1})
    with pytest.raises(RunFailed, match="/dev/full cannot be written"):
        JsonlFile(full).sync()


def test_metrics_that_are_not_numbers_stay_readable_everywhere(tmp_path: Path) -> None:
    """NaN is not JSON: a reader in a browser would refuse the whole file."""
    file = JsonlFile(tmp_path / "rows.jsonl")
    file.append({"reward/mean": float("nan"), "deep": {"row": [float("inf"), 1.0]}})

    def refuse(text: str) -> None:
        raise AssertionError(f"{text} is not JSON")

    json.loads(file.path.read_text(), parse_constant=refuse)
    assert read_jsonl(file.path) == [{"reward/mean": None, "deep": {"row": [None, 1.0]}}]


class Slow:
    """A value that becomes text only when it is told to, as a disk that is slow would."""

    def __init__(self) -> None:
        self.asked, self.go = threading.Event(), threading.Event()

    def __str__(self) -> str:
        self.asked.set()
        assert self.go.wait(60)
        return "slow"


def test_rows_are_written_in_the_background_in_order(tmp_path: Path) -> None:
    file, slow = BackgroundJsonlFile(tmp_path / "rows.jsonl"), Slow()
    file.append({"a": slow})
    assert slow.asked.wait(60)
    file.append({"b": 1})  # returns while the first is being written
    assert not file.path.exists()
    slow.go.set()
    assert file.sync() == file.path.stat().st_size > 0
    assert read_jsonl(file.path) == [{"a": "slow"}, {"b": 1}]
    file.append({"c": 2})
    file.close()
    assert read_jsonl(file.path) == [{"a": "slow"}, {"b": 1}, {"c": 2}], "closing writes what is left"
    resumed = BackgroundJsonlFile(file.path)
    resumed.append({"d": 3})
    resumed.truncate(0)
    resumed.close()
    assert read_jsonl(file.path) == []


def test_few_appends_wait_in_memory(tmp_path: Path) -> None:
    file, slow = BackgroundJsonlFile(tmp_path / "rows.jsonl"), Slow()
    done = threading.Event()

    def append() -> None:
        for _ in range(MAX_BEHIND + 1):
            file.append({"a": slow})
        done.set()

    thread = threading.Thread(target=append)
    thread.start()
    assert slow.asked.wait(60)
    assert not done.wait(0.2), "one append more than may wait"
    slow.go.set()
    assert done.wait(60)
    thread.join()
    file.close()
    assert len(read_jsonl(file.path)) == MAX_BEHIND + 1


def test_an_error_in_the_background_is_raised_by_what_comes_next() -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no /dev/full")
    for use in (lambda file: file.sync(), lambda file: file.close(), lambda file: file.truncate(0)):
        file = BackgroundJsonlFile(full)
        file.append({"a": 1})
        with pytest.raises(RunFailed, match="/dev/full cannot be written"):
            use(file)
    file = BackgroundJsonlFile(full)
    with pytest.raises(RunFailed, match="/dev/full cannot be written"):
        for _ in range(MAX_BEHIND + 1):
            file.append({"a": 1})


def test_a_replaced_file_is_whole_or_unchanged(tmp_path: Path) -> None:
    file = tmp_path / "scores.jsonl"
    with replacing(file) as output:
        output.write("first\n")
        assert not file.exists()
    with pytest.raises(ZeroDivisionError), replacing(file) as output:
        output.write("half")
        raise ZeroDivisionError
    assert file.read_text() == "first\n"
    assert list(tmp_path.iterdir()) == [file]
    with pytest.raises(UserError, match=r"--output .*missing/x: cannot be written"), replacing(tmp_path / "missing/x"):
        pass
