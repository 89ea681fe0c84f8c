"""Preferences from a dataset in place of rollouts, in the shape that the loop expects. Nothing is sampled.

A row becomes a group of two "rollouts" with rewards 1 (chosen) and 0 (rejected), or of one whose reward is its label.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmrl.algo.preference.loss_options import KtoLoss
from llmrl.algo.preference.options import DPO, KTO
from llmrl.algo.samples import mismatched_samples, samples_of
from llmrl.data.chat import Chat
from llmrl.data.preferences import PreferenceRow, encode_preferences, mismatch
from llmrl.data.prompts import beyond_embedding
from llmrl.data.report import Finding, RowReport
from llmrl.data.sampler import TaskSampler
from llmrl.errors import UserError
from llmrl.rollout.source import Feed, Source, StartEngine
from llmrl.types import Message, Rollout, RolloutGroup, Score, Turn

if TYPE_CHECKING:
    from llmrl.data.options import PreferenceData
    from llmrl.train.learner import Learner
    from llmrl.types import ModelLimits, Sample, Task

CHUNK = 512
"""Number of completions whose reference log-probabilities are computed at once."""


class PreferenceFeed(Feed):
    """The rows of a run on stored preferences.

    Args:
        rows: the rows to train on.
        eval_rows: held-out rows; empty if there is no evaluation.
        reports: which rows of either could not be read.
        data: how rows are rendered and ordered.
        options: the algorithm's options: how sequences are cut, and whether the reference is computed beforehand.
        folder: where to save the reference's log-probabilities, unless `ref_cache_dir` is set.
        seed: seed of the run.

    Raises:
        UserError: the loss compares pairs, but the rows hold single completions.
    """

    def __init__(
        self,
        rows: list[PreferenceRow],
        eval_rows: list[PreferenceRow],
        *,
        reports: tuple[RowReport, RowReport] | None = None,
        data: PreferenceData,
        options: DPO | KTO,
        folder: Path,
        seed: int,
    ) -> None:
        self.rows, self.eval_rows, self.data, self.options = rows, eval_rows, data, options
        self.reports = reports or (RowReport(num_rows=len(rows)), RowReport(num_rows=len(eval_rows)))
        self.folder, self.seed, self.rewards = folder, seed, {}
        self.has_reference = options.precompute_ref_log_probs
        for row in (*rows[:1], *eval_rows[:1]):
            if len(row.completions) == 1 and isinstance(options, DPO):
                raise UserError(
                    f"{row.place}: single completions with a label, but algo.name {options.name} compares pairs: use "
                    "algo.name kto, or rows with chosen and rejected"
                )

    @property
    def tasks(self) -> list[Task]:
        """What the sampler draws from."""
        return [row.task for row in self.rows]

    @property
    def eval_tasks(self) -> list[Task]:
        """Held-out tasks."""
        return [row.task for row in self.eval_rows]

    def encode(self, tokenizer: Any, generation: Any, limits: ModelLimits) -> list[str]:
        """Render all rows and cut them to `max_length` tokens."""
        conversational = self.rows[0].is_conversational
        if self.eval_rows and self.eval_rows[0].is_conversational != conversational:
            raise UserError(f"{self.eval_rows[0].place}: training and evaluation rows must both be text, or messages")
        self.chat = Chat(
            tokenizer,
            prompt_format="chat" if conversational else "text",
            chat_template=self.data.chat_template,
            generation_config=generation,
            template_options=self.data.chat_template_kwargs,
        )
        limit = self.options.max_length
        notes = [f"{len(self.rows)} preferences from {self.data.path}"]
        self.rows, more = encode_preferences(
            self.rows, self.chat, max_length=limit, limits=limits, report=self.reports[0]
        )
        self.eval_rows, about_eval = encode_preferences(
            self.eval_rows, self.chat, max_length=limit, limits=limits, report=self.reports[1]
        )
        if isinstance(self.options, KTO) and isinstance(self.options.loss, KtoLoss):
            mismatch(self.rows, max_length=limit)
            mismatch(self.eval_rows, max_length=limit)
        return notes + more + [f"evaluation: {note}" for note in about_eval]

    def check_vocabulary(self, tokenizer: Any, vocab_size: int) -> None:
        """Refuse rows with tokens that the loaded model has no embedding for."""
        for row in (*self.rows, *self.eval_rows):
            used = [*row.prompt_ids, *(number for ids in row.completion_ids for number in ids)]
            if max(used) >= vocab_size:
                raise UserError(f"{row.place}: {beyond_embedding(tokenizer, used, vocab_size)}")

    @property
    def streams(self) -> bool:
        return self.reports[0].streams

    def dropped(self) -> list[Finding]:
        """Return the rows that were left out because they cannot be used."""
        return [finding for report in self.reports for finding in report.found]

    def preview(self) -> str:
        """Return the first row as the model sees it: its prompt, then each completion."""
        row, decode = self.rows[0], self.chat.tokenizer.decode
        names = ["chosen", "rejected"] if len(row.completion_ids) == 2 else [f"completion, label {row.rewards[0]:g}"]
        parts = [f"[prompt]\n{decode(row.prompt_ids)}"]
        parts += [f"[{name}]\n{decode(ids)}" for name, ids in zip(names, row.completion_ids, strict=True)]
        return "\n".join(parts)

    def sampler(self, num_prompts: int) -> TaskSampler:
        """Return the order of the rows."""
        sampler = TaskSampler(self.tasks, seed=self.seed, shuffle=self.data.shuffle, streams=self.streams)
        sampler.check(num_prompts)
        return sampler

    def source(self, start_engine: StartEngine) -> Source:
        """Return a source without an engine."""
        folder = Path(self.options.ref_cache_dir or self.folder) if self.has_reference else None
        return PreferenceSource([*self.rows, *self.eval_rows], reference_folder=folder)


class PreferenceSource(Source):
    """Rows of a dataset in the shape of scored rollouts.

    Args:
        rows: all rows, for training and evaluation, with token ids.
        reference_folder: if given, compute the reference's log-probabilities of all rows before the first step and
            save them here.
    """

    def __init__(self, rows: Iterable[PreferenceRow], *, reference_folder: Path | None = None) -> None:
        self.rows = {row.task.id: row for row in rows}
        self.reference_folder = reference_folder

    async def open(self, learner: Learner) -> list[str]:
        """Compute the reference's log-probabilities, if they are to be computed beforehand."""
        if self.reference_folder is None:
            return []
        return [precompute_reference(self, learner, self.reference_folder)]

    async def collect(self, tasks: list[Task], positions: list[int], **_: Any) -> list[RolloutGroup]:
        """Return each task's group: [chosen, rejected] with rewards 1 and 0, or one completion with its label."""
        return [self.group(task, position) for task, position in zip(tasks, positions, strict=True)]

    def group(self, task: Task, position: int = 0) -> RolloutGroup:
        """Return the group of one task."""
        row = self.rows[task.id]
        rollouts = [self._rollout(row, index) for index in range(len(row.completions))]
        return RolloutGroup(task=task, rollouts=rollouts, position=position)

    def _rollout(self, row: PreferenceRow, index: int) -> Rollout:
        text, ids, known = row.completions[index], row.completion_ids[index], row.ref_logprobs
        messages = [Message(role="assistant", content=text)] if isinstance(text, str) else text
        rollout = _stored(row, index, ids, row.rewards[index], messages, None if known is None else known[index])
        if row.mismatched_ids:
            ids, known = row.mismatched_ids[index], row.mismatched_ref_logprobs
            nobody = [Message(role="assistant", content="")]
            rollout.mismatched = _stored(row, index, ids, 0.0, nobody, None if known is None else known[index])
        return rollout


def _stored(
    row: PreferenceRow, index: int, ids: list[int], reward: float, messages: list[Message], ref: np.ndarray | None
) -> Rollout:
    turn = Turn(
        prompt_ids=row.prompt_ids,
        completion_ids=ids,
        rollout_logprobs=[0.0] * len(ids),  # placeholders: no sampler drew these tokens (`TrainBatch.sampled`)
        finish="stop",
        policy_version=(0, 0),
        message=messages[0],
        replies=messages[1:],
    )
    score = Score(reward=reward)
    return Rollout(task=row.task, index=index, turns=[turn], score=score, advantage=0.0, ref_logprobs=ref)


# --- the reference, computed once -------------------------------------------------------------------------------------


def precompute_reference(source: PreferenceSource, learner: Learner, folder: Path) -> str:
    """Set `ref_logprobs` of every row, from a file in `folder` if the same model has scored the same tokens before.

    This must run before the first update: without adapters, the policy at that time is the reference.

    Returns:
        A line to show.
    """
    rows = list(source.rows.values())
    samples = _samples(source, rows)
    file = folder / f"reference-{_fingerprint(learner, samples)}.npy"
    lengths = [sample.num_tokens for sample in samples]
    if known := file.is_file():
        flat = np.load(file)
    else:
        for start in range(0, len(samples), CHUNK):
            learner.fill_reference(samples[start : start + CHUNK])
        flat = np.concatenate([sample.ref_logprobs for sample in samples])  # pyright: ignore
        if learner.parallel.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            unfinished = file.with_suffix(".writing.npy")
            np.save(unfinished, flat)
            unfinished.rename(file)
    learner.parallel.barrier()
    parts = iter(np.split(flat, np.cumsum(lengths)[:-1]))
    for row in rows:
        row.ref_logprobs = [next(parts) for _ in row.completions]
    for row in rows:
        row.mismatched_ref_logprobs = [next(parts) for _ in row.mismatched_ids]
    return f"reference log-probabilities of {len(samples)} completions {'from' if known else 'saved in'} {file}"


def _samples(source: PreferenceSource, rows: list[PreferenceRow]) -> list[Sample]:
    """Return a sample of every completion of all rows, then of every mismatched one."""
    groups = [source.group(row.task) for row in rows]
    return samples_of(groups) + mismatched_samples(groups)


def _fingerprint(learner: Learner, samples: list[Sample]) -> str:
    """Return a hash of the model's parameters and of all tokens."""
    import torch

    digest = hashlib.sha256(str(learner.policy.dtype).encode())
    for name, parameter in learner.policy.named_parameters():
        if "lora_" in name and learner.policy.base_is_reference:  # adapters without effect, of any seed
            continue
        digest.update(f"{name} {parameter.dtype}".encode())
        digest.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    for sample in samples:
        digest.update(sample.input_ids.tobytes() + sample.loss_mask.tobytes())
    return digest.hexdigest()[:24]
