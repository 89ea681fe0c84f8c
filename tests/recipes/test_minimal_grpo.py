"""The one-file GRPO is short, it runs, and its advantages and loss equal those of the library."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from llmrl.algo.ops.advantages import group_advantages
from llmrl.algo.ops.losses import clipped_surrogate, token_ratio

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "minimal_grpo.py"


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(RECIPE.parent))
    import minimal_grpo

    return minimal_grpo


def test_it_stays_readable() -> None:
    assert len(RECIPE.read_text().splitlines()) < 300


def test_its_arithmetic_is_the_librarys(recipe: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randint(0, 2, (6, 5), generator=generator).float()
    torch.testing.assert_close(recipe.group_advantages(rewards), group_advantages(rewards), rtol=0, atol=1e-6)
    logprobs = -torch.rand(4, 7, generator=generator)
    old = logprobs + 0.4 * torch.randn(4, 7, generator=generator)
    advantages = torch.randn(4, generator=generator)
    mask = torch.arange(7) < torch.tensor([[7], [3], [1], [5]])
    found = recipe.grpo_loss(logprobs, old, advantages, mask, clip_low=0.2, clip_high=0.28)
    per_token = advantages[:, None].expand(4, 7)[mask]
    losses = clipped_surrogate(token_ratio(logprobs, old)[mask], per_token, epsilon=0.2, epsilon_high=0.28)
    assert found.item() == pytest.approx(losses.mean().item(), abs=1e-6)


@pytest.mark.parametrize(
    ("text", "reward"),
    [("<think></think>\\boxed{92}", 1.0), ("\\boxed{91}", 0.0), ("\\boxed{92} ", 0.0), ("\\boxed{92}\\boxed{92}", 0.0)],
)
def test_its_verifier(recipe: Any, text: str, reward: float) -> None:
    assert recipe.verify(text, 92) == reward


@pytest.mark.slow
def test_it_runs() -> None:
    options = ["--warm_start_steps", "20", "--steps", "5", "--prompts", "4", "--group", "4", "--updates", "2"]
    environment = os.environ | {"PYTHONPATH": str(RECIPE.parents[1])}
    done = subprocess.run([sys.executable, str(RECIPE), *options], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "step   5" in done.stdout
    assert "after: held-out accuracy" in done.stdout
