"""Finding the program in an answer: a chat answer or a bare completion goes in, source code comes out.

The answer is only text here; nothing of it is run. Time is linear in its length.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass

from llmrl.verify.code.rows import Row, StdinTests, defines, definition
from llmrl.verify.thinking import without_thinking

MAX_PARSED = 100_000
"""Characters; a longer text is not parsed here to find out whether it is code."""


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block of an answer."""

    language: str
    """Lower-case label of the fence; "" without one."""
    content: str

    @property
    def is_python(self) -> bool:
        """Whether the label says Python, with or without a version."""
        return _PYTHON.fullmatch(self.language) is not None


_PYTHON = re.compile(r"(?:i?python|pypy|py)[-\d.]*")
_FENCE = re.compile(r"^(?P<before>[^`~\n]*)(?P<fence>`{3,}|~{3,})(?P<label>[^`\n]*)$", re.MULTILINE)
_END_OF_TURN = re.compile(r"(?:\s*(?:<\|[\w-]+\|>|</s>|<end_of_turn>))+\s*\Z")
_READS_INPUT = re.compile(r"\binput\s*\(|\bstdin\b|\bopen\s*\(\s*0\b|\bread\s*\(\s*0\b")


def extract_program(answer: str, row: Row) -> str:
    """Extract the program from a chat answer or a bare completion.

    Thinking is dropped. Of several fenced blocks, the program is the last one that defines what the tests call; for
    rows with standard input, the last one that reads it; else the last Python block, the last one without a label, the
    last block. Blocks are never joined, because answers repeat themselves and end with examples of use. Without a fence
    the whole text is the program. If the row has a code prompt, its imports and helpers go in front of a function
    definition, and a bare body continues the prompt.

    Args:
        answer: text of the completion.
        row: from `read_row`.

    Returns:
        Source code; "" if there is none.
    """
    code = _code(without_thinking(answer), row)
    if not code.strip():
        return ""
    if not row.prompt:
        return with_apps_call(_unindented(code)) if isinstance(row.tests, StdinTests) else _unindented(code)
    entry = row.names[0]
    if not defines(code, entry):
        return row.prompt.rstrip("\n") + "\n" + _as_body(code)
    prelude = row.prompt[: re.search(definition(entry), row.prompt, re.MULTILINE).start()]  # type: ignore[union-attr]
    return code if "from __future__" in code else prelude + code


_APPS_HARNESS = "\nstdin = sys.stdin\nstdout = sys.stdout\ndef code():\n"
"""How a program that reads standard input begins in the form that APPS's grader gives it, before it calls `code()`."""


def with_apps_call(program: str) -> str:
    """Add the call of `code()` to a program in the form that APPS's grader gives it; return others unchanged.

    The grader puts imports in front of a program and moves its lines into a function `code`. CodeRL's data store some
    programs in this form (`baseline_solutions`). Without the call they would define a function and end.
    """
    return f"{program.rstrip()}\n\ncode()\n" if _APPS_HARNESS in program else program


def _code(text: str, row: Row) -> str:
    text = text.replace("\r\n", "\n").removeprefix("\ufeff")
    if "```" in text or "~~~" in text:
        found = blocks(text)
        if found or "```" in text:
            return _choose(found, row)
    text = _END_OF_TURN.sub("", text)
    tagged = re.fullmatch(r"\s*<answer>[ \t]*\n?(.*?)\s*</answer>\s*", text, re.DOTALL)
    return tagged[1] if tagged else text


def _choose(found: list[Block], row: Row) -> str:
    """Return the block that is most likely the program; see `extract_program`."""
    found = [block for block in found if block.content.strip() and not block.content.lstrip().startswith(">>>")]
    python = [block for block in found if block.is_python]
    plain = [block for block in found if not block.language]
    best = [block for block in found if any(defines(block.content, name) for name in row.names)]
    if not best and isinstance(row.tests, StdinTests) and any(given.strip() for given in row.tests.inputs):
        best = [block for block in python or plain if _READS_INPUT.search(block.content)]
    best = best or python or plain or found
    return best[-1].content if best else ""


# --- fences -----------------------------------------------------------------------------------------------------------


def blocks(text: str) -> list[Block]:
    """Return the fenced blocks of a text, in order.

    More forms are read than Markdown has, because models write them: words or tags before an opening fence and after a
    closing one, a closing fence at the end of a line of code, and a first block that the prompt has opened.
    """
    found: list[Block] = []
    position = 0
    continues = _closes_first(text)
    while (fence := _FENCE.search(text, position)) is not None:
        label = fence["label"].strip()
        is_label = not re.search(r"\s", label)
        if not found and continues and (not label or not is_label) and is_code(text[: fence.start("fence")]):
            found.append(Block("python", text[: fence.start("fence")]))
            position = fence.end()
        elif fence["before"].strip() and not is_label:  # a sentence with backticks in it
            position = fence.end()
        else:
            language = re.sub(r"[{}.]*(.*?)[{}]*", r"\1", label.lower().split()[0]) if label else ""
            start = min(fence.end() + 1, len(text))
            end, position = _end_of_block(text, start, fence["fence"], Block(language, ""))
            indent = len(fence["before"]) if not fence["before"].strip() else _width_of_bullet(fence["before"])
            found.append(Block(language, _shifted(text[start:end].rstrip("\n") + "\n", indent)))
    return found


def _closes_first(text: str) -> bool:
    """Return whether the fences of a text make pairs only if its first one closes a block."""
    labels = [fence["label"].strip() for fence in _FENCE.finditer(text)]
    labelled = [bool(label) and not re.search(r"\s", label) for label in labels]
    # A last fence with a label opens a block that was cut off.
    return (len(labels) + (labelled[-1] if labelled else 0)) % 2 == 1


def _end_of_block(text: str, start: int, fence: str, kind: Block) -> tuple[int, int]:
    """Return where the content of a block ends, and where its closing fence does."""
    if fence[0] == "~":
        closing = re.compile(rf"^[ \t]*~{{{len(fence)},}}[ \t]*$", re.MULTILINE).search(text, start)
        return closing.span() if closing else (len(text), len(text))
    first = re.compile(rf"`{{{len(fence)},}}").search(text, start)
    if first is None:
        return len(_END_OF_TURN.sub("", text)), len(text)
    ends = [first]
    if kind.is_python or not kind.language:
        outside = _outside_strings(text, start, len(fence))
        if outside is not None and outside.start() != first.start() and is_code(text[start : outside.start()]):
            ends = [outside]
    end = ends[0].start()
    line = text.rfind("\n", 0, end) + 1
    return (line if line >= start and not text[line:end].strip() else end), ends[0].end()


def _outside_strings(text: str, start: int, length: int) -> re.Match[str] | None:
    """Return the first run of backticks outside Python's strings and comments, where no program has any."""
    tokens = re.compile(
        r"#[^\n]*|'''(?:\\.|[^\\])*?'''|\"\"\"(?:\\.|[^\\])*?\"\"\"|'(?:\\.|[^'\\\n])*'|\"(?:\\.|[^\"\\\n])*\""
        rf"|(?P<fence>`{{{length},}})",
        re.DOTALL,
    )
    return next((token for token in tokens.finditer(text, start) if token["fence"]), None)


def is_code(text: str) -> bool:
    """Return whether a text is Python that does something: a word alone would be Python too."""
    if len(text) > MAX_PARSED:
        return False
    try:
        body = ast.parse(_unindented(text)).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return any(not isinstance(node, ast.Expr) or isinstance(node.value, ast.Call) for node in body)


def _width_of_bullet(before: str) -> int:
    return len(before) if re.fullmatch(r"[ \t]*(?:[-*+>]|\d+[.)])[ \t]+", before) else 0


def _shifted(content: str, indent: int) -> str:
    """Return a block without the indentation that its fence has, as Markdown reads it."""
    lines = content.split("\n")
    widths = [len(line) - len(line.lstrip(" \t")) for line in lines if line.strip()]
    indent = min([indent, *widths])
    return "\n".join(line[indent:] if line.strip() else line for line in lines)


def _unindented(code: str) -> str:
    """Return a program whose first line is indented with all of it moved to the left."""
    first = next((line for line in code.split("\n") if line.strip()), "")
    return _shifted(code, len(first) - len(first.lstrip(" \t"))) if first[:1] in (" ", "\t") else code


def _as_body(code: str) -> str:
    """Return a function body at one level of indentation; chat models omit that of the first line, or all of it."""
    lines = code.strip("\n").split("\n")
    rest = [line for line in lines[1:] if line.strip()]
    if lines[0][:1] in (" ", "\t"):
        return code
    if rest and all(line[:1] in (" ", "\t") for line in rest) and not lines[0].rstrip().endswith(":"):
        return "\n".join([" " * 4 + lines[0], *lines[1:]])
    return "\n".join(" " * 4 + line for line in lines)
