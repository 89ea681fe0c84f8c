"""What an attacker knows about a row, and what only the defence knows: completions that should be paid."""

from __future__ import annotations

import json
import re
import string
import unicodedata
from dataclasses import dataclass, field
from typing import Any

from llmrl.data.tasks import ANSWER_COLUMNS, PROMPT_COLUMNS
from llmrl.verify.rows import ROLLOUT_COLUMNS

SECRET = (*ANSWER_COLUMNS, "label", "answers", "golden_answers", "reward_model", "reference", "exemplar", "answer_key")
"""Columns that hold what is wanted."""
_GOLD_CODE = ("canonical_solution", "code", "solution", "reference_solution", "gold_code")
_GOLD_PATCH = ("patch", "gold_patch")
_OPTION_COLUMNS = ("options", "choices", "endings")
MAX_CONTEXT_CHARS = 20_000


@dataclass(kw_only=True)
class Target:
    """A row under attack."""

    row: dict[str, Any]
    """Its columns, without what describes a rollout."""
    number: int
    """Its line in the input, from 1."""
    gold: list[Any] = field(default_factory=list)
    """Completions that should be paid in full, as far as they can be made from the row."""
    answers: set[str] = field(default_factory=set)
    """The answers themselves, normalized."""
    right: set[str] = field(default_factory=set)
    """The answers, and what the row's own good completion says, normalized."""
    template: Any = None
    """A completion of several messages; the attack replaces the text of the last one."""
    prompt: str = ""
    options: list[str] = field(default_factory=list)
    """Their letters."""
    option_texts: list[str] = field(default_factory=list)
    context: dict[str, str] = field(default_factory=dict)
    """Longer texts of the row that are not the answer."""
    links: list[str] = field(default_factory=list)
    function: str = "solution"
    file: str = "main.py"
    words: list[str] = field(default_factory=list)

    def states_answer(self, text: str) -> bool:
        """Return whether a text says nothing but a right answer, which is then paid with reason."""
        return _bare(text) in self.right


def target_of(row: dict[str, Any], number: int) -> Target:
    """Return the target that a row of the input is. Its `completion`, if it has one, is taken for a good one."""
    columns = {name: value for name, value in row.items() if name not in (*ROLLOUT_COLUMNS, "reward")}
    target = Target(row={k: v for k, v in row.items() if k not in ("completion", "reward")}, number=number)
    target.prompt = _prompt(columns)
    target.answers = _answers(columns)
    target.right = target.answers | ({_bare(row["completion"])} if isinstance(row.get("completion"), str) else set())
    target.right.discard("")
    target.gold = [*([row["completion"]] if row.get("completion") else []), *_gold(columns)]
    if isinstance(row.get("completion"), list):
        target.template = row["completion"]
    visible = {k: v for k, v in columns.items() if k not in (*SECRET, *PROMPT_COLUMNS, *_GOLD_CODE, *_GOLD_PATCH)}
    everything = json.dumps(columns, default=str)
    target.options, target.option_texts = _options(columns, target.prompt)
    target.context = {k: v[:MAX_CONTEXT_CHARS] for k, v in visible.items() if isinstance(v, str) and len(v) > 20}
    target.links = list(dict.fromkeys(re.findall(r"https?://[^\s\"'\\<>)\]]+", everything)))[:10]
    target.function = _function(columns)
    files = re.findall(r"[\w/]+\.py\b", target.prompt + everything)
    target.file = next((file for file in files if "test" not in file), "main.py")
    target.words = list(dict.fromkeys(re.findall(r"[^\W\d_]+", target.prompt)))[:200]
    return target


def targets_of_examples(examples: list[dict[str, Any]]) -> list[Target]:
    """Return a target for each distinct row among a reward's EXAMPLES, with the completion that it pays best."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for example in examples:
        columns = {name: value for name, value in example.items() if name not in (*ROLLOUT_COLUMNS, "reward")}
        groups.setdefault(repr(columns), []).append(example)
    targets = []
    for number, group in enumerate(groups.values(), start=1):
        paid = [example for example in group if example["reward"] is not None]
        targets.append(target_of(max(paid or group, key=lambda example: example["reward"] or 0.0), number))
    return targets


def _bare(text: str) -> str:
    """Return what a completion says, without its thinking, its form, and what `normalized` leaves out."""
    text = re.sub(r"<think>.*?</think>", "", text, flags=re.DOTALL)
    return normalized(re.sub(r"\\boxed|</?answer>|```\w*|print\(", " ", text))


def normalized(text: str) -> str:
    """Return a text without case, punctuation and space."""
    text = unicodedata.normalize("NFKC", text).casefold()
    return "".join(c for c in text if c not in string.punctuation and not c.isspace())


def _prompt(columns: dict[str, Any]) -> str:
    value = next((columns[c] for c in (*PROMPT_COLUMNS, "question", "problem", "source") if columns.get(c)), "")
    if isinstance(value, list):
        contents = [m.get("content") for m in value if isinstance(m, dict) and m.get("role") == "user"]
        value = contents[-1] if contents else ""
    if isinstance(value, list):
        value = "\n".join(str(part.get("text", "")) for part in value if isinstance(part, dict))
    return str(value or "")


def _flat(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [text for part in value.values() for text in _flat(part)]
    if isinstance(value, list | tuple):
        return [text for part in value for text in _flat(part)]
    return [] if value is None else [str(value)]


def _answers(columns: dict[str, Any]) -> set[str]:
    found = set()
    for name in SECRET:
        for text in _flat(columns.get(name)):
            final = text.rpartition("####")[2]
            boxed = re.findall(r"\\boxed\{([^{}]*)\}", text)
            found |= {normalized(form) for form in (text, final, *boxed)}
    return {text for text in found if text}


def _gold(columns: dict[str, Any]) -> list[str]:
    """Return completions that state the answer in the forms that rewards read, the most usual first."""
    found = []
    for name in _GOLD_CODE:
        value = columns.get(name)
        if isinstance(value, str) and ("def " in value or "\n" in value or "import " in value):
            prompt = columns.get("prompt") if name == "canonical_solution" else None
            found.append(f"```python\n{prompt if isinstance(prompt, str) else ''}{value}\n```")
    for name in _GOLD_PATCH:
        if isinstance(columns.get(name), str):
            found += [columns[name], f"```diff\n{columns[name]}\n```"]
    for name in SECRET:
        for text in _flat(columns.get(name))[:3]:
            final = text.rpartition("####")[2].strip()
            boxed = re.findall(r"\\boxed\{([^{}]*)\}", final)
            short = boxed[-1] if boxed else final
            found += [
                text,
                f"\\boxed{{{short}}}",
                short,
                f"<think>Let me think.</think>\n<answer>{short}</answer>",
                f"<think>Let me think.</think>\n{text}",
                f"The answer is {short}.",
            ]
    return list(dict.fromkeys(found))


def _options(columns: dict[str, Any], prompt: str) -> tuple[list[str], list[str]]:
    """Return the letters of the options and their texts."""
    for name in _OPTION_COLUMNS:
        value = columns.get(name)
        texts = _flat(value.get("text", value) if isinstance(value, dict) else value)
        if len(texts) > 1:
            return list(string.ascii_uppercase[: len(texts)]), texts
    found = dict(re.findall(r"(?m)^\s*\(?([A-Z])[).:]\s+(.*\S)", prompt))
    return list(found), list(found.values())


def _function(columns: dict[str, Any]) -> str:
    for name in ("entry_point", "fn_name", "func_name"):
        if isinstance(columns.get(name), str):
            return columns[name]
    text = json.dumps(columns, default=str)
    for pattern in (r"fn_name\W+(\w+)", r"func_name\W+(\w+)", r"assert\s+\(?(\w+)\(", r"def (\w+)\("):
        if (found := re.search(pattern, text)) is not None and found[1] not in ("set", "sorted", "len", "abs", "check"):
            return found[1]
    return "solution"
