"""scripts/fetch_model: a model is in the cache whole or not at all, and is fetched once."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

from llmrl.errors import UserError
from llmrl.verify.spec import load_file

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "fetch_model.py"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = load_file(SCRIPT)
    monkeypatch.setattr(module, "SOURCES", {})
    return module


def write(model: Path, **changed: object) -> None:
    model.mkdir()
    facts = load_file(SCRIPT).FACTS
    (model / "config.json").write_text(json.dumps({**facts, **changed}))


def test_the_next_source_is_tried_and_the_second_call_needs_none(script: ModuleType, tmp_path: Path) -> None:
    def unreachable(model: Path, scratch: Path) -> None:
        write(model)
        raise ConnectionError("no route")

    script.SOURCES.update({"one": unreachable, "two": lambda model, scratch: write(model)})
    folder = script.fetch(tmp_path / "cache")
    assert folder == tmp_path / "cache" / script.NAME and (folder / "config.json").is_file()
    script.SOURCES.clear()
    assert script.fetch(tmp_path / "cache") == folder
    assert {path.suffix for path in folder.parent.iterdir()} <= {"", ".lock"}


def test_without_a_source_the_message_names_each_and_why(script: ModuleType, tmp_path: Path) -> None:
    def unreachable(model: Path, scratch: Path) -> None:
        raise subprocess.CalledProcessError(1, ["pip", "install", "something"])

    def half(model: Path, scratch: Path) -> None:
        model.mkdir()
        raise OSError("disk full")

    script.SOURCES.update({"one": unreachable, "two": half})
    with pytest.raises(UserError, match=r"(?s)could not be fetched.*one: .*exit status 1.*two: .*disk full"):
        script.fetch(tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_a_killed_fetch_leaves_nothing_half(script: ModuleType, tmp_path: Path) -> None:
    left = tmp_path / f"{script.NAME}.writing"
    (left / "model").mkdir(parents=True)
    (left / "model" / "config.json").write_text("half")
    script.SOURCES["one"] = lambda model, scratch: write(model)
    folder = script.fetch(tmp_path)
    assert json.loads((folder / "config.json").read_text()) == script.FACTS
    assert not left.exists()


def test_another_model_is_refused(script: ModuleType, tmp_path: Path) -> None:
    script.SOURCES["one"] = lambda model, scratch: write(model, vocab_size=50_000)
    with pytest.raises(UserError, match=r"is not SmolLM2-135M-Instruct.*'vocab_size': 50000"):
        script.fetch(tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_the_cache_is_where_the_environment_says(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMRL_CACHE", "/somewhere")
    assert script.cache_folder() == Path("/somewhere")
    monkeypatch.delenv("LLMRL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/user")
    assert script.cache_folder() == Path("/user/llmrl")
