"""Precision: what is trained is held in float32, and models compute exactly as if they were held in `model.dtype`."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmrl.config import LoraConfig, ModelConfig, SeparateCritic
from llmrl.errors import UserError
from llmrl.model.critic import build_critic
from llmrl.model.load import add_lora, load_model, load_tokenizer
from llmrl.model.policy import Policy
from llmrl.model.precision import compute_in, exact_positions, hold, own_type
from llmrl.model.rounding import computing_in
from llmrl.train.packing import build_micro_batch
from llmrl.train.selfcheck import check_forward
from tests.invariance.cases import (
    make_config,
    make_learner,
    make_lora,
    make_ppo_learner,
    make_samples,
    scored_groups,
    tiny_model,
    train_batch,
    update_and_look,
)

BF16 = torch.bfloat16
ARCHS = ["qwen2", "qwen3", "llama", "gemma", "gemma2"]


def narrow(model: nn.Module) -> Any:
    """Return a copy of the model that is held in bfloat16, as transformers would load it."""
    copied = copy.deepcopy(model)
    for parameter in copied.parameters():
        parameter.data = parameter.data.to(BF16)
    return copied


def policy_of(model: nn.Module, **options: Any) -> Policy:
    return Policy(model, **({"temperature": 1.0, "keep_reference": False, "dtype": BF16} | options))


def types(module: nn.Module, *, trained: bool) -> set[torch.dtype]:
    return {p.dtype for p in module.parameters() if p.requires_grad is trained}


# --- computing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHS)
def test_a_policy_computes_what_a_bfloat16_model_computes(arch: str, seed: int) -> None:
    model = tiny_model(arch, seed=seed)
    plain: Any = narrow(model)
    policy = policy_of(model)
    plain.set_attn_implementation(policy.model_config._attn_implementation)  # capped scores need eager
    ids = torch.tensor([make_samples(seed)[0].input_ids.tolist()])
    expected = plain(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)[0, :-1]
    expected = expected.gather(1, ids[0, 1:, None])[:, 0]
    found = torch.tensor(policy.sequence_logprobs(ids.tolist())[0])
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02 * expected.abs().max().item())  # the head's rounding
    with policy.computing():
        hidden = policy.causal_lm.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    assert torch.equal(hidden, plain.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state)
    assert hidden.dtype == BF16
    check_forward(policy)


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_adapters_of_single_parameters_compute_pass_after_pass(dtype: torch.dtype, seed: int) -> None:
    """peft puts them in for each pass, in the place of the experts' tensors, and takes them out again."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"vocab_size": 61, "hidden_size": 32, "moe_intermediate_size": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    experts = {"num_experts": 4, "num_experts_per_tok": 2}
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_moe", **sizes, **heads, **experts))
    policy = policy_of(make_lora(model, target_parameters=["mlp.experts.down_proj"]), dtype=dtype)
    hold(policy.module, dtype)
    plain: Any = copy.deepcopy(policy.module.model)
    for parameter in plain.parameters():
        parameter.data = parameter.data.to(dtype)
    sequence = make_samples(seed)[0].input_ids.tolist()
    logits = plain(input_ids=torch.tensor([sequence]), use_cache=False).logits[0, :-1].float()
    expected = logits.log_softmax(-1).gather(1, torch.tensor(sequence)[1:, None])[:, 0].tolist()
    for _ in range(3):
        found = policy.sequence_logprobs([sequence])[0]
        assert found == pytest.approx(expected, abs=1e-5 if dtype == torch.float32 else 0.05)
    with computing_in(policy.module, torch.float32 if dtype == BF16 else BF16):  # casts of the experts' tensors
        other, again = (policy.sequence_logprobs([sequence])[0] for _ in range(2))
    assert other == again != found
    assert other == pytest.approx(expected, abs=0.05)
    assert policy.sequence_logprobs([sequence])[0] == found
    policy.forward(build_micro_batch(make_samples(seed), [[0]])).logprobs.sum().backward()
    gradients = {name: p.grad for name, p in policy.module.named_parameters() if p.requires_grad}
    assert all(g is not None and g.isfinite().all() for g in gradients.values())
    assert {name for name, g in gradients.items() if "experts" in name and g.any()}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_a_bfloat16_model(checkpointing: bool, seed: int) -> None:
    model = tiny_model(seed=seed)
    plain: Any = narrow(model)
    if checkpointing:
        model.gradient_checkpointing_enable()  # pyright: ignore
    policy = policy_of(model)
    batch = build_micro_batch(make_samples(seed), [[0], [1]])
    policy.wrapped.train()
    policy.forward(batch).logprobs.sum().backward()
    hidden = plain.get_decoder()(batch.input_ids, position_ids=batch.position_ids, use_cache=False).last_hidden_state
    logits = hidden.flatten(0, 1)[batch.predict_from] @ plain.lm_head.weight.detach().T
    logits.float().log_softmax(-1).gather(1, batch.targets[:, None]).sum().backward()
    theirs = dict(plain.named_parameters())
    for name, parameter in policy.causal_lm.named_parameters():
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32
        if ".layers." in name:
            expected = theirs[name].grad.float()
            torch.testing.assert_close(parameter.grad, expected, rtol=0.05, atol=0.05 * expected.abs().max().item())


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_activations_are_the_same(lora: bool, reentrant: bool, seed: int) -> None:
    """A model may come with checkpointing switched on, in either of torch's two ways."""
    outcomes = []
    for checkpointing in (False, True):
        model: Any = tiny_model(seed=seed)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model = make_lora(model) if lora else model
        learner, algorithm = make_learner(narrow(model) if not lora else model, make_config(), dtype=BF16)
        outcomes.append(update_and_look(learner, algorithm, make_samples(seed)).gradients)
    for name, gradient in outcomes[0].items():
        assert torch.equal(outcomes[1][name], gradient), name


def test_parameters_that_transformers_keeps_in_float32_stay_so() -> None:
    model: Any = tiny_model()
    model._keep_in_fp32_modules_strict = {"post_attention_layernorm"}
    model.model._keep_in_fp32_modules_strict = {"post_attention_layernorm"}
    policy = policy_of(model)
    kept = [tensor.dtype for name, tensor in policy.weights() if "post_attention" in name]
    assert set(kept) == {torch.float32}
    assert {tensor.dtype for name, tensor in policy.weights() if "post_attention" not in name} == {BF16}
    with compute_in(BF16, model):
        assert model.model.layers[0].post_attention_layernorm.weight.dtype == torch.float32
        assert model.model.layers[0].input_layernorm.weight.dtype == BF16
    assert types(model, trained=True) == {torch.float32}


# --- holding ----------------------------------------------------------------------------------------------------------


def test_a_whole_model_its_reference_and_what_engines_get() -> None:
    model = tiny_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    policy = policy_of(model, keep_reference=True)
    policy.hold()
    assert types(policy.module, trained=True) == {torch.float32} and policy.dtype == BF16
    assert policy._reference is not None
    assert types(policy._reference, trained=False) == {BF16}, "half the memory"
    for name, tensor in policy.weights():
        assert tensor.dtype == BF16 and torch.equal(tensor, before[name].to(BF16))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.named_parameters())
    assert {t.dtype for t in policy.trained_parameters().values()} == {torch.float32}


def test_adapters_are_held_in_float32_over_a_base_in_the_compute_type() -> None:
    model = add_lora(tiny_model(), LoraConfig(r=4), seed=0)
    policy = policy_of(model)
    policy.hold()
    assert types(policy.module, trained=True) == {torch.float32}
    assert types(policy.module, trained=False) == {BF16}
    assert {tensor.dtype for _, tensor in policy.weights()} == {BF16}
    assert {tensor.dtype for tensor in policy.adapter().tensors.values()} == {torch.float32}


def test_a_bfloat16_model_becomes_a_float32_one_that_computes_in_bfloat16() -> None:
    model = narrow(tiny_model())
    policy = Policy(model, temperature=1.0, keep_reference=False)
    assert policy.dtype == BF16 and types(model, trained=True) == {BF16}, "what only looks changes nothing"
    batch = build_micro_batch(make_samples(0), [[0, 1]])
    before = policy.exact_logprobs(batch)
    policy.hold()
    assert policy.dtype == BF16 and types(model, trained=True) == {torch.float32}
    assert torch.equal(policy.exact_logprobs(batch), before)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "lora", "critic_lora"),
    [
        ("separate", False, False),
        ("separate", True, False),
        ("separate", True, True),
        ("separate", False, True),
        ("shared", False, False),
        ("shared", True, False),
        ("adapter", True, False),
    ],
)
def test_critics(kind: str, lora: bool, critic_lora: bool, seed: int) -> None:
    """Whatever they train is float32, whatever is frozen bfloat16; and they learn what the float32 ones learn."""
    critic = {"lora": LoraConfig(r=4, lora_alpha=4)} if critic_lora else {}
    gradients = {}
    for dtype in ("float32", "bfloat16"):
        learner, algorithm = make_ppo_learner(
            kind, lora=lora, algo={"num_mini_batches": 1}, critic=critic, model={"dtype": dtype}
        )
        module = learner.policy.module
        assert types(module, trained=True) == {torch.float32}
        if lora or critic_lora:
            assert types(module, trained=False) == {getattr(torch, dtype)}
        check_forward(learner.policy)
        batch = algorithm.prepare(scored_groups(seed), policy_version=0)
        gradients[dtype] = update_and_look(learner, algorithm, batch).gradients
        assert learner.policy.values(build_micro_batch(make_samples(seed), [[0, 1]])).dtype == torch.float32
        state = learner.optimizer.state
        assert {s["exp_avg_sq"].dtype for s in state.values()} == {torch.float32}
    for part in ("critic.", "model."):
        exact, found = (
            torch.cat([g.flatten() for n, g in gradients[d].items() if n.startswith(part)]) for d in gradients
        )
        error = (found - exact).norm() / exact.norm()
        assert 0 < error < 0.1, f"{part} {error:.3f}"


def test_a_frozen_parameter_that_two_models_share_stays_shared() -> None:
    learner, _ = make_ppo_learner("adapter", lora=True, model={"dtype": "bfloat16"})
    assert learner.policy.critic is not None
    policy = {id(p) for p in learner.policy.causal_lm.parameters()}
    shared = [p for p in learner.policy.critic.parameters() if id(p) in policy]
    assert len(shared) > 10 and {p.dtype for p in shared} == {BF16}


def test_a_reward_model_under_adapters_is_loaded_in_the_compute_type(tmp_path: Any) -> None:
    tiny_model().save_pretrained(tmp_path)  # pyright: ignore
    for lora, held in ((None, torch.float32), (LoraConfig(r=4), BF16)):
        critic = build_critic(
            SeparateCritic(path=str(tmp_path), lora=lora),
            ModelConfig(path="unused", dtype="bfloat16"),
            tiny_model(),  # pyright: ignore
            tokenizer=None,  # pyright: ignore
            seed=0,
        )
        assert critic.trunk is not None
        assert next(critic.trunk.parameters()).dtype == held


# --- learning ---------------------------------------------------------------------------------------------------------


def changed(dtype: torch.dtype, *, learning_rate: float, steps: int, seed: int) -> float:
    """Return the share of the weights that some steps change."""
    train = {"learning_rate": learning_rate, "adam_epsilon": 1e-8}
    learner, algorithm = make_learner(tiny_model(seed=seed), make_config(train=train), dtype=dtype)
    before = {name: tensor.clone() for name, tensor in learner.policy.trained_parameters().items()}
    for step in range(steps):
        learner.update(train_batch(make_samples(seed + step)), algorithm)
    after = learner.policy.trained_parameters()
    return sum((after[n] != b).sum().item() for n, b in before.items()) / sum(b.numel() for b in before.values())


def test_whole_training_in_bfloat16_moves_what_float32_moves(seed: int) -> None:
    exact, found = (changed(d, learning_rate=1e-6, steps=4, seed=seed) for d in (torch.float32, BF16))
    assert exact > 0.95 and found >= 0.99 * exact


def test_the_second_moment_can_fall() -> None:
    """Gradients of 1 for 100 steps, then of 0.1 for 3,000: with beta2 .999 bfloat16 would stay at 0.098."""
    train = {"learning_rate": 1e-6, "adam_epsilon": 1e-8}
    learner, _ = make_learner(narrow(tiny_model(num_layers=1)), make_config(train=train))
    for step in range(3100):
        for parameter in learner.parameters:
            parameter.grad = torch.full_like(parameter, 1.0 if step < 100 else 0.1)
        learner.optimizer.step()
    expected = (1 - 0.999**100) * 0.999**3000 + 0.01 * (1 - 0.999**3000)
    for state in learner.optimizer.state.values():
        torch.testing.assert_close(state["exp_avg_sq"], torch.full_like(state["exp_avg_sq"], expected))


def gradient(dtype: torch.dtype, max_tokens: int, seed: int) -> Tensor:
    """Return the gradient of samples whose advantages have one sign, so that it grows with every micro-batch."""
    train = {"max_tokens_per_micro_batch": max_tokens, "share_prefixes": False}
    learner, algorithm = make_learner(tiny_model(), make_config(algo={"aggregation": "dapo"}, train=train), dtype=dtype)
    samples = make_samples(seed, groups=40, size=3)
    for sample in samples:
        sample.advantages[:] = 1.0
    return torch.cat([g.flatten() for g in update_and_look(learner, algorithm, samples).gradients.values()])


def test_many_micro_batches_add_up_in_float32(seed: int) -> None:
    exact = gradient(torch.float32, 10**6, seed)
    one, many = (((gradient(BF16, size, seed) - exact).norm() / exact.norm()).item() for size in (10**6, 1))
    assert many < 1.2 * one < 0.05, "120 micro-batches are about as exact as one"


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
@pytest.mark.parametrize("estimator", ["k3", "full"])
def test_the_policy_starts_at_distance_zero_from_its_reference(lora: bool, estimator: str, seed: int) -> None:
    model = add_lora(tiny_model(), LoraConfig(r=4), seed=0) if lora else tiny_model()
    config = make_config(algo={"kl": {"beta": 0.1, "estimator": estimator}})
    learner, algorithm = make_learner(model, config, dtype=BF16, moved=False)
    metrics = update_and_look(learner, algorithm, make_samples(seed)).metrics
    if estimator == "full":  # a difference of two sums over the vocabulary, each rounded to float32
        assert abs(metrics["kl/ref"]) < 1e-6
    else:
        assert metrics["kl/ref"] == 0.0
    assert metrics["policy/grad_norm"] > 0


def test_a_reference_that_moves_is_held_in_float32(seed: int) -> None:
    policy = policy_of(tiny_model(seed=seed), keep_reference=True)
    expected = {name: p.detach().to(BF16).float() for name, p in policy.module.named_parameters()}
    with torch.no_grad():
        for parameter in policy.module.parameters():
            parameter.mul_(1.01)
    for _ in range(5):
        policy.move_reference(0.01)
        for name, p in policy.module.named_parameters():
            expected[name].lerp_(p.detach(), 0.01)
    found = policy.reference_state()
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6)
    batch = build_micro_batch(make_samples(seed), [[0, 1]])
    fresh = policy_of(tiny_model(seed=seed), keep_reference=True)
    fresh.load_reference_state(found)
    assert torch.equal(fresh.reference_logprobs(batch), policy.reference_logprobs(batch))


# --- models that are given, and loading -------------------------------------------------------------------------------


def test_the_type_of_a_loaded_model() -> None:
    assert own_type(tiny_model()) == torch.float32
    assert own_type(narrow(tiny_model())) == BF16
    lora = add_lora(narrow(tiny_model()), LoraConfig(r=4), seed=0)
    assert own_type(lora) == BF16, "peft's adapters are float32"
    for name in ("float16", "float64"):
        with pytest.raises(UserError, match=f"type {name}, .* load it with dtype=torch.bfloat16"):
            own_type(tiny_model().to(getattr(torch, name)))


@pytest.mark.parametrize("arch", ["qwen2", "gemma2"])
def test_frequencies_of_positions_are_exact_again(arch: str) -> None:
    model: Any = tiny_model(arch)
    expected = {name: buffer.clone() for name, buffer in model.named_buffers() if "inv_freq" in name}
    rounded = model.to(BF16)
    assert expected and any(not torch.equal(dict(rounded.named_buffers())[n].float(), b) for n, b in expected.items())
    exact_positions(rounded)
    found = dict(rounded.named_buffers())
    for name, buffer in expected.items():
        assert found[name].dtype == torch.float32 and torch.equal(found[name], buffer)
    assert own_type(rounded) == BF16


def test_loading_for_training_is_in_float32() -> None:
    config = ModelConfig(path="tiny:qwen2", dtype="bfloat16")
    tokenizer = load_tokenizer(config)
    frozen, trained = (load_model(config, tokenizer, seed=0, trained=trained) for trained in (False, True))
    assert {p.dtype for p in frozen.parameters()} == {BF16}
    assert {p.dtype for p in trained.parameters()} == {torch.float32}
    for ours, theirs in zip(frozen.buffers(), trained.buffers(), strict=True):
        assert torch.equal(ours, theirs), "buffers are not rounded"


def test_quantized_weights_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].weight = nn.Parameter(torch.ones(2, 2, dtype=torch.uint8), requires_grad=False)
    hold(model.requires_grad_(False), BF16)
    assert [p.dtype for p in model.parameters()] == [torch.uint8, BF16, BF16, BF16]
    with compute_in(BF16, model):
        assert model[0].weight.dtype == torch.uint8


def test_training_goes_on_exactly_from_what_is_trained(seed: int) -> None:
    """The float32 parameters of a checkpoint are all there is: their casts are made anew. A separate critic too."""

    def learner_of() -> Any:
        options = {"algo": {"num_mini_batches": 1}, "model": {"dtype": "bfloat16"}, "critic": {"learning_rate": 1e-4}}
        return make_ppo_learner("separate", train={"learning_rate": 1e-4, "adam_epsilon": 1e-8}, **options)

    learner, algorithm = learner_of()
    batches = [algorithm.prepare(scored_groups(seed + step), policy_version=step) for step in range(3)]
    learner.update(batches[0], algorithm)
    parameters = {name: tensor.clone() for name, tensor in learner.policy.trained_parameters().items()}
    state = copy.deepcopy(learner.state_dict())
    expected = [learner.update(batch, algorithm) for batch in copy.deepcopy(batches[1:])]
    resumed, _ = learner_of()
    resumed.policy.load_trained_parameters(parameters)
    resumed.load_state_dict(state)
    assert [resumed.update(batch, algorithm) for batch in batches[1:]] == expected
    found = resumed.policy.trained_parameters()
    for name, tensor in learner.policy.trained_parameters().items():
        assert tensor.dtype == torch.float32 and torch.equal(found[name], tensor), name
