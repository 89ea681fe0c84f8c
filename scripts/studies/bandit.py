"""Compare mechanisms on a tabular bandit: 256 contexts x 16 arms, a softmax policy, exact probabilities.

A run takes a fraction of a second. One "completion" is one token. Common arms are wrong, and the correct ones are rare
(about 2 % each); in the two-sided variant one correct arm is common and the others are rare. The losses and advantages
are those of `llmrl.algo`.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmrl.algo.ops.advantages import group_advantages, leave_one_out, pass_at_k_advantages
from llmrl.algo.ops.losses import cispo_loss, clipped_surrogate, importance_ratio, sapo_loss
from llmrl.algo.ops.token_hidden_reward import influence, influence_matrix, prediction_errors, thr_weights
from studies.tables import cell, markdown

CONTEXTS, ARMS, GROUP, STEPS, UPDATES = 256, 16, 16, 15, 4
LEARNING_RATE = 1.0

Outcome = dict[str, float]


def start(seed: int, *, common_right: bool) -> tuple[Tensor, Tensor]:
    """Return (logits [C, A], right [C, A]): 4 common arms and 12 rare ones (about 2 % each).

    3 of the rare arms are right; with `common_right` one common arm is right too.
    """
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(CONTEXTS, ARMS, generator=generator) * 0.3
    logits[:, 4:] -= 2.3
    right = torch.zeros(CONTEXTS, ARMS)
    right[:, 4:7] = 1.0
    if common_right:
        right[:, 0] = 1.0
    return logits, right


def train(seed: int, options: dict[str, Any]) -> Outcome:
    """Train some batches of GRPO with these options and measure the policy in expectation."""
    options = {"advantage": "group", "loss": "clip", "epsilon_high": 0.2, "common_right": False, "noise": 0.0} | options
    logits, right = start(seed, common_right=options["common_right"])
    logits.requires_grad_()
    generator = torch.Generator().manual_seed(seed + 1000)
    contexts = torch.arange(CONTEXTS).repeat_interleave(GROUP)
    for _ in range(STEPS):
        with torch.no_grad():
            arms = torch.multinomial(logits.softmax(-1), GROUP, replacement=True, generator=generator)
            outcomes = right.gather(1, arms)
            rewards = outcomes + options["noise"] * torch.randn(outcomes.shape, generator=generator)
            old = logits.log_softmax(-1).gather(1, arms).flatten()
            advantages = advantages_of(options["advantage"], rewards, outcomes)
            advantages = (advantages * thr_factors(logits, arms, outcomes, options.get("thr_p"))).flatten()
        for _ in range(UPDATES):
            logprobs = logits.log_softmax(-1)[contexts, arms.flatten()]
            losses = loss_of(options, logprobs, old, advantages)
            (gradient,) = torch.autograd.grad(losses.sum() / GROUP, logits)
            with torch.no_grad():
                logits -= LEARNING_RATE * gradient
    probabilities = logits.detach().softmax(-1)
    return {
        "accuracy": (probabilities * right).sum(-1).mean().item(),
        "rare right": probabilities[:, 4:7].sum(-1).mean().item(),
        "greedy": right.gather(1, probabilities.argmax(-1, keepdim=True)).mean().item(),
        "pass@16": (1 - (1 - (probabilities * right).sum(-1)) ** 16).mean().item(),
        "entropy": -(probabilities * probabilities.clamp(min=1e-30).log()).sum(-1).mean().item(),
        "distinct right": ((probabilities > 0.05) * right).sum(-1).mean().item(),
    }


def advantages_of(kind: str, rewards: Tensor, outcomes: Tensor) -> Tensor:
    if kind == "leave_one_out":
        return leave_one_out(rewards)
    if kind.startswith("passk"):
        return pass_at_k_advantages(outcomes, int(kind.removeprefix("passk")))
    mean, scale = kind.split("/") if "/" in kind else (kind, kind)
    return group_advantages(rewards, mean=mean, scale=scale)  # pyright: ignore[reportArgumentType]


def loss_of(options: dict[str, Any], logprobs: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
    ids = torch.arange(len(logprobs))
    ratio = importance_ratio(logprobs, old, ids, torch.ones_like(ids), "token")
    if options["loss"] == "cispo":
        return cispo_loss(ratio, logprobs, advantages, max_ratio=5.0)
    if options["loss"] == "sapo":
        return sapo_loss(ratio, advantages, temperature_pos=1.0, temperature_neg=1.05)
    return clipped_surrogate(ratio, advantages, epsilon=0.2, epsilon_high=options["epsilon_high"])


def thr_factors(logits: Tensor, arms: Tensor, outcomes: Tensor, p: float | None) -> Tensor:
    """Compute the factors of THR without threshold.

    The "hidden state" of a context is its own one-hot row, so influence stays within the context.
    """
    if p is None:
        return torch.ones_like(outcomes)
    factors = []
    one = torch.ones(GROUP, 1)
    for row, chosen, right in zip(logits.softmax(-1), arms, outcomes, strict=True):
        errors = prediction_errors(row.repeat(GROUP, 1), chosen)
        score = influence(errors, one, influence_matrix(errors, one, right)) * (2 * right - 1)
        factors.append(thr_weights(score, p=p, above=-math.inf))
    return torch.stack(factors)


NORMALIZATIONS = (("group", "group"), ("group", "batch"), ("group", "none"), ("batch", "batch"))
STUDIES: dict[str, dict[str, dict[str, Any]]] = {
    "clip-higher (right arms are rare)": {f"epsilon_high {e}": {"epsilon_high": e} for e in (0.2, 0.28, 0.5, 1.0)}
    | {"cispo (cap 5)": {"loss": "cispo"}, "sapo": {"loss": "sapo"}},
    "normalization (right arms are rare)": {
        f"mean {mean}, scale {scale}": {"advantage": f"{mean}/{scale}", "epsilon_high": 1.0}
        for mean, scale in (*NORMALIZATIONS, ("none", "none"))
    }
    | {"leave one out": {"advantage": "leave_one_out", "epsilon_high": 1.0}},
    "normalization, noisy reward (deviation 0.05)": {
        f"mean {mean}, scale {scale}": {"advantage": f"{mean}/{scale}", "epsilon_high": 1.0, "noise": 0.05}
        for mean, scale in NORMALIZATIONS
    },
    "sign of THR's p (a common right arm and rare ones)": {
        f"p {p:+.1f}": {"thr_p": p, "epsilon_high": 1.0, "common_right": True}
        for p in (-0.9, -0.5, -0.1, 0.0, 0.1, 0.5, 0.9)
    },
    "pass@k (a common right arm and rare ones)": {"group": {"epsilon_high": 1.0, "common_right": True}}
    | {f"pass@{k}": {"advantage": f"passk{k}", "epsilon_high": 1.0, "common_right": True} for k in (2, 4, 8)},
}


def main(num_seeds: int, file: Path | None) -> None:
    """Print one table per mechanism; each number has the 95 % interval of its mean over seeds."""
    stored: dict[str, dict[str, list[Outcome]]] = {}
    for study, arms in STUDIES.items():
        stored[study] = {name: [train(seed, options) for seed in range(num_seeds)] for name, options in arms.items()}
        columns = list(next(iter(stored[study].values()))[0])
        body = [[name, *(cell([run[c] for run in runs]) for c in columns)] for name, runs in stored[study].items()]
        print(f"\n{study}\n\n{markdown(['', *columns], body)}", flush=True)
    if file is not None:
        file.write_text(json.dumps(stored) + "\n")
