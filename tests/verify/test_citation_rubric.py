"""The citation reward: rows, groups, examples; and the rubric server with its client, over real HTTP with faults."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from llmrl import endpoint as judge_http
from llmrl.endpoint import EndpointError
from llmrl.errors import UserError
from llmrl.types import Rollout, RolloutGroup, Score, Status, Task, Turn
from llmrl.verify.citations.support import LexicalJudge
from llmrl.verify.judge.verdict import Question, Verdict
from llmrl.verify.rubric import Part, Rubric
from rewards.citation_rubric import EXAMPLES, citation_rubric, evaluate_remotely, score_group
from tests.verify.rubric_cases import RIGHT, ScriptedJudge

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE_ROW = {k: v for k, v in EXAMPLES[0].items() if k not in ("completion", "reward", "judge")}
GOOD = EXAMPLES[0]["completion"]


# --- the reward -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", EXAMPLES, ids=lambda e: repr(e["completion"])[-40:])
def test_examples(case: dict[str, Any]) -> None:
    columns = {k: v for k, v in case.items() if k != "reward"}
    assert asyncio.run(citation_rubric(**columns)).reward == pytest.approx(case["reward"])


def test_rows_in_the_paper_s_format() -> None:
    environment = {"search_forbidden_strs": ["Which town?"], "rubrics": EXAMPLE_ROW["rubrics"]}
    judge = ScriptedJudge(
        correct=RIGHT,
        entities={"analysis": "", "E0": "a", "E1": "b", "E2": "c"},
        support={"analysis": "", "S1": True, "S2": True},
    )
    found = asyncio.run(
        citation_rubric(
            GOOD,
            EXAMPLE_ROW["messages"],
            label="Basel",
            metadata={"remote_env_info": environment},
            prompt="long prompt",
            judge=judge,
        )
    )
    assert found.reward == 1.0 and found.parts == {"outcome": 1.0, "rubric": 1.0}
    assert found.info["rubric_scores"]["1"]["score"] == 1
    assert judge.cases[0]["question"] == "Which town?"


def test_the_final_answer_is_not_counted_twice() -> None:
    ended = [*EXAMPLE_ROW["messages"], {"role": "assistant", "content": GOOD}]
    judge = ScriptedJudge(correct=RIGHT)
    for completion, messages in (
        (GOOD, ended),
        (GOOD, EXAMPLE_ROW["messages"]),
        ([ended[-1]], EXAMPLE_ROW["messages"]),
        (ended, None),
    ):
        found = asyncio.run(citation_rubric(completion, messages, "Basel", judge=judge, alpha=0.0))
        assert found.reward == 1.0
    assert judge.asked == ["correct"] * 4, "with alpha 0 no rubric question is asked"


def test_an_abstention_is_none_or_on_request_zero() -> None:
    judge = ScriptedJudge(correct=RIGHT, entities=None)
    assert asyncio.run(citation_rubric(GOOD, **EXAMPLE_ROW, judge=judge)).reward is None
    assert asyncio.run(citation_rubric(GOOD, **EXAMPLE_ROW, judge=judge, zero_unjudged=True)).reward == pytest.approx(
        0.7
    )


def test_missing_judge_and_answer_are_errors() -> None:
    with pytest.raises(UserError, match="server_url"):
        asyncio.run(citation_rubric(GOOD, **EXAMPLE_ROW))
    with pytest.raises(UserError, match="answer or label"):
        asyncio.run(citation_rubric(GOOD, judge="lexical"))


def rollout(completion: str, status: Status = Status.COMPLETED) -> Rollout:
    first, asked, replied = EXAMPLE_ROW["messages"]
    meta = {"rubrics": EXAMPLE_ROW["rubrics"], "entities": EXAMPLE_ROW["entities"]}

    def turn(message: Any, replies: list) -> Turn:
        return Turn(
            prompt_ids=[1],
            completion_ids=[2],
            rollout_logprobs=[0.0],
            finish="stop",
            policy_version=(0, 0),
            message=message,
            replies=replies,
        )

    turns = [turn(asked, [replied]), turn({"role": "assistant", "content": completion}, [])]
    return Rollout(task=Task(id="t", messages=[first], answer="Basel", meta=meta), index=0, turns=turns, status=status)


def test_a_group_is_normalized_by_its_best_supported_rollout() -> None:
    half = EXAMPLES[1]["completion"]
    wrong = EXAMPLES[3]["completion"]
    uncited = EXAMPLES[2]["completion"]
    group = [
        rollout(half),
        rollout(uncited),
        rollout(wrong.replace("[[0](https://books.example/froben)]", "")),
        rollout(half, Status.TRUNCATED_LENGTH),
    ]
    scores = asyncio.run(score_group(group, judge="lexical"))
    assert [s.parts["rubric"] for s in scores] == [0.5, 0.0, 0.5, 0.0]
    assert [s.reward for s in scores] == pytest.approx([1.0, 0.7, 0.0, 0.0])
    plain = asyncio.run(score_group(group, judge="lexical", rubric_norm="none"))
    assert [s.reward for s in plain] == pytest.approx([0.85, 0.7, 0.0, 0.0])


def test_rubric_questions_are_skipped_if_they_cannot_count() -> None:
    judge = ScriptedJudge(correct={**RIGHT, "correct": False})
    for norm in ("none", "group_max_correct"):
        (score,) = asyncio.run(score_group([rollout(GOOD)], judge=judge, rubric_norm=norm))
        assert (score.reward, score.parts["rubric"]) == (0.0, 0.0)
    assert judge.asked == ["correct"] * 2


def test_a_failure_of_one_rollout_leaves_the_others_scored() -> None:
    class Flaky(LexicalJudge):
        async def ask(self, question: Question, case: dict[str, str]) -> Verdict:
            if case.get("response") == "BROKEN":
                raise ConnectionError("judge is down")
            return await super().ask(question, case)

    judge = Flaky(EXAMPLE_ROW["entities"])
    good, failed = asyncio.run(score_group([rollout(GOOD), rollout("BROKEN")], judge=judge))
    assert good.reward == 1.0
    assert isinstance(failed, Score) and failed.reward is None and "judge is down" in (failed.error or "")
    with pytest.raises(UserError):
        asyncio.run(score_group([rollout(GOOD)]))


def test_as_part_of_a_rubric() -> None:
    async def rewards() -> list[float | None]:
        half = EXAMPLES[1]["completion"]
        task = rollout(half).task
        group = RolloutGroup(task=task, rollouts=[rollout(half), rollout("no answer")])
        rubric = Rubric(
            [Part(fn=str(ROOT / "rewards" / "citation_rubric.py") + ":score_group", args={"judge": "lexical"})]
        )
        try:
            await rubric.score_group(group)
        finally:
            await rubric.close()
        return [r.score.reward if r.score else None for r in group.rollouts]

    assert asyncio.run(rewards()) == pytest.approx([1.0, 0.0])


# --- the server -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """Run scripts/serve_rubric on a free port, with the judge that needs no model."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, str(ROOT / "scripts" / "serve_rubric"), "--port", str(port), "--judge", "lexical"]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": ""}, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 60
        while True:
            if process.poll() is not None:
                raise AssertionError(f"serve_rubric ended: {process.stderr.read() if process.stderr else ''}")
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert time.monotonic() < deadline, "serve_rubric does not listen"
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(10)


def payload(completion: str, ratio: float = 0.5) -> dict[str, Any]:
    return {
        "history": [*EXAMPLE_ROW["messages"], {"role": "assistant", "content": completion}],
        "label": "Basel",
        "task_unfinished": False,
        "remote_env_info": {
            "search_forbidden_strs": ["In which town?"],
            "rubrics": EXAMPLE_ROW["rubrics"],
            "rubric_reward_ratio": ratio,
            "entities": EXAMPLE_ROW["entities"],
        },
    }


def test_server_contract(server: str) -> None:
    def post(content: Any) -> httpx.Response:
        return httpx.post(f"{server}/evaluate", json=content, timeout=30)

    half = EXAMPLES[1]["completion"]
    reply = post(payload(half)).json()
    assert (reply["reward"], reply["outcome_reward"], reply["rubric_reward"]) == (0.75, 1.0, 0.5)
    assert [reply["rubric_scores"][i]["score"] for i in ("0", "1")] == [0, 1]
    assert (post(payload(half, 0.0)).json()["reward"], post(payload(half, 1.0)).json()["reward"]) == (1.0, 0.5)
    assert post(payload(half, 0.0)).json()["rubric_reward"] == post(payload(half, 1.0)).json()["outcome_reward"] == 0.0
    for zero in (
        {**payload(half), "task_unfinished": True},
        {**payload(half), "history": payload(half)["history"][:-1]},
    ):
        reply = post(zero).json()
        assert (reply["reward"], reply["outcome_reward"], reply["rubric_reward"]) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    "missing", ["history", "label", "task_unfinished", "remote_env_info", "rubrics", "search_forbidden_strs"]
)
def test_server_refuses_an_incomplete_payload(server: str, missing: str) -> None:
    content = payload(GOOD)
    content.pop(missing, None)
    content.get("remote_env_info", {}).pop(missing, None)
    reply = httpx.post(f"{server}/evaluate", json=content, timeout=30)
    assert reply.status_code == 400 and missing in reply.json()["error"]


@pytest.mark.parametrize("label", [["Basel", "Bâle"], {"text": "Basel"}, None, True])
def test_server_refuses_a_label_that_is_no_single_answer(server: str, label: Any) -> None:
    reply = httpx.post(f"{server}/evaluate", json=payload(GOOD) | {"label": label}, timeout=30)
    assert reply.status_code == 400 and "label must be one answer" in reply.json()["error"]


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b"[" * 100_000, b'{"history": NaN}'])
def test_server_refuses_an_invalid_payload(server: str, body: bytes) -> None:
    assert httpx.post(f"{server}/evaluate", content=body, timeout=30).status_code == 400


def test_the_reward_through_the_server_is_the_reward_without(server: str) -> None:
    environment = {"remote_env_info": {"entities": EXAMPLE_ROW["entities"]}}
    for case in EXAMPLES:
        columns = {k: v for k, v in case.items() if k not in ("reward", "judge")}
        # The server's lexical judge knows no names, so no rubric has its entities and only the outcome counts.
        local = asyncio.run(citation_rubric(**{**columns, "entities": {}}, metadata=environment, judge=LexicalJudge()))
        remote = asyncio.run(citation_rubric(**columns, server_url=server))
        assert remote.reward == local.reward and remote.parts["outcome"] == local.parts["outcome"]


def test_text_without_utf8_form_goes_through_the_server(server: str) -> None:
    reply = asyncio.run(evaluate_remotely(server, payload("\ud800\0" + GOOD)))
    assert reply["outcome_reward"] == 1.0


class Faulty(BaseHTTPRequestHandler):
    """Answer with the scripted (status, body) pairs one after the other."""

    script: list[tuple[int, str]] = []
    num_requests = 0

    def do_POST(self) -> None:
        type(self).num_requests += 1
        self.rfile.read(int(self.headers["Content-Length"]))
        status, body = self.script.pop(0)
        if status == 0:  # a connection that is cut
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def faulty() -> Iterator[tuple[str, type[Faulty]]]:
    handler = type("Handler", (Faulty,), {"num_requests": 0})
    service = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=service.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{service.server_port}", handler
    service.shutdown()
    service.server_close()


FINE = (200, '{"outcome_reward": 1.0, "rubric_reward": 0.5}')


def test_client_retries_transport_failures_only(
    faulty: tuple[str, type[Faulty]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judge_http, "_backoff", lambda state: 0.01)
    url, handler = faulty
    handler.script = [(500, "x"), (0, ""), (429, "x"), (504, "x"), FINE]
    assert asyncio.run(evaluate_remotely(url, {}))["rubric_reward"] == 0.5
    assert handler.num_requests == 5
    handler.script, handler.num_requests = [(500, "x")] * 11, 0
    with pytest.raises(EndpointError, match="HTTP 500"):
        asyncio.run(evaluate_remotely(url, {}))
    assert handler.num_requests == 11
    for refused in ((400, "missing: label"), (424, "the budget is used up"), (200, "{}")):
        handler.script, handler.num_requests = [refused], 0
        with pytest.raises(EndpointError):
            asyncio.run(evaluate_remotely(url, {}))
        assert handler.num_requests == 1


def test_a_server_s_abstention_is_an_abstention(faulty: tuple[str, type[Faulty]]) -> None:
    url, handler = faulty
    handler.script = [(200, '{"reward": null, "outcome_reward": 1.0, "rubric_reward": null}')]
    found = asyncio.run(citation_rubric(GOOD, **EXAMPLE_ROW, server_url=url))
    assert found.reward is None and found.error is None and found.parts == {"outcome": 1.0, "rubric": None}
