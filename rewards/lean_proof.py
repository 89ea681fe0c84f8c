"""Proofs in Lean 4, checked by a Lean server: 1.0 if the response proves the row's theorem.

    rewards:
      - fn: lean_proof
        args: {server: "http://localhost:8000"}

Rows have `formal_statement` (the theorem, with or without `:= by sorry`) and optionally `header` (imports). The
response's only fenced block states the theorem again, with its proof; lemmas may stand before it. `server` is a Kimina
Lean Server or one with its interface. A server that fails or is away is an error, never a 0. Refused are sorry, axioms
beyond Lean's three standard ones, another statement, and whatever could change its meaning.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from llmrl.endpoint import EndpointError, shared_endpoint
from llmrl.errors import UserError
from llmrl.types import Score
from llmrl.verify.checks.lean import build_program, extract_proof, statement_of, verdict
from llmrl.verify.thinking import without_thinking

Server = str | Callable[[str, float], Any]


async def lean_proof(
    completion: str,
    formal_statement: str,
    header: str = "",
    prefilled: str = "",
    server: Server | None = None,
    proof_limit_s: float = 60.0,
    retries: int = 5,
    max_concurrency: int = 32,
) -> Score:
    """Compile the response's proof on a Lean server.

    Args:
        completion: the policy's response; its thinking is not read.
        formal_statement: the theorem, up to `:=` or with `:= by sorry`; definitions before it are kept.
        header: imports and options; by default `import Mathlib`.
        prefilled: how the prompt already begins the response, such as `<think>`.
        server: URL of the server (`/api/check` is added if it has no path; `/verify` is the older interface), or a
            function (code, seconds) -> the REPL's answer.
        proof_limit_s: seconds that the server may take; a proof that takes longer is wrong.
        retries: further requests where the server does not answer.
        max_concurrency: requests at once, per process.

    Raises:
        UserError: no server, or a statement without a theorem.
        EndpointError: the server failed.
    """
    if server is None:
        raise UserError("lean_proof: needs a server: set args.server to the URL of a Lean server")
    try:
        statement_of(formal_statement)
    except ValueError as error:
        raise UserError(f"lean_proof: {error}") from None
    try:
        program = build_program(
            extract_proof(without_thinking(prefilled + completion).strip()), formal_statement, header
        )
    except ValueError as error:
        return Score(reward=0.0, info={"reason": str(error)})
    if callable(server):
        reply = server(program.code, proof_limit_s)
        reply = await reply if inspect.isawaitable(reply) else reply
    else:
        reply = await _ask(server, program.code, proof_limit_s, retries, max_concurrency)
    problem = "the proof took too long" if reply is None else verdict(reply, program.axioms_line)
    return Score(reward=float(problem is None), info={} if problem is None else {"reason": problem})


def check(row: dict[str, Any]) -> str | None:
    """Say that a row has no theorem, or that there is no server."""
    if row.get("server") is None:
        return "needs a server: set args.server to the URL of a Lean server"
    try:
        statement_of(str(row["formal_statement"]))
    except ValueError as error:
        return str(error)
    return None


async def _ask(url: str, code: str, limit_s: float, retries: int, max_concurrency: int) -> dict[str, Any] | None:
    """Return the REPL's answer, or None if the proof took too long."""
    if not urlsplit(url).path.strip("/"):
        url = url.rstrip("/") + "/api/check"
    older = url.rstrip("/").endswith("/verify")
    body: dict[str, Any] = {"timeout": int(limit_s)}
    body |= {"codes": [{"custom_id": "0", "proof": code}]} if older else {"snippets": [{"id": "0", "code": code}]}
    endpoint = shared_endpoint(url, timeout_s=limit_s + 60, retries=retries, max_concurrency=max_concurrency)
    answer = await endpoint.post(body)
    results = answer.get("results")
    if not isinstance(results, list) or len(results) != 1 or not isinstance(results[0], dict):
        raise EndpointError(f"{url}: the reply has no result: {str(answer)[:200]}")
    (result,) = results
    if problem := result.get("error"):
        if "timed out" in str(problem).lower() or "timeout" in str(problem).lower():
            return None
        raise EndpointError(f"{url}: {str(problem)[:300]}")
    reply = result.get("response")
    if not isinstance(reply, dict) or "message" in reply:
        raise EndpointError(f"{url}: the REPL did not answer: {str(reply)[:200]}")
    return reply


def _example_server(code: str, limit_s: float) -> dict[str, Any]:
    """Answer as a REPL to which only `omega` and `rfl` are proofs."""
    line = code.count("\n") + 1
    name = code.rpartition("#print axioms ")[2].strip()
    proof = code.rpartition(":=")[2].split("#print")[0].split()
    if proof not in (["by", "omega"], ["rfl"]):
        return {"messages": [{"severity": "error", "pos": {"line": 1}, "data": "unsolved goals"}]}
    return {"messages": [{"severity": "info", "pos": {"line": line}, "data": f"'{name}' depends on axioms: [propext]"}]}


_THEOREM = "theorem two (n : Nat) (h : n = 1) : n + 1 = 2"
_ROW = {"formal_statement": f"{_THEOREM} := by sorry", "server": _example_server}
EXAMPLES = [
    # good
    {**_ROW, "completion": f"```lean4\nimport Mathlib\n\n{_THEOREM} := by\n  omega\n```", "reward": 1.0},
    {**_ROW, "completion": f"<think>rfl?</think>\n```lean\n{_THEOREM} := by omega\n```", "reward": 1.0},
    {**_ROW, "completion": f"lemma one : 1 = 1 := rfl\n{_THEOREM} := by omega", "reward": 1.0},
    # bad
    {**_ROW, "completion": f"{_THEOREM} := by simp", "reward": 0.0},
    {**_ROW, "completion": "It follows by omega.", "reward": 0.0},
    # hostile
    {**_ROW, "completion": "", "reward": 0.0},
    {**_ROW, "completion": f"{_THEOREM} := by sorry", "reward": 0.0},
    {**_ROW, "completion": f"axiom a : False\n{_THEOREM} := by omega", "reward": 0.0},
    {**_ROW, "completion": "theorem two : 2 = 2 := rfl", "reward": 0.0},
    {**_ROW, "completion": f"{_THEOREM} + 0 := by omega", "reward": 0.0},
    {**_ROW, "completion": f"/- {_THEOREM} := by -/ theorem two : 2 = 2 := rfl", "reward": 0.0},
    {**_ROW, "completion": f"def Nat.add' := 0\n{_THEOREM} := by omega", "reward": 0.0},
    {**_ROW, "completion": f'local notation "n" => 1\n{_THEOREM} := by omega', "reward": 0.0},
    {
        **_ROW,
        "completion": f"```lean\n{_THEOREM} := by sorry\n```\n```lean\n{_THEOREM} := by omega\n```",
        "reward": 0.0,
    },
]
