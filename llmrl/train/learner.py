"""Stage 5: a batch of samples -> optimizer steps, on accelerate. Knows no algorithm: it is handed a loss."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from llmrl.algo.ops.corrections import finish_metrics, mismatch_metrics
from llmrl.algo.policy_gradient.refine import INFLUENCE, INFLUENCE_WEIGHTS
from llmrl.algo.preference.pairs import count_pairs
from llmrl.algo.presets import resolve
from llmrl.errors import RunFailed
from llmrl.model.policy import evaluating
from llmrl.train.influence import Reweighting, group_influence, groups_to_score
from llmrl.train.packing import build_micro_batch, fits, plan_micro_batches
from llmrl.train.prefixes import share_prefixes, single_trees
from llmrl.types import Counts, MicroBatch, Sample, TrainBatch

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor

    from llmrl.algo.base import Algorithm
    from llmrl.config import Config, TrainConfig
    from llmrl.model.policy import Policy, ReferenceHead
    from llmrl.train.prefixes import Tree


class Learner:
    """Owns the optimizer and turns a `TrainBatch` into updates of the policy.

    The whole batch is known to every process; which process computes which sequence is a pure function of it. Losses
    are divided by global counts before the backward pass and gradients are summed over processes, so the update does
    not depend on micro-batch size, packing or the number of processes.
    """

    def __init__(self, config: Config, policy: Policy, accelerator: Accelerator) -> None:
        self.config, self.policy, self.accelerator = config.train, policy, accelerator
        by_device = 2048 if accelerator.device.type == "cpu" else 16384
        self.max_tokens = config.train.max_tokens_per_micro_batch or by_device
        algo = resolve(config.algo)
        self.num_iterations, self.num_mini_batches = algo.num_iterations or 1, algo.num_mini_batches or 1
        self.steps_per_batch = self.num_iterations * self.num_mini_batches
        self.critic_config: Any = config.critic
        critic = policy.bare.critic
        own = set() if critic is None else {id(p) for p in critic.parameters()}
        self.parameters = [p for p in policy.bare.parameters() if p.requires_grad]
        self.policy_parameters = [p for p in self.parameters if id(p) not in own]
        self.critic_parameters = [p for p in self.parameters if id(p) in own]
        groups: list[dict[str, Any]] = [{"params": self.policy_parameters}]
        if config.critic is not None and self.critic_parameters:
            groups.append({"params": self.critic_parameters, "lr": config.critic.learning_rate})
        optimizer = torch.optim.AdamW(
            groups,
            lr=config.train.learning_rate,
            betas=(config.train.adam_beta1, config.train.adam_beta2),
            eps=config.train.adam_epsilon,
            weight_decay=config.train.weight_decay,
            fused=True,
        )
        policy.module, self.optimizer = accelerator.prepare(policy.bare, optimizer)
        self.learning_rates = [group["lr"] for group in self.optimizer.param_groups]
        self.num_updates = 0
        self.num_scheduled = 0
        self.num_frozen_batches = 0
        self.num_skipped = 0

    def update(self, batch: TrainBatch, algorithm: Algorithm) -> dict[str, float]:
        """Take all optimizer steps of one batch.

        Returns:
            Metrics, the same on every process: means over the optimizer steps of what the loss reports, and
            loss/total, policy/entropy, policy/grad_norm, policy/lr, and kl/mismatch (sampler against trainer before the
            first step: `mismatch_metrics`).

        Raises:
            RunFailed: more than `train.max_skipped_steps` optimizer steps had a non-finite gradient.
        """
        computed = _with_gradient(batch.samples, algorithm)
        to_reweight = self._fill_all(computed, algorithm)
        if algorithm.needs.refine:
            algorithm.refine(batch)
        self.policy.module.train()
        reports, num_iterations = [], self.num_iterations
        if algorithm.policy_frozen:
            num_iterations = self.critic_config.warmup_iterations
            self.num_frozen_batches += 1
        for _ in range(num_iterations):
            for mini_batch in self._mini_batches(batch):
                reports.append(self._step(mini_batch, batch, algorithm, to_reweight))
        keys = dict.fromkeys(key for report in reports for key in report)
        means = {key: float(np.mean([report[key] for report in reports if key in report])) for key in keys}
        # Later steps measure the update, not the mismatch.
        means |= {key: value for key, value in reports[0].items() if key.startswith("kl/mismatch")}
        return means | {
            "policy/lr": self.optimizer.param_groups[0]["lr"],
            "policy/skipped_updates": self.num_skipped,
            "train/computed_frac": sum(not s.probe for s in computed) / max(1, len(batch.samples)),
        }

    @torch.no_grad()
    def measure(self, batch: TrainBatch, algorithm: Algorithm) -> dict[str, float]:
        """What the loss reports of a batch (loss/total too) without training on it; the same on every process."""
        self._fill_all(_with_gradient(batch.samples, algorithm), algorithm)
        if algorithm.needs.refine:
            algorithm.refine(batch)
        counts, totals = _count(batch.samples, batch), {}
        whole = range(batch.num_groups) if algorithm.needs.whole_groups else ()
        with evaluating(self.policy.module), self.accelerator.autocast():
            for micro_batch in self._micro_batches(batch.samples, whole=whole):
                loss, metrics = algorithm.loss(self.policy.forward(micro_batch), micro_batch, counts)
                _accumulate(totals, metrics | {"loss/total": loss})
        return {key: value.item() for key, value in self._reduce(totals).items()}

    def _mini_batches(self, batch: TrainBatch) -> list[list[Sample]]:
        """Whole groups dealt into `num_mini_batches`, in an order that is fresh for every pass."""
        if self.num_mini_batches == 1:
            return [batch.samples]
        random = np.random.Generator(np.random.Philox([self.config.seed, self.num_updates]))
        order = random.permutation(batch.num_groups)
        parts = [set(order[k :: self.num_mini_batches].tolist()) for k in range(self.num_mini_batches)]
        return [[s for s in batch.samples if s.group in part] for part in parts]

    def _step(
        self, samples: list[Sample], batch: TrainBatch, algorithm: Algorithm, to_reweight: set[int]
    ) -> dict[str, float]:
        """One optimizer step over one mini-batch; the groups in `to_reweight` get their advantages on the way."""
        counts = _count(samples, batch)
        computed = _with_gradient(samples, algorithm)
        num_computed = max(1, sum(s.num_tokens for s in computed))
        whole = range(batch.num_groups) if algorithm.needs.whole_groups else to_reweight
        micro_batches = self._micro_batches(computed, whole=whole)
        totals: dict[str, Tensor] = {}
        reweighting = Reweighting(self.policy, algorithm, batch, computed, to_reweight)
        for number, micro_batch in enumerate(micro_batches):
            last = number == len(micro_batches) - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.policy.module):
                reference = self._reference_head(micro_batch) if algorithm.needs.full_kl else None
                outputs = self.policy.forward(micro_batch, with_hidden=bool(to_reweight), reference=reference)
                reweighting.apply(micro_batch, outputs)
                loss, metrics = algorithm.loss(outputs, micro_batch, counts)
                loss = loss + 0.0 * outputs.logprobs.sum()  # a micro-batch without tokens still has a graph
                # Data-parallel wrappers average gradients over processes; the shares of the loss are to be added.
                self.accelerator.backward(loss * self.accelerator.num_processes)
            metrics["loss/total"] = loss.detach()
            if batch.sampled:
                metrics |= mismatch_metrics(outputs.logprobs.detach(), micro_batch.rollout_logprobs, num_computed)
            metrics["policy/entropy"] = outputs.entropy.detach().sum() / num_computed
            _accumulate(totals, metrics)
        if to_reweight:
            reweighting.adopt(self._gather(reweighting.found))
        totals = self._reduce(totals)
        norms = self._clip(policy_frozen=algorithm.policy_frozen)
        report = finish_metrics({key: value.item() for key, value in totals.items()}) | norms
        if not computed:  # nothing was measured: no value is better than a 0 that looks like one
            report = {key: value for key, value in report.items() if not key.startswith(("kl/", "policy/entropy"))}
        if all(math.isfinite(value) for value in (*norms.values(), report["loss/total"])):
            self._set_rates(policy_frozen=algorithm.policy_frozen)
            self.optimizer.step()
        else:
            self._skip(report, samples)
        self.optimizer.zero_grad()
        self.num_updates += 1
        if algorithm.needs.ref_sync is not None and self.num_updates % algorithm.needs.ref_sync[0] == 0:
            self.policy.move_reference(algorithm.needs.ref_sync[1])
        return report

    def _set_rates(self, *, policy_frozen: bool) -> None:
        """Learning rates of the optimizer step at hand: `learning_rate_factor` of the steps and batches that train the
        policy. Value pre-training, which comes before them, has its own: the critic's falls linearly to 0.
        """
        if policy_frozen:
            total = self.critic_config.warmup_steps * self.critic_config.warmup_iterations * self.num_mini_batches
            factors = [0.0, 1 - self.num_updates / total]
        else:
            total = (self.config.max_steps - self.num_frozen_batches) * self.steps_per_batch
            factors = [learning_rate_factor(self.config, self.num_scheduled, total=total)] * 2
            self.num_scheduled += 1
        for group, rate, factor in zip(self.optimizer.param_groups, self.learning_rates, factors, strict=False):
            group["lr"] = rate * factor

    def _reference_head(self, micro_batch: MicroBatch) -> ReferenceHead:
        with self.accelerator.autocast():  # rounded as in the policy's own forward pass
            return self.policy.reference_head(micro_batch)

    def _micro_batches(
        self, samples: list[Sample], *, alone: bool = False, whole: Collection[int] = ()
    ) -> list[MicroBatch]:
        """This process's share of the samples, equally many micro-batches on every process; `alone`: all of them.

        The samples of a group in `whole` share a micro-batch.
        """
        num_processes = 1 if alone else self.accelerator.num_processes
        trees = self._trees(samples)
        groups = [samples[tree.samples[0]].group for tree in trees]
        plans = plan_micro_batches(
            [tree.length for tree in trees],
            max_tokens=self.max_tokens,
            num_processes=num_processes,
            packing=self.config.packing,
            units=[group if group in whole else -1 - i for i, group in enumerate(groups)],
        )
        rows_of = plans[0 if alone else self.accelerator.process_index]
        causal_head = self.policy.causal_head and self._bears_masks(samples)
        options = {"trees": trees, "causal_head": causal_head, "device": self.accelerator.device}
        return [build_micro_batch(samples, rows, **options) for rows in rows_of]

    def _trees(self, samples: list[Sample]) -> list[Tree]:
        """How samples share prefixes; a tree is within one group."""
        share = self.config.share_prefixes and self._bears_masks(samples)
        return share_prefixes(samples, self.policy.cost()) if share else single_trees(samples)

    def _bears_masks(self, samples: list[Sample]) -> bool:
        return self.policy.bears_masks(max((len(s.input_ids) for s in samples), default=0))

    def _fill_all(self, samples: list[Sample], algorithm: Algorithm) -> set[int]:
        """Compute what the loss and `refine` need of the policy as it is now, and of the reference.

        Returns the groups whose influences are left to the forward pass that trains on them: those that fit into one
        micro-batch, where nothing else is asked of the policy as it is now.
        """
        needs = algorithm.needs
        waiting = [s for s in samples if s.ref_logprobs is None]
        if needs.ref_logprobs and waiting:
            self._fill(waiting, lambda micro_batch: {"ref_logprobs": self.policy.reference_logprobs(micro_batch)})
        wants_old = self.steps_per_batch > 1 or needs.old_logprobs or needs.old_entropies
        if needs.rollout_as_old:
            wants_old = False
            for sample in samples:
                sample.old_logprobs = sample.rollout_logprobs
        waiting, later = samples, set()
        if needs.influence:
            groups = groups_to_score(samples)
            later = {g for g, members in groups.items() if self._fits(samples, members)}
            if wants_old or self.steps_per_batch > 1:
                later = set()
            now = [members for group, members in groups.items() if group not in later]
            scored = self._fill_influence(samples, now, with_old=wants_old)
            if not needs.old_entropies:  # that pass has the log-probabilities too
                waiting = [sample for index, sample in enumerate(samples) if index not in scored]
        names = ["old_logprobs"] * wants_old + ["old_entropies"] * needs.old_entropies
        if names:
            names += ["old_values"] * needs.values
            self._fill(waiting, lambda micro_batch: self._old_streams(micro_batch, names))
        elif needs.values:
            self._fill(samples, lambda micro_batch: {"old_values": self.policy.values(micro_batch)})
        if not wants_old and (probes := [s for s in samples if s.probe]):
            self._fill(probes, lambda micro_batch: self._old_streams(micro_batch, ["old_logprobs"]))
        if needs.policy_streams:
            self._fill(samples, self.policy.streams)  # pyright: ignore[reportAttributeAccessIssue]
        if needs.collisions:
            self._fill(samples, lambda micro_batch: {"collisions": self.policy.collisions(micro_batch)})
        return later

    def _fits(self, samples: list[Sample], group: list[int]) -> bool:
        lengths = [tree.length for tree in self._trees([samples[i] for i in group])]
        return fits(lengths, max_tokens=self.max_tokens, packing=self.config.packing)

    def fill_reference(self, samples: list[Sample]) -> None:
        """Set the reference log-probabilities before the first update, when without adapters the policy is its own
        reference.
        """
        now = self.policy.reference_logprobs if self.policy.has_adapters else self.policy.own_logprobs
        self._fill(samples, lambda micro_batch: {"ref_logprobs": now(micro_batch)})

    def _old_streams(self, micro_batch: MicroBatch, names: list[str]) -> dict[str, Tensor]:
        outputs = self.policy.forward(micro_batch)
        streams = {"old_logprobs": outputs.logprobs, "old_entropies": outputs.entropy, "old_values": outputs.values}
        return {name: streams[name] for name in names}

    @torch.no_grad()
    def _fill(self, samples: list[Sample], compute: Callable[[MicroBatch], dict[str, Tensor]]) -> None:
        """Compute streams once for all samples, each process its share, and set them on all of them everywhere."""
        if not samples:
            return
        found: dict[int, dict[str, np.ndarray]] = {}
        # accelerate puts the policy's forward pass under autocast; the reference's has to round alike.
        with evaluating(self.policy.module), self.accelerator.autocast():
            for micro_batch in self._micro_batches(samples):
                _split(compute(micro_batch), micro_batch, micro_batch.sample_indices, found)
        self._share_streams(samples, found)

    @torch.no_grad()
    def _fill_influence(self, samples: list[Sample], groups: list[list[int]], *, with_old: bool) -> set[int]:
        """`extras["influence"]` (and the old log-probabilities) of the samples of groups, given by their indices.

        A group is whole on one process, which holds the hidden states of one group at a time. Returns which samples.
        """
        tokens = [sum(len(samples[i].input_ids) for i in indices) for indices in groups]
        plans = plan_micro_batches(tokens, max_tokens=1, num_processes=self.accelerator.num_processes, packing=False)
        found: dict[int, dict[str, np.ndarray]] = {}
        with evaluating(self.policy.module), self.accelerator.autocast():
            for number in (i for rows in plans[self.accelerator.process_index] for row in rows for i in row):
                self._influence_of_group(samples, groups[number], found)
        if not with_old:
            for streams in found.values():
                del streams["old_logprobs"]
        return set(self._share_streams(samples, found))

    def _influence_of_group(
        self, samples: list[Sample], indices: list[int], found: dict[int, dict[str, np.ndarray]]
    ) -> None:
        micro_batches = self._micro_batches([samples[i] for i in indices], alone=True)
        outputs = [self.policy.forward(micro_batch, with_hidden=True, alone=True) for micro_batch in micro_batches]
        order = [indices[i] for micro_batch in micro_batches for i in micro_batch.sample_indices]
        lengths = torch.cat([micro_batch.sequence_lengths for micro_batch in micro_batches])
        logprobs = torch.cat([output.logprobs for output in outputs])
        scores = group_influence(
            self.policy,
            torch.cat([output.hidden for output in outputs if output.hidden is not None]),
            logprobs,
            torch.cat([micro_batch.targets for micro_batch in micro_batches]),
            torch.cat([micro_batch.extras[INFLUENCE_WEIGHTS] for micro_batch in micro_batches]),
        )
        streams = torch.stack([scores, logprobs]).cpu().numpy()
        for index, part in zip(order, np.split(streams, lengths.cumsum(0).tolist()[:-1], axis=1), strict=True):
            found[index] = {INFLUENCE: part[0], "old_logprobs": part[1]}

    def _share_streams(
        self, samples: list[Sample], found: dict[int, dict[str, np.ndarray]]
    ) -> dict[int, dict[str, np.ndarray]]:
        """Set streams, by index of sample, on every process: on the sample where it has the field, else in extras.

        Returns those of all processes.
        """
        found = self._gather(found)
        for index, streams in found.items():
            for name, values in streams.items():
                if hasattr(samples[index], name):
                    setattr(samples[index], name, values)
                else:
                    samples[index].extras[name] = values
        return found

    def _gather(self, found: dict[int, Any]) -> dict[int, Any]:
        """What all processes found, by index of sample."""
        if self.accelerator.num_processes == 1:
            return found
        from accelerate.utils import gather_object

        return dict(gather_object(list(found.items())))

    def _reduce(self, totals: dict[str, Tensor]) -> dict[str, Tensor]:
        """Add (or take the maximum of) every metric over processes, in one collective each."""
        if self.accelerator.num_processes == 1:
            return totals
        keys = sorted(totals)
        gathered = self.accelerator.gather(torch.stack([totals[key].float() for key in keys])[None])
        return {
            key: column.amax() if key.endswith("/max") else column.sum()
            for key, column in zip(keys, gathered.T, strict=True)  # pyright: ignore
        }

    def _clip(self, *, policy_frozen: bool = False) -> dict[str, float]:
        """Gradient norms before clipping. Policy and critic are clipped apart: neither shortens the other's step."""
        if policy_frozen:
            for parameter in self.policy_parameters:  # no gradient at all: with zeros Adam would count a step
                parameter.grad = None
        limit = self.config.max_grad_norm or math.inf
        parts = {"policy/grad_norm": self.policy_parameters, "value/grad_norm": self.critic_parameters}
        norms = {}
        for name, parameters in parts.items():
            if parameters:
                norm = self.accelerator.clip_grad_norm_(parameters, limit)
                assert norm is not None, "accelerate gives no norm under DeepSpeed, which the learner does not support"
                norms[name] = float(norm)
        return norms

    def _skip(self, report: dict[str, float], samples: list[Sample]) -> None:
        """Record the mini-batch of a step that would have broken the weights; stop over the budget."""
        self.num_skipped += 1
        folder = Path(self.config.output_dir) / "skipped"
        if self.accelerator.is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            torch.save({"report": report, "samples": samples}, folder / f"update-{self.num_updates:08d}.pt")
        if self.num_skipped > self.config.max_skipped_steps:
            raise RunFailed(
                f"{self.num_skipped} optimizer steps had a non-finite loss or gradient (loss "
                f"{report['loss/total']}, gradient norm {report['policy/grad_norm']}), more than "
                f"train.max_skipped_steps {self.config.max_skipped_steps}; their batches are in {folder}. Try a lower "
                "learning rate, or model.dtype float32"
            )

    def state_dict(self) -> dict[str, Any]:
        """Everything of the learner that the next step depends on, but the weights."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "num_updates": self.num_updates,
            "num_scheduled": self.num_scheduled,
            "num_frozen_batches": self.num_frozen_batches,
            "num_skipped": self.num_skipped,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undo `state_dict`."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.num_updates, self.num_scheduled = state["num_updates"], state["num_scheduled"]
        self.num_frozen_batches, self.num_skipped = state["num_frozen_batches"], state["num_skipped"]


def _count(samples: list[Sample], batch: TrainBatch) -> Counts:
    num_pairs, num_preferred_tokens = count_pairs(samples)
    return Counts(
        num_tokens=max(1, sum(s.num_tokens for s in samples)),
        num_sequences=max(1, len(samples)),
        num_groups=max(1, len({s.group for s in samples})),
        max_completion_length=batch.max_completion_length,
        num_pairs=max(1, num_pairs),
        num_preferred_tokens=max(1, num_preferred_tokens),
    )


def _with_gradient(samples: list[Sample], algorithm: Algorithm) -> list[Sample]:
    """The samples that change the gradient; the others stay in the denominators and cost nothing."""
    return [s for s in samples if algorithm.needs.every_sample or np.any(s.advantages)]


def learning_rate_factor(config: TrainConfig, step: int, *, total: int) -> float:
    """Factor on the learning rate of optimizer step n (from 0) of `total`: linear warm-up, then the named shape."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, total - config.warmup_steps)
    if config.lr_scheduler_type == "linear":
        return max(0.0, 1 - done)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, done))) if config.lr_scheduler_type == "cosine" else 1.0


def _split(
    streams: dict[str, Tensor], micro_batch: MicroBatch, indices: list[int], found: dict[int, dict[str, np.ndarray]]
) -> None:
    """Cut streams of a micro-batch into sequences; `indices` says which sample each of them is."""
    lengths = micro_batch.sequence_lengths.tolist()
    for name, values in streams.items():
        for index, part in zip(indices, values.float().split(lengths), strict=True):
            found.setdefault(index, {})[name] = part.cpu().numpy()


def _accumulate(totals: dict[str, Tensor], metrics: dict[str, Tensor]) -> None:
    for key, value in metrics.items():
        if key not in totals:
            totals[key] = value
        elif key.endswith("/max"):
            totals[key] = torch.maximum(totals[key], value)
        else:
            totals[key] = totals[key] + value
