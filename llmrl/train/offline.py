"""A run without an engine: preferences from a dataset take the place of rollouts; the loop stays as it is."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmrl.algo.preference_presets import is_single, resolve_preference
from llmrl.algo.samples import samples_of
from llmrl.config import DataConfig
from llmrl.data.chat import Chat
from llmrl.data.preferences import (
    PreferenceCollector,
    PreferenceRow,
    encode_preferences,
    load_preferences,
    preferences_from_rows,
)
from llmrl.data.sampler import TaskSampler
from llmrl.errors import UserError

if TYPE_CHECKING:
    from llmrl.config import Config
    from llmrl.train.learner import Learner
    from llmrl.types import Sample

CHUNK = 512
"""Rows whose reference log-probabilities are computed at once."""


class OfflineData:
    """The rows of an offline run: read before a model loads, encoded once there is a tokenizer.

    Args:
        config: of the run.
        train_dataset: rows given in Python, or None for `config.data`.
        eval_dataset: the same, held out; None for `config.eval.data`, if that is set.

    Raises:
        UserError: the data are wrong, or of the wrong kind for the loss.
    """

    def __init__(self, config: Config, train_dataset: Any, eval_dataset: Any) -> None:
        self.config = config
        self.preference, _ = resolve_preference(config)
        self.rows = _read(train_dataset, config.data)
        wanted = eval_dataset is not None or config.eval.data is not None
        self.eval_rows = _read(eval_dataset, config.eval.data or DataConfig()) if wanted else []
        for row in (self.rows[:1], self.eval_rows[:1]):
            if row and len(row[0].completions) == 1 and not is_single(self.preference):
                raise UserError(
                    f"{row[0].place}: single completions with a label, but preference.loss_type "
                    f"{self.preference.loss_type} compares pairs: use loss_type kto, or rows with chosen and rejected"
                )

    def encode(self, tokenizer: Any, generation: Any) -> list[str]:
        """Tokens of all rows; returns what to tell the user.

        Raises:
            UserError: no row is left.
        """
        conversational = self.rows[0].is_conversational
        if self.eval_rows and self.eval_rows[0].is_conversational != conversational:
            raise UserError(f"{self.eval_rows[0].place}: training and evaluation rows must both be text, or messages")
        chat = Chat(
            tokenizer,
            prompt_format="chat" if conversational else "text",
            chat_template=self.config.data.chat_template,
            generation_config=generation,
        )
        limit = self.preference.max_length
        notes = [f"{len(self.rows)} preferences from {self.config.data.path}"]
        self.rows, more = encode_preferences(self.rows, chat, max_length=limit)
        self.eval_rows, about_eval = encode_preferences(self.eval_rows, chat, max_length=limit)
        return notes + more + [f"evaluation: {note}" for note in about_eval]

    def sampler(self) -> TaskSampler:
        """The order of the rows."""
        tasks = [row.task for row in self.rows]
        sampler = TaskSampler(tasks, seed=self.config.train.seed, shuffle=self.config.data.shuffle)
        sampler.check(self.config.rollout.num_prompts)
        return sampler

    def collector(self) -> PreferenceCollector:
        """What gives the rows as groups of two rollouts."""
        return PreferenceCollector([*self.rows, *self.eval_rows])


def _read(dataset: Any, config: DataConfig) -> list[PreferenceRow]:
    if dataset is None or isinstance(dataset, str):
        return load_preferences(config)
    return preferences_from_rows(dataset, config, "dataset")


class NoEngine:
    """Nothing is sampled."""

    async def sleep(self) -> None:
        """Nothing is held."""

    async def close(self) -> None:
        """Nothing is held."""


class NoSync:
    """No engine needs the weights."""

    async def push(self, version: int) -> None:
        """Nothing to prove."""


# --- the reference, computed once -------------------------------------------------------------------------------------


def precompute_reference(collector: PreferenceCollector, learner: Learner, folder: Path) -> str:
    """Set `ref_logprobs` of every row, from a file of `folder` where the same model has scored the same tokens.

    It must run before the first update: without adapters the policy is its own reference then.

    Returns:
        What to tell the user.
    """
    rows = list(collector.rows.values())
    samples = _samples(collector, rows)
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
    return f"reference log-probabilities of {len(samples)} completions {'from' if known else 'saved in'} {file}"


def _samples(collector: PreferenceCollector, rows: list[PreferenceRow]) -> list[Sample]:
    groups = [collector.group(row.task) for row in rows]
    for group in groups:
        for rollout in group.rollouts:
            rollout.advantage = 0.0
    return samples_of(groups)


def _fingerprint(learner: Learner, samples: list[Sample]) -> str:
    """Of the model's parameters and all tokens."""
    import torch

    digest = hashlib.sha256()
    for name, parameter in learner.policy.named_parameters():
        if "lora_" in name:  # the reference is the model without its adapters
            continue
        digest.update(f"{name} {parameter.dtype}".encode())
        digest.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    for sample in samples:
        digest.update(sample.input_ids.tobytes() + sample.loss_mask.tobytes())
    return digest.hexdigest()[:24]
