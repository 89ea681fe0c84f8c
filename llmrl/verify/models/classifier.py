"""Reward models: conversations go in, one number each comes out, from a sequence classifier here or from a server.

The server's protocol is that of vLLM's `/classify` (`vllm serve MODEL --runner pooling`):

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
"""Text beyond this many characters for each of `max_length` tokens is dropped before it is tokenized."""


def load_classifier(path: str, *, device: str | None, dtype: str) -> tuple[Any, Any]:
    """Load a sequence classifier with one output and its tokenizer.

    Args:
        path: hub id or folder.
        device: such as `cuda:1`; by default the current accelerator, or the CPU if there is none.
        dtype: data type of the weights.

    Returns:
        The model, ready to score, and the tokenizer.

    Raises:
        UserError: the model cannot be loaded, or it does not have exactly one output.
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
    """Yield the indices of sequences of similar length, longest first, as many at a time as fit `max_tokens`.

    Padding counts. A single sequence that is longer than `max_tokens` is a batch of its own.
    """
    order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))
    while order:
        count = max(1, max_tokens // max(1, len(sequences[order[0]])))
        yield order[:count]
        order = order[count:]


def pad_right(sequences: Sequence[list[int]], pad: int, *, device: Any = "cpu") -> Int[Tensor, "B T"]:
    """Return token ids as one rectangle, with `pad` at the end of shorter rows."""
    import torch

    width = max(map(len, sequences))
    return torch.tensor([ids + [pad] * (width - len(ids)) for ids in sequences], device=device)


class SharedBatches(Generic[T, R]):
    """Lets concurrent callers share the batches of a function: items that arrive while it computes form the next batch.

    Args:
        compute: takes items and returns a result for each; called in a thread.
    """

    def __init__(self, compute: Callable[[list[T]], Sequence[R]]) -> None:
        self.compute = compute
        self._waiting: list[tuple[list[T], asyncio.Future[list[R]]]] = []
        self._worker: asyncio.Task[None] | None = None

    async def __call__(self, items: list[T]) -> list[R]:
        """Return the results of `items`, in order."""
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

    Concurrent calls share batches: conversations that arrive while a batch is computed form the next one, so groups of
    rollouts that finish at about the same time share a forward pass.

    Args:
        path: hub id or folder.
        device: such as `cuda:1`; by default the current accelerator, or the CPU if there is none.
        dtype: data type of the weights.
        max_length: most tokens of a conversation; longer ones are cut off at the end.
        max_tokens: most tokens of one forward pass, including padding.

    Raises:
        UserError: the model cannot be loaded, or it does not have exactly one output.
    """

    def __init__(self, path: str, *, device: str | None, dtype: str, max_length: int, max_tokens: int) -> None:
        self.model, self.tokenizer = load_classifier(path, device=device, dtype=dtype)
        self.device = self.model.device
        self.max_length, self.max_tokens = max_length, max_tokens
        self._shared = SharedBatches(self.scores)

    def encode(self, conversation: Conversation) -> list[int]:
        """Return the tokens of a conversation: its chat template, or without one its contents joined, and eos."""
        if self.tokenizer.chat_template:
            text = self.tokenizer.apply_chat_template(conversation, tokenize=False)
            ids = self.tokenizer(self._short(text), add_special_tokens=False)["input_ids"]
        else:
            text = "".join(str(message.get("content") or "") for message in conversation)
            ids = [*self.tokenizer(self._short(text))["input_ids"], self.tokenizer.eos_token_id]
        return ids[: self.max_length]

    def _short(self, text: str) -> str:
        # Text from a policy may hold lone surrogates, which tokenizers do not accept.
        return text[: self.max_length * CHARACTERS_PER_TOKEN].encode(errors="replace").decode()

    def scores(self, sequences: Sequence[list[int]]) -> list[float]:
        """Return the classifier's output for each sequence; sequences of similar length share a forward pass."""
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
        """Return the scores of conversations, which share batches with those of concurrent calls."""
        return await self._shared([self.encode(conversation) for conversation in conversations])


class RewardServer:
    """Scores conversations on a server, with one request for each.

    Args:
        base_url: address of the server, such as `http://localhost:8001`; `/classify` is added.
        model: name of the model on the server.
        timeout_s: limit of one attempt, in seconds.
        retries: further attempts after a transport failure.
        max_concurrency: limit on concurrent requests.
    """

    def __init__(self, base_url: str, model: str, *, timeout_s: float, retries: int, max_concurrency: int) -> None:
        self.url, self.model = base_url.rstrip("/") + "/classify", model
        self.limits: dict[str, Any] = {"timeout_s": timeout_s, "retries": retries, "max_concurrency": max_concurrency}

    async def __call__(self, conversations: Sequence[Conversation]) -> list[float | Exception]:
        """Return the score of each conversation, or the exception if it has none."""
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
    """Return the reward model with these options, loaded once per process; with `base_url`, the one on that server."""
    if base_url is not None:
        return RewardServer(base_url, model, timeout_s=timeout_s, retries=retries, max_concurrency=max_concurrency)
    return RewardModel(model, device=device, dtype=dtype, max_length=max_length, max_tokens=max_tokens)


async def ask(scorer: Scorer, conversations: Sequence[Conversation]) -> list[Score]:
    """Return the results of a scorer (or any function of conversations) as scores; an exception becomes an error."""
    found = scorer(conversations)
    values = await found if asyncio.iscoroutine(found) else found
    return [
        Score(reward=None, error=f"{type(value).__name__}: {value}")
        if isinstance(value, BaseException)
        else Score(reward=None if value is None else float(value))
        for value in values
    ]
