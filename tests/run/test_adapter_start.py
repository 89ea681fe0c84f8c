"""Runs that start from an adapter: a folder, a peft configuration, or a peft model given in Python."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from llmrl import Trainer
from llmrl.config import load_config
from llmrl.errors import UserError
from llmrl.tiny import byte_tokenizer
from llmrl.track.files import read_jsonl
from tests.model.test_adapter_folder import logits, save_adapter, save_base

pytestmark = pytest.mark.slow

PAIRS = [{"prompt": f"Name {i}.", "chosen": f" It is {i}, surely", "rejected": f" no {chr(97 + i)}"} for i in range(8)]
QUESTIONS = [{"question": f"{i}+{i}?", "answer": str(2 * i)} for i in range(8)]


def odd(completion: str) -> float:
    return float(sum(map(ord, completion)) % 2)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, torch.Tensor]:
    folder = tmp_path_factory.mktemp("models")
    base = save_base(folder / "base")
    return base, folder / "sft", save_adapter(base, folder / "sft")


def given(folders: tuple[Path, Path, torch.Tensor], **options: Any) -> Any:
    return peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folders[0]), folders[1], **options)


def trainer(folder: Path, options: dict[str, Any] | None = None, **more: Any) -> Trainer:
    settings: dict[str, Any] = {
        "train.output_dir": str(folder),
        "train.max_steps": 2,
        "train.learning_rate": 1e-2,
        "train.save_steps": 1,
        "rollout.num_prompts": 4,
        "track.console": "quiet",
    }
    if more.get("algorithm", "grpo") in ("dpo", "kto"):
        more.setdefault("train_dataset", PAIRS)
    else:
        settings |= {"rollout.num_generations": 4, "rollout.max_completion_length": 6}
        more = {"train_dataset": QUESTIONS, "reward": odd} | more
    return Trainer(settings | (options or {}), **more)


def metrics(folder: Path) -> list[dict[str, Any]]:
    rows = read_jsonl(folder / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "perf/"))} for row in rows]


STARTS = {
    "continue": {},
    "merge": {"model.adapter": "merge"},
    "merge under a fresh one": {"model.adapter": "merge", "model.lora": {"r": 2}},
}


@pytest.mark.slow
@pytest.mark.parametrize("start", STARTS)
def test_a_run_starts_from_the_adapters_model_and_that_is_its_reference(
    start: str, folders: tuple[Path, Path, torch.Tensor], tmp_path: Path
) -> None:
    _, sft, expected = folders
    options = STARTS[start] | {"algo.kl.beta": 0.1}
    run = trainer(tmp_path / "grpo", options, model=str(sft))
    torch.testing.assert_close(logits(run.policy.causal_lm), expected, rtol=0, atol=1e-5)
    run.train()
    first, second = metrics(tmp_path / "grpo")
    assert first["kl/ref"] == pytest.approx(0, abs=1e-9)
    assert second["kl/ref"] > 1e-5
    after = logits(run.policy.causal_lm)
    assert (after - expected).abs().max() > 1e-3
    again = trainer(tmp_path / "next", STARTS[start] if start == "continue" else {}, model=str(tmp_path / "grpo/model"))
    torch.testing.assert_close(logits(again.policy.causal_lm), after, rtol=0, atol=1e-5)


@pytest.mark.parametrize("algorithm", ["dpo", "kto"])
@pytest.mark.parametrize("precomputed", [False, True])
def test_the_first_loss_of_preferences(
    algorithm: str, precomputed: bool, folders: tuple[Path, Path, torch.Tensor], tmp_path: Path
) -> None:
    """DPO: -log sigmoid(0). KTO: 1 - sigmoid(0)."""
    if algorithm == "kto" and precomputed:
        pytest.skip("KTO's estimate of the KL needs a reference")
    options = {"algo.precompute_ref_log_probs": precomputed}
    run = trainer(tmp_path / "run", options, model=str(folders[1]), algorithm=algorithm)
    run.train()
    first, second = metrics(tmp_path / "run")
    assert first["loss/total"] == pytest.approx({"dpo": math.log(2), "kto": 0.5}[algorithm], abs=1e-6)
    assert second["loss/total"] != pytest.approx(first["loss/total"], abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("algorithm", "options"),
    [
        ("grpo", {"algo.kl.beta": 0.1}),
        ("dpo", {}),
        ("dpo", {"algo.reference": {"steps": 1, "alpha": 1.0}}),
        ("ppo", {"algo.num_mini_batches": 1, "algo.kl.beta": 0.1}),
        ("ppo", {"algo.num_mini_batches": 1, "critic.kind": "adapter", "critic.lora": {"r": 2}}),
    ],
    ids=str,
)
def test_resumed_equals_undisturbed(
    algorithm: str, options: dict[str, Any], folders: tuple[Path, Path, torch.Tensor], tmp_path: Path
) -> None:
    """The reference comes from the checkpoint: the folder of the start is another one by then."""
    same = {"model": str(folders[1]), "algorithm": algorithm}
    trainer(tmp_path / "whole", options | {"train.max_steps": 3}, **same).train()
    trainer(tmp_path / "parts", options, **same).train()
    if "critic.kind" in options or algorithm != "ppo":  # a separate critic starts as a copy of the policy
        save_adapter(folders[0], tmp_path / "other", r=4)
        file = tmp_path / "other" / "adapter_model.safetensors"
        file.write_bytes((tmp_path / "parts" / "model" / "adapter_model.safetensors").read_bytes())
        same["model"] = str(tmp_path / "other")
    trainer(
        tmp_path / "parts", options | {"train.max_steps": 3, "train.resume_from_checkpoint": "last"}, **same
    ).train()
    one, other = (load_file(tmp_path / name / "model/adapter_model.safetensors") for name in ("whole", "parts"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    for undisturbed, resumed in zip(metrics(tmp_path / "whole"), metrics(tmp_path / "parts"), strict=True):
        differing = {key for key, value in resumed.items() if undisturbed[key] != value}
        assert not {key for key in differing if not key.startswith("sync/")}, "its probes are drawn by the start"


# --- given in Python ---


def test_a_peft_configuration_is_trained_and_written_down(
    folders: tuple[Path, Path, torch.Tensor], tmp_path: Path
) -> None:
    config = peft.LoraConfig(
        r=4, target_modules="all-linear", rank_pattern={"q_proj": 2}, modules_to_save=["model.norm"]
    )
    run = trainer(tmp_path / "run", model=str(folders[0]), peft_config=config, algorithm="dpo")
    run.train()
    assert config.task_type is None, "what the user gave is left alone"
    shapes = {name: tuple(p.shape) for name, p in run.policy.trained_parameters().items()}
    assert shapes["model.base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"][0] == 2
    assert shapes["model.base_model.model.model.layers.0.self_attn.k_proj.lora_A.default.weight"][0] == 4
    assert "model.base_model.model.model.norm.modules_to_save.default.weight" in shapes
    assert metrics(tmp_path / "run")[0]["loss/total"] == pytest.approx(math.log(2), abs=1e-6)
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["model"]
    assert written["peft"] == {
        "peft_type": "LORA",
        "r": 4,
        "target_modules": "all-linear",
        "rank_pattern": {"q_proj": 2},
        "modules_to_save": ["model.norm"],
    }
    options = [f"--model.peft={written['peft']}", "--model.path=x", "--data.path=y", "--rewards=[{'fn': 'a.py:f'}]"]
    assert load_config(options).model.peft == written["peft"]


def test_lora_options_reach_peft(folders: tuple[Path, Path, torch.Tensor], tmp_path: Path) -> None:
    lora = {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["model.norm"]}
    same: dict[str, Any] = {"model": str(folders[0]), "algorithm": "dpo"}
    run = trainer(tmp_path / "run", {"model.lora": lora}, **same)
    trained = [name.removeprefix("model.base_model.model.model.") for name in run.policy.trained_parameters()]
    expected = [f"layers.{k}.self_attn.q_proj.lora_{which}.default.weight" for k in range(2) for which in "AB"]
    assert sorted(trained) == [*expected, "norm.modules_to_save.default.weight"]
    with pytest.raises(UserError, match="model.lora and model.peft"):
        trainer(tmp_path / "none", {"model.lora": lora, "model.peft": {"peft_type": "LORA"}}, **same)


def test_a_trained_peft_model_is_trained_as_given(folders: tuple[Path, Path, torch.Tensor], tmp_path: Path) -> None:
    model = given(folders, is_trainable=True, adapter_name="mine")
    run = trainer(tmp_path / "run", {"algo.kl.beta": 0.1}, model=model, processing_class=byte_tokenizer())
    assert torch.equal(logits(run.policy.causal_lm), folders[2])
    run.train()
    assert metrics(tmp_path / "run")[0]["kl/ref"] == 0.0
    assert (tmp_path / "run/model/adapter_config.json").is_file(), "at the top, whatever the adapter is called"
    again = trainer(tmp_path / "next", model=str(tmp_path / "run/model"))
    torch.testing.assert_close(logits(again.policy.causal_lm), logits(run.policy.causal_lm), rtol=0, atol=1e-5)


def test_the_active_one_of_several_adapters_is_trained(
    folders: tuple[Path, Path, torch.Tensor], tmp_path: Path
) -> None:
    model = given(folders, is_trainable=True, adapter_name="first")
    model.load_adapter(folders[1], "second", is_trainable=True)
    model.set_adapter("second")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer(tmp_path / "run", model=model, processing_class=byte_tokenizer()).train()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(before[name], parameter)}
    assert changed
    assert all(".second." in name for name in changed)


def frozen(folders: Any) -> Any:
    return given(folders)


def injected(folders: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folders[1])


def without_gradient(folders: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folders[0]).requires_grad_(False)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (frozen, r"is frozen.*is_trainable=True"),
        (injected, r"transformers loaded.*is_trainable=True"),
        (without_gradient, r"no parameter of the model is trained"),
    ],
)
def test_models_that_would_not_be_trained_are_refused(
    make: Any, message: str, folders: tuple[Path, Path, torch.Tensor], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        trainer(tmp_path / "run", model=make(folders), processing_class=byte_tokenizer())


def test_two_descriptions_of_an_adapter_are_refused(folders: tuple[Path, Path, torch.Tensor], tmp_path: Path) -> None:
    model = given(folders, is_trainable=True)
    config = peft.LoraConfig(r=2, target_modules="all-linear")
    with pytest.raises(UserError, match=r"has an adapter already, and peft_config"):
        trainer(tmp_path / "run", model=model, processing_class=byte_tokenizer(), peft_config=config)
    with pytest.raises(UserError, match=r"give a configuration of peft"):
        trainer(tmp_path / "run", model=str(folders[0]), peft_config={"r": 4})
    with pytest.raises(UserError, match=r"PREFIX_TUNING adds virtual tokens"):
        prefix = peft.PrefixTuningConfig(num_virtual_tokens=3)
        trainer(tmp_path / "run", model=str(folders[0]), peft_config=prefix)


def test_a_reference_cannot_move_part_of_the_way_between_adapters(
    folders: tuple[Path, Path, torch.Tensor], tmp_path: Path
) -> None:
    options = {"algo.reference": {"steps": 1, "alpha": 0.5}}
    for more in ({"model": str(folders[1])}, {"model": str(folders[0]), "peft_config": peft.LoraConfig(r=2)}):
        with pytest.raises(UserError, match="alpha 0.5 would mix the weights of two adapters"):
            trainer(tmp_path / "run", options, algorithm="dpo", **more)
