"""Check the prompt of every task before a model loads: it renders, nothing is lost, it fits, its tokens are known."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llmrl.data.chat import Chat
from llmrl.data.messages import joined
from llmrl.errors import LlmrlError
from llmrl.types import Message, ModelLimits, Task

CHUNK = 256
"""Prompts that are tokenized together."""
END_LENGTH = 24
"""Letters and digits at the end of a message that have to be in the rendered prompt."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What the check found out about one prompt."""

    problem: str | None = None
    """Why it cannot be used."""
    length: int = 0
    """Tokens."""
    largest_id: int = 0
    """Largest token id."""


class PromptCheck:
    """Checks prompts.

    Args:
        chat: renders them.
        limits: of the model.
        max_completion_length: tokens that have to fit behind a prompt.
        max_prompt_length: longer prompts will be left out, so that it does not matter whether they fit.
    """

    def __init__(
        self, chat: Chat, limits: ModelLimits, *, max_completion_length: int, max_prompt_length: int | None = None
    ) -> None:
        self.chat, self.limits, self.room = chat, limits, max_completion_length
        self.longest = max_prompt_length
        self.shows_tools: bool | None = None

    def check(self, tasks: Sequence[Task]) -> list[Prompt]:
        """Return what there is to know about each task's prompt, in order."""
        texts = [self._text(task) for task in tasks]
        good = [text for text in texts if isinstance(text, str)]
        ids = iter(self.chat.render_texts(good) if good else [])
        return [self._measured(next(ids)) if isinstance(text, str) else text for text in texts]

    def _text(self, task: Task) -> str | Prompt:
        try:
            text = self.chat.text(task.messages, task.tools, **task.template_options)
        except LlmrlError as error:
            return Prompt(problem=str(error))
        problem = self._lost(task, text) if self.chat.prompt_format == "chat" else None
        if not text:
            problem = "the prompt is empty: check the prompt column and data.chat_template"
        return text if problem is None else Prompt(problem=problem)

    def problem(self, task: Task) -> str | None:
        """Return why a task's prompt cannot be rendered without a loss, or None."""
        found = self._text(task)
        return None if isinstance(found, str) else found.problem

    def _lost(self, task: Task, text: str) -> str | None:
        """Return what the template leaves out of a prompt, or None."""
        if task.tools is not None:
            if self.shows_tools is None:
                self.shows_tools = text != self.chat.text(task.messages, None, **task.template_options)
            if not self.shows_tools:
                return (
                    "column tools: the chat template does not show tools to the policy: set another "
                    "data.chat_template, or data.ignore_columns [tools]"
                )
        for name in task.template_options:
            if not self.chat.reads(name):
                return (
                    f"column chat_template_kwargs: the chat template has no variable {name}: remove it, or set "
                    "data.ignore_columns [chat_template_kwargs]"
                )
        return next((found for i, m in enumerate(task.messages) if (found := _not_shown(m, i, text))), None)

    def _measured(self, ids: list[int]) -> Prompt:
        limits, largest, problem = self.limits, max(ids), None
        if self.longest is not None and len(ids) > self.longest:
            problem = None
        elif limits.context is not None and len(ids) + self.room > limits.context:
            problem = (
                f"the prompt has {len(ids)} tokens; with rollout.max_completion_length {self.room} it does not fit the "
                f"{limits.context} positions of the model: shorten either, or leave long prompts out with "
                f"data.max_prompt_length {max(1, limits.context - self.room)}"
            )
        elif limits.vocab_size is not None and largest >= limits.vocab_size:
            problem = beyond_embedding(self.chat.tokenizer, ids, limits.vocab_size)
        return Prompt(problem=problem, length=len(ids), largest_id=largest)


def beyond_embedding(tokenizer: Any, ids: Sequence[int], vocab_size: int) -> str:
    """Return the reason why token ids of a row cannot be used by a model of that many embeddings."""
    beyond = sorted({number for number in ids if number >= vocab_size})
    names = ", ".join(repr(name) for name in tokenizer.convert_ids_to_tokens(beyond[:5]))
    return (
        f"the data has tokens that the model has no embeddings for: {names} (the tokenizer has {len(tokenizer)} "
        f"tokens, the model {vocab_size}). Save a model with more: model.resize_token_embeddings(len(tokenizer)); "
        "under adapters train them too, with modules_to_save or trainable_token_indices"
    )


_OTHER = re.compile(r"[\W_]+")


def _not_shown(message: Message, i: int, text: str) -> str | None:
    """Return a reason if the end of a message is not in the prompt.

    A template may escape, strip or shorten (thoughts of earlier turns), so letters and digits of the end are compared.
    """
    for call in message.get("tool_calls") or []:
        name = call.get("function", call).get("name")
        if name and str(name) not in text:
            return (
                f"message {i}: the chat template does not show its call of the tool {name!r}: set another "
                "data.chat_template"
            )
    content = joined(message.get("content")).rpartition("</think>")[2].strip()
    if not content or content[-END_LENGTH:] in text:
        return None
    end = _OTHER.sub("", content[-4 * END_LENGTH :])[-END_LENGTH:]
    if end in _OTHER.sub("", text):
        return None
    return (
        f"message {i}: the chat template does not show it (role {message.get('role')!r}): use a role that the template "
        "knows, or set another data.chat_template"
    )
