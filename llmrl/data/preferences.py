"""Rows with preferences -> tasks and their token ids. The columns and the tokens are TRL's.

    prompt, chosen, rejected        a pair
    chosen, rejected                a pair whose prompt is the common beginning of both
    prompt, completion, label       one completion, desirable (true) or not

Prompts and completions are text, or lists of messages (in OpenAI's form or ShareGPT's). Completions may be whole
conversations that begin with the prompt. Text goes to the tokenizer unchanged, and a completion ends with the eos
token; messages are rendered with the chat template.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from llmrl.data.ids import new_id
from llmrl.data.messages import lost_columns, template_options_of, tools_of
from llmrl.data.preference_forms import Form, Text, split_prompt
from llmrl.data.prompts import PromptCheck, beyond_embedding
from llmrl.data.report import BadRow, RowReport
from llmrl.data.rows import OpenRows, Row, open_rows, rows_in_memory
from llmrl.errors import LlmrlError, UserError
from llmrl.track.progress import progress
from llmrl.types import Message, ModelLimits, Task

if TYPE_CHECKING:
    from llmrl.algo.preference.hierarchy import HierarchicalPreference
    from llmrl.data.chat import Chat
    from llmrl.data.options import PreferenceRows


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
    prompt_ids: list[int] = field(default_factory=list)
    completion_ids: list[list[int]] = field(default_factory=list)
    cut: bool = False
    """The tokens of the prompt end before its text does."""
    ref_logprobs: list[np.ndarray] | None = None
    """[tokens] of each completion, where they were computed before training."""
    mismatched_ids: list[list[int]] = field(default_factory=list)
    """Completions of another row, as many as this one has, from `mismatch`."""
    mismatched_ref_logprobs: list[np.ndarray] | None = None
    """Their log-probabilities behind this row's prompt under the reference, where known before training."""

    @property
    def is_conversational(self) -> bool:
        return isinstance(self.completions[0], list)


def load_preferences(
    config: PreferenceRows, report: RowReport | None = None, *, needed: int | None = None
) -> list[PreferenceRow]:
    """Read the preference dataset that `config` names.

    Args:
        config: which rows and columns.
        report: collects the rows that cannot be used; without it, they are an error here.
        needed: rows that a run can use; what streams is read no further.

    Raises:
        UserError: nothing is readable, there are no rows, or the columns have no known form; without `report`, also if
            a row cannot be used or has another form than the first.
    """
    return _collected(open_rows(config, needed=needed), config, report)


def preferences_from_rows(
    rows: Any, config: PreferenceRows, name: str, report: RowReport | None = None, *, needed: int | None = None
) -> list[PreferenceRow]:
    """Read rows that are already in memory (see `llmrl.data.rows.rows_in_memory`); otherwise as `load_preferences`."""
    return _collected(rows_in_memory(rows, config, name, needed=needed), config, report)


def _collected(opened: OpenRows, config: PreferenceRows, report: RowReport | None) -> list[PreferenceRow]:
    report, strict = report if report is not None else RowReport(), report is None
    found = _build(opened, config, report)
    if not report.num_rows:
        raise UserError(f"data.path {config.path}: there are no rows in {opened.name}")
    if strict or not found:
        report.settle(len(found))
    return found


def _build(opened: OpenRows, config: PreferenceRows, report: RowReport) -> list[PreferenceRow]:
    short_name = re.sub(r"[^\w.-]+", "_", opened.name)
    ids: dict[str, int] = {}
    found: list[PreferenceRow] = []
    form: Form | None = None
    report.streams |= opened.streams
    for place, row in opened.rows:
        report.num_rows += 1
        try:
            if isinstance(row, BadRow):
                raise row
            form = form or Form.of(config, place, row)
            new = _preference(form, row, place, short_name, ids)
            if found:
                _check_same_form(new, found[0])
        except BadRow as error:
            report.refuse(place, error, row)
        else:
            report.places[new.task.id] = place
            found.append(new)
    return found


def _preference(form: Form, row: Row, place: str, name: str, ids: dict[str, int]) -> PreferenceRow:
    ignored = form.config.ignore_columns
    if reason := lost_columns(row, ignored):
        raise BadRow(place, reason)
    prompt, completions, rewards = form.read(row, place)
    messages = prompt if isinstance(prompt, list) else [Message(role="user", content=prompt)]
    task = Task(
        id=new_id(name, prompt, [completions, rewards], ids, place),
        messages=messages,
        tools=tools_of(row, place, ignored),
        template_options=template_options_of(row, place, ignored),
    )
    return PreferenceRow(task=task, place=place, prompt=prompt, completions=completions, rewards=rewards)


def _check_same_form(row: PreferenceRow, first: PreferenceRow) -> None:
    if row.is_conversational != first.is_conversational:
        raise BadRow(row.place, f"text and messages cannot be mixed ({first.place} is the other kind)")


# --- tokens -----------------------------------------------------------------------------------------------------------


def encode_preferences(
    rows: Sequence[PreferenceRow],
    chat: Chat,
    *,
    max_length: int | None,
    limits: ModelLimits | None = None,
    report: RowReport | None = None,
) -> tuple[list[PreferenceRow], list[str]]:
    """Set the token ids of all rows.

    A completion begins at the first token where the prompt and the whole sequence differ, and ends at `max_length`
    tokens of the whole sequence.

    Args:
        rows: their text is read, their ids are set.
        chat: holds the tokenizer.
        max_length: tokens of a sequence; None cuts nothing.
        limits: what the model can take.
        report: collects the rows that cannot be used; without it, they are an error here.

    Returns:
        (kept rows, notes for the console). Rows whose prompt leaves no room for a completion are left out, and so are
        pairs whose completions are the same tokens.

    Raises:
        UserError: no row is left, or rows cannot be used and must not be left out.
    """
    found, limits = report if report is not None else RowReport(num_rows=len(rows)), limits or ModelLimits()
    check = PromptCheck(chat, limits, max_completion_length=0)
    kept, too_long, equal, cut = [], 0, 0, 0
    with progress(f"encoding {found.what}", len(rows)) as advance:
        for row in rows:
            advance(1)
            if problem := _set_ids(row, check, max_length):
                found.add(row.place, problem, row.task.meta)
                continue
            cut += row.cut
            if not row.prompt_ids or not all(row.completion_ids):
                too_long += 1
            elif len(row.completion_ids) == 2 and row.completion_ids[0] == row.completion_ids[1]:
                equal += 1
            else:
                kept.append(row)
    notes = found.settle(len(kept))
    counts = [
        (too_long, f"left out: no room for a completion within algo.max_length {max_length} tokens"),
        (equal, "left out: chosen and rejected are the same tokens (up to algo.max_length)"),
        (cut, "lose the end of their prompt: the tokenizer or template renders it differently before a completion"),
    ]
    if rows and not kept:
        raise UserError(f"all {len(rows)} rows are left out: {too_long} {counts[0][1]}, {equal} {counts[1][1]}")
    return kept, notes + [f"{count} of {len(rows)} rows {text}" for count, text in counts if count]


def _set_ids(row: PreferenceRow, check: PromptCheck, max_length: int | None) -> str | None:
    """Set a row's token ids. Returns why it cannot be used, or None."""
    chat, limits = check.chat, check.limits
    if problem := check.problem(row.task):
        return problem
    try:
        prompt_ids, whole = _encode(row, chat)
    except LlmrlError as error:
        return str(error)
    # A tokenizer may merge the end of the prompt with the completion: the prompt ends where all of them agree.
    start = min(_common_length(prompt_ids, ids) for ids in whole)
    row.cut = start < len(prompt_ids)
    row.prompt_ids = prompt_ids[:start]
    row.completion_ids = [ids[start:max_length] for ids in whole]
    if not all(row.completion_ids):
        return None  # no room behind the prompt: it will be left out, and counted
    longest = max(start + len(ids) for ids in row.completion_ids)
    if limits.context is not None and longest > limits.context:
        return (
            f"the row has {longest} tokens, and the model {limits.context} positions: cut rows with algo.max_length "
            f"{limits.context}"
        )
    used = [*row.prompt_ids, *(number for ids in row.completion_ids for number in ids)]
    if limits.vocab_size is not None and max(used, default=0) >= limits.vocab_size:
        return beyond_embedding(chat.tokenizer, used, limits.vocab_size)
    return None


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
                messages, row.task.tools, generation_prompt=generation_prompt, **row.task.template_options
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
