"""Models with random weights and batches of random tokens for scripts/gpu_check, and clocks."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from benchmarks.grpo import forward_operations
from llmrl.types import Sample


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model and a batch."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int = 151_936
    num_prompts: int = 8
    num_generations: int = 8
    prompt_length: int = 512
    completion_length: int = 512
    rival_sequences: int = 8
    """Sequences that TRL computes at once."""

    def model(self, *, dtype: torch.dtype, device: torch.device, attention: str = "sdpa") -> Any:
        """Make the model with random weights, as wide in its logits as a trained one."""
        config = Qwen2Config(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            vocab_size=self.vocabulary,
            max_position_embeddings=32_768,
            tie_word_embeddings=True,
        )
        torch.manual_seed(0)
        with device:
            return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)

    def samples(self, seed: int = 0) -> list[Sample]:
        """Make groups of random tokens with a common prompt each."""
        random, samples = np.random.default_rng(seed), []
        for group in range(self.num_prompts):
            prompt = random.integers(0, self.vocabulary, self.prompt_length)
            for index in range(self.num_generations):
                completion = random.integers(0, self.vocabulary, self.completion_length)
                samples.append(
                    Sample(
                        input_ids=np.concatenate([prompt, completion]),
                        loss_mask=np.arange(self.prompt_length + self.completion_length) >= self.prompt_length,
                        advantages=np.full(self.completion_length, (-1.0) ** index, np.float32),
                        rollout_logprobs=np.full(self.completion_length, -math.log(self.vocabulary), np.float32),
                        group=group,
                        index=index,
                    )
                )
        return samples

    def operations(self) -> float:
        """Return what forward and backward need: each prompt once, the head at trained tokens, nothing twice."""
        attention = 2 * self.hidden * self.hidden * (1 + self.kv_heads / self.heads)
        sizes = {
            "num_prompts": self.num_prompts,
            "num_generations": self.num_generations,
            "prompt_length": self.prompt_length,
            "linear_parameters": self.layers * (attention + 3 * self.hidden * self.intermediate),
            "num_layers": self.layers,
            "hidden_size": self.hidden,
            "vocab_size": self.vocabulary,
        }
        return 3 * forward_operations(sizes, self.num_completion_tokens)

    @property
    def num_completion_tokens(self) -> int:
        return self.num_prompts * self.num_generations * self.completion_length


SMALL = Shape(
    name="60M", hidden=512, intermediate=1408, layers=8, heads=8, kv_heads=2, vocabulary=32_000, num_prompts=2,
    num_generations=3, prompt_length=96, completion_length=64,
)  # fmt: skip
SHAPES = [
    Shape(name="0.5B", hidden=896, intermediate=4864, layers=24, heads=14, kv_heads=2),
    Shape(name="1.5B", hidden=1536, intermediate=8960, layers=28, heads=12, kv_heads=2),
]
TINY = Shape(
    name="tiny", hidden=64, intermediate=128, layers=2, heads=4, kv_heads=2, vocabulary=512, num_prompts=2,
    num_generations=2, prompt_length=24, completion_length=16, rival_sequences=4,
)  # fmt: skip


class NotMeasured(Exception):
    """Something that this machine lacks; it is no failure."""


def needs(attention: str, device: torch.device) -> None:
    """Raise NotMeasured where an attention kernel cannot run here."""
    if attention != "sdpa" and device.type != "cuda":
        raise NotMeasured("needs a GPU")
    if attention == "flash_attention_2" and find_spec("flash_attn") is None:
        raise NotMeasured("flash-attn is not installed")


def matmul_rate(device: torch.device, size: int) -> float:
    """Return the operations per second of a bfloat16 matrix product."""
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    return 2 * size**3 / min(seconds(lambda: a @ a, device) for _ in range(5))


def seconds(work: Callable[[], Any], device: torch.device) -> float:
    """Return how long some work takes, until the device has finished it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


@contextmanager
def peak_memory(device: torch.device) -> Iterator[dict[str, float]]:
    """Measure the most memory that the block allocates on a GPU."""
    found: dict[str, float] = {}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    yield found
    if device.type == "cuda":
        found["peak GiB"] = round(torch.cuda.max_memory_allocated(device) / 2**30, 1)
