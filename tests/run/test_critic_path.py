"""A critic made of another model: its trunk, and of a reward model its last layer too."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from llmrl import Trainer
from llmrl.errors import UserError
from llmrl.tiny import build_tiny_model
from llmrl.train.packing import build_micro_batch
from tests.invariance.cases import make_samples
from tests.model.test_critic import ROWS, letters, settings

pytestmark = pytest.mark.slow


def test_a_critic_of_another_shape(tmp_path: Path) -> None:
    build_tiny_model("llama", vocab_size=300, hidden_size=32, intermediate_size=32).save_pretrained(tmp_path / "other")
    options = settings(tmp_path / "run", critic__path=str(tmp_path / "other"))
    run = Trainer(options, model="tiny:qwen2", reward=letters, train_dataset=ROWS)
    critic = run.policy.module.critic
    assert critic is not None and critic.head.weight.shape == (32,)
    assert run.train()["value/grad_norm"] > 0
    build_tiny_model("llama", vocab_size=64).save_pretrained(tmp_path / "small")
    options = settings(tmp_path / "run2", critic__path=str(tmp_path / "small"))
    with pytest.raises(UserError, match="a vocabulary of 64 tokens, the policy one of 259"):
        Trainer(options, model="tiny:qwen2", reward=letters, train_dataset=ROWS)


@pytest.mark.parametrize("adapters", [None, {"r": 2}], ids=["whole", "adapters"])
def test_a_reward_model_gives_its_score_to_the_value_head(adapters: dict[str, int] | None, tmp_path: Path) -> None:
    """Before any step the value of every state is what the classifier says of the tokens up to there."""
    from transformers import AutoModelForSequenceClassification

    options = build_tiny_model("qwen2", vocab_size=259, pad_token_id=256).config
    options.num_labels = 1
    torch.manual_seed(7)
    judge = AutoModelForSequenceClassification.from_config(options).eval()
    judge.save_pretrained(tmp_path / "judge")
    more = {"critic__path": str(tmp_path / "judge"), "critic__lora": adapters}
    run = Trainer(settings(tmp_path / "run", **more), model="tiny:qwen2", reward=letters, train_dataset=ROWS)
    samples = [dataclasses.replace(s, input_ids=s.input_ids + 100) for s in make_samples(3)]
    values = run.policy.values(build_micro_batch(samples, [[i] for i in range(len(samples))]))
    with torch.no_grad():
        expected = [
            judge(input_ids=torch.from_numpy(s.input_ids[None, :t])).logits[0, 0]
            for s in samples
            for t in np.flatnonzero(s.loss_mask)
        ]
    torch.testing.assert_close(values, torch.stack(expected), rtol=0, atol=1e-5)
    assert values.std() > 1e-3
