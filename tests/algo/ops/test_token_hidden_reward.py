"""Token Hidden Reward: against brute force and derivatives, over splits of a group, and the rules built on it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from llmrl.algo.base import Algorithm
from llmrl.algo.ops.token_hidden_reward import (
    influence,
    influence_matrix,
    nthr_eta,
    nthr_weights,
    prediction_errors,
    scheduled_p,
    thr_weights,
    threshold,
)
from llmrl.model.parallel import Parallel
from llmrl.model.policy import Policy, PolicyModule
from llmrl.run.methods import make_algorithm
from llmrl.train.learner import Learner
from llmrl.train.selfcheck import check_forward
from llmrl.types import Rollout, RolloutGroup, Score, Task, Turn
from tests.invariance.cases import make_config, tiny_model, trained_parameters

VOCABULARY, WIDTH = 6, 3
LENGTHS, CORRECT = (4, 2, 5, 3), (True, False, True, False)


class Toy:
    """A group of four responses: hidden states, tokens and a head, whole vocabulary, no trunk."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        total = sum(LENGTHS)
        self.hidden = torch.randn(total, WIDTH, generator=generator, dtype=torch.float64)
        self.head = torch.randn(VOCABULARY, WIDTH, generator=generator, dtype=torch.float64)
        self.tokens = torch.randint(VOCABULARY, (total,), generator=generator)
        self.response = torch.repeat_interleave(torch.arange(4), torch.tensor(LENGTHS))
        weights = [1 / length if right else 0.0 for length, right in zip(LENGTHS, CORRECT, strict=True)]
        self.weights = torch.tensor(weights, dtype=torch.float64)[self.response]

    def logprobs(self, head: Tensor) -> Tensor:
        return (self.hidden @ head.T).log_softmax(-1).gather(1, self.tokens[:, None])[:, 0]

    def errors(self) -> Tensor:
        return prediction_errors((self.hidden @ self.head.T).softmax(-1), self.tokens)

    def influences(self) -> Tensor:
        errors = self.errors()
        return influence(errors, self.hidden, influence_matrix(errors, self.hidden, self.weights))

    def objective(self, head: Tensor) -> Tensor:
        """Sum over correct responses of the mean log-probability of their tokens."""
        return (self.weights * self.logprobs(head)).sum()


def test_the_factorized_form_is_the_sum_over_pairs_of_tokens(seed: int) -> None:
    toy = Toy(seed)
    probabilities = (toy.hidden @ toy.head.T).softmax(-1)
    expected = []
    for k in range(len(toy.tokens)):
        total = 0.0
        for j in range(len(toy.tokens)):
            a, b = int(toy.tokens[j]), int(toy.tokens[k])
            alpha = int(a == b) - probabilities[k, a] - probabilities[j, b] + probabilities[j] @ probabilities[k]
            total += toy.weights[j] * alpha * (toy.hidden[j] @ toy.hidden[k])
        expected.append(float(total))
    torch.testing.assert_close(toy.influences(), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)


def test_influence_is_the_first_order_effect_of_one_step_of_the_head(seed: int) -> None:
    toy, step = Toy(seed), 1e-5
    found = toy.influences()
    for k in range(len(toy.tokens)):
        head = toy.head.clone().requires_grad_()
        toy.logprobs(head)[k].backward()
        assert head.grad is not None
        change = toy.objective(toy.head + step * head.grad) - toy.objective(toy.head - step * head.grad)
        assert float(change / (2 * step)) == pytest.approx(float(found[k]), rel=1e-6, abs=1e-9)


def test_mean_influence_of_correct_tokens_is_a_squared_norm(seed: int) -> None:
    toy = Toy(seed)
    matrix = influence_matrix(toy.errors(), toy.hidden, toy.weights)
    assert float((toy.weights * toy.influences()).sum()) == pytest.approx(float(matrix.square().sum()))


@pytest.mark.parametrize("cut", [1, 6, 9])
def test_a_group_split_over_processes_gives_the_same_scores(cut: int, seed: int) -> None:
    toy = Toy(seed)
    parts = [slice(0, cut), slice(cut, None)]
    errors = toy.errors()
    matrix = sum(influence_matrix(errors[part], toy.hidden[part], toy.weights[part]) for part in parts)
    assert isinstance(matrix, Tensor)
    found = torch.cat([influence(errors[part], toy.hidden[part], matrix) for part in parts])
    torch.testing.assert_close(found, toy.influences(), rtol=0, atol=1e-12)


def test_restriction_to_the_tokens_that_occur_omits_only_the_tails(seed: int) -> None:
    toy = Toy(seed)
    toy.tokens = toy.tokens % 4  # tokens 4 and 5 occur nowhere
    probabilities = (toy.hidden @ toy.head.T).softmax(-1)
    whole = toy.influences()
    occurring, columns = toy.tokens.unique(return_inverse=True)
    errors = prediction_errors(probabilities[:, occurring].clone(), columns)
    found = influence(errors, toy.hidden, influence_matrix(errors, toy.hidden, toy.weights))
    absent = [v for v in range(VOCABULARY) if v not in occurring.tolist()]
    tails = probabilities[:, absent]
    missing = ((tails @ tails.T) * (toy.hidden @ toy.hidden.T)) @ toy.weights
    torch.testing.assert_close(found + missing, whole, rtol=0, atol=1e-12)
    assert float(missing.abs().max()) > 1e-6


# --- rules ------------------------------------------------------------------------------------------------------------


def test_thresholds() -> None:
    influences = [torch.tensor([1.0, 3.0]), torch.tensor([-4.0]), torch.tensor([0.5])]
    correct = [True, False, True]
    rules = {("nthr_min", 1.0): 0.5, ("nthr_min", 2.0): 1.0, ("mean", 1.0): 1.25, ("none", 1.0): -math.inf}
    for (rule, value), expected in rules.items():
        assert threshold(influences, correct, rule=rule, value=value) == expected  # pyright: ignore
    assert threshold(influences, correct, rule="quantile", value=0.5) == pytest.approx(2.0)


def test_weights() -> None:
    score = torch.tensor([2.0, -2.0, 0.5, -0.5, 0.0])
    assert thr_weights(score, p=0.1, above=1.0).tolist() == pytest.approx([1.1, 0.9, 0, 0, 0])
    assert thr_weights(score, p=-0.1, above=-math.inf).tolist() == pytest.approx([0.9, 1.1, 0.9, 1.1, 1.0])
    assert thr_weights(score, p=0.0, above=-math.inf).tolist() == [1.0] * 5
    assert nthr_weights(score, eta=0.25, above=0.4).tolist() == [0.25, 1.0, 0.25, 1.0, 1.0]
    assert nthr_eta(torch.tensor([True, False, False, False])) == 0.5
    assert nthr_eta(torch.tensor([True, False])) == 0.0


def test_schedule() -> None:
    assert [scheduled_p(s, start=0.2, end=-0.2, steps=4) for s in (0, 1, 2, 4, 9)] == pytest.approx(
        [0.2, 0.1, 0, -0.2, -0.2]
    )
    assert scheduled_p(50, start=0.1, end=None, steps=None) == 0.1


# --- inside the learner -----------------------------------------------------------------------------------------------


def make_groups(seed: int) -> list[RolloutGroup]:
    """Two mixed groups and one whose rollouts are all right; one rollout in two turns with a rewritten context."""
    random = np.random.default_rng(seed)
    groups = []
    for number, outcomes in enumerate(([1, 0, 1, 0], [1, 1, 1, 1], [0, 0, 1, None])):
        task = Task(id=f"t{number}", messages=[])
        rollouts = []
        for index, reward in enumerate(outcomes):
            turns = []
            for _ in range(2 if index == 1 else 1):
                ids = random.integers(0, 61, int(random.integers(2, 7))).tolist()
                prompt = random.integers(0, 61, 3).tolist()
                turns.append(
                    Turn(
                        prompt_ids=prompt,
                        completion_ids=ids,
                        rollout_logprobs=[-4.0] * len(ids),
                        finish="stop",
                        policy_version=(0, 0),
                        message={},
                    )
                )
            rollouts.append(Rollout(task=task, index=index, turns=turns, score=Score(reward=reward)))
        groups.append(RolloutGroup(task=task, rollouts=rollouts))
    return groups


def build(*, train: dict | None = None, **algo: object) -> tuple[Learner, Algorithm]:
    config = make_config(algo=algo, train=train)
    policy = Policy(tiny_model(), temperature=1.0, keep_reference=False)
    check_forward(policy)
    return Learner(policy, config.train, Parallel.alone()), make_algorithm(config)  # pyright: ignore


def update(seed: int, *, train: dict | None = None, **algo: object) -> tuple[dict, dict, list[RolloutGroup]]:
    learner, algorithm = build(train=train, **algo)
    groups = make_groups(seed)
    metrics = learner.update(algorithm.prepare(groups, policy_version=0), algorithm)
    return metrics, trained_parameters(learner), groups


def flat(parameters: dict[str, Tensor]) -> Tensor:
    return torch.cat([p.flatten() for p in parameters.values()])


@pytest.mark.parametrize(
    "preset", [{"aggregation": "grpo"}, {"name": "gspo_token", "num_mini_batches": 1}, {"name": "cispo"}]
)
def test_p_zero_without_threshold_is_the_plain_algorithm(preset: dict, seed: int) -> None:
    plain = flat(update(seed, **preset)[1])
    options = {"kind": "thr", "p": 0.0, "threshold": "none"}
    torch.testing.assert_close(flat(update(seed, **preset, token_weighting=options)[1]), plain, rtol=0, atol=1e-7)
    other = flat(update(seed, **preset, token_weighting=options | {"p": 0.5})[1])
    assert (other - plain).abs().max() > 1e-5


def test_scores_in_the_learner_equal_those_of_the_whole_group_at_once(seed: int) -> None:
    _, _, groups = update(seed, name="thr", token_weighting={"p": 0.1}, train={"max_tokens_per_micro_batch": 8})
    model = tiny_model()
    for number in (0, 2):
        rollouts = [r for r in groups[number].rollouts if r.score is not None and r.score.reward is not None]
        hidden, probabilities, tokens, weights, signs = [], [], [], [], []
        for rollout in rollouts:
            right = rollout.score.reward == 1
            for turn in rollout.turns:
                ids = torch.tensor([turn.prompt_ids + turn.completion_ids])
                with torch.no_grad():
                    out = model(input_ids=ids, output_hidden_states=True)
                places = range(len(turn.prompt_ids) - 1, ids.shape[1] - 1)
                hidden.append(out.hidden_states[-1][0, list(places)])
                probabilities.append(out.logits[0, list(places)].softmax(-1))
                tokens += turn.completion_ids
                weights += [1 / rollout.num_completion_tokens if right else 0.0] * len(turn.completion_ids)
                signs += [1.0 if right else -1.0] * len(turn.completion_ids)
        occurring, columns = torch.tensor(tokens).unique(return_inverse=True)
        errors, states = prediction_errors(torch.cat(probabilities)[:, occurring], columns), torch.cat(hidden)
        expected = torch.tensor(signs) * influence(
            errors, states, influence_matrix(errors, states, torch.tensor(weights))
        )
        found = torch.tensor([s for r in rollouts for s in r.token_scores["thr"]])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_which_tokens_are_weighed(seed: int) -> None:
    metrics, _, groups = update(seed, name="thr", token_weighting={"p": 0.25, "threshold": "none"})
    for number, group in enumerate(groups):
        for rollout in group.rollouts:
            if number == 1 or rollout.score is None or rollout.score.reward is None:
                assert rollout.token_scores == {}, (
                    "a group without both outcomes, or a rollout without one, has no scores"
                )
                continue
            scores = np.array(rollout.token_scores["thr"])
            assert len(scores) == rollout.num_completion_tokens
            plain = (rollout.score.reward - np.mean([r.score.reward for r in scored(group)])) / (
                np.std([r.score.reward for r in scored(group)], ddof=1) + 1e-4
            )
            advantages = np.broadcast_to(rollout.advantage, scores.shape)
            np.testing.assert_allclose(advantages, plain * (1 + 0.25 * np.sign(scores)), rtol=1e-4)
    assert metrics["train/computed_frac"] < 1, "groups without signal are not computed"


def scored(group: RolloutGroup) -> list[Rollout]:
    return [r for r in group.rollouts if r.score is not None and r.score.reward is not None]


@pytest.mark.parametrize("preset", ["thr", "nthr"])
def test_micro_batches_and_packing_change_nothing(preset: str, seed: int) -> None:
    _, parameters, groups = update(seed, name=preset)
    expected, scores = flat(parameters), all_scores(groups)
    layouts = [{"max_tokens_per_micro_batch": size} for size in (1, 20, 40, 60)]
    for train in (*layouts, {"packing": False}, {"share_prefixes": False}):
        _, parameters, groups = update(seed, name=preset, train=train)
        torch.testing.assert_close(flat(parameters), expected, rtol=0, atol=2e-6)
        torch.testing.assert_close(all_scores(groups), scores, rtol=1e-4, atol=1e-5)


def all_scores(groups: list[RolloutGroup]) -> Tensor:
    scores = [r.token_scores.values() for group in groups for r in group.rollouts]
    return torch.tensor([value for found in scores for values in found for value in values])


@pytest.mark.parametrize(
    ("algo", "max_tokens", "expected"),
    [
        ({"name": "grpo"}, 2048, 1),
        ({"name": "thr"}, 2048, 1),  # scored in the forward pass that trains
        ({"name": "thr"}, 1, 18),  # no group fits: a pass for each of the 9 samples to score it, another to train on it
        ({"name": "thr", "num_mini_batches": 2}, 2048, 4),  # the old log-probabilities' pass, one for each group
        ({"name": "thr", "top_entropy_quantile": 0.9}, 2048, 4),  # scores, then entropies, then the update
    ],
)
def test_how_many_forward_passes_it_takes(
    algo: dict, max_tokens: int, expected: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = {"max_tokens_per_micro_batch": max_tokens, "share_prefixes": False}
    weighting = {"token_weighting": {"threshold": "none"}} if algo["name"] == "thr" else {}
    learner, algorithm = build(train=train, **algo, **weighting)
    batch = algorithm.prepare(make_groups(seed), policy_version=0)
    calls, forward = [], PolicyModule.hidden_states
    monkeypatch.setattr(PolicyModule, "hidden_states", lambda *args: calls.append(1) or forward(*args))
    learner.update(batch, algorithm)
    assert len(calls) == expected


def test_nthr_touches_incorrect_responses_only(seed: int) -> None:
    _, _, groups = update(seed, name="nthr", token_weighting={"eta": 0.0, "threshold": "none"})
    for rollout in scored(groups[0]):
        if rollout.score.reward == 1:
            assert rollout.advantage == pytest.approx(math.sqrt(3) / 2, rel=1e-3)
        else:
            assert np.all(np.asarray(rollout.advantage) == 0), "with eta 0 and no threshold nothing of them is left"
