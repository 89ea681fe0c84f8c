"""The judge against a real HTTP server on loopback, with faults."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from llmrl import endpoint as judge_http
from llmrl.endpoint import Endpoint
from llmrl.errors import RunFailed, UserError
from llmrl.verify.judge import judge as judge_module
from llmrl.verify.judge import outage
from llmrl.verify.judge.cache import SpendLedger, Spent
from llmrl.verify.judge.judge import (
    Canary,
    EndpointError,
    Judge,
    JudgeConfig,
    OfflineJudge,
    Question,
    both_orders,
    get_judge,
)
from llmrl.verify.judge.verdict import json_schema
from llmrl.verify.rubric import Rubric
from rewards import judge as judge_reward
from rewards import translation_compare
from tests.verify.cache_writer import write_and_read

pytestmark = pytest.mark.slow

QUESTION = Question(name="correct", instructions="Is it right?", fields={"reason": str, "correct": bool})
GOOD = json.dumps({"reason": "same", "correct": True})


class FakeServer:
    """An OpenAI-compatible server whose answer to request number n is `script(n, body)`.

    A script returns text (a completion), a (status, headers, raw body) triple, or a callable on the handler.
    """

    def __init__(self) -> None:
        self.script: Callable[[int, dict[str, Any]], Any] = lambda n, body: GOOD
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[Any] = []
        self.times: list[float] = []
        self.open_now = 0
        self.most_open = 0
        self.lock = threading.Lock()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with owner.lock:
                    number = len(owner.bodies)
                    owner.bodies.append(body)
                    owner.headers.append(self.headers)
                    owner.times.append(time.monotonic())
                    owner.open_now += 1
                    owner.most_open = max(owner.most_open, owner.open_now)
                try:
                    answer = owner.script(number, body)
                    if callable(answer):
                        answer(self)
                    else:
                        self.answer(*(answer if isinstance(answer, tuple) else (200, {}, completion(answer))))
                except (BrokenPipeError, ConnectionResetError):
                    self.close_connection = True
                finally:
                    with owner.lock:
                        owner.open_now -= 1

            def answer(self, status: int, headers: dict[str, str], raw: str) -> None:
                data = raw.encode()
                self.send_response(status)
                for name, value in {"Content-Length": str(len(data)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 64

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()


def completion(text: str | None, finish: str = "stop", usage: Any = (100, 10)) -> str:
    counted = {"prompt_tokens": usage[0], "completion_tokens": usage[1]} if usage else None
    choice = {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text}}
    return json.dumps({"choices": [choice], "usage": counted})


def reset(handler: BaseHTTPRequestHandler) -> None:
    """Close with RST instead of an answer."""
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()
    handler.close_connection = True


FAULT_S = 60
"""How long a server that hangs would hold a request: far longer than a judge waits for it here."""


def drip(handler: BaseHTTPRequestHandler) -> None:
    """Send one byte every 50 ms, so no single read times out."""
    handler.send_response(200)
    handler.send_header("Content-Length", "100000")
    handler.end_headers()
    for _ in range(20 * FAULT_S):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.05)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    monkeypatch.setattr(outage, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(outage, "LONGEST_WAIT_S", 0.02)
    fake = FakeServer()
    yield fake
    fake.server.shutdown()
    fake.server.server_close()


def make(server: FakeServer, **options: Any) -> Judge:
    return Judge(JudgeConfig(**{"base_url": server.url, "model": "m", "timeout_s": 5, "canary_rate": 0.0, **options}))


def ask(judge: Judge, question: Question = QUESTION, **case: str) -> Any:
    async def run() -> Any:
        try:
            return await judge.ask(question, case or {"response": "4"})
        finally:
            await judge.close()

    return asyncio.run(run())


# --- what is sent, what comes back ------------------------------------------------------------------------------------


def test_a_verdict_comes_back_typed_and_the_request_is_complete(server: FakeServer, monkeypatch: Any) -> None:
    monkeypatch.setenv("JUDGE_KEY", "secret")
    judge = make(server, api_key_env="JUDGE_KEY", extra_body={"top_k": 1, "max_tokens": None})
    verdict = ask(judge, response="it is 4")
    assert verdict.values == {"reason": "same", "correct": True} and not verdict.cached
    body = server.bodies[0]
    assert (body["model"], body["temperature"], body["top_k"]) == ("m", 0.0, 1) and "max_tokens" not in body
    assert body["response_format"]["json_schema"]["schema"] == json_schema(QUESTION.fields)
    assert "it is 4" in body["messages"][0]["content"] and "Is it right?" in body["messages"][0]["content"]
    assert server.headers[0]["Authorization"] == "Bearer secret"
    metrics = judge.metrics()
    assert (metrics["judge/calls"], metrics["judge/input_tokens"], metrics["judge/output_tokens"]) == (1, 100, 10)


def test_a_server_without_json_schema_is_asked_without_it_from_then_on(server: FakeServer) -> None:
    server.script = lambda n, body: (400, {}, "response_format unknown") if "response_format" in body else GOOD
    judge = make(server)
    assert ask(judge, response="1").values and ask(judge, response="2").values
    assert ["response_format" in body for body in server.bodies] == [True, False, False]


def test_a_bad_request_is_final_and_does_not_switch_the_schema_off(server: FakeServer) -> None:
    server.script = lambda n, body: (400, {}, "context too long") if n < 2 else GOOD
    judge = make(server)
    with pytest.raises(EndpointError, match="HTTP 400 context too long"):
        ask(judge, response="1")
    ask(judge, response="2")
    assert len(server.bodies) == 3 and "response_format" in server.bodies[2]


# --- answers that cannot be read --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bad",
    [
        "yes, it is correct",
        '{"reason": "x", "correct": "true"}',
        '{"reason": "x", "correct": 1}',
        '{"reason": "x", "correct": null}',
        '{"correct": true}',
        '{"reason": "x", "correct": tr',
        '{"reason": "x", "correct": false, "correct": true}',
        "",
        None,
    ],
)
def test_an_unreadable_answer_is_asked_again_then_abstained_from(server: FakeServer, bad: str | None) -> None:
    server.script = lambda n, body: (200, {}, completion(bad))
    judge = make(server, format_retries=2)
    verdict = ask(judge)
    assert verdict.values is None and verdict.problem
    assert len(server.bodies) == 3 and judge.counts["unreadable"] == 1
    assert "could not be read" in server.bodies[1]["messages"][-1]["content"]


def test_a_readable_second_answer_counts(server: FakeServer) -> None:
    server.script = lambda n, body: "hm" if n == 0 else GOOD
    judge = make(server)
    assert ask(judge).values == {"reason": "same", "correct": True}
    assert (judge.counts["format_retries"], judge.counts["unreadable"]) == (1, 0)


def test_a_cut_off_answer_is_not_a_verdict(server: FakeServer) -> None:
    server.script = lambda n, body: (200, {}, completion(f"<think>perhaps {GOOD}", finish="length"))
    assert ask(make(server)).values is None


# --- transport faults -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault",
    [
        (500, {}, "boom"),
        (503, {}, "busy"),
        (429, {}, "slow down"),
        (200, {}, "{not json"),
        (200, {}, "[1]"),
        reset,
        lambda handler: time.sleep(FAULT_S),
        drip,
    ],
    ids=["500", "503", "429", "malformed", "not-object", "reset", "silent", "drip"],
)
def test_transport_faults_are_retried(server: FakeServer, fault: Any) -> None:
    server.script = lambda n, body: fault if n < 2 else GOOD
    hangs = callable(fault) and fault is not reset
    judge = make(server, timeout_s=3 if hangs else 120, retries=3)

    async def run() -> Any:
        verdict = await judge.ask(QUESTION, {"response": "4"})
        return verdict, judge.metrics()

    verdict, metrics = asyncio.run(run())
    assert verdict.values == {"reason": "same", "correct": True}
    assert len(server.bodies) == 3 and metrics["judge/transport_retries"] == 2
    # Without a limit on the whole request a server that hangs would hold each of the two attempts for FAULT_S.
    assert server.times[2] - server.times[0] < FAULT_S


@pytest.mark.parametrize("status", [401, 404])
def test_a_judge_that_refuses_is_an_error_not_a_verdict(server: FakeServer, status: int) -> None:
    server.script = lambda n, body: (status, {}, "no")
    with pytest.raises(EndpointError, match=f"HTTP {status}"):
        ask(make(server, retries=2))
    assert len(server.bodies) == 1


def test_a_judge_that_stays_broken_is_an_abstention(server: FakeServer) -> None:
    server.script = lambda n, body: (500, {}, "no")
    verdict = ask(make(server, outage_budget_s=0.1))
    assert verdict.values is None and "HTTP 500 no" in verdict.problem


def test_no_server_is_an_abstention_with_the_judges_name() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    verdict = ask(Judge(JudgeConfig(base_url=url, model="m", outage_budget_s=0.1)))
    assert verdict.values is None and f"judge m at {url} has not answered" in verdict.problem
    assert "Connect" in verdict.problem


def test_retry_after_is_waited_for(server: FakeServer) -> None:
    server.script = lambda n, body: (429, {"Retry-After": "1"}, "") if n == 0 else GOOD
    assert ask(make(server)).values
    assert server.times[1] - server.times[0] > 0.9


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("7", 7.0),
        ("-1", 0.0),
        ("1e9", 60.0),
        ("nan", None),
        ("soon", None),
        (None, None),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0),
    ],
)
def test_retry_after_header(header: str | None, seconds: float | None) -> None:
    assert judge_http._retry_after(header) == seconds


def test_no_more_requests_at_once_than_allowed(server: FakeServer) -> None:
    three = threading.Barrier(3)  # nobody is answered before three requests are open
    server.script = lambda n, body: (three.wait(120), GOOD)[1]
    judge = make(server, max_concurrency=3)

    async def run() -> None:
        await asyncio.gather(*(judge.ask(QUESTION, {"response": str(i)}) for i in range(12)))
        await judge.close()

    asyncio.run(run())
    assert len(server.bodies) == 12 and server.most_open == 3


# --- cache ------------------------------------------------------------------------------------------------------------


def test_equal_questions_are_paid_once(server: FakeServer, tmp_path: Any) -> None:
    server.script = lambda n, body: (time.sleep(0.05), GOOD)[1]
    judge = make(server, cache_dir=str(tmp_path))

    async def run() -> list[Any]:
        found = await asyncio.gather(*(judge.ask(QUESTION, {"response": "4"}) for _ in range(8)))
        await judge.close()
        return found

    assert all(verdict.values["correct"] for verdict in asyncio.run(run()))
    assert len(server.bodies) == 1
    again = make(server, cache_dir=str(tmp_path))
    assert ask(again).cached and len(server.bodies) == 1 and again.counts["cache_hits"] == 1
    for changed in ({"model": "other"}, {"temperature": 0.5}, {"extra_body": {"top_k": 2}}):
        assert not ask(make(server, cache_dir=str(tmp_path), **changed)).cached
    assert len(server.bodies) == 4


def test_unreadable_answers_are_not_cached_and_damaged_files_are_asked_again(server: FakeServer, tmp_path: Any) -> None:
    server.script = lambda n, body: "hm" if n < 1 else GOOD
    assert ask(make(server, cache_dir=str(tmp_path), format_retries=0)).values is None
    assert not list(tmp_path.rglob("*.json"))
    assert ask(make(server, cache_dir=str(tmp_path))).values
    (file,) = tmp_path.rglob("*.json")
    whole = file.read_text()
    for damage in (whole[:-20], "", json.dumps({**json.loads(whole), "content": "hm"})):
        file.write_text(damage)
        verdict = ask(make(server, cache_dir=str(tmp_path)))
        assert verdict.values and not verdict.cached
        assert file.read_text() == whole


def test_several_processes_share_cache_and_ledger(tmp_path: Any) -> None:
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=write_and_read, args=(str(tmp_path), i)) for i in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    spent = SpendLedger(tmp_path / "ledger.jsonl", budget_tokens=None, budget_cost=None).spent()
    assert spent == Spent(calls=100, input_tokens=50, output_tokens=100, cost=50.0)
    assert not list(tmp_path.rglob(".writing-*"))


# --- budget -----------------------------------------------------------------------------------------------------------


def test_the_budget_stops_the_run_with_the_numbers(server: FakeServer, tmp_path: Any) -> None:
    options = {"budget_tokens": 200, "ledger_file": str(tmp_path / "ledger.jsonl")}
    judge = make(server, **options)
    ask(judge, response="1")
    ask(judge, response="2")
    with pytest.raises(RunFailed, match="2 calls took 200 input and 20 output tokens"):
        ask(judge, response="3")
    with pytest.raises(RunFailed, match="budget_tokens 200"):
        ask(make(server, **options), response="4")
    assert len(server.bodies) == 2


def test_the_budget_in_money(server: FakeServer) -> None:
    judge = make(server, input_price=1000.0, output_price=5000.0, budget_cost=0.1)
    ask(judge)
    assert judge.metrics()["judge/cost"] == pytest.approx(100 * 1000 / 1e6 + 10 * 5000 / 1e6)
    with pytest.raises(RunFailed, match=r"budget_cost 0\.1"):
        ask(judge, response="2")


def test_a_budget_needs_usage(server: FakeServer) -> None:
    server.script = lambda n, body: (200, {}, completion(GOOD, usage=None))
    assert ask(make(server)).values
    with pytest.raises(RunFailed, match="reports no token usage"):
        ask(make(server, budget_tokens=1000))


def test_calls_at_once_do_not_overshoot_the_budget(server: FakeServer) -> None:
    judge = make(server, budget_tokens=2000, max_output_tokens=100)  # an answer costs 110

    async def run() -> list[Any]:
        asked = [judge.ask(QUESTION, {"response": str(i)}) for i in range(30)]
        found = await asyncio.gather(*asked, return_exceptions=True)
        await judge.close()
        return found

    found = asyncio.run(run())
    answered = [verdict for verdict in found if not isinstance(verdict, BaseException)]
    assert len(answered) == len(server.bodies) == 19  # the 19th begins below the budget and ends above it
    assert all(isinstance(error, RunFailed) for error in found if isinstance(error, BaseException))
    assert judge.metrics()["judge/input_tokens"] + judge.metrics()["judge/output_tokens"] == 2090


@pytest.mark.parametrize(
    "message",
    [
        {"content": [{"type": "text", "text": GOOD[:9]}, {"type": "text", "text": GOOD[9:]}]},
        {"content": [GOOD]},
        {"content": None, "reasoning_content": f"It is 4. {GOOD}"},
        {"content": "", "reasoning": GOOD},
        {"content": GOOD, "reasoning_content": GOOD.replace("true", "false")},
    ],
    ids=["parts", "strings", "reasoning only", "other name", "both"],
)
def test_every_form_of_content_is_read(server: FakeServer, message: dict[str, Any]) -> None:
    reply = json.loads(completion(GOOD))
    reply["choices"][0]["message"] = {"role": "assistant", **message}
    server.script = lambda n, body: (200, {}, json.dumps(reply))
    assert ask(make(server)).values == {"reason": "same", "correct": True}
    assert len(server.bodies) == 1


# --- canaries ---------------------------------------------------------------------------------------------------------

CANARY_QUESTION = Question(
    name="correct",
    instructions="Is it right?",
    fields=QUESTION.fields,
    canaries=(
        Canary(case={"response": "known good"}, expected={"correct": True}),
        Canary(case={"response": "known bad"}, expected={"correct": False}),
    ),
)


def _ask_many(judge: Judge, count: int) -> None:
    async def run() -> None:
        for i in range(count):
            await judge.ask(CANARY_QUESTION, {"response": str(i)})
        await judge.close()

    asyncio.run(run())


def test_canaries_are_mixed_in_at_the_rate_and_pass(server: FakeServer) -> None:
    def honest(n: int, body: dict[str, Any]) -> str:
        return json.dumps({"reason": "", "correct": "known bad" not in body["messages"][0]["content"]})

    server.script = honest
    judge = make(server, canary_rate=0.25, canary_min_count=1, canary_max_failure=0.0)
    _ask_many(judge, 16)
    assert (judge.counts["canaries"], judge.counts["canary_failures"], len(server.bodies)) == (4, 0, 20)


def test_canaries_find_a_judge_that_always_agrees(server: FakeServer) -> None:
    options = {"canary_rate": 1.0, "canary_min_count": 4}
    with pytest.raises(RunFailed, match="got 2 of 4 known cases wrong"):
        _ask_many(make(server, **options), 10)
    warned = make(server, **options, on_canary_failure="warn")
    with pytest.warns(UserWarning, match="known cases wrong") as caught:
        _ask_many(warned, 10)
    assert sum(w.category is UserWarning for w in caught) == 1 and warned.counts["canary_failures"] == 5


def test_each_question_cycles_through_its_canaries_with_their_fields(server: FakeServer) -> None:
    flags = [Canary(case={"response": f"known {i}"}, fields={f"S{i}": bool}, expected={f"S{i}": True}) for i in (1, 2)]
    support = Question(name="support", instructions="Are they?", fields={"S3": bool}, canaries=tuple(flags))

    def always_true(n: int, body: dict[str, Any]) -> str:
        wanted = body["response_format"]["json_schema"]["schema"]["required"]
        return json.dumps(dict.fromkeys(wanted, True) | ({"reason": ""} if "reason" in wanted else {}))

    server.script = always_true
    judge = make(server, canary_rate=1.0, on_canary_failure="warn")

    async def run() -> None:
        for i in range(2):
            await judge.ask(support, {"response": str(i)})
            await judge.ask(CANARY_QUESTION, {"response": str(i)})
        await judge.close()

    asyncio.run(run())
    texts = [body["messages"][0]["content"] for body in server.bodies]
    assert [sum(f"known {name}" in text for text in texts) for name in ("1", "2", "good", "bad")] == [1, 1, 1, 1]
    assert (judge.counts["canaries"], judge.counts["canary_failures"]) == (4, 1)


def test_canaries_bypass_the_cache(server: FakeServer, tmp_path: Any) -> None:
    judge = make(server, canary_rate=1.0, cache_dir=str(tmp_path))
    _ask_many(judge, 4)
    _ask_many(judge, 4)
    assert judge.counts["canaries"] == 4 and len(list(tmp_path.rglob("*.json"))) == 4 and len(server.bodies) == 8


# --- order ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "option", "expected"),
    [
        ({"ab": 2.0, "ba": -1.0}, "tie", 1.5),
        ({"ab": -1.0, "ba": 1.0}, "tie", -1.0),
        ({"ab": 1.0, "ba": 0.0}, "tie", 0.5),
        ({"ab": 1.0, "ba": 2.0}, "tie", 0.0),
        ({"ab": 1.0, "ba": 2.0}, "abstain", None),
        ({"ab": 1.0, "ba": None}, "tie", None),
    ],
)
def test_both_orders(table: dict[str, Any], option: Any, expected: float | None) -> None:
    async def prefer(x: str, y: str) -> float | None:
        return table[x + y]

    assert asyncio.run(both_orders(prefer, "a", "b", on_contradiction=option)) == expected


# --- configuration ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "args.judge"),
        ("qwen", "args.judge"),
        ("llmrl.no_such_module:make", "no module"),
        ("builtins:dict", "without `ask"),
        ({"model": "m"}, "base_url"),
        ({"base_url": "http://x", "model": "m", "modle": 1}, "modle"),
        ({"base_url": "localhost:8000", "model": "m"}, "give a URL"),
        ({"base_url": "http://x", "model": "m", "api_key_env": "LLMRL_NO_SUCH_KEY"}, "LLMRL_NO_SUCH_KEY"),
        ({"base_url": "http://x", "model": "m", "budget_cost": 1.0}, "input_price"),
        ({"base_url": "http://x", "model": "m", "canary_rate": 2.0}, "canary_rate"),
    ],
)
def test_wrong_configuration(config: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        get_judge(config)


def test_equal_configurations_share_a_judge() -> None:
    config = {"base_url": "http://x", "model": "m"}
    assert get_judge(config) is get_judge(dict(reversed(config.items())))
    assert get_judge(config) is not get_judge({**config, "temperature": 1.0})
    offline = OfflineJudge(lambda name, case: None)
    assert get_judge(offline) is offline


def test_the_metrics_of_the_rewards_include_the_judges(server: FakeServer, monkeypatch: Any) -> None:
    monkeypatch.setattr(judge_module, "_judges", {})
    for model in ("a", "b"):
        judge = get_judge({"base_url": server.url, "model": model, "canary_rate": 0.0, "input_price": 10_000.0})
        assert ask(judge).values
    metrics = Rubric([judge_reward.judge]).take_metrics()
    assert (metrics["judge/questions"], metrics["judge/input_tokens"], metrics["judge/cost"]) == (2, 200, 2.0)


def test_one_judge_serves_several_event_loops(server: FakeServer) -> None:
    judge = make(server)
    for i in range(3):
        assert asyncio.run(judge.ask(QUESTION, {"response": str(i)})).values


def test_canceling_one_caller_leaves_the_other_its_verdict(server: FakeServer) -> None:
    canceled = threading.Event()
    server.script = lambda n, body: (canceled.wait(120), GOOD)[1]
    judge = make(server)

    async def run() -> Any:
        first = asyncio.create_task(judge.ask(QUESTION, {"response": "4"}))
        second = asyncio.create_task(judge.ask(QUESTION, {"response": "4"}))
        while not server.bodies:  # the request that both wait for is on its way
            await asyncio.sleep(0.01)
        first.cancel()
        canceled.set()
        return await second

    assert asyncio.run(run()).values and len(server.bodies) == 1


# --- the endpoint -----------------------------------------------------------------------------------------------------


def test_endpoint_sends_lone_surrogates_only_cleaned(server: FakeServer) -> None:
    assert ask(make(server), response="a\ud800\x00 b").values
    assert "a\ufffd\ufffd b" in server.bodies[0]["messages"][0]["content"]


def test_redirects_are_refused(server: FakeServer) -> None:
    server.script = lambda n, body: (302, {"Location": "http://127.0.0.1:1/"}, "")

    async def run() -> None:
        endpoint = Endpoint(server.url, headers={}, timeout_s=2, retries=2, max_concurrency=1)
        try:
            await endpoint.post({})
        finally:
            await endpoint.close()

    with pytest.raises(EndpointError, match="HTTP 302"):
        asyncio.run(run())
    assert len(server.bodies) == 1


# --- the reward -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [judge_reward, translation_compare], ids=["judge", "translation_compare"])
def test_examples(module: Any) -> None:
    function = getattr(module, module.__name__.split(".")[-1])
    for example in module.EXAMPLES:
        columns = {name: value for name, value in example.items() if name != "reward"}
        assert asyncio.run(function(**columns)).reward == example["reward"], example


def test_reward_over_http(server: FakeServer) -> None:
    config = {"base_url": server.url, "model": "m", "canary_rate": 0.0, "format_retries": 0}
    parts = [{"type": "text", "text": "2 + 2?"}]
    prompts: Any = ["2 + 2?", parts, [{"role": "user", "content": "Hi"}, {"role": "user", "content": parts}]]
    answers = [
        '{"final_answer": "4", "reason": "", "correct": true}',
        '{"final_answer": null, "reason": "", "correct": true}',
    ]
    server.script = lambda n, body: [*answers, "hm"][n]
    rewards = [
        asyncio.run(judge_reward.judge(f"<think>5</think> {n}", answer="4", prompt=prompts[n], judge=config)).reward
        for n in range(3)
    ]
    assert rewards == [1.0, 0.0, None]
    for body in server.bodies:
        content = body["messages"][0]["content"]
        assert "2 + 2?" in content and "<think>" not in content and "Hi" not in content


@pytest.mark.parametrize(("columns", "message"), [({"answer": "4"}, "question"), ({"question": "q"}, "criteria")])
def test_the_error_names_the_missing_column(columns: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        asyncio.run(judge_reward.judge("4", judge=OfflineJudge(lambda n, c: None), **columns))
