"""How rows hold preferences: the columns of the first row decide, and every row is read as its author meant it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmrl.data.columns import ABSENT, check_column, names, pick
from llmrl.data.messages import SYSTEM_COLUMNS, as_messages, check_ignored, conversation, joined
from llmrl.data.report import BadRow
from llmrl.errors import UserError
from llmrl.types import Message

if TYPE_CHECKING:
    from llmrl.data.options import PreferenceRows
    from llmrl.data.rows import Row

Text = str | list[Message]
PROMPTS = ("conversations", "prompt", "question", "problem", "instruction", "query", "context")
"""Columns with the prompt of a pair, the first that there is. `messages` is the whole conversation in some datasets."""


@dataclass(frozen=True, kw_only=True)
class Form:
    """How the rows of a dataset hold preferences, decided by the columns of the first."""

    config: PreferenceRows
    prompt_column: str | None
    """None: chosen and rejected begin with the prompt."""
    pairs: bool

    @classmethod
    def of(cls, config: PreferenceRows, place: str, first: Row) -> Form:
        """Find the columns.

        Raises:
            UserError: there is no known form.
        """
        pairs = all(pick(first, column) is not ABSENT for column in (config.chosen_column, config.rejected_column))
        single = all(pick(first, column) is not ABSENT for column in (config.completion_column, config.label_column))
        if not pairs and not single:
            raise UserError(
                f"{place}: preferences need the columns prompt, chosen, rejected (or a prompt that both begin with), "
                f"or prompt, completion, label; the columns are {names(first)}. Name others with data.prompt_column, "
                ".chosen_column, .rejected_column, .completion_column, .label_column"
            )
        check_ignored(config.ignore_columns, place, first)
        if config.prompt_column is not None:
            check_column("data.prompt_column", config.prompt_column, place, first)
        taken = {config.chosen_column, config.rejected_column, config.completion_column, config.label_column}
        candidates = [config.prompt_column] if config.prompt_column else [c for c in PROMPTS if c not in taken]
        prompt = next((c for c in candidates if pick(first, c) not in (ABSENT, None)), None)
        if prompt is None and not pairs:
            raise UserError(f"{place}: there is no prompt; set data.prompt_column (the columns are {names(first)})")
        return cls(config=config, prompt_column=prompt, pairs=pairs)

    def read(self, row: Row, place: str) -> tuple[Text, list[Text], list[float]]:
        """Return (prompt, completions, rewards) of a row.

        Raises:
            BadRow: a column is missing or wrong.
        """
        config = self.config
        if self.pairs:
            completions = [self._text(row, column, place) for column in (config.chosen_column, config.rejected_column)]
            rewards = [1.0, 0.0]
        else:
            completions = [self._text(row, config.completion_column, place)]
            rewards = [_label(pick(row, config.label_column), f"column {config.label_column}", place)]
        if len({isinstance(text, str) for text in completions}) > 1:
            raise BadRow(place, "chosen and rejected must both be text, or both lists of messages")
        if self.prompt_column is None:
            prompt, *completions = split_prompt(*completions)
            if not prompt:
                raise BadRow(
                    place,
                    "there is no column prompt, and chosen and rejected do not begin with the same text or message: "
                    "add the prompt, or name its column with data.prompt_column",
                )
        else:
            prompt = self._prompt(row, place)
            prompt, completions = _behind(prompt, completions, place)
        prompt = _with_system(prompt, row, config, place)
        if not prompt or not all(isinstance(text, str) or text for text in completions):
            raise BadRow(place, "the prompt or a completion is empty")
        return prompt, completions, rewards

    def _prompt(self, row: Row, place: str) -> Text:
        assert self.prompt_column is not None
        prompt = self._text(row, self.prompt_column, place)
        more = row.get("input") if self.prompt_column == "instruction" else None  # Alpaca
        if (
            isinstance(prompt, str)
            and isinstance(more, str)
            and more.strip()
            and "input" not in self.config.ignore_columns
        ):
            return f"{prompt}\n{more}"
        return prompt

    def _text(self, row: Row, column: str, place: str) -> Text:
        value = as_messages(pick(row, column))
        if isinstance(value, str):
            return value
        if isinstance(value, list):
            return conversation(value, f"{place}, column {column}")
        found = "nothing" if value is ABSENT else type(value).__name__
        raise BadRow(place, f"column {column}: must be text or a list of messages, found {found}")


def _behind(prompt: Text, completions: list[Text], place: str) -> tuple[Text, list[Text]]:
    """Return a prompt and completions of the same kind, where completions may repeat the prompt in front.

    Whole conversations (ultrafeedback_binarized and its like) begin with the prompt that has a column too.
    """
    if isinstance(completions[0], str):
        if not isinstance(prompt, str):
            raise BadRow(place, "prompt and completions must all be text, or all lists of messages")
        if prompt and all(isinstance(text, str) and text.startswith(prompt) for text in completions):
            completions = [text[len(prompt) :] for text in completions]
        return prompt, completions
    whole = [text for text in completions if not isinstance(text, str)]
    if isinstance(prompt, str):
        prompt = _messages_of(prompt, whole[0])
    if all(len(text) > len(prompt) and _same(text[: len(prompt)], prompt) for text in whole):
        return prompt, [text[len(prompt) :] for text in whole]
    if any(text[0].get("role") != "assistant" for text in whole):
        raise BadRow(
            place, "a completion begins with a message that is neither the assistant's nor the prompt: remove either"
        )
    return prompt, list(whole)


def _messages_of(prompt: str, conversation: list[Message]) -> list[Message]:
    """Return a prompt of text as messages, with the system message that a conversation has in front of it."""
    system = conversation[:1] if conversation[:1] and conversation[0].get("role") == "system" else []
    return [*system, Message(role="user", content=prompt)]


def _same(a: list[Message], b: list[Message]) -> bool:
    """Return whether two conversations are equal, apart from space around their texts."""
    return all(
        x.get("role") == y.get("role") and joined(x.get("content")).strip() == joined(y.get("content")).strip()
        for x, y in zip(a, b, strict=True)
    )


def _with_system(prompt: Text, row: Row, config: PreferenceRows, place: str) -> Text:
    """Put the system message of a row's own column in front of a prompt of messages."""
    columns = [c for c in SYSTEM_COLUMNS if c not in config.ignore_columns and c != config.prompt_column]
    system = next((row[c] for c in columns if isinstance(row.get(c), str) and row[c].strip()), None)
    if system is None:
        return prompt
    if isinstance(prompt, str):
        raise BadRow(
            place,
            "the row has a system message, but its prompt is text, which has no place for one: use messages, or set "
            "data.ignore_columns [system]",
        )
    if prompt[0].get("role") == "system":
        if joined(prompt[0].get("content")) == system:
            return prompt
        raise BadRow(place, "the prompt has a system message, and the column system another: remove one")
    return [Message(role="system", content=system), *prompt]


def _label(value: Any, column: str, place: str) -> float:
    if isinstance(value, str):  # of a CSV file, whose columns are text
        value = {"true": 1, "1": 1, "false": 0, "0": 0}.get(value.strip().lower(), value)
    if isinstance(value, bool | int | float) and value in (0, 1):
        return float(value)
    raise BadRow(place, f"{column}: must be true or false, found {value!r}")


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
