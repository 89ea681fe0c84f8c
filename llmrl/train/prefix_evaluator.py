"""IRCoCo's evaluator, made: tasks and a model in, labelled prefixes, and a sequence classifier fitted to them out.

References:
    Li et al. 2024, arXiv:2401.16637, section 3.2.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from llmrl.errors import UserError
from llmrl.tiny import build_tiny_model
from llmrl.verify.prefix_evaluator import PrefixEvaluator
from llmrl.verify.reward_model import pad_right
from llmrl.verify.text_metrics import edit_similarity, sentence_bleu

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from llmrl.config import PrefixEvaluatorConfig
    from llmrl.data.chat import Chat
    from llmrl.types import Task

GENERATE_ROWS = 128
HELD_OUT_FRAC = 0.1
REPORT = "evaluator.json"


@dataclass(frozen=True, slots=True)
class Prefix:
    """Token ids, and how well the model completed them (0 to 1)."""

    ids: list[int]
    quality: float


# --- labels -----------------------------------------------------------------------------------------------------------


def label_prefixes(
    model: PreTrainedModel,
    chat: Chat,
    tasks: list[Task],
    options: PrefixEvaluatorConfig,
    *,
    max_completion_length: int,
    seed: int,
) -> list[Prefix]:
    """`options.num_prefixes` prefixes of random tasks with the quality of what the model makes of them.

    Args:
        model: the policy before training; it continues greedily.
        chat: renders the tasks' prompts.
        tasks: with the true completion as their answer.
        options: without gaps (`resolve_evaluator`).
        max_completion_length: samples: tokens of a completion.
        seed: of the tasks, cuts and samples.

    Raises:
        UserError: no task is long enough to be cut.
    """
    cut = _cut_files if options.prefixes == "files" else _cut_samples
    limit = options.num_next_tokens or max_completion_length
    cuts = cut(model, chat, tasks, options, limit=limit, draw=random.Random(seed))
    continued = generate(model, chat, [prefix for prefix, _, _ in cuts], max_new_tokens=limit)
    prefixes = []
    for (prefix, written, true), more in zip(cuts, continued, strict=True):
        ended = bool(written) and written[-1] in chat.stop_token_ids
        whole = written if ended else (written + more)[:limit]
        prefixes.append(Prefix(prefix, quality(whole, true, chat, options)))
    return prefixes


Cut = tuple[list[int], list[int], list[int]]
"""A prefix; what of it the model wrote, and is judged; the true tokens to compare with."""


def _cut_files(
    model: PreTrainedModel, chat: Chat, tasks: list[Task], options: Any, *, limit: int, draw: random.Random
) -> list[Cut]:
    """Prompts with their answers, cut at a random place; nothing of them was written by the model."""
    files = [chat.render(task.messages) + chat.encode(str(task.answer)) for task in tasks]
    files = [file for file in files if len(file) > options.min_prefix_length]
    if not files:
        raise UserError(
            f"every prompt with its answer is shorter than evaluator.min_prefix_length {options.min_prefix_length}"
        )
    cuts = []
    for file in draw.choices(files, k=options.num_prefixes):
        place = draw.randint(options.min_prefix_length, min(options.max_prefix_length, len(file) - 1))
        cuts.append((file[:place], [], file[place : place + limit]))
    return cuts


def _cut_samples(
    model: PreTrainedModel, chat: Chat, tasks: list[Task], options: Any, *, limit: int, draw: random.Random
) -> list[Cut]:
    """Prompts with the beginning, or the whole, of a completion that the model drew at temperature 1."""
    chosen = draw.choices(tasks, k=options.num_prefixes)
    prompts = [chat.render(task.messages) for task in chosen]
    seed = draw.getrandbits(32)
    samples = generate(model, chat, prompts, max_new_tokens=limit, seed=seed)
    cuts = []
    for task, prompt, sample in zip(chosen, prompts, samples, strict=True):
        written = sample[: draw.randint(0, len(sample))]
        cuts.append((prompt + written, written, chat.encode(str(task.answer))))
    return cuts


def quality(written: list[int], true: list[int], chat: Chat, options: PrefixEvaluatorConfig) -> float:
    """How well `written` matches `true`, from 0 to 1. A stop token at its end does not count."""
    if options.quality == "bleu":
        return sentence_bleu([token for token in written if token not in chat.stop_token_ids], true)
    return edit_similarity(chat.decode(written), chat.decode(true))


def generate(
    model: PreTrainedModel, chat: Chat, prompts: list[list[int]], *, max_new_tokens: int, seed: int | None = None
) -> list[list[int]]:
    """Continuations, a stop token included: greedy ones, or with a `seed` drawn at temperature 1."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    found: list[list[int]] = [[] for _ in prompts]
    sampling: dict[str, Any] = {"do_sample": False}
    if seed is not None:
        sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    with torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(seed or 0)
        for start in range(0, len(order), GENERATE_ROWS):
            rows = order[start : start + GENERATE_ROWS]
            width = max(len(prompts[i]) for i in rows)
            ids = torch.tensor([[chat.pad_token_id] * (width - len(prompts[i])) + prompts[i] for i in rows])
            lengths = torch.tensor([len(prompts[i]) for i in rows])
            mask = torch.arange(width)[None] >= width - lengths[:, None]
            answered: Any = model.generate(  # pyright: ignore
                input_ids=ids.to(model.device),
                attention_mask=mask.long().to(model.device),
                max_new_tokens=max_new_tokens,
                eos_token_id=list(chat.stop_token_ids),
                pad_token_id=chat.pad_token_id,
                **sampling,
            )
            for i, row in zip(rows, answered[:, width:].tolist(), strict=True):
                end = next((t for t, token in enumerate(row, start=1) if token in chat.stop_token_ids), len(row))
                found[i] = row[:end]
    return found


# --- fitting ----------------------------------------------------------------------------------------------------------


def train_evaluator(
    prefixes: list[Prefix],
    tokenizer: PreTrainedTokenizerBase,
    options: PrefixEvaluatorConfig,
    folder: Path,
    *,
    vocab_size: int,
    seed: int,
) -> dict[str, float]:
    """Fit a new classifier to the prefixes by mean squared error and save it in `folder`, with what it came to.

    Returns:
        On the tenth that was held out: correlation and root mean squared error of prediction and quality, mean and
        deviation of the quality. Also in `evaluator.json`.
    """
    from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

    num_held_out = max(1, int(HELD_OUT_FRAC * len(prefixes)))
    held_out, training = prefixes[:num_held_out], prefixes[num_held_out:]
    pad: Any = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    settings = build_tiny_model(
        "qwen2",
        vocab_size=vocab_size,
        hidden_size=options.hidden_size,
        num_layers=options.num_layers,
        num_heads=options.num_heads,
        num_kv_heads=options.num_heads,
        intermediate_size=4 * options.hidden_size,
        pad_token_id=pad,
    ).config
    settings.num_labels = 1
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_config(settings)

        class Regression(Trainer):
            """Reads the value at the last token: transformers would look before it where that is what pads, too."""

            def compute_loss(self, model: Any, inputs: dict[str, torch.Tensor], **_: Any) -> torch.Tensor:
                ids, last = inputs["input_ids"], inputs["last"]
                hidden = getattr(model, model.base_model_prefix)(input_ids=ids, use_cache=False).last_hidden_state
                found = model.score(hidden[torch.arange(len(ids), device=ids.device), last])[:, 0]
                return nn.functional.mse_loss(found, inputs["labels"])

        def collate(rows: list[Prefix]) -> dict[str, torch.Tensor]:
            ids = pad_right([row.ids for row in rows], pad)
            last = torch.tensor([len(row.ids) - 1 for row in rows])
            labels = torch.tensor([row.quality for row in rows], dtype=torch.float32)
            return {"input_ids": ids, "last": last, "labels": labels}

        Regression(
            model=model,
            args=TrainingArguments(
                output_dir=str(folder),
                seed=seed,
                per_device_train_batch_size=options.batch_size,
                num_train_epochs=options.num_epochs,
                learning_rate=options.learning_rate,
                weight_decay=options.weight_decay,
                lr_scheduler_type="linear",
                warmup_steps=20,
                use_cpu=not torch.accelerator.is_available(),
                remove_unused_columns=False,
                dataloader_pin_memory=False,
                logging_strategy="no",
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=training,  # pyright: ignore - a list has what it asks of a dataset
            data_collator=collate,  # pyright: ignore
        ).train()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    report = measure(folder, held_out)
    (folder / REPORT).write_text(json.dumps(report, indent=2) + "\n")
    return report


def measure(folder: Path, prefixes: list[Prefix]) -> dict[str, float]:
    """How well the evaluator in `folder` predicts the quality of these prefixes."""
    predicted = np.array([values[-1] for values in PrefixEvaluator(str(folder)).values([p.ids for p in prefixes])])
    true = np.array([p.quality for p in prefixes])
    constant = not (predicted.std() and true.std())
    return {
        "correlation": float("nan") if constant else float(np.corrcoef(predicted, true)[0, 1]),
        "rmse": float(np.sqrt(np.mean((predicted - true) ** 2))),
        "quality_mean": fmean(true.tolist()),
        "quality_std": pstdev(true.tolist()),
    }
