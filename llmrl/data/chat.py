"""Messages <-> token ids: a conversation in, the ids that a policy continues out; completion ids in, a message out.

`Chat` makes every decision that depends on the tokenizer: template, bos, stop tokens, padding.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llmrl.data.messages import without_parts
from llmrl.errors import UserError
from llmrl.types import Message, Task

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase


PREFILLED_TAGS = (
    *("think", "thinking", "thought", "thoughts", "reason", "reasoning", "reflection", "scratchpad", "plan"),
    *("answer", "solution"),
)
"""Tags that a plain-text prompt ends with to begin the reply. Any tag would not do: code ends with `List<int>`."""


class Chat:
    """Renders prompts and reads completions with one tokenizer.

    Args:
        tokenizer: the policy's.
        prompt_format: `chat` renders with the chat template, `text` joins the contents of the messages.
        chat_template: a Jinja file to use instead of the tokenizer's own template.
        generation_config: the model's; its eos tokens also end a completion.
        template_options: variables for the chat template (`enable_thinking` ...).

    Raises:
        UserError: there is no chat template, its file is unreadable or has none of the variables, or no token could
            end a completion.
    """

    stop_token_ids: tuple[int, ...]
    """A completion ends with one of these: eos of tokenizer and generation configuration, the template's turn end."""
    pad_token_id: int
    """The tokenizer's, or a stop token where it has none. Padding is always masked."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        prompt_format: Literal["chat", "text"] = "chat",
        chat_template: str | None = None,
        generation_config: GenerationConfig | None = None,
        template_options: dict[str, Any] | None = None,
    ) -> None:
        self.tokenizer: Any = tokenizer  # Any: transformers annotates ids as a union of five types
        self.prompt_format = prompt_format
        self._template = _read_template(tokenizer, prompt_format, chat_template)
        self.template_options = dict(template_options or {})
        self._check_options()
        self._bos = _default_bos(tokenizer) if prompt_format == "text" else None
        self._anchor = tokenizer.encode("a", add_special_tokens=False) if prompt_format == "text" else []
        self._anchor_text = self._decode(self._anchor)
        self.stop_token_ids = self._find_stop_tokens(generation_config)
        self._prefilled: dict[str, str] = {}
        pad = self.tokenizer.pad_token_id
        self.pad_token_id = self.stop_token_ids[0] if pad is None else pad

    def render(self, messages: Sequence[Message], tools: list[Any] | None = None, **template_options: Any) -> list[int]:
        """Return the prompt's token ids, up to where the assistant's next message begins.

        A bos token appears at most once: where the template writes it or, in text format, where the tokenizer adds it.

        Args:
            messages: the conversation so far.
            tools: JSON schemas or functions that the template shows to the policy.
            **template_options: variables for the template, over those of the run.

        Raises:
            UserError: the template refuses this conversation, or the text format cannot show it.
        """
        return self._with_bos(self.encode(self.text(messages, tools, **template_options)))

    def render_task(self, task: Task) -> list[int]:
        """Return the token ids of a task's prompt; see `render`."""
        return self.render(task.messages, task.tools, **task.template_options)

    def render_texts(self, texts: list[str]) -> list[list[int]]:
        """Return the token ids of prompts from `text`, all at once, which is faster."""
        return [self._with_bos(list(ids)) for ids in self.tokenizer(texts, add_special_tokens=False)["input_ids"]]

    def text(self, messages: Sequence[Message], tools: list[Any] | None = None, **template_options: Any) -> str:
        """Return the prompt as text; see `render`."""
        if self.prompt_format == "text":
            return _plain_text(messages, tools)
        return self._chat_text(messages, tools, **template_options)

    def _with_bos(self, token_ids: list[int]) -> list[int]:
        if self._bos is not None and token_ids[:1] != [self._bos]:
            token_ids = [self._bos, *token_ids]
        if not token_ids:
            raise UserError("the prompt is empty: check the prompt column and data.chat_template")
        return token_ids

    def prefilled(self, messages: Sequence[Message], **template_options: Any) -> str:
        """Return how the rendered prompt already begins the assistant's message: `<think>` and the like, mostly ''.

        In text format it is one of PREFILLED_TAGS at the very end of the prompt, in chat format what the template
        writes after the header of the assistant's message when it asks for one.
        """
        if self.prompt_format == "text":
            found = re.search(rf"<(?:{'|'.join(PREFILLED_TAGS)})>\s*$", _plain_text(messages, None))
            return found.group() if found else ""
        key = repr(sorted(template_options.items()))
        if key not in self._prefilled:
            self._prefilled[key] = self._template_prefilled(template_options)
        return self._prefilled[key]

    def _template_prefilled(self, options: dict[str, Any]) -> str:
        user, assistant = "first-marker", "second-marker"
        question = Message(role="user", content=user)
        try:
            asked = self._chat_text([question], **options).rpartition(user)[2]
        except UserError:
            return ""  # a template that wants more than a question; what it puts before the answer stays unknown
        try:
            # Not as the last message: there many templates write empty thinking, which is not part of the header.
            told = self._chat_text([question, Message(role="assistant", content=assistant), question], **options)
        except UserError:
            told = ""
        header = told.partition(assistant)[0].rpartition(user)[2]
        shared = next((i for i, (a, b) in enumerate(zip(asked, header, strict=False)) if a != b), len(header))
        start = min(shared, len(asked)) or len(asked)
        if "<think>" in asked:  # even if the header has it
            start = min(start, asked.index("<think>"))
        return asked[start:] if asked[start:].strip() else ""

    def render_conversation(
        self,
        messages: Sequence[Message],
        tools: list[Any] | None = None,
        *,
        generation_prompt: bool = False,
        **template_options: Any,
    ) -> list[int]:
        """Return the token ids of a finished conversation, rendered with the chat template.

        Raises:
            UserError: the template refuses it.
        """
        return self.encode(self._chat_text(messages, tools, generation_prompt=generation_prompt, **template_options))

    def decode(self, completion_ids: Sequence[int]) -> str:
        """Return a completion's text. A stop token at its end is left out; any other special token stays, as text.

        In text format a leading space survives, because code may continue the prompt's line; in chat format the text is
        decoded as the beginning of a message.
        """
        token_ids = list(completion_ids)
        if token_ids and token_ids[-1] in self.stop_token_ids:
            token_ids.pop()
        # Some decoders drop a leading space. A token in front, removed again, protects the space of a continuation.
        return self._decode(self._anchor + token_ids).removeprefix(self._anchor_text)

    def parse(self, completion_ids: Sequence[int]) -> Message:
        """Return a completion as an assistant message."""
        return Message(role="assistant", content=self.decode(completion_ids))

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, without adding special tokens."""
        # Not `apply_chat_template(tokenize=True)`: its result differs between versions of transformers, and it may add
        # a second bos.
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _decode(self, token_ids: list[int]) -> str:
        return self.tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _chat_text(
        self,
        messages: Sequence[Message],
        tools: list[Any] | None = None,
        *,
        generation_prompt: bool = True,
        **template_options: Any,
    ) -> str:
        if not self._takes_parts and any(isinstance(message.get("content"), list) for message in messages):
            messages = without_parts(list(messages))
        try:
            return self.tokenizer.apply_chat_template(
                list(messages),
                tools=tools,
                chat_template=self._template,
                add_generation_prompt=generation_prompt,
                tokenize=False,
                **self.template_options | template_options,
            )
        except Exception as error:  # a template may raise anything
            number = getattr(error, "lineno", None)  # set for syntax errors only
            line = "" if number is None else f", line {number}"
            roles = ", ".join(message.get("role", "?") for message in messages)
            raise UserError(
                f"the chat template{line} fails on messages with the roles {roles}: {error}. Change the messages "
                "(many templates accept no system message: data.system_prompt), or set another data.chat_template"
            ) from error

    @cached_property
    def _takes_parts(self) -> bool:
        """Whether the template renders content in parts, and not as the text of a Python list."""
        parts: Any = [Message(role="user", content=[{"type": "text", "text": "marker"}])]
        try:
            found = self.tokenizer.apply_chat_template(
                parts, chat_template=self._template, tokenize=False, **self.template_options
            )
        except Exception:  # a template that expects text may raise anything
            return False
        return found == self._chat_text([Message(role="user", content="marker")], generation_prompt=False)

    @property
    def template(self) -> str:
        """The source of the chat template; empty in text format."""
        if self.prompt_format == "text":
            return ""
        return self._template or str(self.tokenizer.get_chat_template())

    def reads(self, variable: str) -> bool:
        """Return whether the chat template has a variable of this name."""
        return re.search(rf"\b{re.escape(variable)}\b", self.template) is not None

    def _check_options(self) -> None:
        unread = [name for name in self.template_options if not self.reads(name)]
        if unread:
            where = "data.prompt_format `text` uses no template" if self.prompt_format == "text" else "the template"
            raise UserError(
                f"data.chat_template_kwargs {', '.join(unread)}: {where}"
                + ("" if self.prompt_format == "text" else " has no variable of this name, so it would change nothing")
                + ": remove it, or set another data.chat_template"
            )

    def _find_stop_tokens(self, generation_config: GenerationConfig | None) -> tuple[int, ...]:
        found = [self.tokenizer.eos_token_id]
        eos = getattr(generation_config, "eos_token_id", None)
        found += eos if isinstance(eos, list | tuple) else [eos]
        if self.prompt_format == "chat":
            found.append(self._turn_end())
        stop_token_ids = tuple(dict.fromkeys(token for token in found if token is not None))
        if not stop_token_ids:
            raise UserError(
                "the tokenizer has no eos token, so no completion could end: set eos_token in tokenizer_config.json "
                "or eos_token_id in generation_config.json"
            )
        return stop_token_ids

    def _turn_end(self) -> int | None:
        """Return the special token that the template writes after an assistant's message, if there is one."""
        marker = "marker"
        conversation = [Message(role="user", content="a"), Message(role="assistant", content=marker)]
        try:
            text = self._chat_text(conversation, generation_prompt=False)
        except UserError as error:
            if hasattr(error.__cause__, "lineno"):
                raise  # a syntax error fails for every conversation
            return None  # the template accepts a single turn only
        _, found, after = text.rpartition(marker)
        token_ids = self.encode(after.lstrip()) if found else []
        return token_ids[0] if token_ids and token_ids[0] in self.tokenizer.added_tokens_decoder else None


def _read_template(tokenizer: PreTrainedTokenizerBase, prompt_format: str, file: str | None) -> str | None:
    """Return the text of the template file; None stands for the tokenizer's own template."""
    if prompt_format == "text":
        if file is not None:
            raise UserError("data.chat_template is set, but data.prompt_format `text` uses no template: remove one")
        return None
    if file is None:
        if not tokenizer.chat_template:
            raise UserError(
                f"the tokenizer {tokenizer.name_or_path or ''} has no chat template: set data.prompt_format to `text` "
                "(base models), or data.chat_template to a Jinja file"
            )
        return None
    return _read_file(file)


def with_template(tokenizer: Any, file: str | None) -> Any:
    """Return the tokenizer with the chat template in `file`, if there is one, so that it is saved with it.

    Raises:
        UserError: the file is unreadable.
    """
    if file is None:
        return tokenizer
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = _read_file(file)
    return changed


def _read_file(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.chat_template {file}: cannot be read ({error})") from None


def _default_bos(tokenizer: Any) -> int | None:
    """Return the bos token if the tokenizer puts one before plain text by default."""
    bos = tokenizer.bos_token_id
    return bos if bos is not None and list(tokenizer("a")["input_ids"])[:1] == [bos] else None


def _plain_text(messages: Sequence[Message], tools: list[Any] | None) -> str:
    if tools:
        raise UserError("data.prompt_format `text` cannot show tools to the policy: use `chat`")
    parts: list[str] = []
    for message in messages:
        content: Any = message.get("content") or ""
        for part in [{"text": content}] if isinstance(content, str) else content:
            if part.get("text") is None:
                raise UserError(f"data.prompt_format `text` cannot show a part with {', '.join(part)}: use `chat`")
            parts.append(part["text"])
    return "".join(parts)
