"""FlashAttention and FlexAttention: every layout gives the log-probabilities and gradients of eager attention."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask
from torch.nn.attention.flex_attention import flex_attention as flex_attention_of_torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoConfig, AutoModelForCausalLM, masking_utils
from transformers.integrations import flex_attention as flex

from llmrl import Trainer
from llmrl.errors import UserError
from llmrl.model import attention
from llmrl.model.attention import Kernel, block_mask, check_attention, tree_mask
from llmrl.model.policy import Policy
from llmrl.track.files import read_jsonl
from llmrl.train.packing import build_micro_batch
from llmrl.train.prefixes import Cost, share_prefixes
from llmrl.train.selfcheck import check_forward
from llmrl.types import Sample, Score
from tests.attention_kernels import SLOWLY, flash, flex_with_gradients
from tests.invariance import cases
from tests.invariance.cases import (
    VOCABULARY,
    assert_same,
    make_config,
    make_learner,
    make_ppo_learner,
    make_samples,
    scored_groups,
    tiny_model,
    update_and_look,
)

pytestmark = pytest.mark.slow

__all__ = ["flash", "flex_with_gradients"]

ARCHS = ["qwen2", "qwen3", "llama", "gemma", "gemma2", "mistral", "gpt2", "gpt_neox", "opt", "phi", "olmo2"]
SIZES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_head": 2, "n_layer": 2, "n_positions": 64},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "phi": {"num_key_value_heads": 2},
    "olmo2": {"num_key_value_heads": 2},
}


def model_of(arch: str, attn_implementation: str, **overrides: Any) -> Any:
    """Build the same small model of random weights for every attention kernel."""
    if arch in ("qwen2", "qwen3", "llama", "gemma", "gemma2", "mistral"):
        model = tiny_model(arch, **overrides)
        model.set_attn_implementation(attn_implementation)
        return model
    common = {
        "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 48,
        "max_position_embeddings": 64, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    config = AutoConfig.for_model(arch, vocab_size=VOCABULARY, **(common | SIZES.get(arch, {}) | overrides))
    for name in ("attn_pdrop", "resid_pdrop", "embd_pdrop", "attention_dropout", "hidden_dropout", "dropout"):
        if hasattr(config, name):
            setattr(config, name, 0.0)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def plain(model: Any, samples: list[Sample]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Compute log-probabilities one sequence at a time with the model's own forward, and gradients of a sum of them."""
    model.zero_grad()
    found = []
    for sample in samples:
        ids = torch.from_numpy(sample.input_ids)[None]
        logprobs = model(input_ids=ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)
        chosen = logprobs.gather(1, ids[0, 1:, None])[:, 0][torch.from_numpy(sample.loss_mask[1:])]
        (chosen * weights(sample)).sum().backward()
        found.append(chosen.detach())
    return found, gradients_of(model)


def weights(sample: Sample) -> Tensor:
    return torch.from_numpy(np.cos(sample.input_ids[sample.loss_mask])).float()


def gradients_of(model: Any) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def laid_out(policy: Policy, samples: list[Sample], batches: Any) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Compute the same in micro-batches."""
    policy.module.zero_grad()
    found: dict[int, Tensor] = {}
    for batch in batches:
        outputs = policy.forward(batch).logprobs
        pieces = outputs.split(batch.sequence_lengths.tolist())
        loss = outputs.sum() * 0.0
        for i, piece in zip(batch.sample_indices, pieces, strict=True):
            loss = loss + (piece * weights(samples[i])).sum()
            found[i] = piece.detach()
        loss.backward()
    return [found[i] for i in range(len(samples))], gradients_of(policy.causal_lm)


def assert_equal(found: tuple[list[Tensor], dict[str, Tensor]], wanted: tuple[list[Tensor], dict[str, Tensor]]) -> None:
    torch.testing.assert_close(torch.cat(found[0]), torch.cat(wanted[0]), rtol=0, atol=1e-5)
    assert found[1].keys() == wanted[1].keys()
    for name, gradient in wanted[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-5, msg=name)


def layout_of(policy: Policy, **train: Any) -> Any:
    learner, _ = make_learner(policy.causal_lm, make_config(train=train))
    learner.policy.can_share_prefixes = policy.can_share_prefixes
    return learner.layout


@pytest.mark.parametrize("arch", ARCHS)
def test_flash_attention_gets_one_row_and_equals_eager(arch: str, flash: list[str], seed: int) -> None:
    samples = make_samples(seed, groups=3, size=3)
    wanted = plain(model_of(arch, "eager"), samples)
    policy = Policy(model_of(arch, "flash_attention_2"), temperature=1.0, keep_reference=False)
    assert not check_forward(policy) and policy.can_pack
    assert policy.kernel is Kernel.VARLEN and not policy.can_share_prefixes
    for bound in (30, 60, 1000):
        layout = layout_of(policy, max_tokens_per_micro_batch=bound)
        batches = [*layout.micro_batches(samples)]
        for batch in batches:
            assert batch.input_ids.shape[0] == 1 and (batch.segment_ids > 0).all(), "one row, no padding"
            assert batch.visibility.branch_ids is None
        flash.clear()
        assert_equal(laid_out(policy, samples, batches), wanted)
        assert set(flash) == {"varlen"}
    padded = layout_of(policy, packing=False, max_tokens_per_micro_batch=60)
    assert_equal(laid_out(policy, samples, padded.micro_batches(samples)), wanted)
    rectangle = build_micro_batch(samples, [[0, 1], [2, 3], [4, 5, 6], [7, 8]])  # as no plan lays it out
    assert_equal(laid_out(policy, samples, [rectangle]), wanted)


@pytest.mark.parametrize("arch", ["mistral", "gemma2"])
def test_flash_attention_has_windows_of_its_own(arch: str, flash: list[str], seed: int) -> None:
    samples = make_samples(seed, groups=2, size=3)
    assert max(len(s.input_ids) for s in samples) > 6
    wanted = plain(model_of(arch, "eager", sliding_window=6), samples)
    policy = Policy(model_of(arch, "flash_attention_2", sliding_window=6), temperature=1.0, keep_reference=False)
    check_forward(policy)
    assert_equal(laid_out(policy, samples, layout_of(policy).micro_batches(samples)), wanted)


def test_flash_attention_that_is_told_wrong_boundaries_is_caught(
    flash: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = Policy(model_of("gpt2", "flash_attention_2"), temperature=1.0, keep_reference=False)
    true_row = attention._flat_row

    def one_sequence(*inputs: Any) -> dict[str, Any]:
        found = true_row(*inputs)
        if not found:  # each sequence has a row of its own
            return {}
        length = found["input_ids"].shape[1]
        whole = torch.tensor([0, length], dtype=torch.int32)
        return found | {"cu_seq_lens_q": whole, "cu_seq_lens_k": whole, "max_length_q": length, "max_length_k": length}

    monkeypatch.setattr(attention, "_flat_row", one_sequence)
    (note,) = check_forward(policy)
    assert "packed row" in note and not policy.can_pack


@pytest.mark.parametrize(
    ("name", "implementation"),
    [
        *(itertools.product(["grpo", "thr", "dpo", "ppo separate", "ppo adapter"], ["flash_attention_2"])),
        *(itertools.product(["grpo", "thr", "dpo", "ppo separate"], ["flex_attention"])),
        ("ppo shared", "flash_attention_3"),
    ],
)
def test_an_update_is_that_of_eager_attention(
    name: str,
    implementation: str,
    flash: list[str],
    flex_with_gradients: None,
    seed: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Old, reference and training passes, critics with and without a trunk, and groups that stay whole."""
    outcomes = []
    for kernel in ("eager", implementation):
        monkeypatch.setattr(cases, "tiny_model", lambda arch, kernel=kernel, **_: model_of(arch, kernel))
        train = {"max_tokens_per_micro_batch": 60}
        if name.startswith("ppo"):
            kind = name.split()[1]
            options = {"algo": {"kl": {"beta": 0.1}, "num_iterations": 2}, "train": train}
            learner, algorithm = make_ppo_learner(kind, lora=kind == "adapter", **options)
        else:
            algo = {"name": "online_dpo" if name == "dpo" else name} | ({"kl": {"beta": 0.1}} if name == "grpo" else {})
            learner, algorithm = make_learner(cases.tiny_model("qwen2"), make_config(algo=algo, train=train))
        assert not check_forward(learner.policy)
        assert learner.layout.one_row is (kernel != "eager")
        groups = scored_groups(seed, size=2)
        for group in groups if name == "dpo" else ():
            for number, rollout in enumerate(group.rollouts):
                rollout.score = Score(reward=float(number))
        outcomes.append(update_and_look(learner, algorithm, algorithm.prepare(groups, policy_version=0)))
    assert outcomes[0].metrics["policy/grad_norm"] > 1e-3
    assert bool(flash) is ("flash" in implementation)
    assert_same(outcomes[1], outcomes[0], tolerance=1e-5)


# --- FlexAttention ----------------------------------------------------------------------------------------------------


def ids_of(seed: int, length: int) -> tuple[Tensor, Tensor]:
    """Make rows of trees whose prefixes and branches have random lengths, and padding at the end."""
    random = np.random.default_rng(seed)
    segments, branches = np.zeros((2, 3, length), np.int64)
    for row in range(3):
        column, segment = 0, 0
        while column < length * 0.9:
            segment += 1
            for branch in range(random.integers(1, 5)):
                end = min(length, column + int(random.choice([3, 40, 128, 200, 300])))
                segments[row, column:end], branches[row, column:end] = segment, branch
                column = end
    return torch.from_numpy(segments), torch.from_numpy(branches)


@pytest.mark.parametrize("length", [1, 100, 128, 500, 1024, 1500])
def test_blocks_are_the_mask(length: int, seed: int) -> None:
    """Hidden blocks are hidden everywhere, whole ones visible everywhere; between them the function decides."""
    ids = ids_of(seed, length)
    mask, blocks = tree_mask(*ids), block_mask(*ids)
    padded = torch.nn.functional.pad(mask, (0, -length % 128, 0, -length % 128))
    parts = padded.unflatten(3, (-1, 128)).unflatten(2, (-1, 128)).transpose(3, 4)[:, 0]
    some, whole = kinds_of(blocks)
    assert not (some & whole).any()
    assert not parts[~(some | whole)].any(), "a block that is left out has something to see"
    assert parts[whole].all(), "a block that gets no mask has something to hide"
    hidden = ~parts.flatten(-2).any(-1)
    assert (some & hidden).sum() <= 0.2 * hidden.sum(), "hardly any hidden block is computed"
    assert torch.equal(create_mask(blocks.mask_mod, 3, 1, length, length, device="cpu"), mask)


def kinds_of(blocks: BlockMask) -> tuple[Tensor, Tensor]:
    """Return which (row of blocks, column of blocks) are partly and which are wholly visible."""
    found = []
    for numbers, places in (
        (blocks.kv_num_blocks, blocks.kv_indices),
        (blocks.full_kv_num_blocks, blocks.full_kv_indices),
    ):
        assert numbers is not None and places is not None
        dense = torch.zeros(places.shape, dtype=torch.bool)
        listed = torch.arange(places.shape[-1]) < numbers[..., None]
        dense.scatter_(-1, places.long(), listed)
        found.append(dense[:, 0])
    return found[0], found[1]


def test_torchs_flex_attention_with_these_blocks_is_attention_with_the_mask(seed: int) -> None:
    ids = ids_of(seed, 700)
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(3, 2, 700, 16, generator=generator) for _ in range(3))
    wanted = scaled_dot_product_attention(q, k, v, tree_mask(*ids))
    found = flex_attention_of_torch(q, k, v, block_mask=block_mask(*ids))
    assert isinstance(found, Tensor)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("arch", ["qwen2", "qwen3", "llama", "gemma", "gemma2", "gpt_neox", "olmo2"])
def test_shared_prefixes_under_flex_attention(arch: str, flex_with_gradients: None, seed: int) -> None:
    samples = make_samples(seed, groups=3, size=4)
    wanted = plain(model_of(arch, "eager"), samples)
    policy = Policy(model_of(arch, "flex_attention"), temperature=1.0, keep_reference=False)
    assert not check_forward(policy) and policy.can_pack
    assert policy.kernel is Kernel.BLOCKS and policy.can_share_prefixes
    for bound in (30, 60, 1000):
        layout = layout_of(policy, max_tokens_per_micro_batch=bound)
        batches = [*layout.micro_batches(samples)]
        assert all(len(batch.input_ids) == 1 and (batch.segment_ids > 0).all() for batch in batches)
        assert_equal(laid_out(policy, samples, batches), wanted)
    trees = share_prefixes(samples, Cost(per_token=1.0, per_pair=0.0), max_tokens=100)
    assert any(len(tree.samples) > 1 for tree in trees)
    rectangle = build_micro_batch(samples, [[0, 1], [2]] + [[i] for i in range(3, len(trees))], trees=trees)
    assert_equal(laid_out(policy, samples, [rectangle]), wanted)


@pytest.mark.slow
def test_compiled_flex_attention_on_a_cpu_gives_the_same_log_probabilities(seed: int) -> None:
    samples = make_samples(seed, groups=3, size=4)
    wanted = torch.cat(plain(model_of("qwen2", "eager"), samples)[0])
    policy = Policy(model_of("qwen2", "flex_attention"), temperature=1.0, keep_reference=False)
    check_forward(policy)
    assert policy.can_share_prefixes
    with torch.no_grad():
        for own_masks in (False, True):
            batch = build_micro_batch(samples, [[*range(len(samples))]], own_masks=own_masks)
            torch.testing.assert_close(policy.forward(batch).logprobs, wanted, rtol=0, atol=1e-5)


def sample_of(length: int) -> Sample:
    """Make a sample whose last half is trained."""
    trained = length - length // 2
    numbers = np.zeros(trained, np.float32)
    mask = np.arange(length) >= length // 2
    return Sample(input_ids=np.arange(length) % VOCABULARY, loss_mask=mask, advantages=numbers,
                  rollout_logprobs=numbers, group=0, index=0)  # fmt: skip


def test_torch_never_gives_up_compiling_flex_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    # After 8 forms of inputs it would compute all scores of all pairs from then on, and say so once.
    torch._dynamo.reset()
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 8)
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)
    compiled = torch.compile(flex_attention_of_torch, backend="eager")

    def attend(q: Tensor, k: Tensor, v: Tensor, training: bool = False, **options: Any) -> Any:
        return compiled(q, k, v, **options)

    monkeypatch.setattr(flex, "compile_friendly_flex_attention", attend)
    monkeypatch.setattr(masking_utils, "create_block_mask", lambda **options: create_block_mask(**options | SLOWLY))
    for dtype in (torch.float32, torch.bfloat16):
        model = model_of("qwen2", "flex_attention", max_position_embeddings=2048)
        policy = Policy(model, temperature=1.0, keep_reference=False, dtype=dtype)
        for rows, length in [(1, 40), (1, 150), (2, 40), (2, 300), (1, 700), (3, 150), (1, 1300), (1, 90)]:
            samples = [sample_of(length) for _ in range(2 * rows)]
            places = [[2 * i, 2 * i + 1] for i in range(rows)]
            with torch.no_grad():
                for own_masks in (False, True):
                    policy.forward(build_micro_batch(samples, places, own_masks=own_masks))
    assert torch._dynamo.config.recompile_limit > 8
    torch._dynamo.reset()


# --- what is refused --------------------------------------------------------------------------------------------------


def test_a_kernel_that_cannot_run_is_refused_in_one_line(flash: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    check_attention("sdpa", "float32", "cpu")
    check_attention("flash_attention_2", "bfloat16", "cuda")
    check_attention("flex_attention", "float32", "cuda")
    check_attention("flex_attention", "float32", "cpu", training=False)
    with pytest.raises(UserError, match="flex_attention has no backward pass on a CPU: set it to sdpa"):
        check_attention("flex_attention", "float32", "cpu")
    with pytest.raises(UserError, match="flash_attention_3 does not compute in float32: set model.dtype bfloat16, or"):
        check_attention("flash_attention_3", "float32", "cuda")
    monkeypatch.undo()
    for name, package in (
        ("flash_attention_2", "flash-attn"),
        ("flash_attention_3", "flash-attn-3"),
        ("kernels-community/flash-attn2", "kernels"),
    ):
        with pytest.raises(UserError, match=f"{name} needs a GPU and the package `{package}`.* to sdpa, or on a GPU"):
            check_attention(name, "bfloat16", "cpu")


def run_of(folder: Path, kernel: str, *, model: str = "tiny:gemma2") -> Trainer:
    options = {
        "train.output_dir": str(folder), "train.max_steps": 1, "train.learning_rate": 1e-3,
        "rollout.engine": "hf", "rollout.num_prompts": 2, "rollout.num_generations": 4,
        "rollout.max_completion_length": 12, "track.console": "quiet", "model.attn_implementation": kernel,
    }  # fmt: skip
    rows = [{"prompt": "Say it.", "answer": "a"}, {"prompt": "Say it again, please.", "answer": "b"}]
    return Trainer(options, model=model, reward=lambda completion: len(completion) / 12, train_dataset=rows)


def test_a_whole_run_with_the_hf_engine_draws_and_learns_the_same(tmp_path: Path, flash: list[str]) -> None:
    """gemma2 is served by transformers' own model, which samples with sdpa whatever the learner computes with."""
    metrics = {kernel: run_of(tmp_path / kernel, kernel).train() for kernel in ("sdpa", "flash_attention_2")}
    drawn = [read_jsonl(tmp_path / kernel / "rollouts.jsonl") for kernel in metrics]
    texts = [[row["messages"] for row in rows] for rows in drawn]
    assert texts[0] == texts[1] and len(texts[0]) == 8
    assert "varlen" in flash
    for key in ("policy/grad_norm", "loss/total", "kl/mismatch", "reward/mean"):
        found, wanted = (metrics[kernel][key] for kernel in ("flash_attention_2", "sdpa"))
        assert found == pytest.approx(wanted, rel=1e-4, abs=1e-5), key


def test_a_run_names_the_missing_package_before_it_loads_a_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs a GPU and the package `flash-attn`"):
        run_of(tmp_path, "flash_attention_2", model="nowhere/no-such-model")
    with pytest.raises(UserError, match="no backward pass on a CPU"):
        run_of(tmp_path, "flex_attention", model="nowhere/no-such-model")
