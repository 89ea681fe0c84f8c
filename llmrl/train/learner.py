"""Stage 5: a batch of samples -> optimizer steps. Knows no method: it is handed an algorithm and calls its hooks."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from llmrl.algo.ops.corrections import finish_metrics, mismatch_metrics
from llmrl.algo.preference.pairs import count_pairs
from llmrl.errors import RunFailed
from llmrl.model.modes import evaluating, optimizing
from llmrl.train.influence import GroupScores
from llmrl.train.packing import Layout, to_tensor
from llmrl.train.streams import compute_streams
from llmrl.types import Counts, ForwardOutputs, MicroBatch, Sample, TrainBatch

if TYPE_CHECKING:
    from torch import Tensor

    from llmrl.algo.base import Algorithm
    from llmrl.model.parallel import Parallel
    from llmrl.model.policy import Policy
    from llmrl.train.options import TrainConfig

MISMATCH = "kl/mismatch"


class Learner:
    """Owns the optimizer and turns a `TrainBatch` into updates of the policy.

    Every process knows the whole batch; which process computes which sequence is a pure function of it. Losses are
    divided by global counts before the backward pass and gradients are summed over processes, so the update does not
    depend on micro-batch size, packing or the number of processes.

    Args:
        policy: what is trained. From here on its trained parameters are float32 and spread over the processes.
        options: the optimizer, the length of the run, and how samples are laid out.
        parallel: the processes.
        critic_learning_rate: of the critic's own parameters; by default the policy's.
    """

    def __init__(
        self, policy: Policy, options: TrainConfig, parallel: Parallel, *, critic_learning_rate: float | None = None
    ) -> None:
        self.policy, self.options, self.parallel = policy, options, parallel
        policy.hold()
        self.layout = Layout(policy, options, parallel)
        self.policy_parameters, self.critic_parameters = policy.parameters_to_train()
        self.parameters = self.policy_parameters + self.critic_parameters
        groups: list[dict[str, Any]] = [{"params": self.policy_parameters}]
        if self.critic_parameters:
            rate = options.learning_rate if critic_learning_rate is None else critic_learning_rate
            groups.append({"params": self.critic_parameters, "lr": rate})
        optimizer = torch.optim.AdamW(
            groups,
            lr=options.learning_rate,
            betas=(options.adam_beta1, options.adam_beta2),
            eps=options.adam_epsilon,
            weight_decay=options.weight_decay,
            fused=True,
        )
        self.optimizer = policy.distribute(parallel, optimizer)
        self.learning_rates = [group["lr"] for group in self.optimizer.param_groups]
        self.num_updates = 0
        self.num_scheduled = 0
        self.num_frozen_batches = 0
        self.num_skipped = 0

    def update(self, batch: TrainBatch, algorithm: Algorithm) -> dict[str, float]:
        """Take all optimizer steps of one batch.

        Returns:
            Metrics, the same on every process: what the loss reports (means over the optimizer steps that computed
            something; of keys that end in `/max` the maximum), loss/total, policy/entropy, policy/grad_norm, policy/lr,
            and kl/mismatch (sampler against trainer before the first step: `mismatch_metrics`).

        Raises:
            RunFailed: more than `train.max_skipped_steps` optimizer steps had a non-finite gradient.
        """
        computed = _with_gradient(batch.samples, algorithm)
        scores = GroupScores(self.layout, algorithm, batch)
        self._fill(computed, algorithm, scores)
        if algorithm.needs.refine:
            algorithm.refine(batch)
        self.num_frozen_batches += algorithm.policy_frozen
        reports: list[dict[str, float]] = []
        with optimizing(self.policy.wrapped, dropout=self.options.dropout):
            for _ in range(algorithm.passes):
                for mini_batch in self._mini_batches(batch, algorithm.num_mini_batches):
                    reports.append(self._step(mini_batch, batch, algorithm, scores))
        found = _over_steps(reports) | self._mismatch(batch, algorithm, reports[0])
        return found | {
            "policy/lr": self.optimizer.param_groups[0]["lr"],
            "policy/skipped_updates": self.num_skipped,
            "train/computed_frac": sum(not s.probe for s in computed) / max(1, len(batch.samples)),
        }

    @torch.no_grad()
    def measure(self, batch: TrainBatch, algorithm: Algorithm) -> dict[str, float]:
        """Compute what the loss reports of a batch (loss/total too) without training on it, alike on every process."""
        self._fill(_with_gradient(batch.samples, algorithm), algorithm, GroupScores(self.layout, algorithm, batch))
        if algorithm.needs.refine:
            algorithm.refine(batch)
        counts, totals = _count(batch.samples, batch), dict[str, "Tensor"]()
        whole = range(batch.num_groups) if algorithm.needs.whole_groups else ()
        with evaluating(self.policy.wrapped):
            for micro_batch in self.layout.micro_batches(batch.samples, whole=whole):
                loss, metrics = algorithm.loss(self.policy.forward(micro_batch), micro_batch, counts)
                _accumulate(totals, metrics | {"loss/total": loss})
        return to_floats(self._reduce(totals))

    def fill_reference(self, samples: list[Sample]) -> None:
        """Set the reference log-probabilities before the first update: until then the policy is its own reference."""
        compute_streams(self.layout, samples, lambda rows: {"ref_logprobs": self.policy.forward(rows).logprobs})

    # --- before the first step: what the algorithm reads of the policy as it is now ---

    def _fill(self, samples: list[Sample], algorithm: Algorithm, scores: GroupScores) -> None:
        """Compute what the loss and `refine` read of the policy as it is now, and of the reference."""
        needs, policy, layout = algorithm.needs, self.policy, self.layout
        # Value pre-training uses of the policy what `refine` reads of it, for a KL in the reward.
        unread = algorithm.policy_frozen and not (needs.old_logprobs or needs.old_entropies)
        if needs.ref_logprobs and not unread:
            without = [s for s in samples if s.ref_logprobs is None]
            compute_streams(layout, without, lambda rows: {"ref_logprobs": policy.reference_logprobs(rows)})
        wants_old = (algorithm.steps_per_batch > 1 and not unread) or needs.old_logprobs or needs.old_entropies
        if needs.rollout_as_old:
            wants_old = False
            for sample in samples:
                sample.old_logprobs = sample.rollout_logprobs
        unscored = scores.score_first(samples, with_old=wants_old)
        names = ["old_logprobs"] * wants_old + ["old_entropies"] * needs.old_entropies
        if names:
            names += ["old_values"] * needs.values
            # What has been scored has its old log-probabilities by now, but not the entropies.
            waiting = samples if needs.old_entropies else unscored
            compute_streams(layout, waiting, lambda rows: self._old_streams(rows, names))
        elif needs.values:
            compute_streams(layout, samples, lambda rows: {"old_values": policy.values(rows)})
        if probes := [s for s in samples if s.probe and s.old_logprobs is None]:
            compute_streams(layout, probes, lambda rows: self._old_streams(rows, ["old_logprobs"]))
        if needs.policy_streams:
            compute_streams(layout, samples, policy.streams)
        if needs.collisions:
            compute_streams(layout, samples, lambda rows: {"collisions": policy.collisions(rows)})

    def _old_streams(self, micro_batch: MicroBatch, names: list[str]) -> dict[str, Tensor]:
        outputs = self.policy.forward(micro_batch)
        streams = {"old_logprobs": outputs.logprobs, "old_entropies": outputs.entropy}
        if outputs.values is not None:
            streams["old_values"] = outputs.values
        return {name: streams[name] for name in names}

    def _mismatch(self, batch: TrainBatch, algorithm: Algorithm, first: dict[str, float]) -> dict[str, float]:
        """Return kl/mismatch of the whole batch before its first optimizer step, whose report is `first`.

        Where several steps use the batch, the first one holds a part of it, but the old log-probabilities are known.
        """
        if not batch.sampled or algorithm.steps_per_batch == 1 or algorithm.needs.rollout_as_old:
            return {key: value for key, value in first.items() if key.startswith(MISMATCH)}
        known = [s for s in batch.samples if s.old_logprobs is not None]
        if not known:
            return {}
        old = to_tensor(np.concatenate([s.old_logprobs for s in known if s.old_logprobs is not None]), "cpu")
        drawn = to_tensor(np.concatenate([s.rollout_logprobs for s in known]), "cpu")
        return finish_metrics(to_floats(mismatch_metrics(old, drawn, len(old))))

    # --- optimizer steps ---

    def _mini_batches(self, batch: TrainBatch, count: int) -> list[list[Sample]]:
        """Deal whole groups into `count` mini-batches, in a fresh order for every pass."""
        if count == 1:
            return [batch.samples]
        random = np.random.Generator(np.random.Philox([self.options.seed, self.num_updates]))
        order = random.permutation(batch.num_groups)
        parts = [set(order[k::count].tolist()) for k in range(count)]
        return [[s for s in batch.samples if s.group in part] for part in parts]

    def _step(
        self, samples: list[Sample], batch: TrainBatch, algorithm: Algorithm, scores: GroupScores
    ) -> dict[str, float]:
        """Take one optimizer step over one mini-batch; groups that wait for their scores get them on the way."""
        computed = _with_gradient(samples, algorithm)
        counts = _count(samples, batch, num_computed=sum(s.num_tokens for s in computed))
        whole = range(batch.num_groups) if algorithm.needs.whole_groups else scores.waiting
        micro_batches = self.layout.micro_batches(computed, whole=whole)
        totals: dict[str, Tensor] = {}
        for number, micro_batch in enumerate(micro_batches):
            last = number == len(micro_batches) - 1
            with contextlib.nullcontext() if last else self.parallel.no_sync(self.policy.wrapped):
                if algorithm.policy_frozen:
                    loss, metrics = algorithm.value_loss(self.policy.values(micro_batch), micro_batch, counts)
                else:
                    reference = self.policy.reference_head(micro_batch) if algorithm.needs.full_kl else None
                    outputs = self.policy.forward(micro_batch, with_hidden=bool(scores.waiting), reference=reference)
                    scores.apply(micro_batch, outputs, computed)
                    loss, metrics = algorithm.loss(outputs, micro_batch, counts)
                    loss = loss + 0.0 * outputs.logprobs.sum()  # a micro-batch without tokens still has a graph
                    metrics |= _policy_metrics(outputs, micro_batch, counts, sampled=batch.sampled)
                self.parallel.backward(loss)
            _accumulate(totals, metrics | {"loss/total": loss.detach()})
        if algorithm.policy_frozen:
            self.parallel.add_gradients(self.critic_parameters)
        scores.finish(computed)
        totals, gradient_norms = self._reduce(totals), self._clip()
        found = to_floats(totals | gradient_norms)  # the one place in a step that waits for the device
        norms = {key: found.pop(key) for key in gradient_norms}
        report = finish_metrics(found)
        if not computed:  # nothing was measured: no value is better than a 0 that looks like one
            report = {"loss/total": report["loss/total"]}
        report |= norms
        if all(math.isfinite(value) for value in (*norms.values(), report["loss/total"])):
            self._set_rates(algorithm)
            self.optimizer.step()
        else:
            self._skip(report, samples)
        self.optimizer.zero_grad()
        self.num_updates += 1
        if algorithm.needs.ref_sync is not None and self.num_updates % algorithm.needs.ref_sync[0] == 0:
            self.policy.move_reference(algorithm.needs.ref_sync[1])
        return report

    def _set_rates(self, algorithm: Algorithm) -> None:
        """Set the learning rates of the optimizer step at hand.

        They follow `learning_rate_factor` over the steps and batches that train the policy. Value pre-training comes
        before those and has a schedule of its own: the critic's rate falls linearly to 0.
        """
        if algorithm.policy_frozen:
            factors = [0.0, 1 - self.num_updates / algorithm.num_frozen_updates]
        else:
            total = (self.options.max_steps - self.num_frozen_batches) * algorithm.steps_per_batch
            factors = [learning_rate_factor(self.options, self.num_scheduled, total=total)] * 2
            self.num_scheduled += 1
        for group, rate, factor in zip(self.optimizer.param_groups, self.learning_rates, factors, strict=False):
            group["lr"] = rate * factor

    def _reduce(self, totals: dict[str, Tensor]) -> dict[str, Tensor]:
        """Add every metric over processes, or take the maximum where its key ends in `/max`."""
        return self.parallel.reduce(totals, largest={key for key in totals if key.endswith("/max")})

    def _clip(self) -> dict[str, Tensor]:
        """Clip gradients and return their norms before. Policy and critic do not shorten each other's steps."""
        limit = self.options.max_grad_norm or math.inf
        parts = {"policy/grad_norm": self.policy_parameters, "value/grad_norm": self.critic_parameters}
        return {name: self.parallel.clip(parameters, limit) for name, parameters in parts.items() if parameters}

    def _skip(self, report: dict[str, float], samples: list[Sample]) -> None:
        """Record the mini-batch of a step that would have broken the weights; stop when there are too many."""
        self.num_skipped += 1
        folder = Path(self.options.output_dir) / "skipped"
        if self.parallel.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            torch.save({"report": report, "samples": samples}, folder / f"update-{self.num_updates:08d}.pt")
        if self.num_skipped > self.options.max_skipped_steps:
            raise RunFailed(
                f"{self.num_skipped} optimizer steps had a non-finite loss or gradient (loss "
                f"{report['loss/total']}, gradient norm {report['policy/grad_norm']}), more than "
                f"train.max_skipped_steps {self.options.max_skipped_steps}; their batches are in {folder}. Try a lower "
                "learning rate"
            )

    # --- checkpoints ---

    def state_dict(self) -> dict[str, Any]:
        """Return everything of the learner, except the weights, that the next step depends on."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "num_updates": self.num_updates,
            "num_scheduled": self.num_scheduled,
            "num_frozen_batches": self.num_frozen_batches,
            "num_skipped": self.num_skipped,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore from `state_dict`."""
        options = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        # The checkpoint's options came along. Those that this run was given count, as for everything else.
        for group, given in zip(self.optimizer.param_groups, options, strict=True):
            group.update(given)
        self.num_updates, self.num_scheduled = state["num_updates"], state["num_scheduled"]
        self.num_frozen_batches, self.num_skipped = state["num_frozen_batches"], state["num_skipped"]


def _count(samples: list[Sample], batch: TrainBatch, *, num_computed: int | None = None) -> Counts:
    num_pairs, num_preferred_tokens = count_pairs(samples)
    num_tokens = sum(s.num_tokens for s in samples)
    return Counts(
        num_tokens=max(1, num_tokens),
        num_skipped_tokens=0 if num_computed is None else num_tokens - num_computed,
        num_sequences=max(1, len(samples)),
        num_groups=max(1, len({s.group for s in samples})),
        max_completion_length=batch.max_completion_length,
        num_pairs=max(1, num_pairs),
        num_preferred_tokens=max(1, num_preferred_tokens),
    )


def _with_gradient(samples: list[Sample], algorithm: Algorithm) -> list[Sample]:
    """Return the samples that change the gradient. The others count in the denominators and cost nothing."""
    return [s for s in samples if algorithm.needs.every_sample or np.any(s.advantages)]


def learning_rate_factor(config: TrainConfig, step: int, *, total: int) -> float:
    """Return the factor on the learning rate at `step` (from 0) of `total`: linear warm-up, then the chosen shape."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, total - config.warmup_steps)
    if config.lr_scheduler_type == "linear":
        return max(0.0, 1 - done)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, done))) if config.lr_scheduler_type == "cosine" else 1.0


def _over_steps(reports: list[dict[str, float]]) -> dict[str, float]:
    """Combine the reports of the optimizer steps of a batch: the mean, or of keys that end in `/max` the maximum."""
    values: dict[str, list[float]] = {}
    for report in reports:
        for key, value in report.items():
            if not key.startswith(MISMATCH):  # later steps would measure the update
                values.setdefault(key, []).append(value)
    return {key: max(found) if key.endswith("/max") else float(np.mean(found)) for key, found in values.items()}


def _policy_metrics(
    outputs: ForwardOutputs, micro_batch: MicroBatch, counts: Counts, *, sampled: bool
) -> dict[str, Tensor]:
    """Return this micro-batch's share of what is measured of every policy, whatever its loss is."""
    tokens, metrics = counts.num_computed_tokens, dict[str, "Tensor"]()
    if sampled:
        metrics |= mismatch_metrics(outputs.logprobs.detach(), micro_batch.rollout_logprobs, tokens)
    return metrics | {"policy/entropy": outputs.entropy.detach().sum() / tokens}


def to_floats(values: dict[str, Tensor]) -> dict[str, float]:
    """Return numbers that lie on a device, all in one copy."""
    if not values:
        return {}
    found: list[float] = torch.stack([value.float() for value in values.values()]).tolist()  # pyright: ignore
    return dict(zip(values, found, strict=True))


def _accumulate(totals: dict[str, Tensor], metrics: dict[str, Tensor]) -> None:
    for key, value in metrics.items():
        if key not in totals:
            totals[key] = value
        elif key.endswith("/max"):
            totals[key] = torch.maximum(totals[key], value)
        else:
            totals[key] = totals[key] + value
