"""Proofs in Lean 4: what a completion may contain, and what a Lean server's reply says about it.

A server compiles what it gets. That the proof proves the right statement, without sorry, axioms of its own or
redefined words, is decided here, before and after it compiles.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

STANDARD_AXIOMS = frozenset({"propext", "Classical.choice", "Quot.sound"})
MAX_CHARS = 100_000
_FENCE = re.compile(r"```[ \t]*(?:lean4?|)[ \t]*\r?\n(.*?)```", re.DOTALL)
_FORBIDDEN = (
    "sorry|sorryAx|admit|axiom|axioms|constant|opaque|unsafe|partial|extern|implemented_by|csimp|native_decide|ofReduceBool"
    "|reduceBool|trustCompiler|macro|macro_rules|syntax|elab|elab_rules|notation|notation3|infix|infixl|infixr|prefix"
    "|postfix|declare_syntax_cat|run_cmd|run_tac|run_meta|initialize|builtin_initialize|debug|skipKernelTC|simproc"
    "|addDecl|unsafeCast|lcProof|lcUnreachable|attribute|instance|deriving|export|universe|include|omit"
)
_TOKEN = re.compile(rf"(?<![\w.'])(?:{_FORBIDDEN})(?![\w'])|#[a-z_]+|\bunsafe[A-Z]\w*|\bcode of\b")
_BEFORE = re.compile(
    r"(?<![\w.'])(?:def|abbrev|structure|class|inductive|namespace|variable|variables|section|open|local|scoped)(?![\w'])"
)
_HEADER_LINE = re.compile(r"\s*(?:import\s+[\w.]+|set_option\s+max\w+\s+\d+)\s*$")
_NAME = re.compile(r"(?:theorem|lemma)\s+([^\s:({\[]+)")


@dataclass(frozen=True, slots=True)
class Program:
    """A program for the server."""

    code: str
    axioms_line: int
    """Line, from 1, of the command whose message lists the axioms."""


def extract_proof(text: str) -> str:
    """Return the Lean code of a response: its only fenced block, or the whole.

    Raises:
        ValueError: there are several blocks, or none that is closed.
    """
    blocks = _FENCE.findall(text)
    if len(blocks) > 1:
        raise ValueError(f"{len(blocks)} fenced blocks of Lean, expected one")
    if not blocks and "```" in text:
        raise ValueError("a fenced block that is not closed, or not Lean")
    code = (blocks[0] if blocks else text).strip()
    if not code or len(code) > MAX_CHARS:
        raise ValueError("no proof" if not code else f"{len(code)} characters, at most {MAX_CHARS} are read")
    return code


def build_program(code: str, statement: str, header: str) -> Program:
    """Return the program to compile: header, the completion's code, and a command that lists the proof's axioms.

    Args:
        code: the completion's code: the statement again with its proof, and lemmas before it.
        statement: the row's theorem, up to `:=`, or with `:= by sorry`.
        header: imports and options of the row.

    Raises:
        ValueError: the code does not state the theorem, or contains what could change its meaning.
    """
    wanted, name = statement_of(statement)
    header = header.strip() or "import Mathlib"
    code = _without_header(code, header + "\n" + statement)
    plain = without_comments(code)
    if '"' in plain:
        raise ValueError("a text in quotation marks is not allowed")
    if match := _TOKEN.search(plain):
        raise ValueError(f"{match.group()!r} is not allowed")
    flat = " ".join(plain.split())
    at = flat.find(wanted)
    if at < 0:
        raise ValueError(f"the theorem {name!r} is not stated as in the row")
    if flat.find(wanted, at + 1) >= 0:
        raise ValueError(f"the theorem {name!r} is stated twice")
    if not re.match(r"\s*:=|\s*\|", flat[at + len(wanted) :]):
        raise ValueError(f"the statement of {name!r} goes on after the row's")
    if at and not re.search(r"[\s]$", flat[:at]):
        raise ValueError(f"the theorem {name!r} is not stated as in the row")
    if match := _BEFORE.search(flat[:at]):
        raise ValueError(f"{match.group()!r} before the theorem could change its meaning")
    preamble = _preamble(statement)
    lines = [header, preamble, code, f"#print axioms {name}"]
    full = "\n".join(line for line in lines if line)
    return Program(code=full, axioms_line=full.count("\n") + 1)


def statement_of(statement: str) -> tuple[str, str]:
    """Return the theorem up to its proof, with single spaces, and its name.

    Raises:
        ValueError: it holds no theorem.
    """
    plain = without_comments(statement)
    matches = list(_NAME.finditer(plain))
    if not matches:
        raise ValueError("the formal statement has no theorem")
    last = matches[-1]
    body = re.sub(r":=\s*(?:by\b)?\s*(?:sorry)?\s*$", "", plain[last.start() :].strip())
    return " ".join(body.split()), last.group(1)


def _preamble(statement: str) -> str:
    """Return what stands before the row's theorem: definitions that it needs, without imports."""
    plain = without_comments(statement)
    before = plain[: list(_NAME.finditer(plain))[-1].start()]
    return "\n".join(line for line in before.splitlines() if line.strip() and not line.lstrip().startswith("import "))


def _without_header(code: str, given: str) -> str:
    """Drop the lines at the beginning of the code that repeat the header, or that only import or open what it does."""
    known = {line.strip() for line in without_comments(given).splitlines() if line.strip()}
    lines = without_comments(code).splitlines()
    start = 0
    for i, line in enumerate(lines):
        if line.strip():
            repeats = line.strip() in known and not _NAME.match(line.strip())
            if not repeats and not _HEADER_LINE.match(line):
                break
            start = i + 1
    return "\n".join(lines[start:]).strip("\n")


def without_comments(code: str) -> str:
    """Remove line comments and nested block comments.

    Strings are not looked for: up to its first one a program has the same comments with and without them, and
    `build_program` refuses a program with a quotation mark outside the comments found here.
    """
    kept: list[str] = []
    depth, i = 0, 0
    while i < len(code):
        two = code[i : i + 2]
        if two == "/-" or (depth and two == "-/"):
            depth += 1 if two == "/-" else -1
            kept.append(" ")
            i += 2
        elif not depth and two == "--":
            end = code.find("\n", i)
            i = len(code) if end < 0 else end
        else:
            if not depth or code[i] == "\n":
                kept.append(code[i])
            i += 1
    return "".join(kept)


def verdict(reply: dict[str, Any], axioms_line: int) -> str | None:
    """Return why a compiled program proves nothing, or None if it does.

    Args:
        reply: the REPL's answer: `messages` with `severity`, `data` and `pos`, and `sorries`.
        axioms_line: see `Program`.
    """
    messages = [message for message in reply.get("messages") or [] if isinstance(message, dict)]
    for message in messages:
        if message.get("severity") == "error":
            return f"error: {str(message.get('data'))[:300]}"
    if reply.get("sorries") or any(
        "declaration uses" in str(m.get("data")) and "sorry" in str(m.get("data")) for m in messages
    ):
        return "the proof uses sorry"
    # A tactic can print what looks like this message, but not in its line.
    listed = [str(m.get("data")) for m in messages if (m.get("pos") or {}).get("line") == axioms_line]
    if any("does not depend on any axioms" in text for text in listed):
        return None
    for text in listed:
        if match := re.search(r"depends on axioms:\s*\[([^\]]*)\]", text, re.DOTALL):
            used = {name.strip() for name in match.group(1).split(",") if name.strip()}
            extra = sorted(used - STANDARD_AXIOMS)
            return f"the proof uses the axiom {extra[0]}" if extra else None
    return "the server did not list the proof's axioms"
