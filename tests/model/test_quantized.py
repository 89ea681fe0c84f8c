"""4-bit bases: refused where they cannot compute, and engines are sent the weights that they compute with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

from llmrl import Trainer
from llmrl.config import LoraConfig, ModelConfig
from llmrl.engines.hf.engine import HFEngine
from llmrl.errors import UserError
from llmrl.model import quantized
from llmrl.model.load import add_lora, load_model
from llmrl.model.policy import Policy
from llmrl.tiny import byte_tokenizer
from llmrl.track.files import read_jsonl
from tests.model.test_adapter_folder import save_adapter, save_base

CUDA = torch.device("cuda")


def odd(completion: str) -> float:
    return float(sum(map(ord, completion)) % 2)


def test_a_cpu_is_refused_before_anything_loads(tmp_path: Path) -> None:
    options = {"train.output_dir": str(tmp_path / "run"), "model.quantization": "nf4", "model.lora": {"r": 4}}
    options["rollout.num_prompts"] = 8
    rows = [{"question": str(k), "answer": "b"} for k in range(8)]
    with pytest.raises(UserError, match=r"model.quantization nf4 needs a CUDA GPU, and this process runs on cpu"):
        Trainer(options, model="tiny:qwen2", train_dataset=rows, reward=odd)


def test_missing_bitsandbytes_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install bitsandbytes"):
        quantized.check_device(ModelConfig(path="x", quantization="nf4"), CUDA)
    quantized.check_device(ModelConfig(path="x"), torch.device("cpu"))


def test_merging_into_a_quantized_base_is_refused(tmp_path: Path) -> None:
    assert "model.quantization" in ModelConfig(path="x", quantization="nf4", adapter="merge").findings()[0]


# --- with bitsandbytes ------------------------------------------------------------------------------------------------


@pytest.fixture
def base(tmp_path: Path) -> Path:
    pytest.importorskip("bitsandbytes")
    return save_base(tmp_path / "base", hidden_size=64, intermediate_size=128)


def load(path: Path, **options: Any) -> Any:
    return load_model(ModelConfig(path=str(path), quantization="nf4", **options), byte_tokenizer(), seed=0)


def test_engines_are_sent_what_the_layers_compute_with(base: Path) -> None:
    plain = load_model(ModelConfig(path=str(base)), byte_tokenizer(), seed=0)
    expected = {name: tensor.clone() for name, tensor in Policy(plain, temperature=1, keep_reference=False).weights()}
    adapted = add_lora(load(base), LoraConfig(r=4, target_modules=["q_proj", "down_proj"]), seed=0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    policy = Policy(adapted, temperature=1.0, keep_reference=False)
    assert policy.is_quantized
    found, without = dict(policy.weights()), dict(policy.base_weights())
    assert {name: t.shape for name, t in found.items()} == {name: t.shape for name, t in expected.items()}
    assert without.keys() == expected.keys()
    differing = {name for name in found if not torch.equal(found[name], without[name])}
    assert {name.split(".")[-2] for name in differing} == {"q_proj", "down_proj"}
    for name, layer in policy.causal_lm.named_modules():
        if not isinstance(layer, nn.Linear) or not quantized.is_quantized(layer):
            continue
        name = name.removesuffix(".base_layer")
        rows = torch.eye(layer.in_features, requires_grad=True)
        bias = 0 if layer.bias is None else layer.bias
        computed = (layer(rows) - bias).T.detach()  # through bitsandbytes' own kernel
        torch.testing.assert_close(without[f"{name}.weight"], computed, rtol=0, atol=1e-2 * computed.abs().max().item())
        original = expected[f"{name}.weight"]
        assert 0.01 < (without[f"{name}.weight"] - original).norm() / original.norm() < 0.2, "it was rounded to 4 bits"
    delta = adapted.get_base_model().model.layers[0].self_attn.q_proj.get_delta_weight("default")
    name = "model.layers.0.self_attn.q_proj.weight"
    torch.testing.assert_close(found[name] - without[name], delta, rtol=0, atol=1e-6)
    engine = HFEngine(policy.served_config, weights=policy.weights, dtype=torch.float32, device=torch.device("cpu"))
    assert not hasattr(policy.served_config, "quantization_config")
    assert engine is not None


def test_a_saved_adapter_goes_on_a_quantized_base(base: Path, tmp_path: Path) -> None:
    save_adapter(base, tmp_path / "adapter")
    model = load(tmp_path / "adapter")
    assert quantized.is_quantized(model)
    quantized.check_quantized(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert trained
    assert all(parameter.is_floating_point() for parameter in trained)


def test_what_cannot_be_trained_is_refused(base: Path) -> None:
    with pytest.raises(UserError, match="cannot be trained: train adapters"):
        quantized.check_quantized(load(base))
    dora = add_lora(load(base), LoraConfig(r=4, use_dora=True, target_modules=["q_proj"]), seed=0)
    obstacle = Policy(dora, temperature=1.0, keep_reference=False).merge_obstacle()
    assert obstacle is not None
    assert "quantized, is of another kind than plain LoRA" in obstacle
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options = {"quantization_config": BitsAndBytesConfig(load_in_8bit=True), "device_map": {"": "cpu"}}
    eight = AutoModelForCausalLM.from_pretrained(base, **options)
    eight = peft.get_peft_model(eight, peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(UserError, match="8-bit layers round activations too"):
        quantized.check_quantized(eight)


@pytest.mark.slow
def test_a_run_on_a_quantized_base(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, with the kernels of bitsandbytes that compute as its CUDA kernels do."""
    import bitsandbytes

    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: False)
    monkeypatch.setattr(quantized, "check_device", lambda *_: None)
    options = {
        "train.output_dir": str(tmp_path / "run"),
        "train.max_steps": 2,
        "train.learning_rate": 1e-2,
        "model.quantization": "nf4",
        "model.lora": {"r": 4},
        "algo.kl.beta": 0.1,
        "rollout.num_prompts": 4,
        "rollout.num_generations": 4,
        "rollout.max_completion_length": 12,
        "track.console": "quiet",
    }
    rows = [{"question": str(k), "answer": "b"} for k in range(8)]
    Trainer(options, model=str(base), train_dataset=rows, reward=odd).train()
    first, second = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert first["kl/ref"] == 0.0
    assert second["kl/ref"] > 1e-6
    assert max(first["kl/mismatch/max"], second["kl/mismatch/max"]) < 1e-5, "the engine computes the same"
    assert (tmp_path / "run" / "model" / "adapter_model.safetensors").is_file()
