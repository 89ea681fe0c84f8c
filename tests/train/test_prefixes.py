"""Trees of samples that share a prefix: layout, mask, and equality with sequences computed alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmrl.model import attention
from llmrl.model.attention import tree_mask
from llmrl.model.policy import Policy
from llmrl.tiny import build_tiny_model
from llmrl.train.packing import build_micro_batch
from llmrl.train.planning import plan_micro_batches
from llmrl.train.prefixes import Cost, Tree, causal_length, share_prefixes, single_trees
from llmrl.train.selfcheck import check_forward
from llmrl.types import MicroBatch, Sample
from tests.invariance.cases import make_config, make_learner

CHEAP_ATTENTION = Cost(per_token=1.0, per_pair=0.0)


def make_sample(prompt: list[int], completion: list[int], group: int = 0, index: int = 0) -> Sample:
    trained = len(completion)
    return Sample(
        input_ids=np.asarray(prompt + completion, np.int64),
        loss_mask=np.asarray([False] * len(prompt) + [True] * trained),
        advantages=np.ones(trained, np.float32),
        rollout_logprobs=np.zeros(trained, np.float32),
        group=group,
        index=index,
    )


def random_groups(seed: int, *, num_groups: int = 3, size: int = 4, vocabulary: int = 50) -> list[Sample]:
    random = np.random.default_rng(seed)
    samples = []
    for group in range(num_groups):
        prompt = random.integers(0, vocabulary, random.integers(1, 12)).tolist()
        for index in range(size):
            completion = random.integers(0, vocabulary, random.integers(1, 9)).tolist()
            samples.append(make_sample(prompt, completion, group, index))
    return samples


def test_layout_of_a_tree_by_hand() -> None:
    samples = [make_sample([5, 6], [7, 8]), make_sample([5, 6], [9], index=1)]
    (tree,) = share_prefixes(samples, CHEAP_ATTENTION, max_tokens=70)
    assert tree == Tree(samples=(0, 1), prefix=2, length=5)
    batch = build_micro_batch(samples, [[0]], trees=[tree])
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 2]]
    assert batch.targets.tolist() == [7, 8, 9]
    assert batch.predict_from.tolist() == [1, 2, 1]
    assert batch.sequence_ids.tolist() == [0, 0, 1]
    seen = batch.visibility
    assert seen.branch_ids is not None and not seen.alone and seen.causal_head == 0
    assert tree_mask(seen.segment_ids, seen.branch_ids)[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 0, 0, 1],
    ]


def test_mask_against_a_literal_loop(seed: int) -> None:
    random = np.random.default_rng(seed)
    segments = torch.from_numpy(np.sort(random.integers(0, 3, (4, 12)))[:, ::-1].copy())
    branches = torch.from_numpy(random.integers(0, 3, (4, 12)))
    mask = tree_mask(segments, branches)[:, 0]
    for b in range(4):
        for query in range(12):
            for key in range(12):
                own = segments[b, query] == segments[b, key] and key <= query
                seen = own and (branches[b, key] == 0 or branches[b, key] == branches[b, query])
                assert mask[b, query, key].item() == bool(seen)
    for skip in (0, 1, 7):
        assert torch.equal(tree_mask(segments, branches, skip=skip)[:, 0], mask[:, skip:])


def test_causal_length_is_what_all_rows_begin_with() -> None:
    tree, other = Tree(samples=(0, 1), prefix=6, length=10), Tree(samples=(2, 3), prefix=7, length=9)
    assert causal_length([[tree]]) == 6
    assert causal_length([[tree], [other]]) == 6
    assert causal_length([[Tree(samples=(4,), prefix=0, length=8), tree]]) == 0, "8 of 18 is less than half"
    assert causal_length([[Tree(samples=(4,), prefix=0, length=8)], [other]]) == 7
    assert causal_length([]) == 0


@given(
    st.integers(0, 10_000), st.sampled_from([0.0, 0.01, 0.1, 10.0]), st.booleans(), st.sampled_from([1, 12, 20, 35, 99])
)
@settings(max_examples=60, deadline=None)
def test_every_sample_lies_in_one_tree_and_sharing_never_costs_more(
    seed: int, per_pair: float, skips_hidden: bool, max_tokens: int
) -> None:
    samples, cost = random_groups(seed), Cost(per_token=1.0, per_pair=per_pair, skips_hidden=skips_hidden)
    trees = share_prefixes(samples, cost, max_tokens=max_tokens)
    assert sorted(i for tree in trees for i in tree.samples) == list(range(len(samples)))
    for tree in trees:
        assert len({samples[i].group for i in tree.samples}) == 1
        lengths = [len(samples[i].input_ids) for i in tree.samples]
        assert tree.length == sum(lengths) - tree.prefix * (len(lengths) - 1)
        assert tree.length <= max_tokens or len(tree.samples) == 1, "a tree is longer than a micro-batch may be"
    alone = sum(cost.of(tree, samples) for tree in single_trees(samples))
    assert sum(cost.of(tree, samples) for tree in trees) <= alone + 1e-9


def test_a_group_that_is_too_long_for_one_tree_becomes_several_that_repeat_the_prefix() -> None:
    samples = [make_sample([1] * 10, [2] * length, index=i) for i, length in enumerate((3, 4, 5, 2))]
    assert share_prefixes(samples, CHEAP_ATTENTION, max_tokens=24) == [
        Tree(samples=(0, 1, 2, 3), prefix=10, length=24),
    ]
    assert share_prefixes(samples, CHEAP_ATTENTION, max_tokens=23) == [
        Tree(samples=(0, 1), prefix=10, length=17),
        Tree(samples=(2, 3), prefix=10, length=17),
    ]
    assert share_prefixes(samples, CHEAP_ATTENTION, max_tokens=16) == [
        Tree(samples=(0,), prefix=0, length=13),
        Tree(samples=(1,), prefix=0, length=14),
        Tree(samples=(2,), prefix=0, length=15),
        Tree(samples=(3,), prefix=0, length=12),
    ]


def test_cost_counts_the_pairs_that_are_computed() -> None:
    samples = [make_sample([1] * 6, [2]), make_sample([1] * 6, [2] * 3, index=1), make_sample([1] * 4, [2] * 4)]
    single, tree = Tree(samples=(2,), prefix=0, length=8), Tree(samples=(0, 1), prefix=6, length=10)
    for skips_hidden, pairs in ((False, 6 * 6 / 2 + 4 * 10), (True, 6 * 6 / 2 + 1 * 6 + 1 / 2 + 3 * 6 + 9 / 2)):
        cost = Cost(per_token=0.0, per_pair=1.0, skips_hidden=skips_hidden)
        assert cost.of(single, samples) == 32
        assert cost.of(tree, samples) == pairs


def test_trained_tokens_are_never_shared_and_long_completions_are_not_worth_it() -> None:
    equal = [make_sample([1, 2, 3], [4, 5]), make_sample([1, 2, 3], [4, 6], index=1)]
    assert share_prefixes(equal, CHEAP_ATTENTION, max_tokens=70)[0].prefix == 3
    different = [make_sample([1, 2, 3], [4]), make_sample([1, 9, 3], [4], index=1)]
    assert share_prefixes(different, CHEAP_ATTENTION, max_tokens=70)[0].prefix == 1
    nothing = [make_sample([1], [4]), make_sample([2], [4], index=1)]
    assert share_prefixes(nothing, CHEAP_ATTENTION, max_tokens=70) == single_trees(nothing)
    long = [make_sample([1, 2], [4] * 500, index=i) for i in range(4)]
    cost = Cost(per_token=1.0, per_pair=0.01)
    assert share_prefixes(long, cost, max_tokens=5000) == single_trees(long)
    blocks = Cost(per_token=1.0, per_pair=0.01, skips_hidden=True)
    assert len(share_prefixes(long, blocks, max_tokens=5000)) == 1, "without hidden pairs, sharing always pays"


def long_prompts(seed: int) -> list[Sample]:
    random = np.random.default_rng(seed)
    prompts = [random.integers(0, 50, length).tolist() for length in (14, 11)]
    completions = [random.integers(0, 50, length).tolist() for length in (3, 1, 2, 4)]
    return [make_sample(p, c, g, i) for g, p in enumerate(prompts) for i, c in enumerate(completions[2 * g :][:2])]


def outputs_and_gradients(
    policy: Policy, samples: list[Sample], trees: list[Tree], *, own_masks: bool, max_tokens: int = 70
) -> tuple[Tensor, dict[str, Tensor], list[MicroBatch]]:
    """Log-probabilities of all samples in order, gradients of a weighted sum of them, and how they were laid out."""
    (plan,) = plan_micro_batches([tree.length for tree in trees], max_tokens=max_tokens)
    logprobs, batches = {}, []
    policy.module.zero_grad()
    for rows in plan:
        batches.append(batch := build_micro_batch(samples, rows, trees=trees, own_masks=own_masks))
        outputs = policy.forward(batch).logprobs
        (outputs * batch.targets.float().cos()).sum().backward()
        pieces = outputs.detach().split(batch.sequence_lengths.tolist())
        logprobs |= dict(zip(batch.sample_indices, pieces, strict=True))
    gradients = {n: p.grad.clone() for n, p in policy.module.named_parameters() if p.grad is not None}
    return torch.cat([logprobs[i] for i in range(len(samples))]), gradients, batches


def assert_like_alone(policy: Policy, samples: list[Sample], trees: list[Tree], **options: Any) -> list[MicroBatch]:
    one_by_one = outputs_and_gradients(policy, samples, single_trees(samples), own_masks=False, max_tokens=1)
    logprobs, gradients, batches = outputs_and_gradients(policy, samples, trees, **options)
    torch.testing.assert_close(logprobs, one_by_one[0], rtol=0, atol=1e-5)
    for name, gradient in one_by_one[1].items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5)
    return batches


@pytest.mark.parametrize("own_masks", [False, True])
@pytest.mark.parametrize("arch", ["qwen2", "qwen3", "llama", "gemma"])
def test_shared_prefixes_give_the_log_probabilities_and_gradients_of_sequences_alone(
    arch: str, own_masks: bool, seed: int
) -> None:
    policy = Policy(build_tiny_model(arch, vocab_size=50, seed=seed), temperature=0.7, keep_reference=False)
    check_forward(policy)
    assert policy.can_share_prefixes
    samples = random_groups(seed)
    assert_like_alone(policy, samples, share_prefixes(samples, CHEAP_ATTENTION, max_tokens=70), own_masks=own_masks)
    assert_like_alone(policy, samples, single_trees(samples), own_masks=own_masks)


@pytest.mark.parametrize(("layout", "rows"), [("shared", {None, 7}), ("packed", {None, 2}), ("alone", {None})])
@pytest.mark.parametrize("arch", ["qwen2", "llama", "mistral"])
def test_a_causal_beginning_needs_no_mask(
    arch: str, layout: str, rows: set[int | None], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Masks have rows for the 7 queries of 18 behind the shorter of two prompts, or the 2 of 15 behind the shortest
    sequence that begins a row; sequences alone in their rows need none."""
    policy = Policy(build_tiny_model(arch, vocab_size=50, seed=seed), temperature=1.0, keep_reference=False)
    samples = long_prompts(seed)
    trees = share_prefixes(samples, CHEAP_ATTENTION, max_tokens=70) if layout == "shared" else single_trees(samples)
    if layout == "packed":
        samples = [samples[1], samples[2], make_sample([1], [2])]
        trees = single_trees(samples)
    found, plain = set[int | None](), attention.sdpa_attention_forward

    def look(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **options: Any) -> Any:
        found.add(None if mask is None else mask.shape[2])
        return plain(module, q, k, v, mask, **options)

    monkeypatch.setattr(attention, "sdpa_attention_forward", look)
    assert_like_alone(policy, samples, trees, own_masks=True)
    assert found == rows


def test_eager_attention_takes_whole_masks(seed: int) -> None:
    model = build_tiny_model("qwen2", vocab_size=50, seed=seed, attn_implementation="eager")
    policy = Policy(model, temperature=1.0, keep_reference=False)
    check_forward(policy)
    assert policy.can_share_prefixes and not policy.own_masks
    samples = long_prompts(seed)
    assert_like_alone(policy, samples, share_prefixes(samples, CHEAP_ATTENTION, max_tokens=70), own_masks=False)


def test_sliding_windows_are_found_out(seed: int) -> None:
    """transformers gives a layer with a window the mask as it is: right only for sequences that fit into the window."""
    model = build_tiny_model("mistral", vocab_size=50, sliding_window=15)
    policy = Policy(model, temperature=1.0, keep_reference=False)
    check_forward(policy)
    assert policy.window == 15
    learner, _ = make_learner(model, make_config(train={"max_tokens_per_micro_batch": 200}))
    learner.policy.can_share_prefixes = True
    for completion, shared in ((2, True), (3, False)):
        samples = [make_sample(list(range(13)), [index] * completion, index=index) for index in range(3)]
        assert (len(learner.layout.trees(samples)) == 1) is shared
        batch, *others = learner.layout.micro_batches(samples)
        assert not others and (batch.visibility.branch_ids is not None) is shared
        alone = outputs_and_gradients(policy, samples, single_trees(samples), own_masks=False, max_tokens=1)[0]
        pieces = policy.forward(batch).logprobs.split(batch.sequence_lengths.tolist())
        found = dict(zip(batch.sample_indices, pieces, strict=True))
        torch.testing.assert_close(torch.cat([found[i] for i in range(3)]), alone, rtol=0, atol=1e-5)
