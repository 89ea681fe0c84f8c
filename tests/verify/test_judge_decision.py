"""Decisions: one token's log-probabilities become probabilities of levels; a server without them is refused."""

from __future__ import annotations

import asyncio
import json
import math
from typing import Any

import pytest

from llmrl.endpoint import Endpoint, EndpointError
from llmrl.errors import RunFailed, UserError
from llmrl.verify.judge.decision import read_decision
from llmrl.verify.judge.judge import Canary, Judge, JudgeConfig, Question
from rewards.judge import judge as judge_reward

LEVELS = {"yes": 1.0, "no": 0.0}
QUESTION = Question(name="right", instructions="Is it right?", levels=LEVELS)


def reply(*tokens: tuple[str, float]) -> dict[str, Any]:
    top = [{"token": token, "logprob": math.log(p) if p else -9999.0} for token, p in tokens]
    logprobs = {"content": [{**top[0], "top_logprobs": top}]}
    choice = {"message": {"content": tokens[0][0]}, "finish_reason": "length", "logprobs": logprobs}
    return {"choices": [choice], "usage": {"prompt_tokens": 50, "completion_tokens": 1}}


def test_every_way_to_write_a_level_counts() -> None:
    found = read_decision(reply((" Yes", 0.5), ("yes", 0.1), ("NO", 0.2), ("n", 0.1), ("maybe", 0.1)), LEVELS, "url")
    assert found == pytest.approx({"yes": 0.6 / 0.9, "no": 0.3 / 0.9})


def test_a_token_that_was_sampled_counts_beside_the_best() -> None:
    answer = reply(("no", 0.7))
    answer["choices"][0]["logprobs"]["content"][0] |= {"token": "yes", "logprob": math.log(0.3)}
    assert read_decision(answer, LEVELS, "url") == pytest.approx({"yes": 0.3, "no": 0.7})


def test_grades() -> None:
    levels = {str(grade): grade / 9 for grade in range(10)}
    found = read_decision(reply(("7", 0.5), ("8", 0.25), (" 9", 0.25)), levels, "url")
    assert (found["7"], found["8"], found["9"], found["0"]) == pytest.approx((0.5, 0.25, 0.25, 0.0))


def test_an_answer_to_something_else_is_not_a_decision() -> None:
    with pytest.raises(ValueError, match=r"only 20% of the probability is on yes, no; .* '<think>'.* extra_body"):
        read_decision(reply(("<think>", 0.8), ("yes", 0.2)), LEVELS, "url")


@pytest.mark.parametrize("logprobs", [None, {}, {"content": []}, {"content": None}, {"content": [{"token": "yes"}]}])
def test_a_server_without_log_probabilities_is_refused(logprobs: Any) -> None:
    answer = reply(("yes", 1.0))
    answer["choices"][0]["logprobs"] = logprobs
    with pytest.raises(RunFailed, match=r"but http://j does not give them: .*`top_logprobs`.*decision: false"):
        read_decision(answer, LEVELS, "http://j")


@pytest.mark.parametrize("levels", [{"yes": 1.0}, {"yes": 1.0, "yellow": 0.0}, {"10": 1.0, "1": 0.0}, {"": 1, "a": 0}])
def test_levels_that_one_token_cannot_tell_apart_are_refused(levels: dict[str, float]) -> None:
    with pytest.raises(UserError, match="cannot be decided by one token"):
        Question(name="q", instructions="?", levels=levels)


@pytest.fixture
def posted(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The bodies posted to a judge that is 80 % sure of yes, unless the response says otherwise."""
    bodies: list[dict[str, Any]] = []

    async def post(self: Endpoint, body: dict[str, Any]) -> dict[str, Any]:
        bodies.append(body)
        text = body["messages"][0]["content"]
        if "refuse" in text:
            raise EndpointError("HTTP 400 top_logprobs must be at most 5", status=400)
        return reply(("no", 0.9), ("yes", 0.1)) if "wrong" in text else reply(("yes", 0.8), ("no", 0.2))

    monkeypatch.setattr(Endpoint, "post", post)
    return bodies


def ask(config: dict[str, Any], response: str, question: Question = QUESTION) -> Any:
    judge = Judge(JudgeConfig(**{"base_url": "http://j/v1", "model": "m", "canary_rate": 0.0, **config}))
    return asyncio.run(judge.ask(question, {"response": response}))


def test_the_request_is_for_one_token_and_the_verdict_has_the_probabilities(posted: list[dict[str, Any]]) -> None:
    values = ask({"top_logprobs": 5}, "4").values
    assert values["level"] == "yes" and values["expected"] == pytest.approx(0.8)
    assert values["probabilities"] == pytest.approx({"yes": 0.8, "no": 0.2})
    (body,) = posted
    assert (body["max_tokens"], body["logprobs"], body["top_logprobs"]) == (1, True, 5)
    assert "response_format" not in body and body["messages"][0]["content"].endswith("nothing else: yes | no")
    ask({"extra_body": {"max_tokens": None, "max_completion_tokens": 900}}, "4")
    assert posted[1]["max_completion_tokens"] == 1 and "max_tokens" not in posted[1]


def test_decisions_are_cached(posted: list[dict[str, Any]], tmp_path: Any) -> None:
    config = {"cache_dir": str(tmp_path)}
    first, second = ask(config, "4"), ask(config, "4")
    assert (first.cached, second.cached, len(posted)) == (False, True, 1)
    assert first.values == second.values
    (file,) = tmp_path.rglob("*.json")
    file.write_text(json.dumps({"content": '{"a": 1}'}))
    assert not ask(config, "4").cached


def test_a_server_that_refuses_the_request_for_its_log_probabilities_stops_the_run(posted: list[Any]) -> None:
    with pytest.raises(RunFailed, match="HTTP 400 top_logprobs must be at most 5"):
        ask({}, "refuse")


def test_canaries_check_decisions(posted: list[Any]) -> None:
    canaries = (Canary(case={"response": "wrong"}, expected={"level": "yes"}),)
    question = Question(name="right", instructions="Is it right?", levels=LEVELS, canaries=canaries)
    with pytest.raises(RunFailed, match="got 1 of 1 known cases wrong"):
        ask({"canary_rate": 1.0, "canary_min_count": 1}, "4", question)


def test_the_reward_is_the_probability(posted: list[Any]) -> None:
    config = {"base_url": "http://j/v1", "model": "reward", "canary_rate": 0.0}
    score = asyncio.run(judge_reward("4", answer="4", prompt="2+2?", judge=config, decision=True))
    assert score.reward == pytest.approx(0.8)
    assert asyncio.run(judge_reward("", answer="4", prompt="2+2?", judge=config, decision=True)).reward == 0.0
