"""Make IRCoCo's evaluator: label prefixes of tasks with a model, and fit a classifier to them.

References:
    Li et al. 2024, arXiv:2401.16637, section 3.2.
"""

from __future__ import annotations

import copy
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from llmrl.errors import UserError
from llmrl.tiny import build_tiny_model
from llmrl.verify.checks.text import edit_similarity, sentence_bleu
from llmrl.verify.models.classifier import pad_right
from llmrl.verify.models.prefix_evaluator import PrefixEvaluator
from llmrl.verify.spec import load_file

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from llmrl.data.chat import Chat
    from llmrl.types import Task
    from recipes.ircoco.options import FilePrefixes, PrefixEvaluatorConfig, RandomStart
else:  # by path: a recipe may be run as a file, installed, or loaded by a test
    OPTIONS = load_file(Path(__file__).resolve().with_name("options.py"))
    FilePrefixes, RandomStart = OPTIONS.FilePrefixes, OPTIONS.RandomStart

GENERATE_ROWS = 128
HELD_OUT_FRAC = 0.1
REPORT = "evaluator.json"


@dataclass(frozen=True, slots=True)
class Example:
    """Token ids, and a quality (0 to 1) to predict after each of them from the `num_context`-th on."""

    ids: list[int]
    num_context: int
    quality: float


# --- labels -----------------------------------------------------------------------------------------------------------


def label_files(
    model: PreTrainedModel, chat: Chat, tasks: list[Task], options: PrefixEvaluatorConfig, *, seed: int
) -> list[Example]:
    """Return prompts with their answers, cut anywhere, labeled by how well the model's greedy next tokens match the
    true ones.

    Args:
        model: the policy before training.
        chat: renders the tasks' prompts.
        tasks: with the true completion as their answer.
        options: with `prefixes` of kind files.
        seed: fixes the choice of tasks and cuts.

    Raises:
        UserError: no task is long enough to be cut.
    """
    prefixes = options.prefixes
    assert isinstance(prefixes, FilePrefixes)
    draw, limit = random.Random(seed), prefixes.num_next_tokens
    files = [chat.render(task.messages) + chat.encode(str(task.answer)) for task in tasks]
    shortest, longest = prefixes.min_prefix_length, prefixes.max_prefix_length
    files = [file for file in files if len(file) > shortest]
    if not files:
        raise UserError(
            f"every prompt with its answer is shorter than evaluator.prefixes.min_prefix_length {shortest}: lower it"
        )
    chosen = draw.choices(files, k=options.num_examples)
    ends = [draw.randint(shortest, min(longest, len(file) - 1)) for file in chosen]
    cut = [file[:end] for file, end in zip(chosen, ends, strict=True)]
    made = generate(model, chat, cut, max_new_tokens=limit)
    return [
        Example(prefix, len(prefix), quality(tokens, file[len(prefix) :][:limit], chat, options))
        for prefix, tokens, file in zip(cut, made, chosen, strict=True)
    ]


def label_samples(
    model: PreTrainedModel,
    chat: Chat,
    tasks: list[Task],
    options: PrefixEvaluatorConfig,
    *,
    max_completion_length: int,
    seed: int,
) -> list[Example]:
    """Return completions that the model drew at temperature 1, labeled by how well they match the answer.

    The label is to be predicted after the prompt and after each token of the completion. Arguments as in `label_files`.
    """
    draw = random.Random(seed)
    chosen = draw.choices(tasks, k=options.num_examples)
    prompts = [chat.render(task.messages) for task in chosen]
    drawn = generate(model, chat, prompts, max_new_tokens=max_completion_length, seed=draw.getrandbits(32))
    return [
        Example(prompt + tokens, len(prompt), quality(tokens, chat.encode(str(task.answer)), chat, options))
        for prompt, tokens, task in zip(prompts, drawn, chosen, strict=True)
    ]


def quality(written: list[int], true: list[int], chat: Chat, options: PrefixEvaluatorConfig) -> float:
    """Return how well `written` matches `true`, from 0 to 1. A stop token at its end does not count."""
    if options.quality == "bleu":
        return sentence_bleu([token for token in written if token not in chat.stop_token_ids], true)
    return edit_similarity(chat.decode(written), chat.decode(true))


def generate(
    model: PreTrainedModel, chat: Chat, prompts: list[list[int]], *, max_new_tokens: int, seed: int | None = None
) -> list[list[int]]:
    """Return continuations, their stop token included: greedy ones, or with a `seed` drawn at temperature 1."""
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
    examples: list[Example],
    tokenizer: PreTrainedTokenizerBase,
    options: PrefixEvaluatorConfig,
    folder: Path,
    *,
    policy: PreTrainedModel,
    seed: int,
) -> dict[str, float]:
    """Fit a classifier to the examples by mean squared error and save it in `folder`.

    Returns:
        Measured on the tenth that was held out: correlation and root mean squared error of prediction and quality, mean
        and standard deviation of the quality. Also written to `evaluator.json`.
    """
    from transformers import Trainer, TrainingArguments

    num_held_out = max(1, int(HELD_OUT_FRAC * len(examples)))
    held_out, training = examples[:num_held_out], examples[num_held_out:]
    pad: Any = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = new_classifier(policy, options, pad_token_id=pad)

        class Regression(Trainer):
            def compute_loss(self, model: Any, inputs: dict[str, torch.Tensor], **_: Any) -> torch.Tensor:
                """Return the mean squared error over all places to predict; transformers would use one alone."""
                bare: Any = self.model  # on a machine with several GPUs `model` is a wrapper
                hidden = bare.base_model(inputs["input_ids"], use_cache=False).last_hidden_state
                errors = bare.score(hidden)[..., 0] - inputs["labels"][:, None]
                return errors[inputs["places"]].square().mean()

        def collate(rows: list[Example]) -> dict[str, torch.Tensor]:
            ids = pad_right([row.ids for row in rows], pad)
            first = torch.tensor([row.num_context for row in rows])[:, None]
            last = torch.tensor([len(row.ids) for row in rows])[:, None]
            after = torch.arange(1, ids.shape[1] + 1)[None]
            labels = torch.tensor([row.quality for row in rows], dtype=torch.float32)
            return {"input_ids": ids, "places": (first <= after) & (after <= last), "labels": labels}

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


def new_classifier(policy: PreTrainedModel, options: PrefixEvaluatorConfig, *, pad_token_id: int) -> PreTrainedModel:
    """Return a causal model with one output that knows the tokens of `policy`: with its weights, or random ones."""
    from transformers import AutoModelForSequenceClassification

    start = options.start
    if isinstance(start, RandomStart):
        settings = build_tiny_model(
            "qwen2",
            vocab_size=policy.config.get_text_config().vocab_size,
            hidden_size=start.hidden_size,
            num_layers=start.num_layers,
            num_heads=start.num_heads,
            num_kv_heads=start.num_heads,
            intermediate_size=4 * start.hidden_size,
        ).config
    else:
        settings = copy.deepcopy(policy.config)
    settings.num_labels, settings.pad_token_id = 1, pad_token_id
    model = AutoModelForSequenceClassification.from_config(settings, dtype=torch.float32)
    if not isinstance(start, RandomStart):
        model.base_model.load_state_dict(policy.base_model.state_dict())
    return model


def measure(folder: Path, examples: list[Example]) -> dict[str, float]:
    """Measure how well the evaluator in `folder` predicts the quality of these examples, over all their places."""
    found = PrefixEvaluator(str(folder)).values([example.ids for example in examples])
    predicted = np.concatenate([v[e.num_context - 1 :] for v, e in zip(found, examples, strict=True)])
    true = np.concatenate([np.full(len(e.ids) - e.num_context + 1, e.quality) for e in examples])
    constant = not (predicted.std() and true.std())
    return {
        "correlation": float("nan") if constant else float(np.corrcoef(predicted, true)[0, 1]),
        "rmse": float(np.sqrt(np.mean((predicted - true) ** 2))),
        "quality_mean": float(true.mean()),
        "quality_std": float(true.std()),
    }
