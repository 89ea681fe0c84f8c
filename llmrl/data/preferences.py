"""Rows with preferences -> tasks and their token ids. The columns and the tokens are TRL's.

    prompt, chosen, rejected        a pair
    chosen, rejected                a pair whose prompt is the common beginning of both
    prompt, completion, label       one completion, desirable (true) or not
    conversations, chosen, rejected a pair in the form of ShareGPT and LLaMA-Factory (`from`, `value`)

Prompts and completions are text, or lists of messages. Text goes to the tokenizer unchanged, and a completion ends
with the eos token; messages are rendered with the chat template.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from llmrl.data.tasks import Located, conversation, new_id, open_rows
from llmrl.errors import UserError
from llmrl.types import Message, Task

if TYPE_CHECKING:
    from llmrl.algo.preference.hierarchy import HierarchicalPreference
    from llmrl.data.chat import Chat
    from llmrl.data.options import RowsConfig

Text = str | list[Message]
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "system": "system", "observation": "tool"}


@dataclass(kw_only=True)
class PreferenceRow:
    """One row: a prompt, its completions, and their rewards."""

    task: Task
    place: str
    """Where the row comes from, for error messages ("pairs.jsonl, line 3")."""
    prompt: Text
    completions: list[Text]
    """[chosen, rejected], or one."""
    rewards: list[float]
    """1 for chosen or desirable, 0 for rejected or undesirable."""
    tools: list[Any] | None = None
    template_options: dict[str, Any] = field(default_factory=dict)
    prompt_ids: list[int] = field(default_factory=list)
    completion_ids: list[list[int]] = field(default_factory=list)
    ref_logprobs: list[np.ndarray] | None = None
    """[tokens] of each completion, where they were computed before training."""
    mismatched_ids: list[list[int]] = field(default_factory=list)
    """Completions of another row, as many as this one has, from `mismatch`."""
    mismatched_ref_logprobs: list[np.ndarray] | None = None
    """Their log-probabilities behind this row's prompt under the reference, where known before training."""

    @property
    def is_conversational(self) -> bool:
        return isinstance(self.completions[0], list)


def load_preferences(config: RowsConfig) -> list[PreferenceRow]:
    """Read the preference dataset that `config` names.

    Raises:
        UserError: nothing is readable, there are no rows, the columns have no known form, or a row has another form
            than the first.
    """
    rows, name = open_rows(config)
    return _build(rows, config, name)


def preferences_from_rows(rows: Iterable[dict[str, Any]], config: RowsConfig, name: str) -> list[PreferenceRow]:
    """Read rows that are already in memory; otherwise as `load_preferences`."""
    return _build(((f"{name}, row {i} (counting from 0)", dict(row)) for i, row in enumerate(rows)), config, name)


def _build(rows: Iterator[Located], config: RowsConfig, name: str) -> list[PreferenceRow]:
    short_name = re.sub(r"[^\w.-]+", "_", name)
    ids: dict[str, int] = {}
    found: list[PreferenceRow] = []
    for place, row in itertools.islice(rows, config.limit):
        prompt, completions, rewards = _read(_without_sharegpt(row, place), place)
        messages = prompt if isinstance(prompt, list) else [Message(role="user", content=prompt)]
        tools: Any = row.get("tools")  # a table can hold JSON schemas only as text
        tools = json.loads(tools) if isinstance(tools, str) and tools.strip() else tools
        new = PreferenceRow(
            task=Task(id=new_id(short_name, prompt, [completions, rewards], ids, place), messages=messages),
            place=place,
            prompt=prompt,
            completions=completions,
            rewards=rewards,
            tools=tools or None,
            template_options=row.get("chat_template_kwargs") or {},
        )
        if found:
            _check_same_form(new, found[0])
        found.append(new)
    if not found:
        raise UserError(f"data.path {config.path}: there are no rows in {name}")
    return found


def _read(row: dict[str, Any], place: str) -> tuple[Text, list[Text], list[float]]:
    """Return (prompt, completions, rewards) of a row in any of TRL's forms."""
    if "chosen" in row and "rejected" in row:
        chosen, rejected = (_text(row[name], f"{place}, column {name}") for name in ("chosen", "rejected"))
        if isinstance(chosen, str) != isinstance(rejected, str):
            raise UserError(f"{place}: chosen and rejected must both be text, or both lists of messages")
        if row.get("prompt") is None:
            prompt, chosen, rejected = split_prompt(chosen, rejected)
            if not prompt:
                raise UserError(
                    f"{place}: there is no column prompt, and chosen and rejected do not begin with the same text or "
                    "message: add the prompt"
                )
        else:
            prompt = _text(row["prompt"], f"{place}, column prompt")
        completions, rewards = [chosen, rejected], [1.0, 0.0]
    elif "completion" in row and "label" in row and "prompt" in row:
        prompt = _text(row["prompt"], f"{place}, column prompt")
        completions, rewards = [_text(row["completion"], f"{place}, column completion")], [_label(row["label"], place)]
    else:
        columns = ", ".join(map(str, row)) or "(none)"
        raise UserError(
            f"{place}: preferences need the columns prompt, chosen, rejected (or a prompt that both begin with), or "
            f"prompt, completion, label; the columns are {columns}"
        )
    if isinstance(prompt, str) != isinstance(completions[0], str):
        raise UserError(f"{place}: prompt and completions must all be text, or all lists of messages")
    if not prompt or not all(isinstance(text, str) or text for text in completions):
        raise UserError(f"{place}: the prompt or a completion is empty")
    return prompt, completions, rewards


def _text(value: Any, place: str) -> Text:
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return conversation(value, place)
    raise UserError(f"{place}: must be text or a list of messages, found {type(value).__name__}")


def _label(value: Any, place: str) -> float:
    if value in (True, False, 0, 1):
        return float(value)
    raise UserError(f"{place}, column label: must be true or false, found {value!r}")


def split_prompt(chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """Split off the common beginning. Returns (prompt, rest of chosen, rest of rejected).

    In text, a space before the first difference belongs to the completion. Where one is the beginning of the other, the
    last element (message or character) counts as different, as in TRL.
    """
    shorter = min(len(chosen), len(rejected))
    index = next((i for i in range(shorter) if chosen[i] != rejected[i]), shorter - 1)
    if index > 0 and isinstance(chosen, str) and chosen[index] != rejected[index] and chosen[index - 1] == " ":
        index -= 1
    return chosen[:index], chosen[index:], rejected[index:]


def _without_sharegpt(row: dict[str, Any], place: str) -> dict[str, Any]:
    """Turn `conversations` with `from` and `value` into a prompt of messages; return other rows unchanged."""
    turns = row.get("conversations")
    if not isinstance(turns, list):
        return row

    def message(turn: Any) -> Message:
        if not isinstance(turn, dict) or turn.get("from") not in SHAREGPT_ROLES or not isinstance(turn["value"], str):
            known = ", ".join(SHAREGPT_ROLES)
            raise UserError(f"{place}: a ShareGPT message needs `from` (one of {known}) and `value`, found {turn!r}")
        return Message(role=SHAREGPT_ROLES[turn["from"]], content=turn["value"])

    changed = {key: value for key, value in row.items() if key not in ("conversations", "system")}
    system = [Message(role="system", content=row["system"])] if row.get("system") else []
    changed["prompt"] = system + [message(turn) for turn in turns]
    for name in ("chosen", "rejected"):
        if isinstance(row.get(name), dict):
            changed[name] = [message(row[name])]
    return changed


def _check_same_form(row: PreferenceRow, first: PreferenceRow) -> None:
    if len(row.completions) != len(first.completions):
        raise UserError(f"{row.place}: pairs and single completions cannot be mixed ({first.place} is the other kind)")
    if row.is_conversational != first.is_conversational:
        raise UserError(f"{row.place}: text and messages cannot be mixed ({first.place} is the other kind)")


# --- tokens -----------------------------------------------------------------------------------------------------------


def encode_preferences(
    rows: Sequence[PreferenceRow], chat: Chat, *, max_length: int | None
) -> tuple[list[PreferenceRow], list[str]]:
    """Set the token ids of all rows.

    A completion begins at the first token where the prompt and the whole sequence differ, and ends at `max_length`
    tokens of the whole sequence.

    Args:
        rows: their text is read, their ids are set.
        chat: holds the tokenizer.
        max_length: tokens of a sequence; None cuts nothing.

    Returns:
        (kept rows, notes for the console). Rows whose prompt leaves no room for a completion are left out, and so are
        pairs whose completions are the same tokens.

    Raises:
        UserError: no row is left.
    """
    kept, too_long, equal, cut = [], 0, 0, 0
    for row in rows:
        prompt_ids, whole = _encode(row, chat)
        # A tokenizer may merge the end of the prompt with the completion: the prompt ends where all of them agree.
        start = min(_common_length(prompt_ids, ids) for ids in whole)
        cut += start < len(prompt_ids)
        row.prompt_ids = prompt_ids[:start]
        row.completion_ids = [ids[start:max_length] for ids in whole]
        if start == 0 or not all(row.completion_ids):
            too_long += 1
        elif len(whole) == 2 and row.completion_ids[0] == row.completion_ids[1]:
            equal += 1
        else:
            kept.append(row)
    notes = [
        (too_long, f"left out: no room for a completion within algo.max_length {max_length} tokens"),
        (equal, "left out: chosen and rejected are the same tokens (up to algo.max_length)"),
        (cut, "lose the end of their prompt: the tokenizer or template renders it differently before a completion"),
    ]
    if rows and not kept:
        raise UserError(f"all {len(rows)} rows are left out: {too_long} {notes[0][1]}, {equal} {notes[1][1]}")
    return kept, [f"{count} of {len(rows)} rows {text}" for count, text in notes if count]


def mismatch(rows: Sequence[PreferenceRow], *, max_length: int) -> None:
    """Set `mismatched_ids` of encoded rows: completions of a row with another prompt, wherever there are enough.

    Which row that is depends on nothing but the rows, so a reference computed beforehand serves every later run. TRL
    too pairs the rows of a dataset once, with the row before.

    Args:
        rows: all rows that completions may come from. A single row gets none.
        max_length: tokens of a sequence (prompt and completion), at which completions are cut.
    """
    if len(rows) < 2:
        return
    by_prompt: dict[tuple[int, ...], list[int]] = {}
    for i in np.random.Generator(np.random.Philox(0)).permutation(len(rows)).tolist():
        by_prompt.setdefault(tuple(rows[i].prompt_ids), []).append(i)
    order = [i for places in by_prompt.values() for i in places]
    # Rows of one prompt lie together: further on by the largest number of them there is another prompt.
    shift = max(map(len, by_prompt.values())) % len(rows) or 1
    for place, i in enumerate(order):
        row, others = rows[i], rows[order[(place + shift) % len(rows)]].completion_ids
        room = max_length - len(row.prompt_ids)
        row.mismatched_ids = [others[k % len(others)][:room] for k in range(len(row.completions))]


def _encode(row: PreferenceRow, chat: Chat) -> tuple[list[int], list[list[int]]]:
    """Return the ids of the prompt alone, and of the prompt with each completion."""
    if isinstance(row.prompt, list):

        def ids(messages: list[Message], generation_prompt: bool = False) -> list[int]:
            return chat.render_conversation(
                messages, row.tools, generation_prompt=generation_prompt, **row.template_options
            )

        prompt: list[Message] = row.prompt
        return ids(prompt, True), [ids([*prompt, *completion]) for completion in row.completions]  # pyright: ignore
    eos = chat.tokenizer.eos_token
    texts = [text if text.endswith(eos) else text + eos for text in map(str, row.completions)]
    return chat.tokenizer(row.prompt)["input_ids"], [chat.tokenizer(row.prompt + text)["input_ids"] for text in texts]


def _common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """Return the length of the common beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


# --- pairs from rollouts ----------------------------------------------------------------------------------------------


def preferences_from_rollouts(
    rows: Iterable[dict[str, Any]], hierarchy: HierarchicalPreference
) -> list[dict[str, list[Message]]]:
    """Make pairs (prompt, chosen, rejected) for a reward model from the rollouts that a run has recorded (HERON).

    Args:
        rows: rows of a run's rollouts.jsonl. Rollouts of the same task at the same step are compared with each other;
            margins are taken over all of them.
        hierarchy: compares their reward parts (and `reward`).
    """
    groups: dict[tuple[Any, Any], list[dict[str, Any]]] = {}
    for row in rows:
        if row.get("reward") is not None:
            groups.setdefault((row["step"], row["task"]), []).append(row)
    parts = {key: [{"reward": row["reward"], **row["parts"]} for row in group] for key, group in groups.items()}
    margins = hierarchy.margins([item for items in parts.values() for item in items])
    found = []
    for key, group in groups.items():
        for better, worse in hierarchy.pairs(parts[key], margins):
            prompt, chosen, rejected = split_prompt(group[better]["messages"], group[worse]["messages"])
            if prompt and chosen != rejected:
                found.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return found
