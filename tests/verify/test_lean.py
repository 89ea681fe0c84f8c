"""Proofs in Lean: what is sent to the server, what is refused before, and how its reply is read."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from llmrl.endpoint import EndpointError
from llmrl.errors import UserError
from llmrl.types import Score
from llmrl.verify.checks.lean import build_program, statement_of, verdict, without_comments
from rewards.lean_proof import check, lean_proof

STATEMENT = "theorem two (n : Nat)\n    (h : n = 1) : n + 1 = 2 := by sorry"
STATED = "theorem two (n : Nat) (h : n = 1) : n + 1 = 2"


def test_the_program_has_the_header_and_lists_the_axioms() -> None:
    program = build_program(
        f"import Mathlib\n-- a proof\n{STATED} := by\n  omega", STATEMENT, "import Mathlib\nopen Nat"
    )
    assert program.code == f"import Mathlib\nopen Nat\n{STATED} := by\n  omega\n#print axioms two"
    assert program.axioms_line == 5


def test_definitions_of_the_row_are_kept_once() -> None:
    statement = f"import Mathlib\n\ndef three := 3\n\n{STATED} := sorry"
    for code in (f"{STATED} := by omega", f"import Mathlib\ndef three := 3\n{STATED} := by omega"):
        assert build_program(code, statement, "").code.splitlines() == [
            "import Mathlib",
            "def three := 3",
            f"{STATED} := by omega",
            "#print axioms two",
        ]


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (f"{STATED} := by sorry", "'sorry' is not allowed"),
        (f"{STATED} := by exact sorryAx _", "'sorryAx'"),
        (f"{STATED} := by native_decide", "'native_decide'"),
        (f"axiom bad : False\n{STATED} := bad.elim", "'axiom'"),
        (f"{STATED} := by omega\n#eval 1", "'#eval'"),
        (f"macro_rules | `(1) => `(2)\n{STATED} := by omega", "'macro_rules'"),
        (f'notation "n" => 1\n{STATED} := by omega', "quotation marks"),
        (f"instance : Add Nat := ⟨fun _ _ => 2⟩\n{STATED} := rfl", "'instance'"),
        (f"variable (bad : False)\n{STATED} := by omega", "'variable'"),
        (f"namespace X\n{STATED} := by omega", "'namespace'"),
        (f"open Foo\n{STATED} := by omega", "'open'"),
        (f"set_option debug.skipKernelTC true\n{STATED} := by omega", "not allowed"),
        ("theorem two : 1 = 1 := rfl", "not stated as in the row"),
        (f"-- {STATED} := by omega\ntheorem two : 1 = 1 := rfl", "not stated as in the row"),
        (f"/- /- -/ {STATED} := by -/ theorem two : 1 = 1 := rfl", "not stated as in the row"),
        (f"lemma q : '\"'.toNat = 34 := rfl /- {STATED} := by -/ theorem two : 1 = 1 := rfl", "quotation marks"),
        (f"{STATED} ∨ True := by omega", "goes on after"),
        (f"{STATED} := by omega\n{STATED} := by omega", "stated twice"),
        ("", "not stated"),
    ],
)
def test_what_is_refused_before_it_compiles(code: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        build_program(code, STATEMENT, "")


def test_comments_nest() -> None:
    assert without_comments("a -- b /- c\nd /- e /- f -/ g -/ h").split() == ["a", "d", "h"]


def test_names_with_dots_and_words_that_contain_others_are_allowed() -> None:
    code = f"{STATED} := by\n  have := Nat.partial_sum; simp [sorry_free, instance_mul]\n  omega"
    assert build_program(code, STATEMENT, "").code


def test_the_theorem_of_a_statement() -> None:
    assert statement_of(STATEMENT) == (STATED, "two")
    assert statement_of("lemma a : True := by trivial\ntheorem b : 1 = 1 :=")[1] == "b"
    with pytest.raises(ValueError, match="no theorem"):
        statement_of("def a := 1")


@pytest.mark.parametrize(
    ("reply", "problem"),
    [
        ({"messages": [{"severity": "info", "pos": {"line": 5}, "data": "'two' does not depend on any axioms"}]}, None),
        (
            {
                "messages": [
                    {"severity": "info", "pos": {"line": 5}, "data": "'two' depends on axioms: [propext,\n Quot.sound]"}
                ]
            },
            None,
        ),
        (
            {"messages": [{"severity": "info", "pos": {"line": 5}, "data": "'two' depends on axioms: [bad]"}]},
            "axiom bad",
        ),
        # A tactic that prints the message does so in another line.
        (
            {"messages": [{"severity": "info", "pos": {"line": 3}, "data": "'two' does not depend on any axioms"}]},
            "did not list",
        ),
        ({"messages": [{"severity": "error", "pos": {"line": 3}, "data": "unsolved goals"}]}, "unsolved goals"),
        ({"messages": [{"severity": "warning", "pos": {"line": 1}, "data": "declaration uses 'sorry'"}]}, "uses sorry"),
        ({"sorries": [{}], "messages": []}, "uses sorry"),
        ({}, "did not list"),
    ],
)
def test_replies(reply: dict[str, Any], problem: str | None) -> None:
    found = verdict(reply, 5)
    assert found is None if problem is None else problem in (found or "")


@pytest.fixture
def server() -> Iterator[tuple[str, list[Any], dict[str, Any]]]:
    """Serve canned answers; yields the URL, the requests it got, and the answer to change."""
    requests: list[Any] = []
    answer: dict[str, Any] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append((self.path, body))
            self.send_response(answer.get("status", 200))
            self.end_headers()
            self.wfile.write(json.dumps(answer["reply"](body)).encode())

        def log_message(self, *_: Any) -> None:
            pass

    http = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{http.server_port}", requests, answer
    finally:
        http.shutdown()


def proof(url: str) -> Score:
    text = f"```lean\n{STATED} := by omega\n```"
    return asyncio.run(lean_proof(text, STATEMENT, server=url, retries=0, proof_limit_s=5))


def test_both_interfaces_of_the_server(server: tuple[str, list[Any], dict[str, Any]]) -> None:
    url, requests, answer = server
    message = {"severity": "info", "pos": {"line": 3}, "data": "'two' does not depend on any axioms"}
    answer["reply"] = lambda body: {"results": [{"error": None, "response": {"env": 0, "messages": [message]}}]}
    assert proof(url).reward == 1.0
    assert proof(f"{url}/verify").reward == 1.0
    code = f"import Mathlib\n{STATED} := by omega\n#print axioms two"
    assert requests == [
        ("/api/check", {"timeout": 5, "snippets": [{"id": "0", "code": code}]}),
        ("/verify", {"timeout": 5, "codes": [{"custom_id": "0", "proof": code}]}),
    ]


def test_a_slow_proof_is_wrong_and_a_broken_server_is_an_error(server: tuple[str, list[Any], dict[str, Any]]) -> None:
    url, _, answer = server
    answer["reply"] = lambda body: {"results": [{"error": "Lean REPL command timed out in 5 seconds"}]}
    assert proof(url).reward == 0.0
    for reply in (
        {"results": [{"error": "no REPL is available"}]},
        {"results": []},
        {"results": [{"error": None, "response": {"message": "Unknown environment."}}]},
        {"detail": "x"},
    ):
        answer["reply"] = lambda body, reply=reply: reply
        with pytest.raises(EndpointError):
            proof(url)
    answer["status"] = 503
    with pytest.raises(EndpointError):
        proof(url)


def test_a_server_that_is_not_there_is_an_error() -> None:
    with pytest.raises(EndpointError):
        proof("http://127.0.0.1:9")


def test_rows_that_cannot_be_checked() -> None:
    assert "needs a server" in (check({"formal_statement": STATEMENT}) or "")
    assert "no theorem" in (check({"formal_statement": "x", "server": "http://x"}) or "")
    assert check({"formal_statement": STATEMENT, "server": "http://x"}) is None
    with pytest.raises(UserError, match="needs a server"):
        asyncio.run(lean_proof("x", STATEMENT))
