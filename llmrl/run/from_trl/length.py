"""Batches, the length of a run and its schedule: TRL counts optimizer steps and completions, llmrl batches of tasks."""

from __future__ import annotations

import math
import os

from llmrl.config import PRESETS
from llmrl.run.from_trl.fields import WARMUP, Fields, Translation
from llmrl.track import names


def batches(found: Translation, fields: Fields, refused: list[str], *, samples: bool) -> None:
    """Set the size of a batch, its mini-batches, and the length of the run."""
    sizes = ["per_device_train_batch_size", "gradient_accumulation_steps"]
    sizes += ["generation_batch_size", "steps_per_generation"] if samples else []
    if fields.any(*sizes):
        (_groups if samples else _rows)(found, fields, refused)
    steps = fields.get("max_steps")
    if "max_steps" in fields and steps > 0:
        found.options["train.max_steps"] = found.batches(steps)
        fields.read.add("num_train_epochs")
    elif "num_train_epochs" in fields and fields.get("num_train_epochs") == 0:
        refused.append("num_train_epochs 0: nothing would be trained; set it, or max_steps")
    elif "num_train_epochs" in fields:
        found.epochs["train.max_steps"] = fields.get("num_train_epochs")


def _groups(found: Translation, fields: Fields, refused: list[str]) -> None:
    """Set the batch of a run that samples.

    An optimizer step of TRL has per_device_train_batch_size * processes * gradient_accumulation_steps completions, and
    generation_batch_size (or steps_per_generation micro-batches) are sampled at once.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    micro, accumulated = fields.get("per_device_train_batch_size") * world, fields.get("gradient_accumulation_steps")
    at_once, steps = fields.get("generation_batch_size"), fields.get("steps_per_generation")
    update, group, passes = micro * accumulated, fields.get("num_generations"), fields.get("num_iterations")
    at_once = at_once or micro * (steps or accumulated)
    size, updates = max(update, at_once), max(1, at_once // update)
    if size % update or size % at_once or at_once % micro or at_once % group:
        refused.append(
            f"{at_once} completions are sampled at once (generation_batch_size) and {update} are in an optimizer step "
            f"(per_device_train_batch_size {micro // world} * {world} processes * gradient_accumulation_steps "
            f"{accumulated}), in groups of num_generations {group}: one must be a multiple of the other, and of the "
            "group; or say it in llmrl's words, rollout.num_prompts and algo.num_mini_batches"
        )
        return
    if at_once < update and passes > 1:
        refused.append(
            f"num_iterations {passes} with several generations in one optimizer step: raise steps_per_generation to "
            "gradient_accumulation_steps, or leave num_iterations out"
        )
    found.options["rollout.num_prompts"] = size // group
    if updates > 1:
        found.options["algo.num_mini_batches"] = updates
    found.updates_per_batch = updates * passes

    def per_epoch(rows: int) -> int:
        micro_batches = rows // (at_once // group) * (at_once // micro) * passes
        return max(1, math.ceil(micro_batches / accumulated))

    found.updates_per_epoch = per_epoch


def _rows(found: Translation, fields: Fields, refused: list[str]) -> None:
    """Set the batch of a run on rows."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    each, accumulated = fields.get("per_device_train_batch_size"), fields.get("gradient_accumulation_steps")
    found.options["rollout.num_prompts"] = each * world * accumulated

    def per_epoch(rows: int) -> int:
        return max(1, math.ceil(math.ceil(math.ceil(rows / each) / world) / accumulated))

    found.updates_per_epoch = per_epoch


def _interval(found: Translation, fields: Fields, value: float, option: str) -> None:
    """Set an option that counts steps: TRL's number of optimizer steps, or below 1 a share of the run."""
    steps = fields.get("max_steps")
    if value >= 1:
        found.options[option] = math.ceil(value) if option == WARMUP else found.batches(value)
    elif steps > 0:
        found.options[option] = math.ceil(value * steps) if option == WARMUP else found.batches(value * steps)
    elif value > 0:
        found.epochs[option] = value * fields.get("num_train_epochs")


def strategies(found: Translation, fields: Fields, refused: list[str], *, evaluates: bool) -> None:
    """Set the schedule of the learning rate, and when checkpoints are saved and the model is evaluated."""
    if fields.any("lr_scheduler_type", "warmup_steps", "warmup_ratio"):
        _schedule(found, fields, refused)
    optimizer = fields.get("optim")
    if optimizer is not None and not str(optimizer).startswith("adamw_torch") and optimizer != "adamw_hf":
        refused.append(f"optim {optimizer}: AdamW is the optimizer; leave it out")
    saving = fields.get("save_strategy") or "steps"
    if saving in ("no", "best"):
        found.options["train.save_steps"] = 0
        fields.read.add("save_steps")
    elif saving == "epoch":
        found.epochs["train.save_steps"] = 1.0
    elif saving == "steps" and "save_steps" in fields:
        _interval(found, fields, fields.get("save_steps"), "train.save_steps")
    evaluation = fields.get("eval_strategy")
    fields.read.add("do_eval")  # follows from it
    if evaluation == "epoch":
        found.epochs["eval.steps"] = 1.0
    elif evaluation == "steps" or (evaluation is None and "eval_steps" in fields):
        every = fields.get("eval_steps") or fields.get("logging_steps")
        _interval(found, fields, every, "eval.steps")
    elif evaluates and fields.complete and not fields.get("eval_on_start"):
        refused.append(
            'eval_dataset is given, but eval_strategy is "no", so it would never be used: set eval_strategy="steps" '
            "and eval_steps"
        )
    else:
        fields.read.add("eval_steps")
    if "eval_on_start" in fields and fields.get("eval_on_start"):
        found.options["eval.at_start"] = True
    if saving == "best" or fields.any("load_best_model_at_end", "metric_for_best_model"):
        _best(found, fields, refused, kept=saving == "best")


BEST = {"rewards/accuracies": "accuracy", "rewards/margins": "margin"}
"""TRL's metrics of an evaluation that have another name here."""


def _best(found: Translation, fields: Fields, refused: list[str], *, kept: bool) -> None:
    """Set which model is kept as the best."""
    kept, metric = bool(fields.get("load_best_model_at_end")) or kept, fields.get("metric_for_best_model")
    up = fields.get("greater_is_better")
    if not kept and metric is None:
        return
    name = str(metric or "loss").removeprefix("eval/").removeprefix("eval_")
    if name == "loss" and PRESETS[found.options["algo.name"]].samples:  # its size says nothing about the policy
        name, up = "reward", None
    option = f"eval/{BEST.get(name, name)}"
    direction = names.find(option)
    if up is not None and direction is not None and direction.better != ("up" if up else "down"):
        refused.append(f"greater_is_better {up}: {option} is better when it goes {direction.better}")
    found.options["eval.keep_best"] = option
    if kept:
        found.notes.append(f"{found.source}: the best model by {option} is kept in best/; model/ holds the last one")


def _schedule(found: Translation, fields: Fields, refused: list[str]) -> None:
    schedule = fields.get("lr_scheduler_type")
    warm = fields.get("warmup_steps") or fields.get("warmup_ratio") or 0
    if schedule not in ("constant", "constant_with_warmup", "linear", "cosine"):
        refused.append(f"lr_scheduler_type {schedule}: use constant, linear or cosine")
        return
    if schedule == "constant":  # which ignores a warm-up
        warm = 0
    if "lr_scheduler_type" in fields:
        found.options["train.lr_scheduler_type"] = schedule.removesuffix("_with_warmup")
    _interval(found, fields, warm, WARMUP)
    if not fields.get("lr_scheduler_kwargs"):
        fields.read.add("lr_scheduler_kwargs")
    else:
        fields.read.discard("lr_scheduler_kwargs")
