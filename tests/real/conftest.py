"""A pretrained model for the tests in this folder. They are all slow, and are skipped where it cannot be had."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from llmrl.errors import UserError
from llmrl.verify.spec import load_file

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Folder of SmolLM2-135M-Instruct: `$LLMRL_SMOLLM2`, or the cache, which is filled if need be."""
    if given := os.environ.get("LLMRL_SMOLLM2"):
        return Path(given)
    script = load_file(REPOSITORY / "scripts" / "fetch_model.py")
    try:
        return script.fetch(script.cache_folder())
    except UserError as error:
        pytest.skip(str(error))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of this folder as slow."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.slow)
