"""The check before the first step: the ways in which training computes log-probabilities are right on this very model.

Packed rows, shared prefixes and our log-prob head are faster than the model's plain forward pass and must equal it. An
architecture that transformers or we treat differently than expected would train on wrong numbers without any error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from llmrl.errors import LlmrlError, RunFailed, first_line
from llmrl.model.attention import Kernel, caps_scores
from llmrl.model.modes import evaluating
from llmrl.model.rounding import PROMPT_LENGTH, computing_in, likely_sequences, rounding_errors
from llmrl.noise import Gap, Limit
from llmrl.train.packing import build_micro_batch, to_tensor
from llmrl.train.prefixes import Tree
from llmrl.types import Sample

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from llmrl.model.critic import Critic
    from llmrl.model.policy import Policy, PolicyModule
    from llmrl.train.planning import Rows
    from llmrl.types import MicroBatch

MORE_DRAWS = 8
"""Rounding errors drawn when a comparison looks wrong, before it is called wrong."""
UNTOUCHED = 1e-4
"""Changes of hidden states, as a share of the largest, that are rounding in float32: such as that of a mixture of
experts, whose experts multiply other numbers of tokens when the neighbor's tokens change."""

Compute = Callable[["MicroBatch"], "Tensor"]


def check_forward(policy: Policy, *, packing: bool = True) -> list[str]:
    """Prove that the log-prob head equals the model's plain forward pass, and find out which layouts are right.

    The tokens are the model's own, and gaps are compared with rounding that is measured on the model. Layouts that turn
    out wrong are not used: `policy.can_pack` and `policy.can_share_prefixes` say so.

    Args:
        policy: the model to check, with its critic.
        packing: check packed rows too.

    Returns:
        Notes for the user about layouts that will not be used although they were asked for.

    Raises:
        RunFailed: the head differs by more than rounding, or the model cannot be run; the message gives what was found.
    """
    try:
        # Of different lengths, so that rows are padded.
        samples = [
            _probe(np.array(ids[: max(2, len(ids) - cut)]), min(PROMPT_LENGTH, len(ids) // 2))
            for cut, ids in enumerate(likely_sequences(policy))
        ]
        checked = _Checked(policy, samples)
        checked.compare("log-prob head", [[i] for i in range(len(samples))])
    except (LlmrlError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise RunFailed(
            f"{type(policy.causal_lm).__name__} cannot be trained here: its forward pass fails "
            f"({type(error).__name__}: {first_line(error)}); choose another model"
        ) from error
    notes = list[str]()
    if caps_scores(policy.model_config) and getattr(policy.model_config, "_attn_implementation", None) == "eager":
        notes.append("attention runs on eager: this model caps its scores, which sdpa leaves out")
    if packing and (wrong := _attempt(checked.packing)):
        policy.can_pack = False
        notes.append(f"train.packing is off for this run, every sequence gets a row of its own: {wrong}")
    policy.can_share_prefixes = not _attempt(checked.sharing)
    return notes


class _Checked:
    """A policy and the layouts that it is tried on."""

    def __init__(self, policy: Policy, samples: list[Sample]) -> None:
        self.policy, self.samples = policy, samples
        self.name = type(policy.causal_lm).__name__
        self.plain = _plain_logprobs(policy, samples)
        self.limit: Limit | None = None
        self.apart = self.lay_out([[i] for i in range(len(samples))])
        self.trees = _trees(samples)

    def lay_out(
        self, rows: Rows, samples: list[Sample] | None = None, *, causal_head: int | None = None, **options: Any
    ) -> MicroBatch:
        """Lay samples out; `causal_head` replaces what the layout would choose for itself."""
        batch = build_micro_batch(samples or self.samples, rows, device=self.policy.device, **options)
        if causal_head is not None:
            batch.visibility = replace(batch.visibility, causal_head=causal_head)
        return batch

    def rows(self, num: int) -> Rows:
        """Deal that many sequences to rows as a micro-batch would: one row, or several where rows may be padded."""
        cut = num if self.policy.kernel is not Kernel.MASKED else (num + 1) // 2
        return [row for row in (list(range(cut)), list(range(cut, num))) if row]

    def packing(self) -> None:
        """Raise RunFailed if sequences of a packed row see each other, or come out different for any other reason."""
        rows = self.rows(len(self.samples))
        self.independent("packed row", [_all_trained(sample) for sample in self.samples], rows)
        self.compare("packed row", rows)

    def sharing(self) -> None:
        """Raise RunFailed if masks of ours are not right; other errors come from models that take no such mask."""
        trees, packed = self.rows(len(self.trees)), self.rows(len(self.samples))
        for causal_head in (0, None):
            self.independent("shared prefix", self.samples, trees, trees=self.trees, causal_head=causal_head)
            self.compare("shared prefix", trees, trees=self.trees, causal_head=causal_head)
        if self.policy.own_masks:
            self.compare("packed row", packed, own_masks=True)

    def compare(self, what: str, rows: Rows, **options: Any) -> None:
        """Compare a layout with the plain forward pass, and the critic's own trunk with itself, apart.

        Raises:
            RunFailed: they differ by more than rounding.
        """
        batch = self.lay_out(rows, **options)
        order = _order(batch, self.samples)
        found, expected = self.policy.exact_logprobs(batch).cpu()[order], self.plain
        gap = Gap.between(found.double().numpy(), expected.double().numpy())
        if self.limit is None:
            self.limit = self.measure()
        if not self.limit.explains(gap):
            self.limit = self.measure(draws=MORE_DRAWS)
        if not self.limit.explains(gap):
            raise RunFailed(
                f"{self.name}: the {what} gives log-probabilities that are off the model's plain forward pass by "
                f"{self.limit.describe(gap)}: this architecture computes them in a way that is not known here"
            )
        critic = self.policy.critic
        if critic is not None and critic.trunk is not None:
            self.compare_critic(critic, what, batch, order)

    def measure(self, draws: int = 1) -> Limit:
        policy = self.policy
        errors = rounding_errors(
            policy.module, policy.causal_lm, lambda: policy.exact_logprobs(self.apart), draws=draws
        )
        return Limit.of(errors)

    def compare_critic(self, critic: Critic, what: str, batch: MicroBatch, order: Tensor) -> None:
        expected, found = _states(critic, self.apart), _states(critic, batch)
        largest = expected.abs().max()

        def sizes(states: Tensor) -> np.ndarray:
            return (states / largest).flatten().double().cpu().numpy()

        gap = Gap.between(sizes(found[order.to(found.device)]), sizes(expected[_order(self.apart, self.samples)]))
        trunk: Any = critic.trunk
        errors = rounding_errors(critic, trunk, lambda: (_states(critic, self.apart) / largest).flatten())
        limit = Limit.of(errors)
        if not limit.explains(gap):
            raise RunFailed(
                f"the critic's {type(trunk).__name__}: the {what} changes its hidden states, relative to the largest, "
                f"by {gap.mean:.2g} on average (rounding explains {limit.mean:.2g})"
            )

    def independent(self, what: str, samples: list[Sample], rows: Rows, **options: Any) -> None:
        """Change the trained tokens of one sequence in each row: nothing may change for its neighbors.

        Raises:
            RunFailed: something changes, so sequences see each other.
        """
        touched = {0, len(samples) // 2}
        other = [_changed(s, self.policy.vocab_size) if i in touched else s for i, s in enumerate(samples)]
        batches = [self.lay_out(rows, given, **options) for given in (samples, other)]
        lengths = [int(samples[i].loss_mask.sum()) for i in batches[0].sample_indices]
        keep = torch.tensor(np.repeat([i not in touched for i in batches[0].sample_indices], lengths))
        for owner, name, compute in self._models():
            change = _change(owner, lambda batch, compute=compute: compute(batch).cpu()[keep], batches)
            if not change <= UNTOUCHED:  # also where it is NaN
                raise RunFailed(
                    f"{name}: sequences of a {what} see each other (other tokens in one change the "
                    f"hidden states of the next by {change:.2g} of the largest)"
                )

    def _models(self) -> Iterator[tuple[PolicyModule | Critic, str, Compute]]:
        yield self.policy.module, self.name, partial(_hidden, self.policy)
        critic = self.policy.critic
        if critic is not None and critic.trunk is not None:
            yield critic, f"the critic's {type(critic.trunk).__name__}", partial(_states, critic)


def _attempt(check: Callable[[], None]) -> str:
    """Return why a layout cannot be used, or "" if it can.

    Models refuse a layout in many ways: a mask of four dimensions is an IndexError here and a TypeError there. Whatever
    it is, training goes on without the layout. Only a lack of memory says nothing about the layout.
    """
    try:
        check()
    except torch.OutOfMemoryError:
        raise
    except RunFailed as error:
        return str(error)
    except Exception as error:
        return f"the model refuses it ({type(error).__name__}: {first_line(error)})"
    return ""


@torch.no_grad()
def _change(owner: PolicyModule | Critic, compute: Compute, batches: list[MicroBatch]) -> float:
    """Return by how much hidden states differ between two batches, as a share of the largest.

    Equal bits are the usual answer. Where they differ, float32 tells rounding from dependence.
    """
    with evaluating(owner):
        before, after = (compute(batch) for batch in batches)
        if torch.equal(before, after):
            return 0.0
        with computing_in(owner, torch.float32):
            before, after = (compute(batch).double() for batch in batches)
    return float((after - before).abs().max() / before.abs().max())


def _hidden(policy: Policy, batch: MicroBatch) -> Tensor:
    """Compute the policy's hidden states at the trained tokens."""
    hidden = policy.module.hidden_states(batch.input_ids, batch.position_ids, batch.visibility)
    return hidden.flatten(0, 1)[batch.predict_from]


@torch.no_grad()
def _states(critic: Critic, batch: MicroBatch) -> Tensor:
    """Compute the hidden states of the critic's own trunk at the trained tokens."""
    with evaluating(critic):
        return critic.hidden_states(batch.input_ids, batch.position_ids, batch.predict_from, batch.visibility)


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
    return torch.cat(found).cpu()


def _order(batch: MicroBatch, samples: list[Sample]) -> Tensor:
    """Return the places of a batch's trained tokens, sample after sample."""
    starts = np.cumsum([0, *(int(samples[i].loss_mask.sum()) for i in batch.sample_indices)])
    places = {i: torch.arange(starts[k], starts[k + 1]) for k, i in enumerate(batch.sample_indices)}
    return torch.cat([places[i] for i in sorted(places)])


def _trees(samples: list[Sample]) -> list[Tree]:
    """Lay samples with the same prompt out as one tree."""
    prompts: dict[bytes, list[int]] = {}
    for i, sample in enumerate(samples):
        prompts.setdefault(sample.input_ids[: int(np.argmax(sample.loss_mask))].tobytes(), []).append(i)
    trees = list[Tree]()
    for members in prompts.values():
        prefix = int(np.argmax(samples[members[0]].loss_mask))
        length = prefix + sum(len(samples[i].input_ids) - prefix for i in members)
        trees.append(Tree(samples=tuple(members), prefix=prefix, length=length))
    return trees


def _probe(ids: np.ndarray, prompt: int) -> Sample:
    """Make a sample for checking a forward pass."""
    zeros = np.zeros(len(ids) - prompt, np.float32)
    mask = np.arange(len(ids)) >= prompt
    return Sample(input_ids=ids, loss_mask=mask, advantages=zeros, rollout_logprobs=zeros, group=0, index=0)


def _all_trained(sample: Sample) -> Sample:
    """Return the sample with every token but the first trained."""
    zeros = np.zeros(len(sample.input_ids) - 1, np.float32)
    mask = np.arange(len(sample.input_ids)) > 0
    return replace(sample, loss_mask=mask, advantages=zeros, rollout_logprobs=zeros)


def _changed(sample: Sample, vocab_size: int) -> Sample:
    """Return the sample with other tokens wherever it is trained."""
    return replace(sample, input_ids=np.where(sample.loss_mask, (sample.input_ids + 1) % vocab_size, sample.input_ids))
