"""The check before the first step: what it lets pass, and what it catches, in the policy and in the critic."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from llmrl.errors import RunFailed
from llmrl.model.policy import Policy, PolicyModule
from llmrl.train.selfcheck import check_forward
from tests.invariance.cases import make_lora, make_ppo_learner, tiny_model

ARCHS = ["qwen2", "qwen3", "llama", "gemma", "gemma2", "mistral"]


def policy_of(model: torch.nn.Module) -> Policy:
    return Policy(model, temperature=1.0, keep_reference=False)


@pytest.mark.parametrize("arch", ARCHS)
def test_known_architectures_pass(arch: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        check_forward(policy_of(tiny_model(arch).to(dtype)))
    check_forward(policy_of(make_lora(tiny_model(arch))))


def test_a_packed_row_whose_sequences_see_each_other_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def with_a_mask(self: PolicyModule, input_ids: torch.Tensor, position_ids: torch.Tensor, *_: Any) -> torch.Tensor:
        inputs = {"input_ids": input_ids, "position_ids": position_ids, "attention_mask": torch.ones_like(input_ids)}
        return self.causal_lm.get_decoder()(**inputs, use_cache=False).last_hidden_state

    monkeypatch.setattr(PolicyModule, "hidden_states", with_a_mask)
    for dtype in (torch.float32, torch.bfloat16):
        policy = policy_of(tiny_model().to(dtype))
        [note] = check_forward(policy)
        assert "train.packing is off for this run" in note and "sequences of a packed row see each other" in note
        assert not policy.can_pack and not policy.can_share_prefixes
        assert check_forward(policy, packing=False) == []


@pytest.mark.parametrize("error", [IndexError("too many indices"), KeyError("mask"), AssertionError()])
def test_a_model_that_refuses_a_layout_trains_without_it(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    honest = PolicyModule.hidden_states

    def refuses(self: PolicyModule, ids: Tensor, positions: Tensor, visibility: Any = None) -> Tensor:
        if visibility.branch_ids is not None:
            raise error
        return honest(self, ids, positions, visibility)

    monkeypatch.setattr(PolicyModule, "hidden_states", refuses)
    policy = policy_of(tiny_model())
    assert check_forward(policy) == []
    assert policy.can_pack and not policy.can_share_prefixes


def test_a_lack_of_memory_says_nothing_about_a_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = PolicyModule.hidden_states

    def refuses(self: PolicyModule, ids: Tensor, positions: Tensor, visibility: Any = None) -> Tensor:
        if visibility.branch_ids is not None:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return honest(self, ids, positions, visibility)

    monkeypatch.setattr(PolicyModule, "hidden_states", refuses)
    with pytest.raises(torch.OutOfMemoryError):
        check_forward(policy_of(tiny_model()))


def test_a_model_that_cannot_be_run_is_one_line() -> None:
    model = tiny_model()
    model.register_forward_pre_hook(lambda *_: {}["rotary"])
    with pytest.raises(RunFailed, match=r"Qwen2ForCausalLM cannot be trained here: .* \(KeyError: 'rotary'\)"):
        check_forward(policy_of(model))


@pytest.mark.parametrize("factor", [1.05, -1.0, math.nan])
def test_logits_that_are_changed_after_the_head_are_caught(factor: float) -> None:
    model = tiny_model()

    def change(_module: object, _inputs: object, output: Any) -> Any:
        output.logits = output.logits * factor
        return output

    model.register_forward_hook(change)
    for packing in (True, False):
        with pytest.raises(RunFailed, match="the log-prob head gives"):
            check_forward(policy_of(model), packing=packing)


@pytest.mark.parametrize(("field", "value"), [("final_logit_softcapping", 3.0), ("logit_scale", 0.3)])
def test_constants_of_the_configuration_that_the_model_does_not_apply_are_caught(field: str, value: float) -> None:
    model = tiny_model()
    setattr(model.config, field, value)
    with pytest.raises(RunFailed, match="the log-prob head gives"):
        check_forward(policy_of(model))


def test_gemma2s_soft_cap_matters() -> None:
    """The check would be blind to a forgotten soft cap if the cap changed nothing at this size of logits."""
    model = tiny_model("gemma2", final_logit_softcapping=2.0)
    check_forward(policy_of(model))
    model.config.final_logit_softcapping = None
    capped = policy_of(tiny_model("gemma2", final_logit_softcapping=2.0))
    assert policy_of(model).sequence_logprobs([[1, 2, 3]]) != capped.sequence_logprobs([[1, 2, 3]])


def test_a_critic_that_cannot_handle_a_layout_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trunk that ignores masks turns shared prefixes off; one that mixes up packed sequences turns packing off."""
    learner, _ = make_ppo_learner("separate")
    policy, critic = learner.policy, learner.policy.module.critic
    assert critic is not None
    honest = critic.hidden_states

    def blind_to_masks(*inputs: Any) -> Tensor:
        return honest(*inputs[:3], None)

    monkeypatch.setattr(critic, "hidden_states", blind_to_masks)
    check_forward(policy)
    assert not policy.can_share_prefixes

    def blind_to_positions(input_ids: Tensor, position_ids: Tensor, *rest: Any) -> Tensor:
        return honest(input_ids, torch.arange(position_ids.shape[1])[None].expand_as(position_ids), *rest)

    monkeypatch.setattr(critic, "hidden_states", blind_to_positions)
    [note] = check_forward(policy)
    assert not policy.can_pack and "train.packing is off" in note and "Qwen2Model" in note
