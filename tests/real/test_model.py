"""The model that `scripts/fetch_model` provides is the one whose name it bears."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from llmrl.data.chat import Chat
from llmrl.types import Message


def test_it_answers_a_question_and_stops(smollm2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    chat = Chat(tokenizer, generation_config=GenerationConfig.from_pretrained(smollm2))
    prompt = chat.render([Message(role="user", content="What is the capital of France?")])
    assert chat.decode(prompt).startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert chat.decode(prompt).endswith("France?<|im_end|>\n<|im_start|>assistant\n")
    found = model.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False)[0, len(prompt) :].tolist()
    assert "Paris" in chat.decode(found)
    assert found[-1] in chat.stop_token_ids and 2 in chat.stop_token_ids


def test_its_configuration_is_the_published_one(smollm2: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    config = model.config
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (576, 30, 49152)
    assert (config.num_attention_heads, config.num_key_value_heads) == (9, 3)
    assert config.rope_parameters["rope_theta"] == 100_000 and config.rms_norm_eps == 1e-5
    assert config.tie_word_embeddings and config.max_position_embeddings == 8192
    assert getattr(config, "quantization_config", None) is None
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 2)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("12+345", ["1", "2", "+", "3", "4", "5"]),
        # The run of spaces ends where the digit begins, so it is one token. Without the cut at digits, the last space
        # would be taken together with what follows.
        ("a   7", ["a", "\u0120\u0120\u0120", "7"]),
        ("<|im_start|>user", ["<|im_start|>", "user"]),
    ],
)
def test_its_tokenizer_cuts_at_every_digit(smollm2: Path, text: str, tokens: list[str]) -> None:
    assert AutoTokenizer.from_pretrained(smollm2).tokenize(text) == tokens


def test_its_tokenizer_names_the_special_tokens(smollm2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert tokenizer.convert_ids_to_tokens([0, 1, 2]) == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert len(tokenizer) == 49152 and tokenizer.model_max_length == 8192
