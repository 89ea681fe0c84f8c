"""A trained model for others: weights or adapter, the tokenizer with the template it was trained with, and a card."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from safetensors import SafetensorError

from llmrl.errors import RunFailed, first_line
from llmrl.track.files import read_jsonl
from llmrl.track.history import part_of

if TYPE_CHECKING:
    from llmrl.model.policy import Policy

CARD = """---
{front}---

# {name}

{model} after {step} training steps of {algorithm} with [llmrl](https://github.com/llmrl/llmrl).

| | |
|---|---|
{facts}

## Use

```python
{use}
```

## Configuration

`llmrl train` with this file trains the model again.

```yaml
{config}```
"""
WHOLE = """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({name!r})
tokenizer = AutoTokenizer.from_pretrained({name!r})"""
ADAPTER = """from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

model = AutoPeftModelForCausalLM.from_pretrained({name!r})
tokenizer = AutoTokenizer.from_pretrained({name!r})"""
TOKENIZER = "tokenizer"
"""Folder of a run with its tokenizer, for exports."""
SHOWN_METRICS = (
    "reward/mean",
    "rollout/completion_length",
    "policy/entropy",
    "preference/accuracy",
    "preference/margin",
)


def save_model(folder: Path, policy: Policy, tokenizer: Any, *, run: Path, step: int) -> None:
    """Write a model folder that `from_pretrained` and vLLM take. It replaces a folder of this name when it is complete.

    Args:
        folder: where to.
        policy: the model as it is after `step`.
        tokenizer: with the chat template that it was trained with.
        run: the folder of the run, for the card.
        step: the step, from 1.

    Raises:
        RunFailed: the disk is full or not writable. Nothing is left behind, and what was in `folder` stays.
    """
    unfinished = folder.with_name(f".writing-{folder.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        policy.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        (unfinished / "README.md").write_text(model_card(run, step, policy), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise RunFailed(
            f"the model could not be written to {folder} ({first_line(error)}); free space, then "
            f"`llmrl export {run} --output DIR` writes it from the last checkpoint"
        ) from error


def model_card(run: Path, step: int, policy: Policy) -> str:
    """Return a model card with what the run itself recorded about its model of `step`."""
    part, adapter = part_of(run, step), policy.has_adapters and policy.base_is_saved
    config: dict[str, Any] = part["config"]
    base, algo, name = config["model"]["path"], config["algo"]["name"], run.resolve().name
    front: dict[str, Any] = {
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["llmrl", algo],
    }
    if is_hub_id(base):
        front["base_model"] = base
    if is_hub_id(config["data"]["path"].partition(":")[0]):
        front["datasets"] = [config["data"]["path"].partition(":")[0]]
    return CARD.format(
        front=yaml.safe_dump(front, sort_keys=False),
        name=name,
        model=base,
        step=step,
        algorithm=algo,
        facts="\n".join(f"| {fact} | {value} |" for fact, value in _facts(run, step, part, policy).items()),
        use=(ADAPTER if adapter else WHOLE).format(name=name),
        config=yaml.safe_dump(config, sort_keys=False, allow_unicode=True),
    )


def is_hub_id(name: str) -> bool:
    """Return whether a path of a model or dataset has the form of a name on the hub, and is nothing local."""
    return name.count("/") == 1 and not name.startswith((".", "~", "/", "(")) and not Path(name).exists()


def _facts(run: Path, step: int, part: dict[str, Any], policy: Policy) -> dict[str, str]:
    config, versions = part["config"], part["environment"].get("versions", {})
    rewards = ", ".join(f"`{r['fn']}` (weight {r.get('weight', 1.0):g})" for r in config.get("rewards", ()))
    facts = {
        "trained": policy.adapter_kind or "all parameters",
        "data": f"`{config['data']['path']}`, split {config['data'].get('split')}",
        "rewards": rewards,
        "learning rate": f"{config['train'].get('learning_rate')}",
        "versions": ", ".join(f"{package} {version}" for package, version in versions.items()),
        "part began": part["began"],
    }
    metrics = run / "metrics.jsonl"
    rows = [row for row in read_jsonl(metrics) if row["step"] == step] if metrics.is_file() else []
    facts |= {
        f"{key}, step {step}": f"{row[key]:.4g}" for row in rows for key in SHOWN_METRICS if row.get(key) is not None
    }
    return {fact: value for fact, value in facts.items() if value}
