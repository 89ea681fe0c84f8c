"""A language model as judge, over any OpenAI-compatible endpoint: Question and case in, a typed Verdict out.

A judge that refuses a request, or fails it while it answers others, is an error of the sample (EndpointError). A judge
that stays away for longer than `outage_budget_s`, or whose answer cannot be read, abstains (Verdict.values None).
Neither counts as "wrong". The cost is recorded, and canaries (cases with a known verdict, mixed among the real ones)
measure how far the judge can be trusted.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import json
import os
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from llmrl.endpoint import Endpoint, EndpointError, PerLoop, require_client
from llmrl.errors import RunFailed, UserError
from llmrl.verify.judge.cache import ReplyCache, SpendLedger, Spent, request_key
from llmrl.verify.judge.decision import decision_body, no_logprobs, read_decision
from llmrl.verify.judge.options import JudgeConfig
from llmrl.verify.judge.orders import both_orders
from llmrl.verify.judge.outage import JudgeAway, Outage
from llmrl.verify.judge.replies import text_of
from llmrl.verify.judge.verdict import (
    AnyJudge,
    Canary,
    OfflineJudge,
    Question,
    Verdict,
    canonical_json,
    decided,
    json_schema,
    read_verdict,
    render,
)
from llmrl.verify.spec import find

__all__ = [
    "AnyJudge",
    "Canary",
    "EndpointError",
    "Judge",
    "JudgeConfig",
    "OfflineJudge",
    "Question",
    "Verdict",
    "both_orders",
    "get_judge",
    "judge_metrics",
]


@dataclass(kw_only=True)
class _LoopState:
    """A judge's state per event loop, because connections belong to one loop."""

    endpoint: Endpoint
    outage: Outage
    in_flight: dict[str, asyncio.Task[Verdict]] = field(default_factory=dict)


class Judge:
    """A judge behind an OpenAI-compatible endpoint. One object serves a whole run, on any number of event loops."""

    def __init__(self, config: JudgeConfig) -> None:
        require_client()
        self.config = config
        self.ledger = SpendLedger(
            config.ledger_file, budget_tokens=config.budget_tokens, budget_cost=config.budget_cost
        )
        self.counts = dict.fromkeys(
            (
                "questions",
                "cache_hits",
                "unreadable",
                "format_retries",
                "transport_retries",
                "given_up",
                "canaries",
                "canary_failures",
            ),
            0,
        )
        self._cache = ReplyCache(config.cache_dir) if config.cache_dir is not None else None
        self._structured = config.structured
        self._canaries_due = 0.0
        self._canaries_asked: Counter[str] = Counter()
        self._warned = False
        self._states = PerLoop(self._make_state)

    async def ask(self, question: Question, case: dict[str, str]) -> Verdict:
        """Judge one case. Identical requests in progress at the same time are sent once.

        Args:
            question: the instructions, and the fields of the verdict.
            case: block name -> text.

        Returns:
            The verdict; its values are None where the judge did not answer, or not in a form that can be read.

        Raises:
            EndpointError: the endpoint refuses the request, or fails it while it answers others.
            RunFailed: the budget is used up, or too many canaries were judged wrongly.
        """
        self.counts["questions"] += 1
        messages = render(question, case, max_chars=self.config.max_chars)
        form = {"levels": dict(question.levels)} if question.levels else {"fields": json_schema(question.fields)}
        key = request_key({"url": self.config.base_url, **self._body(messages), **form})
        remembered = self._remembered(key, question)
        if remembered is not None:
            self.counts["cache_hits"] += 1
            return remembered
        in_flight = self._states.get().in_flight
        task = in_flight.get(key)
        if task is None:
            task = asyncio.create_task(self._ask_paid(question, messages, key))
            in_flight[key] = task
            task.add_done_callback(lambda done: (in_flight.pop(key), done.cancelled() or done.exception()))
        # Shielded, because other callers may wait for the same answer when this one is canceled.
        try:
            return await asyncio.shield(task)
        except JudgeAway as error:
            self.counts["given_up"] += 1
            return Verdict(values=None, problem=str(error))

    def _remembered(self, key: str, question: Question) -> Verdict | None:
        cached = self._cache.get(key) if self._cache is not None else None
        if cached is None:
            return None
        try:
            if question.levels:
                return replace(decided(question, _probabilities(cached, question), cached), cached=True)
            return Verdict(values=read_verdict(cached, question.fields), raw=cached, cached=True)
        except ValueError:
            return None  # a damaged file: ask again and overwrite it

    async def _ask_paid(self, question: Question, messages: list[dict[str, str]], key: str) -> Verdict:
        """Ask the endpoint, together with a canary when one is due, and cache a readable reply."""
        self._canaries_due += self.config.canary_rate if question.canaries else 0.0
        if self._canaries_due < 1:
            verdict = await self._dialogue(question, messages)
        else:
            self._canaries_due -= 1
            canary = asyncio.create_task(self._check_canary(question))
            try:
                verdict = await self._dialogue(question, messages)
            finally:
                await canary  # if the judge fails its canaries, raise that instead of returning a verdict
        if verdict.values is not None and self._cache is not None:
            self._cache.put(key, verdict.raw)
        return verdict

    async def _dialogue(self, question: Question, messages: list[dict[str, str]]) -> Verdict:
        """Ask until the answer can be read; a retry states what was wrong with the first answer."""
        if question.levels:
            return await self._decide(question, messages)
        raw, problem = "", "no answer"
        for attempt in range(self.config.format_retries + 1):
            if attempt > 0:
                self.counts["format_retries"] += 1
            raw, finish = await self._complete(messages, question)
            try:
                if finish not in ("stop", None):
                    # A reply that was cut off may hold only a draft of the verdict.
                    raise ValueError(f"the answer ended by {finish!r} instead of a stop")
                return Verdict(values=read_verdict(raw, question.fields), raw=raw)
            except ValueError as error:
                problem = str(error)
            if attempt == 0:
                correction = f"Your answer could not be read: {problem}. Answer again with the JSON object alone."
                messages = [
                    *messages,
                    {"role": "assistant", "content": raw[-4000:] or "-"},
                    {"role": "user", "content": correction},
                ]
        self.counts["unreadable"] += 1
        return Verdict(values=None, problem=problem, raw=raw)

    async def _complete(self, messages: list[dict[str, str]], question: Question) -> tuple[str, str | None]:
        """Request one chat completion, record its tokens, and return (text, finish reason)."""
        body = self._body(messages)
        if not self._structured:
            return text_of(await self._paid(body))
        schema = {"name": question.name, "strict": True, "schema": json_schema(question.fields)}
        try:
            return text_of(
                await self._paid({**body, "response_format": {"type": "json_schema", "json_schema": schema}})
            )
        except EndpointError as error:
            if error.status not in (400, 415, 422, 501):
                raise
            # The server may not know `response_format`. Only if it takes the request without is that the cause.
            reply = await self._paid(body)
            self._structured = False
            return text_of(reply)

    async def _decide(self, question: Question, messages: list[dict[str, str]]) -> Verdict:
        """Ask for one token. The same request gives the same probabilities, so it is not repeated."""
        try:
            reply = await self._paid(decision_body(self._body(messages), self.config.top_logprobs))
        except EndpointError as error:
            if error.status is not None and error.status < 500 and "logprob" in str(error):
                raise no_logprobs(self.config.base_url, str(error)) from None
            raise
        try:
            probabilities = read_decision(reply, question.levels, self.config.base_url)
        except ValueError as error:
            self.counts["unreadable"] += 1
            return Verdict(values=None, problem=str(error), raw=text_of(reply)[0])
        return decided(question, probabilities, canonical_json(probabilities))

    async def _paid(self, body: dict[str, Any]) -> dict[str, Any]:
        """Post a request within the budget, wait out outages, and record what the reply cost."""
        state = self._states.get()
        # Characters and not tokens, as no tokenizer is at hand: too much rather than too little is held back.
        input_tokens = len(str(body["messages"])) // 3
        expected = self._spent(input_tokens, int(body.get("max_tokens") or self.config.max_output_tokens))
        async with self.ledger.reserved(expected):
            reply = await state.outage.send(lambda: state.endpoint.post(body))
            self._record(reply.get("usage"))
        return reply

    def _body(self, messages: list[dict[str, str]]) -> dict[str, Any]:
        body = {
            "model": self.config.model,
            "messages": messages,
            "temperature": self.config.temperature,
            "max_tokens": self.config.max_output_tokens,
            **self.config.extra_body,
        }
        return {name: value for name, value in body.items() if value is not None}

    def _record(self, usage: Any) -> None:
        usage = usage if isinstance(usage, dict) else {}
        counted = [usage.get("prompt_tokens"), usage.get("completion_tokens")]
        if not all(isinstance(count, int) and count >= 0 for count in counted):
            if self.config.budget_tokens is not None or self.config.budget_cost is not None:
                raise RunFailed(
                    f"judge: a budget is set, but {self.config.base_url} reports no token usage, so it cannot be kept. "
                    "Remove budget_tokens and budget_cost, or use a server that reports usage."
                )
            counted = [0, 0]
        self.ledger.record(self._spent(*counted))

    def _spent(self, input_tokens: int, output_tokens: int) -> Spent:
        cost = (input_tokens * self.config.input_price + output_tokens * self.config.output_price) / 1e6
        return Spent(calls=1, input_tokens=input_tokens, output_tokens=output_tokens, cost=cost)

    async def _check_canary(self, question: Question) -> None:
        """Judge the question's next canary, bypassing the cache; stop or warn if too many were judged wrongly."""
        canary = question.canaries[self._canaries_asked[question.name] % len(question.canaries)]
        self._canaries_asked[question.name] += 1
        if canary.fields is not None:
            question = replace(question, fields=canary.fields)
        messages = render(question, canary.case, max_chars=self.config.max_chars)
        try:
            verdict = await self._dialogue(question, messages)
        except EndpointError:
            return
        self.counts["canaries"] += 1
        if canary.agrees(verdict.values):
            return
        self.counts["canary_failures"] += 1
        asked, failed = self.counts["canaries"], self.counts["canary_failures"]
        if asked < self.config.canary_min_count or failed <= self.config.canary_max_failure * asked:
            return
        message = (
            f"judge: {self.config.model} got {failed} of {asked} known cases wrong (limit "
            f"{self.config.canary_max_failure:.0%}); last: {question.name!r} expected {canary.expected}, got "
            f"{verdict.values or verdict.problem}. Its verdicts cannot be trusted: check the model and its chat "
            "template, or raise canary_max_failure."
        )
        if self.config.on_canary_failure == "error":
            raise RunFailed(message)
        if not self._warned:
            self._warned = True
            warnings.warn(message, stacklevel=2)

    def metrics(self) -> dict[str, float]:
        """Return the counts of questions, costs and failures since the start, by metric name."""
        spent = self.ledger.spent()
        counts: dict[str, float] = {f"judge/{name}": float(count) for name, count in self.counts.items()}
        return counts | {
            "judge/calls": float(spent.calls),
            "judge/input_tokens": float(spent.input_tokens),
            "judge/output_tokens": float(spent.output_tokens),
            "judge/cost": spent.cost,
        }

    def _make_state(self) -> _LoopState:
        key = os.environ.get(self.config.api_key_env, "") if self.config.api_key_env else ""
        endpoint = Endpoint(
            self.config.base_url.rstrip("/") + "/chat/completions",
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout_s=self.config.timeout_s,
            retries=0,
            max_concurrency=self.config.max_concurrency,
        )
        outage = Outage(
            f"{self.config.model} at {self.config.base_url}",
            budget_s=self.config.outage_budget_s,
            retries=self.config.retries,
            on_retry=self._count_retry,
        )
        return _LoopState(endpoint=endpoint, outage=outage)

    def _count_retry(self) -> None:
        self.counts["transport_retries"] += 1

    async def close(self) -> None:
        """Close the connections of the running event loop. The judge can still be used afterwards."""
        state = self._states.pop()
        if state is not None:
            await state.endpoint.close()


def _probabilities(cached: str, question: Question) -> dict[str, float]:
    """Return the probabilities of a cached decision; ValueError if they are not those of the question's levels."""
    found = json.loads(cached)
    if not isinstance(found, dict) or set(found) != set(question.levels):
        raise ValueError("not a decision between these levels")
    return {level: float(value) for level, value in found.items()}


JUDGE_FORMS = (
    "set args.judge to {base_url: http://HOST:PORT/v1, model: NAME}, to `package.module:factory` or `file.py:factory`, "
    "or to an object with `ask`"
)
_judges: dict[str, Judge] = {}


def get_judge(judge: AnyJudge | Mapping[str, Any] | str | None) -> AnyJudge:
    """Return the judge object for a reward's `judge` argument.

    Args:
        judge: an object with `ask`; a mapping with the fields of JudgeConfig (equal mappings share one Judge); or
            `package.module:factory` or `file.py:factory`, called once per process without arguments.

    Raises:
        UserError: no judge, an unknown or missing key, a value out of range, or a factory that does not exist.
    """
    if isinstance(judge, str) and ":" in judge:
        return _made_judge(judge)
    if not isinstance(judge, Mapping):
        if judge is None or isinstance(judge, str) or not hasattr(judge, "ask"):
            raise UserError(f"this reward needs a judge, but got {judge!r}: {JUDGE_FORMS}")
        return judge
    known = {f.name: f for f in dataclasses.fields(JudgeConfig)}
    unknown = sorted(set(judge) - set(known))
    missing = sorted({"base_url", "model"} - set(judge))
    if unknown or missing:
        raise UserError(f"judge: unknown keys {unknown}, missing keys {missing}; known keys: {', '.join(known)}")
    key = canonical_json(dict(judge))
    if key not in _judges:
        _judges[key] = Judge(JudgeConfig(**judge))
    return _judges[key]


@functools.cache
def _made_judge(spec: str) -> AnyJudge:
    try:
        made = find(spec)[0]()
    except UserError as error:
        problem = str(error).splitlines()[0].removeprefix(f"reward {spec!r}: ")
        raise UserError(f"judge {spec!r}: {problem} To name a judge, {JUDGE_FORMS}") from None
    if not hasattr(made, "ask"):
        raise UserError(f"judge {spec!r} made a {type(made).__name__} without `ask(question, case)`")
    return made


def judge_metrics() -> dict[str, float]:
    """Return the summed metrics of all judges configured in this process (see `Judge.metrics`)."""
    total: Counter[str] = Counter()
    for judge in _judges.values():
        total.update(judge.metrics())
    return dict(total)
