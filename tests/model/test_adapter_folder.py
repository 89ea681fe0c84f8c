"""Models saved as an adapter: which base is found, what the two are together, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from llmrl.config import LoraConfig, ModelConfig
from llmrl.errors import UserError
from llmrl.model.adapter_folder import find_adapter
from llmrl.model.load import load_generation_config, load_model, load_tokenizer
from llmrl.model.policy import Policy
from llmrl.tiny import build_tiny_model, byte_tokenizer

IDS = torch.arange(40, 60)[None]


def save_base(folder: Path, **options: Any) -> Path:
    tokenizer = byte_tokenizer()
    model = build_tiny_model("qwen2", vocab_size=len(tokenizer), seed=0, num_heads=2, num_kv_heads=1, **options)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_adapter(base: Path, folder: Path, *, num_new_tokens: int = 0, **options: Any) -> torch.Tensor:
    """Save an adapter that does something, and return the logits of its model as peft computes them."""
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    if num_new_tokens:
        with torch.random.fork_rng():
            model.resize_token_embeddings(259 + num_new_tokens)
    defaults = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", "init_lora_weights": False}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = peft.get_peft_model(model, peft.LoraConfig(**(defaults | options)))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad and "lora_" not in name:
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(folder)
    return logits(model)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits


def load(folder: Path, **options: Any) -> Any:
    config = ModelConfig(path=str(folder), **options)
    return load_model(config, load_tokenizer(config), seed=0)


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, Path, torch.Tensor]:
    base = save_base(tmp_path / "base")
    return base, tmp_path / "adapter", save_adapter(base, tmp_path / "adapter")


def test_an_adapter_folder_is_its_model_ready_to_be_trained(saved: tuple[Path, Path, torch.Tensor]) -> None:
    base, folder, expected = saved
    model = load(folder)
    assert torch.equal(logits(model), expected)
    assert (expected - logits(load(base))).abs().max() > 0.1
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)


def test_merging_gives_the_same_model_as_a_whole_one(saved: tuple[Path, Path, torch.Tensor]) -> None:
    _, folder, expected = saved
    model = load(folder, adapter="merge")
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)
    assert not hasattr(model, "disable_adapter")
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_tokenizer_and_stop_tokens_are_the_adapters_or_the_bases(saved: tuple[Path, Path, torch.Tensor]) -> None:
    base, folder, _ = saved
    config = ModelConfig(path=str(folder))
    assert len(load_tokenizer(config)) == len(byte_tokenizer())
    assert load_generation_config(config) is not None
    assert load_generation_config(config) == load_generation_config(ModelConfig(path=str(base)))
    own = byte_tokenizer()
    own.chat_template = "its own"
    own.save_pretrained(folder)
    assert load_tokenizer(config).chat_template == "its own"


@pytest.mark.parametrize("case", ["embeddings", "saved embeddings", "token indices"])
def test_new_tokens_of_an_adapter_widen_the_base(case: str, tmp_path: Path) -> None:
    options = {
        "embeddings": {"modules_to_save": ["embed_tokens", "lm_head"]},
        "saved embeddings": {},
        "token indices": {"trainable_token_indices": [259, 260]},
    }[case]
    base = save_base(tmp_path / "base", tie_word_embeddings=False)
    expected = save_adapter(base, tmp_path / "adapter", num_new_tokens=2, **options)
    model = load(tmp_path / "adapter")
    assert model.get_input_embeddings().weight.shape[0] == 261
    known = slice(None, 259) if case == "token indices" else slice(None)  # rows that were not saved are random
    assert torch.equal(logits(model)[..., known], expected[..., known])


def test_where_the_base_is(saved: tuple[Path, Path, torch.Tensor], tmp_path: Path) -> None:
    base, folder, expected = saved
    moved = tmp_path / "elsewhere"
    base.rename(moved)
    with pytest.raises(UserError, match=r"is an adapter of .*base, which is not there: name .* with --model.base"):
        load(folder)
    model = load(folder, base=str(moved))
    assert torch.equal(logits(model), expected)
    assert model.peft_config["default"].base_model_name_or_path == str(moved), "the next stage finds it"
    rewrite(folder, base_model_name_or_path="../elsewhere")
    assert torch.equal(logits(load(folder)), expected), "relative to the adapter"
    rewrite(folder, base_model_name_or_path=None)
    with pytest.raises(UserError, match=r"names no base: .*--model.base"):
        load(folder)
    with pytest.raises(UserError, match="nobody/nothing"):
        load(folder, base="nobody/nothing")


def test_a_whole_model_beside_the_adapter_is_its_base(saved: tuple[Path, Path, torch.Tensor]) -> None:
    base, folder, expected = saved
    shutil.copytree(base, folder, dirs_exist_ok=True)
    rewrite(folder, base_model_name_or_path="nobody/nothing")
    model = load(folder)
    assert torch.equal(logits(model), expected), "the adapter counts once"
    assert model.get_base_model().name_or_path == str(folder)
    torch.testing.assert_close(logits(load(folder, adapter="merge")), expected, rtol=0, atol=1e-5)


def test_an_adapter_on_an_adapter(saved: tuple[Path, Path, torch.Tensor], tmp_path: Path) -> None:
    _, folder, _ = saved
    merged, second = tmp_path / "merged", tmp_path / "second"
    load(folder, adapter="merge").save_pretrained(merged)
    expected = save_adapter(merged, second, r=2)
    rewrite(second, base_model_name_or_path=str(folder))
    torch.testing.assert_close(logits(load(second)), expected, rtol=0, atol=1e-5)


def test_options_of_adapters_must_agree_with_the_folder(saved: tuple[Path, Path, torch.Tensor]) -> None:
    base, folder, expected = saved
    same = LoraConfig(r=4, lora_alpha=8)
    assert torch.equal(logits(load(folder, lora=same)), expected)
    assert torch.equal(
        logits(load(folder, peft={"peft_type": "LORA", "r": 4, "target_modules": "all-linear"})), expected
    )
    differing = {
        "r 8, not 4": {"lora": LoraConfig(r=8, lora_alpha=8)},
        "target_modules": {"lora": LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"])},
        "peft_type IA3, not LORA": {"peft": {"peft_type": "IA3"}},
    }
    for what, options in differing.items():
        with pytest.raises(UserError, match=f"asks for another .*{what}.*model.adapter merge"):
            load(folder, **options)
        torch.testing.assert_close(logits(load(folder, adapter="merge", **options)), expected, rtol=0, atol=1e-5)
    for name in ("adapter", "base"):
        value = "merge" if name == "adapter" else str(folder)
        with pytest.raises(UserError, match=f"model.{name} .* is a whole model"):
            find_adapter(ModelConfig(path=str(base), **{name: value}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task_type": "SEQ_CLS"}, "adapter for SEQ_CLS"),
        ({"peft_type": "NEW"}, "cannot be read by peft"),
        ({"r": 8}, "does not fit its base"),
    ],
)
def test_adapters_that_cannot_be_trained_are_refused(
    change: dict[str, Any], message: str, saved: tuple[Path, Path, torch.Tensor]
) -> None:
    rewrite(saved[1], **change)
    with pytest.raises(UserError, match=message):
        load(saved[1])


def test_a_prefix_is_refused(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    config = peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(tmp_path / "prefix")
    with pytest.raises(UserError, match="PREFIX_TUNING adds virtual tokens"):
        load(tmp_path / "prefix")


def test_what_was_merged_or_written_into_the_base_is_saved_with_it(
    saved: tuple[Path, Path, torch.Tensor], tmp_path: Path
) -> None:
    """An adapter alone would be put on a base that is not the one it was trained on."""
    pissa = load_model(ModelConfig(path=str(saved[0])), byte_tokenizer(), seed=0)
    pissa = peft.get_peft_model(pissa, peft.LoraConfig(r=2, init_lora_weights="pissa", target_modules="all-linear"))
    expected = logits(pissa)
    Policy(pissa, temperature=1.0, keep_reference=False).save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model" / "adapter_config.json").exists()
    torch.testing.assert_close(logits(load(tmp_path / "model", tokenizer=str(saved[0]))), expected, rtol=0, atol=1e-5)


def rewrite(folder: Path, **fields: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
