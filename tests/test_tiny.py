"""Tiny models and tokenizers: lossless text, reproducible weights, saving and loading, fine-tuning."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, seed, settings
from hypothesis import strategies as st

from llmrl.errors import UserError
from llmrl.tiny import TINY_ARCHS, build_tiny_model, byte_tokenizer, char_tokenizer, fine_tune

SEED = int(os.environ.get("LLMRL_TEST_SEED", "0"))
BYTES = byte_tokenizer()
SPECIALS = ("<|pad|>", "<|eos|>", "<|im_start|>")
ALPHABET = "0123456789+-*= abc\n\tZ?\\{}<>"
CHARS = char_tokenizer(ALPHABET, ["<think>", "</think>", "\\boxed{"])


@seed(SEED)
@settings(max_examples=300, deadline=None, database=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_byte_ids_are_the_utf8_bytes_and_decode_to_the_same_text(text: str) -> None:
    if any(special in text for special in SPECIALS):
        return
    token_ids = BYTES.encode(text)
    assert token_ids == list(text.encode())
    assert BYTES.decode(token_ids) == text
    assert BYTES.decode(token_ids, skip_special_tokens=True) == text


@pytest.mark.parametrize(
    "text", ["  two  spaces . , n't \n\n", "e\u0301 \u00e9", "\u5b57\U0001f642\u200d", "\x00\x7f\r\n", " "]
)
def test_byte_tokenizer_keeps_what_decoders_like_to_tidy(text: str) -> None:
    assert BYTES.decode(BYTES.encode(text)) == text


def test_byte_specials_have_the_last_ids_and_are_found_inside_text() -> None:
    assert BYTES.convert_tokens_to_ids(list(SPECIALS)) == [256, 257, 258]
    assert (len(BYTES), BYTES.pad_token_id, BYTES.eos_token_id, BYTES.bos_token_id) == (259, 256, 257, None)
    assert BYTES.encode("a<|eos|>b") == [97, 257, 98]
    assert BYTES.decode([97, 257, 98]) == "a<|eos|>b"
    assert BYTES.decode([97, 257, 98], skip_special_tokens=True) == "ab"


def test_byte_chat_template() -> None:
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    text = BYTES.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == "<|im_start|>system\nS<|eos|>\n<|im_start|>user\nU<|eos|>\n<|im_start|>assistant\n"
    assert not BYTES.apply_chat_template(messages, tokenize=False).endswith("assistant\n")


@seed(SEED)
@settings(max_examples=200, deadline=None, database=None)
@given(st.lists(st.sampled_from([*ALPHABET, "<think>", "</think>", "\\boxed{"])))
def test_char_tokenizer_round_trip_with_one_token_per_character(pieces: list[str]) -> None:
    text = "".join(pieces)
    rest = text.replace("</think>", "@").replace("<think>", "@").replace("\\boxed{", "@")
    token_ids = CHARS.encode(text)
    assert len(token_ids) == len(rest)
    assert CHARS.decode(token_ids) == text
    assert CHARS.decode(token_ids, skip_special_tokens=True) == text


def test_char_ids_follow_the_order_given() -> None:
    tokenizer = char_tokenizer("ba b", ["<think>"])
    names = ["b", "a", "\u0120", "<|unk|>", "<|pad|>", "<|eos|>", "<|im_start|>", "<think>"]
    assert tokenizer.convert_ids_to_tokens(range(len(tokenizer))) == names
    assert tokenizer.encode("a<think>b <|eos|>") == [1, 7, 0, 2, 5]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (4, 5, 3)


def test_char_tokenizer_shows_unknown_characters() -> None:
    assert CHARS.decode(CHARS.encode("1q2")) == "1<|unk|>2"


def test_char_chat_template_uses_two_tokens_per_message() -> None:
    messages = [{"role": "user", "content": "1+1="}]
    token_ids = CHARS.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    start, end = CHARS.convert_tokens_to_ids(["<|im_start|>", "<|eos|>"])
    assert token_ids == [start, *CHARS.encode("1+1="), end, start]


@pytest.mark.parametrize("arguments", [("", ()), ("caf\u00e9", ()), ("ab", ["c"]), ("ab", [""])])
def test_char_tokenizer_refuses(arguments: tuple[str, list[str]]) -> None:
    with pytest.raises(UserError, match="char_tokenizer"):
        char_tokenizer(*arguments)


@pytest.mark.parametrize("arch", TINY_ARCHS)
def test_model_has_the_sizes_asked_for(arch: str) -> None:
    model = build_tiny_model(arch, vocab_size=50, hidden_size=32, num_layers=3, num_heads=4, num_kv_heads=2)
    assert model.config.model_type == arch
    assert not model.training
    layers = model.model.layers
    assert len(layers) == 3
    assert layers[0].self_attn.q_proj.weight.shape == (4 * 8, 32)
    assert layers[0].self_attn.k_proj.weight.shape == (2 * 8, 32)
    assert model.get_input_embeddings().weight.shape == (50, 32)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    # A family's default ids are other tokens here; a pad id would even freeze that token's embedding.
    for config in (model.config, model.generation_config):
        assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (None, None, None)


@pytest.mark.parametrize("arch", TINY_ARCHS)
def test_model_learns_and_is_causal(arch: str) -> None:
    import torch

    model = build_tiny_model(arch, vocab_size=20, seed=SEED)
    generator = torch.Generator().manual_seed(SEED)
    input_ids = torch.randint(0, 20, (2, 9), generator=generator)
    changed = input_ids.clone()
    changed[:, 6:] = (changed[:, 6:] + 1) % 20
    logits, other = model(input_ids).logits, model(changed).logits
    torch.testing.assert_close(logits[:, :6], other[:, :6])
    assert not torch.allclose(logits[:, 6:], other[:, 6:])
    model(input_ids, labels=input_ids).loss.backward()
    dead = [
        name
        for name, p in model.named_parameters()
        if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()
    ]
    assert [name for name in dead if not name.endswith("k_proj.bias")] == []  # softmax ignores a shift of all keys


def test_weights_depend_on_the_seed_alone_and_global_randomness_is_left_alone() -> None:
    import torch

    torch.manual_seed(123)
    before = torch.get_rng_state()
    first = build_tiny_model("qwen2", vocab_size=30, seed=1)
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(7)
    second = build_tiny_model("qwen2", vocab_size=30, seed=1)
    third = build_tiny_model("qwen2", vocab_size=30, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.get_input_embeddings().weight, third.get_input_embeddings().weight)


def test_overrides_reach_the_configuration() -> None:
    model = build_tiny_model("qwen3", vocab_size=259, eos_token_id=257, head_dim=8, attn_implementation="eager")
    assert (model.config.eos_token_id, model.generation_config.eos_token_id, model.config.head_dim) == (257, 257, 8)
    assert model.config._attn_implementation == "eager"
    untied = build_tiny_model("llama", vocab_size=30, tie_word_embeddings=False)
    assert untied.get_input_embeddings().weight is not untied.get_output_embeddings().weight


@pytest.mark.parametrize("arch", TINY_ARCHS)
def test_saved_folder_loads_back(arch: str, tmp_path: object) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    text = "<think>\n 1+  2 =</think>\\boxed{3}<|eos|>"
    for tokenizer, folder in [(BYTES, f"{tmp_path}/bytes"), (CHARS, f"{tmp_path}/chars")]:
        ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
        model = build_tiny_model(arch, vocab_size=len(tokenizer), seed=SEED, **ids)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        loaded, loaded_tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        assert loaded_tokenizer.get_vocab() == tokenizer.get_vocab()
        assert loaded_tokenizer.encode(text) == tokenizer.encode(text)
        assert loaded_tokenizer.decode(tokenizer.encode(text)) == text
        assert loaded_tokenizer.chat_template == tokenizer.chat_template
        assert (loaded_tokenizer.eos_token_id, loaded_tokenizer.pad_token_id) == tuple(ids.values())
        input_ids = torch.tensor([tokenizer.encode(text)])
        assert torch.equal(loaded(input_ids).logits, model(input_ids).logits)
        assert loaded.generation_config.eos_token_id == tokenizer.eos_token_id


def test_wrong_sizes_and_names_are_explained() -> None:
    with pytest.raises(UserError, match=r"'gpt5'.*qwen2, qwen3"):
        build_tiny_model("gpt5", vocab_size=10)
    with pytest.raises(UserError, match="hidden_size 65 is not a multiple of 4"):
        build_tiny_model("qwen2", vocab_size=10, hidden_size=65)
    with pytest.raises(UserError, match="num_heads 4 is not a multiple of 3"):
        build_tiny_model("qwen2", vocab_size=10, num_kv_heads=3)


def test_import_does_without_torch() -> None:
    modules = "llmrl.tiny, llmrl.data.tasks, llmrl.data.chat, llmrl.data.sampler"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_fine_tuning_ends_when_stop_returns_true(tmp_path: Path) -> None:
    tokenizer = char_tokenizer("ab\n")
    model = build_tiny_model("qwen2", vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, seed=SEED)
    before = model.get_input_embeddings().weight.detach().clone()
    rows = [{"prompt": "a\n", "completion": "b"}] * 16
    seen: list[int] = []

    def stop(step: int) -> bool:
        seen.append(step)
        return step == 3

    assert fine_tune(model, tokenizer, rows, output_dir=tmp_path, max_steps=9, batch_size=2, stop=stop) == 3
    assert seen == [1, 2, 3] and not model.training
    assert not before.equal(model.get_input_embeddings().weight)
    assert fine_tune(model, tokenizer, rows, output_dir=tmp_path, max_steps=2, batch_size=2) == 2
