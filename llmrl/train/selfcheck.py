"""The check before the first step: the ways in which training computes log-probabilities are right on this very model.

Packed rows, shared prefixes and our log-prob head are faster than the model's plain forward pass and must equal it. An
architecture that transformers or we treat differently than expected would train on wrong numbers without any error.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from llmrl.errors import RunFailed
from llmrl.model.policy import evaluating
from llmrl.tolerance import forward_gap
from llmrl.train.packing import build_micro_batch, to_tensor
from llmrl.train.prefixes import Tree
from llmrl.types import Sample

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from llmrl.model.critic import Critic
    from llmrl.model.policy import Policy
    from llmrl.types import MicroBatch

PROMPT_LENGTH = 12
COMPLETION_LENGTHS = (3, 5, 1)


def check_forward(policy: Policy, *, packing: bool = True) -> None:
    """Prove that the log-prob head and packed rows equal the model's plain forward pass, on random tokens.

    It also finds out whether sequences can share a prefix and sets `policy.can_share_prefixes`; recurrent layers, for
    example, cannot.

    Args:
        policy: the model to check, with its critic.
        packing: check packed rows too.

    Raises:
        RunFailed: the head or packing differs by more than rounding; the message gives the measured gap.
    """
    random = np.random.Generator(np.random.Philox(key=0))
    prompt = random.integers(0, policy.vocab_size, PROMPT_LENGTH)
    samples = [_probe(prompt, random.integers(0, policy.vocab_size, length)) for length in COMPLETION_LENGTHS]
    plain = _plain_logprobs(policy, samples)
    lay_out = partial(build_micro_batch, samples, device=policy.device)
    apart = lay_out([[0], [1], [2]])
    _compare(policy, "log-prob head", apart, plain, "this architecture changes its logits in a way not known here")
    if packing:
        fix = "set train.packing false, or try model.attn_implementation sdpa"
        for rows in ([[0, 1, 2]], [[0], [1, 2]]):
            packed = lay_out(rows)
            _compare(policy, "packed row", packed, plain, fix)
            _compare_critic(policy.critic, "packed row", apart, packed, fix)
    trees = [
        Tree(samples=(0, 1), prefix=PROMPT_LENGTH, length=PROMPT_LENGTH + sum(COMPLETION_LENGTHS[:2])),
        Tree(samples=(2,), prefix=0, length=PROMPT_LENGTH + COMPLETION_LENGTHS[2]),
    ]
    try:
        for causal_head in {0, PROMPT_LENGTH}:
            shared = lay_out([[0, 1]], trees=trees)
            shared.visibility = replace(shared.visibility, causal_head=causal_head)
            _compare(policy, "shared prefix", shared, plain, "")
            _compare_critic(policy.critic, "shared prefix", apart, shared, "")
        policy.can_share_prefixes = True
    except (RunFailed, RuntimeError, ValueError, TypeError):
        # Some models reject a mask of ours, others ignore it. Either way prefixes are simply not shared.
        policy.can_share_prefixes = False


def _plain_logprobs(policy: Policy, samples: list[Sample]) -> Float[Tensor, " M"]:
    """Compute log-probabilities of the trained tokens with the transformers model as anybody would call it."""
    found: list[Tensor] = []
    with torch.no_grad(), evaluating(policy.module), policy.computing():
        for sample in samples:
            ids = to_tensor(sample.input_ids, policy.device)[None]
            logits: Tensor = policy.causal_lm(input_ids=ids, use_cache=False).logits
            logprobs = logits.float().log_softmax(-1)[0, :-1]
            chosen = logprobs.gather(1, ids[0, 1:, None])[:, 0]
            found.append(chosen[to_tensor(sample.loss_mask[1:], policy.device)])
    return torch.cat(found)


def _compare(policy: Policy, what: str, batch: MicroBatch, plain: Float[Tensor, " M"], fix: str) -> None:
    gap = (policy.exact_logprobs(batch) - plain).abs().max().item()
    tolerance = _tolerance(policy.dtype)
    if not gap <= tolerance:  # also where the gap is NaN
        raise RunFailed(
            f"{type(policy.causal_lm).__name__}: the {what} gives log-probabilities {gap:.2g} nats away from "
            f"the model's plain forward pass (rounding explains {tolerance:g}); {fix}"
        )


def _compare_critic(critic: Critic | None, what: str, apart: MicroBatch, together: MicroBatch, fix: str) -> None:
    """Check that the critic's own trunk, maybe of another architecture, handles a layout of sequences.

    Raises:
        RunFailed: its hidden states differ from those of the sequences `apart` by more than rounding.
    """
    if critic is None or critic.trunk is None:
        return
    with torch.no_grad(), evaluating(critic):
        expected, found = (
            critic.hidden_states(b.input_ids, b.position_ids, b.predict_from, b.visibility).float()
            for b in (apart, together)
        )
    tolerance = _tolerance(critic.dtype)
    gap = ((found - expected).abs().max() / expected.abs().max()).item()
    if not gap <= tolerance:
        raise RunFailed(
            f"the critic's {type(critic.trunk).__name__}: the {what} changes its hidden states by {gap:.2g} of the "
            f"largest (rounding explains {tolerance:g}); {fix}"
        )


def _tolerance(dtype: torch.dtype) -> float:
    return forward_gap(str(dtype).removeprefix("torch."))


def _probe(prompt: np.ndarray, completion: np.ndarray) -> Sample:
    """Make a sample for checking a forward pass."""
    zeros = np.zeros(len(completion), np.float32)
    return Sample(
        input_ids=np.concatenate([prompt, completion]).astype(np.int64),
        loss_mask=np.concatenate([np.zeros(len(prompt), bool), np.ones(len(completion), bool)]),
        advantages=zeros,
        rollout_logprobs=zeros,
        group=0,
        index=0,
    )
