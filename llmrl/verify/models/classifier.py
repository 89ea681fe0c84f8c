"""Reward models: conversations in, one number each out; from a sequence classifier on a device of its own, or a server.

A server is asked in the words of vLLM's `/classify` (`vllm serve MODEL --runner pooling`):

    POST URL    {"model": NAME, "messages": [...], "use_activation": false}
    reply       {"data": [{"probs": [SCORE]}]}
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from llmrl.errors import UserError
from llmrl.types import Message, Score

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor

T = TypeVar("T")
R = TypeVar("R")
Conversation = list[Message]
CHARACTERS_PER_TOKEN = 100
"""Text beyond max_length times this is not even tokenised."""


def load_classifier(path: str, *, device: str | None, dtype: str) -> tuple[Any, Any]:
    """A sequence classifier with one output, ready to score, and its tokenizer.

    Args:
        path: hub id or folder.
        device: such as `cuda:1`; by default the current accelerator, or the CPU.
        dtype: of the weights.

    Raises:
        UserError: there is no such model, or it has more than one output.
    """
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(path)
        model = AutoModelForSequenceClassification.from_pretrained(path, dtype=getattr(torch, dtype))
    except (OSError, ValueError) as error:
        raise UserError(f"reward model {path!r}: cannot be loaded: {error}") from error
    if model.config.num_labels != 1:
        raise UserError(f"reward model {path!r}: has {model.config.num_labels} outputs, a reward needs exactly one")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return model.to(torch.device(device) if device else found or torch.device("cpu")).eval(), tokenizer


def batches_by_length(sequences: Sequence[Sequence[int]], max_tokens: int) -> Iterator[list[int]]:
    """Places of sequences of like length, the longest first, so many at a time as fit `max_tokens` (with padding)."""
    order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))
    while order:
        count = max(1, max_tokens // max(1, len(sequences[order[0]])))
        yield order[:count]
        order = order[count:]


def pad_right(sequences: Sequence[list[int]], pad: int, *, device: Any = "cpu") -> Int[Tensor, "B T"]:
    """Token ids as one rectangle; `pad` fills the rows up."""
    import torch

    width = max(map(len, sequences))
    return torch.tensor([ids + [pad] * (width - len(ids)) for ids in sequences], device=device)


class Together(Generic[T, R]):
    """A function of many items that callers share: what is asked for while it computes waits, and is asked together.

    Args:
        compute: items in, as many results out; called on a thread.
    """

    def __init__(self, compute: Callable[[list[T]], Sequence[R]]) -> None:
        self.compute = compute
        self._waiting: list[tuple[list[T], asyncio.Future[list[R]]]] = []
        self._worker: asyncio.Task[None] | None = None

    async def __call__(self, items: list[T]) -> list[R]:
        """Their results, in order."""
        future: asyncio.Future[list[R]] = asyncio.get_running_loop().create_future()
        self._waiting.append((items, future))
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        return await future

    async def _work(self) -> None:
        while self._waiting:
            taken, self._waiting = self._waiting, []
            everything = [item for items, _ in taken for item in items]
            try:
                results = iter(await asyncio.to_thread(self.compute, everything))
            except Exception as error:
                for _, future in taken:
                    if not future.done():
                        future.set_exception(error)
                continue
            for items, future in taken:
                result = [next(results) for _ in items]
                if not future.done():
                    future.set_result(result)


class RewardModel:
    """A sequence classifier with one output, as `trl.RewardTrainer` trains and saves it.

    Conversations that are asked for while a batch is computed wait and form the next one, so groups of rollouts that
    finish at about the same time share a forward pass.

    Args:
        path: hub id or folder.
        device: such as `cuda:1`; by default the current accelerator, or the CPU.
        dtype: of the weights.
        max_length: tokens of a conversation; longer ones are cut off at the end.
        max_tokens: tokens (padding included) of one forward pass.

    Raises:
        UserError: there is no such model, or it has more than one output.
    """

    def __init__(self, path: str, *, device: str | None, dtype: str, max_length: int, max_tokens: int) -> None:
        self.model, self.tokenizer = load_classifier(path, device=device, dtype=dtype)
        self.device = self.model.device
        self.max_length, self.max_tokens = max_length, max_tokens
        self._together = Together(self.scores)

    def encode(self, conversation: Conversation) -> list[int]:
        """Token ids: rendered with the chat template; without one, the contents one after the other and eos."""
        if self.tokenizer.chat_template:
            text = self.tokenizer.apply_chat_template(conversation, tokenize=False)
            ids = self.tokenizer(self._short(text), add_special_tokens=False)["input_ids"]
        else:
            text = "".join(str(message.get("content") or "") for message in conversation)
            ids = [*self.tokenizer(self._short(text))["input_ids"], self.tokenizer.eos_token_id]
        return ids[: self.max_length]

    def _short(self, text: str) -> str:
        # Text of a policy may hold lone surrogates, which no tokenizer takes.
        return text[: self.max_length * CHARACTERS_PER_TOKEN].encode(errors="replace").decode()

    def scores(self, sequences: Sequence[list[int]]) -> list[float]:
        """The classifier's output for each sequence; sequences of like length share a forward pass."""
        found = [0.0] * len(sequences)
        for batch in batches_by_length(sequences, self.max_tokens):
            for i, score in zip(batch, self._forward([sequences[i] for i in batch]).tolist(), strict=True):
                found[i] = score
        return found

    def _forward(self, sequences: list[list[int]]) -> Tensor:
        import torch

        ids = pad_right(sequences, self.tokenizer.pad_token_id, device=self.device)
        lengths = torch.tensor([len(ids) for ids in sequences], device=self.device)
        mask = torch.arange(ids.shape[1], device=self.device)[None] < lengths[:, None]
        with torch.inference_mode():
            return self.model(input_ids=ids, attention_mask=mask.long()).logits[:, 0].float()

    async def __call__(self, conversations: Sequence[Conversation]) -> list[float]:
        """Scores of conversations, in batches with whatever else is asked for meanwhile."""
        return await self._together([self.encode(conversation) for conversation in conversations])


class RewardServer:
    """The same over HTTP: each conversation is one request.

    Args:
        base_url: where `/classify` is, such as `http://localhost:8001`.
        model: the name the server knows it by.
    """

    def __init__(self, base_url: str, model: str, *, timeout_s: float, retries: int, max_concurrency: int) -> None:
        self.url, self.model = base_url.rstrip("/") + "/classify", model
        self.limits: dict[str, Any] = {"timeout_s": timeout_s, "retries": retries, "max_concurrency": max_concurrency}

    async def __call__(self, conversations: Sequence[Conversation]) -> list[float | Exception]:
        """Scores of conversations; in the place of one that got none, what went wrong."""
        return await asyncio.gather(*(self._one(c) for c in conversations), return_exceptions=True)  # pyright: ignore

    async def _one(self, conversation: Conversation) -> float:
        from llmrl.endpoint import EndpointError, shared_endpoint

        body = {"model": self.model, "messages": conversation, "use_activation": False}
        reply = await shared_endpoint(self.url, **self.limits).post(body)
        try:
            (score,) = reply["data"][0]["probs"]
            return float(score)
        except (KeyError, IndexError, TypeError, ValueError):
            raise EndpointError(
                f"{self.url}: expected data[0].probs with one number, found {str(reply)[:200]}"
            ) from None


Scorer = Callable[[Sequence[Conversation]], Any]


@functools.cache
def get_reward_model(
    model: str,
    *,
    base_url: str | None = None,
    device: str | None = None,
    dtype: str = "float32",
    max_length: int = 2048,
    max_tokens: int = 16384,
    timeout_s: float = 60.0,
    retries: int = 4,
    max_concurrency: int = 64,
) -> Scorer:
    """The reward model of these options, loaded once per process; with `base_url` the one that a server holds."""
    if base_url is not None:
        return RewardServer(base_url, model, timeout_s=timeout_s, retries=retries, max_concurrency=max_concurrency)
    return RewardModel(model, device=device, dtype=dtype, max_length=max_length, max_tokens=max_tokens)


async def ask(scorer: Scorer, conversations: Sequence[Conversation]) -> list[Score]:
    """What a scorer (or any function of conversations) says, as scores; a failure is the error of its conversation."""
    found = scorer(conversations)
    values = await found if asyncio.iscoroutine(found) else found
    return [
        Score(reward=None, error=f"{type(value).__name__}: {value}")
        if isinstance(value, BaseException)
        else Score(reward=None if value is None else float(value))
        for value in values
    ]
