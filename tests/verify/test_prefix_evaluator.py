"""IRCoCo's evaluator and rewards: one pass equals prefix by prefix, and rewards telescope, also in a rubric."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrl.errors import UserError
from llmrl.tiny import byte_tokenizer
from llmrl.types import Message, Rollout, Task, Turn
from llmrl.verify.models.prefix_evaluator import (
    PrefixEvaluator,
    get_prefix_evaluator,
    segment_ends,
    telescoping_rewards,
)
from llmrl.verify.rubric import Part
from tests.verify.classifiers import save_classifier
from tests.verify.rollouts import score_together

NEWLINE = ord("\n")
STOP = 257


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_classifier(tmp_path_factory.mktemp("evaluator"))


def rollout(prompt: str, completion: str, *, index: int = 0, finish: Any = "stop") -> Rollout:
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode(completion, add_special_tokens=False)
    turn = Turn(
        prompt_ids=tokenizer.encode(prompt, add_special_tokens=False),
        completion_ids=[*ids, STOP] if finish == "stop" else ids,
        rollout_logprobs=[-1.0] * (len(ids) + (finish == "stop")),
        finish=finish,
        policy_version=(0, 0),
        message=Message(role="assistant", content=completion),
    )
    return Rollout(task=Task(id="t", messages=[], answer="b = 2\nc = 3"), index=index, turns=[turn])


def score(rollouts: list[Rollout], **args: Any) -> None:
    score_together([Part(fn="rewards/ircoco.py:ircoco", args=args)], rollouts)


@settings(deadline=None)
@given(
    st.lists(st.floats(-100, 100), min_size=1, max_size=60),
    st.lists(st.integers(0, 9), max_size=59),
    st.booleans(),
    st.sampled_from(["token", "line"]),
)
def test_rewards_add_up_to_the_last_value_less_the_first(
    values: list[float], ids: list[int], stopped: bool, boundary: Any
) -> None:
    ids = ids[: len(values) - 1]
    ends = segment_ends(ids, boundary, frozenset({0, 1}))
    rewards = telescoping_rewards(np.array(values), ends, len(ids) + stopped)
    assert len(rewards) == len(ids) + stopped
    assert abs(sum(rewards) - (values[len(ids)] - values[0])) < 1e-6
    assert not stopped or rewards[-1] == 0


def test_the_tokens_of_a_line_share_its_gain() -> None:
    ids, values = [5, 6, NEWLINE, 5, 6], np.array([0.1, 9.0, 9.0, 0.4, 9.0, 0.2])
    ends = segment_ends(ids, "line", frozenset({NEWLINE}))
    assert ends == [3, 5] and segment_ends(ids, "token", frozenset()) == [1, 2, 3, 4, 5]
    assert telescoping_rewards(values, ends, 6) == pytest.approx([0.1, 0.1, 0.1, -0.1, -0.1, 0])
    assert telescoping_rewards(values[:1], [], 1) == [0.0]


def test_one_pass_gives_the_values_of_all_prefixes(folder: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    plain = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    sequences = [[5, 6, 7, 8, 9, 10, 11], [200, 3, NEWLINE], list(range(40))]
    evaluator = PrefixEvaluator(str(folder), device="cpu", max_tokens=50)
    for ids, values in zip(sequences, evaluator.values(sequences), strict=True):
        with torch.no_grad():
            alone = [plain(input_ids=torch.tensor([ids[:t]])).logits[0, 0].item() for t in range(1, len(ids) + 1)]
        np.testing.assert_allclose(values, alone, atol=1e-4)
        assert len({round(value, 3) for value in alone}) > 2


def test_as_a_reward(folder: Path) -> None:
    rollouts = [
        rollout("a = 1\n", "b = 2\nc = 3"),
        rollout("a = 1\n", "b = 2\nd = 4\n", index=1),
        rollout("a = 1\n", "b = ", index=2, finish="length"),
        rollout("a = 1\n", "", index=3),
    ]
    options = {"device": "cpu", "dtype": "float64"}
    evaluator = get_prefix_evaluator(str(folder), **options)
    for boundary, pay_stop in itertools.product(("token", "line"), (False, True)):
        score(rollouts, evaluator=str(folder), boundary=boundary, pay_stop=pay_stop, options=options)
        for one in rollouts:
            (turn,) = one.turns
            assert one.score is not None and one.score.token_rewards is not None
            paid = turn.completion_ids[: -1 if turn.finish == "stop" and not pay_stop else None]
            (values,) = evaluator.values([turn.prompt_ids + paid])
            first, last = values[len(turn.prompt_ids) - 1], values[-1]
            assert len(one.score.token_rewards) == len(turn.completion_ids)
            assert abs(sum(one.score.token_rewards) - (last - first)) < 1e-6
            if turn.finish == "stop":
                assert (one.score.token_rewards[-1] == 0) != pay_stop
            assert one.score.parts["ircoco/evaluator"] == pytest.approx(last, abs=1e-6)
        line = rollouts[0].score.token_rewards[:6]  # pyright: ignore
        assert (len(set(line)) == 1) == (boundary == "line")
        for one in rollouts:
            one.score = None
    score(rollouts, evaluator=str(folder), options={"device": "cpu"})
    assert [r.score.reward for r in rollouts if r.score] == pytest.approx([1, 2 * 9 / 22, 2 * 3 / 14, 0], abs=1e-9)
    assert [r.score.parts["ircoco/exact_match"] for r in rollouts if r.score] == [1, 0, 0, 0]


def test_an_evaluator_that_does_not_fit_the_policy_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has 2 outputs"):
        PrefixEvaluator(str(save_classifier(tmp_path / "two", num_labels=2)))
    with pytest.raises(UserError, match="not in its vocabulary"):
        get_prefix_evaluator(str(folder), device="cpu").values([[999]])
    with pytest.raises(UserError, match="more than its 4096 positions"):
        get_prefix_evaluator(str(folder), device="cpu").values([[1] * 4097])
    other = rollout("a", "b = 2")
    other.turns[0].completion_ids = [token + 1 for token in other.turns[0].completion_ids]
    with pytest.raises(UserError, match="does not have the policy's tokenizer"):
        score([other], evaluator=str(folder), options={"device": "cpu"})
    with pytest.raises(UserError, match="boundary 'word' is unknown"):
        score([rollout("a", "b")], evaluator=str(folder), boundary="word")


def test_a_model_that_sees_later_tokens_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForSequenceClassification, BertConfig

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    bert = AutoModelForSequenceClassification.from_config(BertConfig(vocab_size=259, num_labels=1, **sizes))
    bert.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="is not a classifier of a causal model"):
        PrefixEvaluator(str(tmp_path))
    monkeypatch.setattr(PrefixEvaluator, "_forward", lambda _, rows: np.array([[sum(ids)] * 4 for ids in rows], float))
    with pytest.raises(UserError, match="later tokens change its earlier values"):
        PrefixEvaluator(str(folder), device="cpu")
