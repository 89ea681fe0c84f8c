"""The measurements of scripts/gpu_check: an update beside TRL's, and generation."""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu_work import NotMeasured, Shape, needs, peak_memory, seconds
from llmrl.config import Config, LoraConfig, ModelConfig, RolloutConfig, TrainConfig, preset
from llmrl.model.load import add_lora
from llmrl.model.parallel import Parallel
from llmrl.model.policy import Policy
from llmrl.run.engines import start_engine
from llmrl.run.methods import make_algorithm
from llmrl.train.learner import Learner
from llmrl.train.selfcheck import check_forward
from llmrl.types import Sampling, TrainBatch

REPETITIONS = 3


def measure_update(
    shape: Shape, parallel: Parallel, matmul_per_s: float, *, lora: bool = False, attention: str = "sdpa"
) -> dict[str, Any]:
    """Measure one optimizer step of GRPO, from samples to new weights."""
    needs(attention, parallel.device)
    model = shape.model(dtype=torch.bfloat16, device=parallel.device, attention=attention)
    if lora:
        model = add_lora(model, LoraConfig(r=16), seed=0)
    policy = Policy(model, temperature=1.0, keep_reference=False, dtype=torch.bfloat16)
    check_forward(policy)
    config = Config(algo=preset(name="grpo"), train=TrainConfig(max_steps=100))
    algorithm = make_algorithm(config)
    learner = Learner(policy, config.train, parallel)
    samples = shape.samples()

    def update() -> None:
        batch = TrainBatch(
            samples=[replace(sample) for sample in samples],
            num_groups=shape.num_prompts,
            max_completion_length=shape.completion_length,
            policy_version=0,
        )
        learner.update(batch, algorithm)

    return measured(update, shape, parallel.device, matmul_per_s)


def measured(update: Callable[[], None], shape: Shape, device: torch.device, matmul_per_s: float) -> dict[str, Any]:
    """Return the cells of an update: median time after one step that is not counted, memory, share of the device."""
    update()
    with peak_memory(device) as memory:
        taken = statistics.median(seconds(update, device) for _ in range(REPETITIONS))
    share = shape.operations() / taken / matmul_per_s
    tokens = f"{shape.num_completion_tokens / taken:,.0f}"
    return {"ms": round(1000 * taken, 1), "tokens/s": tokens, "MFU": f"{share:.1%}"} | memory


def measure_trl(shape: Shape, device: torch.device, matmul_per_s: float) -> dict[str, Any]:
    """Measure TRL's loss, backward pass, clipping and AdamW on the same tokens, with float32 weights under autocast."""
    if find_spec("trl") is None:
        raise NotMeasured("trl is not installed")
    with tempfile.TemporaryDirectory() as folder:
        trainer = trl_trainer(shape, device, folder)
        model = trainer.model_wrapped = trainer.accelerator.prepare(trainer.model).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
        samples, at_once = shape.samples(), shape.rival_sequences
        ids = torch.as_tensor(np.stack([s.input_ids for s in samples]), device=device)
        advantages = torch.as_tensor([float(s.advantages[0]) for s in samples], device=device)
        parts = [slice(i, i + at_once) for i in range(0, len(samples), at_once)]
        trainer.current_gradient_accumulation_steps = len(parts)

        def update() -> None:
            for part in parts:
                prompt, completion = ids[part, : shape.prompt_length], ids[part, shape.prompt_length :]
                inputs = {
                    "prompt_ids": prompt, "prompt_mask": torch.ones_like(prompt), "advantages": advantages[part],
                    "completion_ids": completion, "completion_mask": torch.ones_like(completion),
                    "num_items_in_batch": torch.tensor(shape.num_completion_tokens, device=device),
                }  # fmt: skip
                with trainer.compute_loss_context_manager():
                    loss = trainer._compute_loss(model, inputs)
                loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

        return measured(update, shape, device, matmul_per_s) | {"note": f"{at_once} sequences at once"}


def trl_trainer(shape: Shape, device: torch.device, folder: str) -> Any:
    """Make TRL's trainer around the same model."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    from llmrl.tiny import byte_tokenizer

    config = GRPOConfig(
        output_dir=folder,
        per_device_train_batch_size=shape.rival_sequences,
        num_generations=2,
        max_completion_length=shape.completion_length,
        bf16=True,
        use_cpu=device.type == "cpu",
        gradient_checkpointing=False,
        loss_type="grpo",
        report_to=[],
    )
    return GRPOTrainer(
        model=shape.model(dtype=torch.float32, device=device),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=config,
        train_dataset=Dataset.from_list([{"prompt": "x"}] * 8),
        processing_class=byte_tokenizer(),
    )


async def measure_generation(shape: Shape, parallel: Parallel) -> dict[str, Any]:
    """Measure the hf engine: all completions of a batch, each as long as it may get."""
    model = shape.model(dtype=torch.bfloat16, device=parallel.device)
    policy = Policy(model, temperature=1.0, keep_reference=False, dtype=torch.bfloat16)
    options = ModelConfig(path="unused", dtype="bfloat16")
    prompts = [sample.input_ids[: shape.prompt_length].tolist() for sample in shape.samples()]
    with tempfile.TemporaryDirectory() as folder, peak_memory(parallel.device) as memory:
        engine, push = start_engine(options, RolloutConfig(engine="hf"), policy, parallel, log_dir=Path(folder))
        await push(0)
        begin = time.perf_counter()
        done = await asyncio.gather(
            *(
                engine.generate(prompt, Sampling(max_tokens=shape.completion_length, seed=i), session=str(i))
                for i, prompt in enumerate(prompts)
            )
        )
        taken = time.perf_counter() - begin
        await engine.close()
    tokens = sum(len(completion.token_ids) for completion in done)
    return {"ms": round(1000 * taken), "tokens/s": f"{tokens / taken:,.0f}"} | memory
