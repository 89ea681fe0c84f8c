"""The work of the grpo suite: a case in; a saved model, its tokenizer, rows, a reward and a configuration out.

Both sides load the same folder and read the same `Config`, which `benchmarks.trainers` translates for the rival.
"""

from __future__ import annotations

import importlib.util
import random
import string
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.common import REPOSITORY
from llmrl.algo.policy_gradient.options import PolicyGradient
from llmrl.config import Config, DataConfig, EvalConfig, ModelConfig, RolloutConfig, TrackConfig, TrainConfig, parse

ALPHABET = string.digits + string.ascii_letters + string.punctuation + " "
NEVER = "<|never|>"
"""The tokenizer's eos and pad. Its id is beyond the model's vocabulary, so no completion can end early."""


@dataclass(frozen=True, kw_only=True)
class Synthetic:
    """A random model and random prompts. All completions have the same length."""

    num_prompts: int
    prompt_length: int
    completion_length: int
    num_generations: int = 8
    vocab_size: int = 103
    hidden_size: int = 96
    intermediate_size: int = 288
    num_layers: int = 2
    learning_rate: float = 1e-3
    num_steps: int = 10
    """Measured steps, after those that are left out."""
    rival_micro_batches: int = 1
    """Parts in which the rival computes a batch, its fastest setting for this case."""


@dataclass(kw_only=True)
class Work:
    """One case, ready for both sides."""

    config: Config
    rows: list[dict[str, Any]]
    tokenizer: Any
    reward: Any = None
    """A function from completion to number, or None if `config.rewards` names one."""
    held_out: list[dict[str, Any]] = field(default_factory=list)
    """Rows that a learning curve is measured on."""


def synthetic_work(case: Synthetic, folder: Path, *, seed: int, output_dir: Path) -> Work:
    """Return the work of a synthetic case. `save_model` must have written its model to `folder`."""
    config = Config(
        model=ModelConfig(path=str(folder)),
        data=DataConfig(prompt_format="text"),
        rollout=RolloutConfig(
            num_prompts=case.num_prompts,
            num_generations=case.num_generations,
            max_completion_length=case.completion_length,
        ),
        algo=PolicyGradient(aggregation="dapo"),
        train=TrainConfig(output_dir=str(output_dir), seed=seed, learning_rate=case.learning_rate, save_steps=0),
        track=TrackConfig(console="quiet"),
    )
    draw = random.Random(seed)
    prompts = ["".join(draw.choices(ALPHABET, k=case.prompt_length)) for _ in range(64 * case.num_prompts)]
    rows = [{"prompt": prompt, "answer": "-"} for prompt in prompts]
    return Work(config=config, rows=rows, tokenizer=load_tokenizer(folder), reward=digit_share)


def save_model(case: Synthetic, folder: Path) -> None:
    """Write the case's random model and tokenizer to `folder`."""
    from llmrl.tiny import build_tiny_model

    tokenizer = endless_tokenizer(case.vocab_size)
    model = build_tiny_model(
        "qwen2",
        vocab_size=case.vocab_size,
        hidden_size=case.hidden_size,
        intermediate_size=case.intermediate_size,
        num_layers=case.num_layers,
        max_position_embeddings=case.prompt_length + case.completion_length,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def endless_tokenizer(vocab_size: int) -> Any:
    """Return a tokenizer of `vocab_size` ids: one per character of ALPHABET, then fillers that no text contains.

    NEVER comes after them. Half of the fillers decode to digits, so that `digit_share` can be learned with any
    vocabulary.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # In byte-level vocabularies every printable character stands for itself, and \u0120 for the space.
    names = [character.replace(" ", "\u0120") for character in ALPHABET]
    letters = str.maketrans(string.digits, string.ascii_lowercase[:10])
    while len(names) < vocab_size:
        number = str(10_000 + len(names))
        names.append(number if len(names) % 2 else number.translate(letters))
    tokenizer = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=NEVER, pad_token=NEVER)


def load_tokenizer(folder: Path) -> Any:
    """Return the tokenizer of a folder as saved (AutoTokenizer would turn it into one of the model's family)."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(folder)


def digit_share(completion: str) -> float:
    """Return the share of digits in the completion: a reward that is cheap, varies in a group, and can be learned."""
    return sum(character.isdigit() for character in completion) / max(1, len(completion))


# --- the quickstart's task: natural lengths, a real reward ------------------------------------------------------------


def quickstart() -> Any:
    """Return recipes/quickstart.py as a module."""
    if "quickstart" not in sys.modules:
        spec = importlib.util.spec_from_file_location("quickstart", REPOSITORY / "recipes" / "quickstart.py")
        assert spec is not None and spec.loader is not None
        sys.modules["quickstart"] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules["quickstart"]


def quickstart_config(*arguments: str) -> Config:
    """Return the recipe's configuration, with dotted overrides."""
    file = REPOSITORY / "recipes" / "quickstart.yaml"
    config = parse(["--config", str(file), *arguments], config_class=quickstart().QuickstartConfig)
    (reward,) = config.rewards
    return replace(config, rewards=[replace(reward, fn=str(REPOSITORY / reward.fn))])


def warm_start(folder: Path) -> Path:
    """Return `folder` with the quickstart's warm-started model; create it if it is missing (about a minute)."""
    if not (folder / "config.json").is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        quickstart().warm_start(quickstart_config(), folder)
    return folder


def natural_work(folder: Path, *, seed: int, output_dir: Path) -> Work:
    """Return the work of GRPO on additions, from the warm-started model in `folder`, with the recipe's settings."""
    recipe = quickstart()
    config = quickstart_config("--train.output_dir", str(output_dir), "--train.seed", str(seed))
    config = replace(
        config,
        model=replace(config.model, path=str(folder)),
        train=replace(config.train, save_steps=0),
        track=replace(config.track, console="quiet"),
    )
    rows = recipe.rows(recipe.pairs(held_out=False))
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return Work(config=config, rows=rows, tokenizer=tokenizer, held_out=recipe.held_out_rows())


# --- a pretrained model on short sums: recipes/smollm2_sums.yaml ------------------------------------------------------


def sums_work(folder: Path, *, seed: int, output_dir: Path) -> Work:
    """Return the work of recipes/smollm2_sums.yaml with the pretrained model in `folder`.

    Both sides get the conversations that the recipe's templates make of its rows.
    """
    from transformers import AutoTokenizer

    from llmrl.data.tasks import load_tasks

    file = REPOSITORY / "recipes" / "smollm2_sums.yaml"
    arguments = ["--model.path", str(folder), "--train.output_dir", str(output_dir), "--train.seed", str(seed)]
    config: Any = parse(["--config", str(file), *arguments], config_class=Config)
    rows, held_out = (
        [{"prompt": task.messages, "answer": task.answer} for task in load_tasks(data)]
        for data in (config.data, config.eval.data)
    )
    (reward,) = config.rewards
    config = replace(
        config,
        data=DataConfig(path=config.data.path),
        rewards=[replace(reward, fn=str(REPOSITORY / reward.fn))],
        train=replace(config.train, save_steps=0),
        eval=EvalConfig(),
        track=replace(config.track, console="quiet"),
    )
    return Work(config=config, rows=rows, tokenizer=AutoTokenizer.from_pretrained(folder), held_out=held_out)
