"""Runs on rows: the losses of DPO and KTO, by TRL's names."""

from __future__ import annotations

from typing import Any

from llmrl.run.from_trl.fields import Fields, Translation, copy
from llmrl.run.from_trl.tables import ROWS

SMOOTHED = ("sigmoid", "exo_pair", "robust", "aot", "aot_unpaired")
"""Losses that read label_smoothing."""


def rows(found: Translation, fields: Fields, refused: list[str], *, pairs: bool) -> None:
    """Set what is read of a row, the reference, and the loss."""
    copy(found, fields, ROWS)
    if "max_length" in fields and fields.get("max_length") is None:
        found.options["algo.max_length"] = 2**31 - 1
    if fields.get("sync_ref_model"):
        found.options["algo.reference.steps"] = fields.get("ref_model_sync_steps") or 512
        found.options["algo.reference.alpha"] = fields.get("ref_model_mixup_alpha") or 0.6
    fields.read |= {"ref_model_sync_steps", "ref_model_mixup_alpha"}
    if "train_sampling_strategy" in fields:
        found.options["data.shuffle"] = fields.get("train_sampling_strategy") == "random"
        if fields.get("train_sampling_strategy") not in ("random", "sequential"):
            refused.append("train_sampling_strategy: use random or sequential; sequences are packed by length anyway")
    if pairs:
        _pair_loss(found, fields, refused)
        return
    if "loss_type" in fields:
        found.options["algo.loss.kind"] = fields.get("loss_type")
    named = ("beta", "desirable_weight", "undesirable_weight")
    copy(found, fields, {name: f"algo.loss.{name}" for name in named})


def _pair_loss(found: Translation, fields: Fields, refused: list[str]) -> None:
    """Set the loss of a pair, or the sum of several, and the divergence."""
    kinds = fields.get("loss_type") or (["sigmoid"] if fields.any("beta", "label_smoothing") else [])
    kinds = [kinds] if isinstance(kinds, str) else list(kinds)
    weights = fields.get("loss_weights") or [1.0] * len(kinds)
    smoothing, tau = fields.get("label_smoothing"), fields.get("discopop_tau")
    if len(weights) != len(kinds):
        refused.append(f"loss_weights has {len(weights)} entries for {len(kinds)} losses in loss_type")
        return
    terms: list[dict[str, Any]] = []
    for kind, weight in zip(kinds, weights, strict=True):
        term: dict[str, Any] = {"kind": "aot" if kind == "aot_pair" else kind}
        if kind != "sft" and "beta" in fields:
            term["beta"] = fields.get("beta")
        if kind in SMOOTHED and smoothing:
            term["label_smoothing"] = smoothing
        if kind == "discopop" and tau is not None:
            term["tau"] = tau
        if weight != 1:
            term["weight"] = weight
        terms.append(term)
    if smoothing and not set(kinds) & set(SMOOTHED):
        refused.append(f"label_smoothing {smoothing}: loss_type {', '.join(kinds)} does not read it; leave it out")
    if len(terms) == 1:
        found.options |= {f"algo.loss.{key}": value for key, value in terms[0].items()}
    elif terms:
        found.options["algo.loss"] = {"kind": "sum", "terms": terms}
    divergence, coef = fields.get("f_divergence_type"), fields.get("f_alpha_divergence_coef")
    if divergence is not None:
        found.options["algo.divergence.kind"] = divergence
        if divergence == "alpha_divergence" and coef is not None:
            found.options["algo.divergence.coef"] = coef
