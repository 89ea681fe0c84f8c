"""The same work done twice: by llmrl's Trainer, and by TRL's GRPOTrainer with the same settings.

A `Work` and a hook that is called at the beginning of every step (and at the end) in; what each step did out.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.workloads import Work

StepHook = Callable[[int, Any], None]
"""(step that begins now, from 0; the model being trained). Also called once after the last step."""


def preload() -> None:
    """Import what both sides need, so that memory and time of imports are nobody's cost."""
    import datasets  # noqa: F401
    import math_verify  # noqa: F401
    import trl.trainer.grpo_trainer  # noqa: F401

    import llmrl.algo.policy_gradient.algorithm
    import llmrl.engines.hf.engine
    import llmrl.rollout.collector
    import llmrl.run.ledger
    import llmrl.run.sync
    import llmrl.run.trainer
    import llmrl.train.learner
    import llmrl.verify.rubric  # noqa: F401


def train_ours(work: Work, num_steps: int, hook: StepHook) -> list[dict[str, float]]:
    """Train `num_steps` steps with llmrl; reward, tokens, loss and grad_norm of each."""
    from llmrl import Trainer

    # The schedule is constant, so the step too many changes nothing; its checkpoint falls after the last mark.
    config = replace(work.config, train=replace(work.config.train, max_steps=num_steps + 1))
    trainer = Trainer(config, processing_class=work.tokenizer, reward=work.reward, train_dataset=work.rows)
    next_tasks, begun = trainer.sampler.next, iter(range(num_steps + 1))

    def next_with_hook(count: int) -> Any:
        hook(next(begun), trainer.policy.causal_lm)
        return next_tasks(count)

    trainer.sampler.next = next_with_hook
    trainer.train()
    lines = (Path(config.train.output_dir) / "metrics.jsonl").read_text().splitlines()[:num_steps]
    keys = {
        "reward": "reward/mean",
        "tokens": "rollout/num_tokens",
        "loss": "loss/total",
        "grad_norm": "policy/grad_norm",
    }
    return [{name: row[key] for name, key in keys.items()} for row in map(json.loads, lines)]


def train_trl(work: Work, num_steps: int, hook: StepHook, *, micro_batches: int = 1) -> list[dict[str, float]]:
    """The same with TRL, in its cheapest configuration for a CPU."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from transformers.trainer_callback import PrinterCallback
    from trl import GRPOTrainer

    class Hook(TrainerCallback):
        def on_train_begin(self, args, state, control, *, lr_scheduler, **_):
            # Its warm-up counts from 0, so that its first update has learning rate 0; ours counts from 1.
            lr_scheduler.step()

        def on_step_begin(self, args, state, control, *, model, **_):
            hook(state.global_step, model)

    trainer = GRPOTrainer(
        model=work.config.model.path,
        reward_funcs=trl_reward(work),
        args=trl_config(work, num_steps + 1, micro_batches),
        train_dataset=Dataset.from_list(work.rows),
        processing_class=work.tokenizer,
        callbacks=[Hook()],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    num_rollouts = work.config.rollout.num_prompts * work.config.rollout.num_generations
    steps = [row for row in trainer.state.log_history if "reward" in row][:num_steps]
    return [
        {
            "reward": row["reward"],
            "tokens": round(row["completions/mean_length"] * num_rollouts),
            "loss": row["loss"],
            "grad_norm": float(row["grad_norm"]),
        }
        for row in steps
    ]


def trl_config(work: Work, num_steps: int, micro_batches: int) -> Any:
    """`work.config` in TRL's words: the whole batch sampled at once, one update per batch, nothing recomputed."""
    from trl import GRPOConfig

    from llmrl.algo.policy_gradient.options import Clip, Group, PolicyGradient

    rollout, algo, train = work.config.rollout, work.config.algo, work.config.train
    assert isinstance(algo, PolicyGradient)
    assert isinstance(algo.loss, Clip) and isinstance(algo.baseline, Group)
    num_rollouts = rollout.num_prompts * rollout.num_generations
    return GRPOConfig(
        output_dir=train.output_dir,
        max_steps=num_steps,
        seed=train.seed,
        per_device_train_batch_size=num_rollouts // micro_batches,
        gradient_accumulation_steps=micro_batches,
        steps_per_generation=micro_batches,
        num_generations=rollout.num_generations,
        max_completion_length=rollout.max_completion_length,
        temperature=rollout.temperature,
        loss_type=algo.aggregation,
        scale_rewards=algo.baseline.scale,
        epsilon=algo.loss.epsilon,
        beta=algo.beta,
        num_iterations=algo.num_iterations,
        learning_rate=train.learning_rate,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=train.warmup_steps,
        adam_beta1=train.adam_beta1,
        adam_beta2=train.adam_beta2,
        adam_epsilon=train.adam_epsilon,
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        optim="adamw_torch_fused",
        model_init_kwargs={"dtype": "float32", "attn_implementation": work.config.model.attn_implementation},
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def trl_reward(work: Work) -> Callable[..., list[float | None]]:
    """The work's reward as TRL calls it."""
    if work.reward is not None:

        def synthetic(completions: list[str], **_: Any) -> list[float | None]:
            return [work.reward(completion) for completion in completions]

        return synthetic
    from llmrl.verify.reward import resolve

    reward = resolve(work.config.rewards[0].fn, work.config.rewards[0].args)

    def named(completions: list[Any], answer: list[str], **_: Any) -> list[float | None]:
        # A completion of a conversation is a list with one message.
        texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
        return [reward(completion=c, answer=a).reward for c, a in zip(texts, answer, strict=True)]

    return named
