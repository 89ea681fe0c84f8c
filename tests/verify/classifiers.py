"""Tiny sequence classifiers on disk, for the tests of reward models and evaluators."""

from __future__ import annotations

from pathlib import Path

import torch

from llmrl.tiny import build_tiny_model, byte_tokenizer


def save_classifier(folder: Path, *, num_labels: int = 1) -> Path:
    """Save a random classifier of a causal model and a byte tokenizer; return the folder."""
    from transformers import AutoModelForSequenceClassification

    tokenizer = byte_tokenizer()
    config = build_tiny_model("qwen2", vocab_size=len(tokenizer), hidden_size=32, pad_token_id=256).config
    config.num_labels = num_labels
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
