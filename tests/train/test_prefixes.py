"""Trees of samples that share a prefix: layout, mask, and equality with sequences computed alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrl.tiny import build_tiny_model
from llmrl.train.packing import build_micro_batch, plan_micro_batches
from llmrl.train.policy import Policy
from llmrl.train.prefixes import Cost, Tree, share_prefixes, single_trees, tree_mask
from llmrl.types import Sample

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
    (tree,) = share_prefixes(samples, CHEAP_ATTENTION)
    assert tree == Tree(samples=(0, 1), prefix=2, length=5)
    batch = build_micro_batch(samples, [[0]], trees=[tree])
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 2]]
    assert batch.targets.tolist() == [7, 8, 9]
    assert batch.predict_from.tolist() == [1, 2, 1]
    assert batch.sequence_ids.tolist() == [0, 0, 1]
    assert batch.attention_mask is not None
    assert batch.attention_mask[0, 0].int().tolist() == [
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
                expected = key == query if segments[b, query] == 0 else bool(seen)
                assert mask[b, query, key].item() == expected


@given(st.integers(0, 10_000), st.sampled_from([0.0, 0.01, 0.1, 10.0]))
@settings(max_examples=40, deadline=None)
def test_every_sample_lies_in_one_tree_and_sharing_never_costs_more(seed: int, per_pair: float) -> None:
    samples, cost = random_groups(seed), Cost(per_token=1.0, per_pair=per_pair)
    trees = share_prefixes(samples, cost)
    assert sorted(i for tree in trees for i in tree.samples) == list(range(len(samples)))
    for tree in trees:
        assert len({samples[i].group for i in tree.samples}) == 1
        lengths = [len(samples[i].input_ids) for i in tree.samples]
        assert tree.length == sum(lengths) - tree.prefix * (len(lengths) - 1)
    alone = sum(cost.of(tree.length) for tree in single_trees(samples))
    assert sum(cost.of(tree.length) for tree in trees) <= alone + 1e-9


def test_trained_tokens_are_never_shared_and_long_completions_are_not_worth_it() -> None:
    equal = [make_sample([1, 2, 3], [4, 5]), make_sample([1, 2, 3], [4, 6], index=1)]
    assert share_prefixes(equal, CHEAP_ATTENTION)[0].prefix == 3
    different = [make_sample([1, 2, 3], [4]), make_sample([1, 9, 3], [4], index=1)]
    assert share_prefixes(different, CHEAP_ATTENTION)[0].prefix == 1
    nothing = [make_sample([1], [4]), make_sample([2], [4], index=1)]
    assert share_prefixes(nothing, CHEAP_ATTENTION) == single_trees(nothing)
    long = [make_sample([1, 2], [4] * 500, index=i) for i in range(4)]
    assert share_prefixes(long, Cost(per_token=1.0, per_pair=0.01)) == single_trees(long)


@pytest.mark.parametrize("arch", ["qwen2", "qwen3", "llama", "gemma"])
def test_shared_prefixes_give_the_log_probabilities_and_gradients_of_sequences_alone(arch: str, seed: int) -> None:
    samples = random_groups(seed)
    policy = Policy(build_tiny_model(arch, vocab_size=50, seed=seed), temperature=0.7, keep_reference=False)
    policy.check_forward()
    assert policy.can_share_prefixes
    found = {}
    for name, trees in {"alone": single_trees(samples), "shared": share_prefixes(samples, CHEAP_ATTENTION)}.items():
        (plan,) = plan_micro_batches([tree.length for tree in trees], max_tokens=70)
        logprobs = {}
        policy.bare.zero_grad()
        for rows in plan:
            batch = build_micro_batch(samples, rows, trees=trees)
            outputs = policy.forward(batch).logprobs
            weights = batch.targets.float().cos()
            (outputs * weights).sum().backward()
            pieces = outputs.detach().split(batch.sequence_lengths.tolist())
            logprobs |= dict(zip(batch.sample_indices, pieces, strict=True))
        gradients = {n: p.grad.clone() for n, p in policy.bare.named_parameters() if p.grad is not None}
        found[name] = torch.cat([logprobs[i] for i in range(len(samples))]), gradients
    (alone, alone_gradients), (shared, shared_gradients) = found["alone"], found["shared"]
    torch.testing.assert_close(shared, alone, rtol=0, atol=1e-5)
    for name, gradient in alone_gradients.items():
        torch.testing.assert_close(shared_gradients[name], gradient, rtol=1e-4, atol=1e-5)


def test_sliding_windows_are_found_out() -> None:
    model = build_tiny_model("mistral", vocab_size=50, sliding_window=3)
    policy = Policy(model, temperature=1.0, keep_reference=False)
    policy.check_forward()
    assert not policy.can_share_prefixes
