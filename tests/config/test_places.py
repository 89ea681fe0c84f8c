"""A ~ in an option that names a place is the home directory."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmrl.config import from_dotted

PLACES = ("train.output_dir", "model.path", "data.path", "data.chat_template", "model.tokenizer")


def test_a_tilde_is_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    config = from_dotted(dict.fromkeys(PLACES, "~/x") | {"rewards": [{"fn": "f"}]})
    for place in PLACES:
        section, name = place.split(".")
        assert getattr(getattr(config, section), name) == str(tmp_path / "x"), place
