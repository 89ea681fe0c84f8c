"""Which rollouts become pairs, and the tensors over pairs of a micro-batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llmrl.algo.ops.preference_losses import kto_reference_point, matched
from llmrl.algo.preference import options
from llmrl.algo.preference.dpo import DPO
from llmrl.algo.preference.kto import KTO, mismatched
from llmrl.algo.preference.loss_options import ApoZeroUnpaired
from llmrl.algo.preference.pairs import choose_pairs, count_pairs, rollouts_of
from llmrl.train.packing import build_micro_batch
from llmrl.types import Score, Turn
from tests.algo.preference.preference_cases import dataset_group


def group(rewards: list[float | None], name: str = "t"):
    return dataset_group(name, [1, 2], [[10 + i] * (i + 1) for i in range(len(rewards))], rewards)


def config(**given) -> options.OnlineDPO:
    return options.OnlineDPO(**{"pairs": "all", **given})


@pytest.mark.parametrize(
    ("rewards", "given", "expected"),
    [
        ([0.0, 1.0, 0.5], {}, [(1, 0), (1, 2), (2, 0)]),
        ([0.0, 1.0, 0.5], {"pairs": "best_worst"}, [(1, 0)]),
        ([0.0, 1.0, 0.5], {"min_margin": 0.5}, [(1, 0)]),  # a difference of exactly the margin decides nothing
        ([0.0, 1.0, 0.5], {"min_margin": 1.0}, []),
        ([1.0, 1.0, 1.0], {}, []),
        ([1.0, 1.0, 1.0], {"pairs": "best_worst"}, []),
        ([None, 1.0, 0.0], {}, [(1, 2)]),
        ([None, 1.0, None], {"pairs": "best_worst"}, []),
        ([0.0, 1.0, 0.0, 1.0], {"pairs": "best_worst"}, [(1, 0)]),  # ties go to the first
    ],
)
def test_pairs_by_reward(rewards: list, given: dict, expected: list) -> None:
    assert sorted(choose_pairs([group(rewards)], config(**given))[0]) == sorted(expected)


def test_pairs_by_hierarchy_take_their_margins_over_the_whole_batch() -> None:
    groups = [group([0.0, 0.0, 0.0], "a"), group([0.0, 0.0, None], "b")]
    for (right, length), rollout in zip(
        [(1, 10), (1, 30), (0, 5), (1, 20), (1, 25), (1, 0)], [r for g in groups for r in g.rollouts], strict=True
    ):
        assert rollout.score is not None
        rollout.score.parts = {"right": float(right), "length": float(length)}
    levels = [options.Level(part="right"), options.Level(part="length", margin=0.5, lower_is_better=True)]
    found = choose_pairs(groups, config(hierarchy=levels))
    # The standard deviation of the lengths is 11.83: differences up to 5.9 decide nothing. The unscored rollout is in
    # no pair.
    assert found == [[(0, 1), (0, 2), (1, 2)], []]


def test_only_rollouts_in_pairs_become_samples_and_are_computed_once() -> None:
    groups = [group([0.0, 1.0, 0.5, None], "a"), group([1.0, 1.0], "b")]
    batch = DPO(config()).prepare(groups, policy_version=0)
    assert [(s.group, s.index, [p.over for p in s.preferences]) for s in batch.samples] == [
        (0, 0, []), (0, 1, [0, 2]), (0, 2, [0]),
    ]  # fmt: skip
    assert count_pairs(batch.samples) == (3, 2 + 2 + 3)
    assert [r.advantage for r in groups[0].rollouts] == [pytest.approx(-2 / 3), pytest.approx(2 / 3), 0.0, 0.0]
    assert batch.metrics == {"preference/num_pairs": 3.0, "advantage/zero_variance_frac": 0.5}
    assert batch.sampled


def test_a_rollout_of_several_samples_counts_as_one() -> None:
    """Its second prompt does not begin with the first turn: two sequences, one log-probability."""
    pair = group([1.0, 0.0])
    first = pair.rollouts[0].turns[0]
    pair.rollouts[0].turns.append(
        Turn(
            prompt_ids=[9, 9, 9],
            completion_ids=[5, 6],
            rollout_logprobs=[0.0, 0.0],
            finish="stop",
            policy_version=(0, 0),
            message=first.message,
        )
    )
    batch = DPO(config()).prepare([pair], policy_version=0)
    assert len(batch.samples) == 3
    assert count_pairs(batch.samples) == (1, 3)
    rollouts = rollouts_of(build_micro_batch(batch.samples, [[0], [1, 2]]))
    assert rollouts.lengths.tolist() == [3, 2]
    stream = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0])
    assert rollouts.sum(stream).tolist() == [7.0, 24.0]
    chosen, rejected = rollouts.shared(stream, tail=0.5)  # two tokens are shared, chosen's third counts half
    assert (chosen.tolist(), rejected.tolist()) == ([1 + 2 + 2], [24])


def test_ranks_are_matched() -> None:
    values, others = torch.tensor([5.0, 1.0, 3.0]), torch.tensor([20.0, 30.0, 10.0])
    assert matched(values, others).tolist() == [30.0, 10.0, 20.0]
    assert matched(values[:0], others[:0]).tolist() == []


def test_mismatched_completions_come_from_the_group_before() -> None:
    groups = [dataset_group(str(i), [i, i], [[100 + i], [200 + i, 0]], [1.0, 0.0]) for i in range(3)]
    algorithm = KTO(options.KTO())
    batch = algorithm.prepare(groups, policy_version=0)
    probes = [s for s in batch.samples if s.probe]
    assert [s.input_ids.tolist() for s in probes] == [
        [0, 0, 102], [0, 0, 202, 0], [1, 1, 100], [1, 1, 200, 0], [2, 2, 101], [2, 2, 201, 0],
    ]  # fmt: skip
    assert all(s.loss_mask.tolist() == [False, False] + [True] * s.num_tokens for s in probes)
    for s in probes:
        s.old_logprobs, s.ref_logprobs = np.full(s.num_tokens, -1.0), np.full(s.num_tokens, -1.5)
    algorithm.refine(batch)
    assert algorithm.kl == pytest.approx(0.75)  # 0.5 for one token, 1 for two
    assert len(batch.samples) == 6 and not any(s.probe for s in batch.samples)
    assert mismatched(batch.samples[:2]) == []


def test_the_reference_point_is_never_below_zero() -> None:
    assert kto_reference_point(torch.tensor([-3.0, 1.0])) == 0
    assert kto_reference_point(torch.tensor([])) == 0
    assert kto_reference_point(torch.tensor([3.0, 1.0])) == 2


def test_unscored_completions_are_left_out_of_kto() -> None:
    groups = [group([1.0, None], "a"), group([0.2, 0.7], "b")]
    algorithm = KTO(options.OnlineKTO(loss=ApoZeroUnpaired(), desirable_above=0.5))
    batch = algorithm.prepare(groups, policy_version=0)
    assert [(s.group, s.index, float(s.advantages[0])) for s in batch.samples] == [(0, 0, 1), (1, 0, -1), (1, 1, 1)]
    assert groups[0].rollouts[1].score == Score(reward=None)
