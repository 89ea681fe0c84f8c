"""What every test shares: one seed from the environment, no network, no GPU, single-threaded arithmetic."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("ACCELERATE_USE_CPU", "true")  # the same tests on a machine with a GPU; it has scripts/gpu_check

import pytest
from hypothesis import settings

settings.register_profile("llmrl", deadline=None)  # an example may take as long as a busy machine needs
settings.load_profile("llmrl")

REPOSITORY = Path(__file__).resolve().parents[1]
DATA = REPOSITORY.parent / "shared" / "data"


@pytest.fixture
def seed() -> int:
    """Seed of a test's random inputs; tests hold for any."""
    return int(os.environ.get("LLMRL_TEST_SEED", "0"))


@pytest.fixture
def shared_data() -> Path:
    """Folder with real datasets, where this checkout has one beside it."""
    if not DATA.is_dir():
        pytest.skip("no ../shared/data beside this checkout")
    return DATA


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Folder of SmolLM2-135M-Instruct: `$LLMRL_SMOLLM2`, or the cache, filled if need be; skips without a source."""
    if given := os.environ.get("LLMRL_SMOLLM2"):
        return Path(given)
    from llmrl.errors import UserError
    from llmrl.verify.spec import load_file

    script = load_file(REPOSITORY / "scripts" / "fetch_model.py")
    try:
        return script.fetch(script.cache_folder())
    except UserError as error:
        pytest.skip(str(error))
