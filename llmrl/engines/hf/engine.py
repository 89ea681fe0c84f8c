"""The `hf` engine: samples from a transformers checkpoint in the caller's process, with continuous batching.

Prompt token ids and a `Sampling` in, a `Completion` out as soon as that row is finished.
"""

from __future__ import annotations

import asyncio
import warnings
from collections import deque
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal, Protocol, cast

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from llmrl.engines.hf.fast import FastDecoder
from llmrl.engines.hf.generic import GenericDecoder
from llmrl.engines.hf.rows import BAD_LOGITS, RUNNING, STOP, Request, RowState
from llmrl.engines.hf.weights import unsupported_reason
from llmrl.engines.sampling import SamplingRows, check_sampling, check_tokens, sample_tokens
from llmrl.errors import RunFailed, UserError
from llmrl.model.attention import caps_scores
from llmrl.model.positions import SHORTEN, longest_exact
from llmrl.model.precision import compute_in
from llmrl.model.rounding import draw, rounding_errors
from llmrl.noise import Gap, Limit
from llmrl.types import Adapter, Completion, Sampling, WeightSource

if TYPE_CHECKING:
    from transformers import PretrainedConfig


SELF_CHECK_PARAMETERS = 50_000_000
"""Up to this size, a new engine compares its fast decoder with transformers."""
CHECKED_LENGTH = 32
"""Tokens of each of the two sequences that are compared."""
ADMITTED_TOKENS = 4096
"""Tokens of prompts that are computed before others on the event loop have their turn."""
MORE_DRAWS = 8
"""Rounding errors drawn when the decoder looks wrong, before it is called wrong."""


class Decoder(Protocol):
    """What the engine needs of a decoder. Rows are numbered 0..N-1 without gaps, new ones at the end."""

    shapes: dict[str, tuple[int, ...]]

    def admit(self, prompts: Sequence[tuple[int, ...]]) -> Float[Tensor, "n V"]: ...
    def step(self, tokens: Int[Tensor, " N"]) -> Float[Tensor, "N V"]: ...
    def remove(self, finished: list[int], target: list[int], source: list[int]) -> None: ...
    def logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]: ...
    def in_memory(self, weights: Iterable[tuple[str, Tensor]]) -> Iterable[tuple[str, Tensor]]: ...
    def load(self, name: str, tensor: Tensor) -> None: ...
    def finish_load(self) -> None: ...
    def holds(self, name: str, tensor: Tensor) -> bool: ...
    def drop_prefixes(self) -> None: ...
    def reset(self) -> None: ...


class HFEngine:
    """An `Engine` over a transformers model of this process, with its own copy of the weights.

    Up to `max_num_seqs` rows decode together; the slot of a finished row goes to the next waiting request, in the order
    of submission. Work happens in one asyncio task that runs while there are requests and yields to the event loop
    between steps. The same submissions in the same order give the same bits.

    Weights that arrive while requests run are used from the next step on: those requests keep the keys and values
    computed so far, and their `policy_version` spans both. Requests admitted later see only the new weights.

    Args:
        config: transformers' configuration of the model.
        weights: the first weights, served as version 0.
        max_num_seqs: rows decoded together.
        dtype: type in which the weights are held and used.
        device: where the engine runs.
        attn_implementation: attention kernel of the generic decoder.
        decoder: `fast` is this project's decoder for the Llama family; `generic` runs transformers' own model; `auto`
            takes the fast one if it supports every feature of the configuration, otherwise the generic one. Either is
            first compared with a plain forward pass of transformers on a short sequence; the fast one only up to 50
            million parameters, because its comparison needs a second model.
        max_model_len: longest prompt + completion in tokens; default the model's limit. A sliding window that is longer
            than this does not rule out the fast decoder.

    Raises:
        UserError: `decoder="fast"` for a configuration that it does not support.
        RunFailed: `weights` do not fit the configuration, or the decoder fails its comparison with transformers.
    """

    takes_adapters = False
    quantized = False

    def __init__(
        self,
        config: PretrainedConfig,
        *,
        weights: WeightSource,
        max_num_seqs: int = 128,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        attn_implementation: str = "sdpa",
        decoder: Literal["auto", "fast", "generic"] = "auto",
        max_model_len: int | None = None,
    ) -> None:
        if max_num_seqs < 1:
            raise UserError(f"max_num_seqs is {max_num_seqs}: must be at least 1")
        text_config = config.get_text_config()
        wanted = (max_model_len, getattr(text_config, "max_position_embeddings", None), longest_exact(config))
        limits = [n for n in wanted if n is not None]
        self.max_model_len = min(limits) if limits else None
        self.vocab_size = text_config.vocab_size
        self.max_num_seqs = max_num_seqs
        self.device = device
        self.dtype = dtype
        self.limit: Limit | None = None
        self.version = 0
        self._attn_implementation = "eager" if caps_scores(config) else attn_implementation
        self._decoder: Decoder = self._build_decoder(config, dtype, decoder)
        self._rows: list[Request] = []
        self._waiting: deque[Request] = deque()
        self._state = RowState(device)
        self._settings = SamplingRows.build([], device)
        self._task: asyncio.Task[None] | None = None
        self._broken: str | None = None
        self._load(weights)
        self._self_check(config, dtype, weights, decoder)

    async def generate(self, prompt_ids: list[int], sampling: Sampling, *, session: str) -> Completion:
        """Draw one completion; see `Engine.generate`. Cancelling the call frees its row.

        Raises:
            UserError: an empty prompt, a token outside the vocabulary, an impossible setting, or prompt + max_tokens
                beyond the model's positions.
            RunFailed: logits that are not finite, or an engine that is closed or broken.
        """
        self._check_open()
        self._check_request(prompt_ids, sampling)
        future: asyncio.Future[Completion] = asyncio.get_running_loop().create_future()
        self._waiting.append(Request(tuple(prompt_ids), sampling, session, future))
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run(), name="hf engine")
        return await future

    async def logprobs(self, sequences: list[list[int]]) -> list[list[float]]:
        """Return log-probabilities (temperature 1) of each token after the first; see `Engine.logprobs`."""
        self._check_open()
        for sequence in sequences:
            check_tokens(sequence, self.vocab_size)
        with torch.inference_mode():
            return self._decoder.logprobs(sequences)

    async def load_weights(self, source: WeightSource, *, version: int) -> None:
        """Serve the weights of `source` from now on, as policy `version`.

        `source` is iterated once.

        Raises:
            RunFailed: names are missing, unexpected or wrongly shaped. The engine then serves nothing any more.
        """
        self._check_open()
        self._load(source)
        self.version = version

    async def load_adapter(self, adapter: Adapter, *, version: int) -> None:
        """Raise RunFailed: this engine takes merged weights."""
        raise RunFailed("the hf engine takes merged weights: call load_weights")

    async def differing(self, sent: WeightSource | Adapter) -> list[str]:
        """Compare every tensor that is used with `sent`; see `Engine.differing`."""
        if isinstance(sent, Adapter):
            raise RunFailed("the hf engine takes merged weights, so it holds no adapter")
        with torch.inference_mode():
            weights = self._decoder.in_memory(sent())
            return [name for name, tensor in weights if not self._decoder.holds(name, tensor.detach())]

    async def sleep(self) -> None:
        """Do nothing: this engine's weights are small next to what the learner holds."""

    async def close(self) -> None:
        """Release the model. Requests that still wait fail with RunFailed. Safe to call twice."""
        if self._broken is None:
            self._broken = "the engine is closed"
        task, self._task = self._task, None
        self._fail(RunFailed("the engine was closed before this request was finished"))
        if task is not None and not task.done() and task.get_loop() is asyncio.get_running_loop():
            task.cancel()
            await asyncio.wait([task])
        self._decoder = None  # type: ignore[assignment]

    # --- requests -------------------------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._broken is not None:
            raise RunFailed(f"no request can be served: {self._broken}")

    def _check_request(self, prompt_ids: list[int], sampling: Sampling) -> None:
        check_sampling(sampling)
        check_tokens(prompt_ids, self.vocab_size)
        total = len(prompt_ids) + sampling.max_tokens
        if self.max_model_len is not None and total > self.max_model_len:
            raise UserError(
                f"a prompt of {len(prompt_ids)} tokens and max_tokens {sampling.max_tokens} make {total}, but the "
                f"model holds {self.max_model_len} positions (beyond, they may depend on what else is in a batch): "
                f"{SHORTEN}"
            )

    # --- the step loop --------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        """Step until no request is left. An error is passed on to every caller."""
        try:
            waiting = -1
            while waiting != len(self._waiting):  # let callers that are ready submit before the first batch is formed
                waiting = len(self._waiting)
                await asyncio.sleep(0)
            while self._waiting or self._rows:
                self._drop_cancelled()
                while self._waiting and len(self._rows) < self.max_num_seqs:
                    self._admit()
                    await asyncio.sleep(0)  # judges, other engines and timers have their turn between long prompts
                    self._drop_cancelled()
                self._step()
                await asyncio.sleep(0)
        except asyncio.CancelledError:
            self._fail(RunFailed("the engine's task was cancelled: its event loop was shut down"))
            raise
        except Exception as error:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        """Drop all requests and raise `error` in their callers."""
        requests = [*self._rows, *self._waiting]
        self._rows, self._waiting = [], deque()
        if self._decoder is not None:
            self._decoder.reset()
        for request in requests:
            if not request.future.done() and not request.future.get_loop().is_closed():
                request.future.set_exception(error)

    @torch.inference_mode()
    def _step(self) -> None:
        """Draw one token for every row."""
        if self._rows:
            self._accept(self._decoder.step(self._state.last[: len(self._rows)]), first=0)

    @torch.inference_mode()
    def _drop_cancelled(self) -> None:
        if any(request.future.done() for request in self._waiting):
            self._waiting = deque(request for request in self._waiting if not request.future.done())
        cancelled = [row for row, request in enumerate(self._rows) if request.future.done()]
        if cancelled:
            self._remove(cancelled)

    @torch.inference_mode()
    def _admit(self) -> None:
        """Give free rows to waiting requests, up to `ADMITTED_TOKENS` of prompts, and sample their first token."""
        first, tokens, prompts, requests = len(self._rows), 0, set[tuple[int, ...]](), list[Request]()
        while self._waiting and first + len(requests) < self.max_num_seqs:
            prompt = self._waiting[0].prompt
            if prompt not in prompts:  # those that share a prompt are computed once, and together
                tokens += len(prompt)
                if prompts and tokens > ADMITTED_TOKENS:
                    break
                prompts.add(prompt)
            requests.append(self._waiting.popleft())
        for request in requests:
            request.oldest_version = self.version
        self._rows += requests
        self._state.append(first, [request.sampling for request in requests])
        logits = self._decoder.admit([request.prompt for request in requests])
        self._settings = SamplingRows.build([request.sampling for request in requests], self.device)
        self._accept(logits, first=first)
        self._settings = self._settings_of_rows()

    def _accept(self, logits: Float[Tensor, "n V"], *, first: int) -> None:
        """Sample the next token of rows first, first + 1, ... and return the finished ones to their callers."""
        rows = slice(first, len(self._rows))
        sampled = sample_tokens(logits, self._state.next_uniforms(rows), self._settings)
        states = self._state.record(rows, *sampled)
        if not any(states):
            return
        finished = [first + i for i, state in enumerate(states) if state != RUNNING]
        results = self._state.results(finished)
        for row, (token_ids, logprobs) in zip(finished, results, strict=True):
            request, state = self._rows[row], states[row - first]
            if state == BAD_LOGITS:
                raise RunFailed(
                    f"the model gave NaN or infinite logits for token {len(token_ids)} of the completion of session "
                    f"{request.session!r} (prompt of {len(request.prompt)} tokens, weights of version {self.version}): "
                    "the weights are broken, usually by a diverged update; lower the learning rate or train in float32"
                )
            if not request.future.done():
                finish = "stop" if state == STOP else "length"
                versions = (request.oldest_version, self.version)
                request.future.set_result(
                    Completion(token_ids=token_ids, logprobs=logprobs, finish=finish, policy_version=versions)
                )
        self._remove(finished)

    def _remove(self, finished: list[int]) -> None:
        """Free rows. The last rows move to the freed numbers, so that numbers stay without gaps."""
        remaining = len(self._rows) - len(finished)
        gone = set(finished)
        target = [row for row in finished if row < remaining]
        source = [row for row in range(remaining, len(self._rows)) if row not in gone]
        self._decoder.remove(finished, target, source)
        if target:
            self._state.move(target, source)
        for new, old in zip(target, source, strict=True):
            self._rows[new] = self._rows[old]
        del self._rows[remaining:]
        self._settings = self._settings_of_rows()

    def _settings_of_rows(self) -> SamplingRows:
        return SamplingRows.build([request.sampling for request in self._rows], self.device)

    # --- weights --------------------------------------------------------------------------------------------------

    def _build_decoder(self, config: PretrainedConfig, dtype: torch.dtype, decoder: str) -> Decoder:
        reason = unsupported_reason(config, self.max_model_len)
        if decoder == "fast" and reason is not None:
            raise UserError(f'the fast decoder does not support this model: {reason}. Use decoder="auto" or "generic"')
        if decoder == "generic" or reason is not None:
            return self._build_generic(config, dtype)
        return FastDecoder(config, dtype=dtype, device=self.device)

    def _build_generic(self, config: PretrainedConfig, dtype: torch.dtype) -> GenericDecoder:
        return GenericDecoder(config, dtype=dtype, device=self.device, attn_implementation=self._attn_implementation)

    @torch.inference_mode()
    def _load(self, source: WeightSource) -> None:
        """Replace all weights, in one pass over the source: with adapters, every tensor of it takes a merge."""
        self._broken = self._broken or "loading weights stopped halfway, so the engine holds parts of two policies"
        wrong = _copy_into(self._decoder, source())
        if wrong:
            shown = "\n  ".join(wrong[:20] + ([f"... and {len(wrong) - 20} more"] if len(wrong) > 20 else []))
            raise RunFailed(f"the weights do not fit the model that the hf engine serves:\n  {shown}")
        self._broken = None
        self._decoder.drop_prefixes()

    @torch.no_grad()
    def _self_check(self, config: PretrainedConfig, dtype: torch.dtype, weights: WeightSource, wanted: str) -> None:
        """Compare prompts, steps and whole sequences with a plain forward pass of transformers' model."""
        if self.max_model_len is not None and self.max_model_len < 4:
            return
        reference = cast("GenericDecoder", self._decoder)  # replaced below if it is a fast decoder
        if isinstance(self._decoder, FastDecoder):
            if sum(torch.Size(shape).numel() for shape in self._decoder.shapes.values()) > SELF_CHECK_PARAMETERS:
                return
            reference = self._build_generic(config, dtype)
            _copy_into(reference, weights())
        check = _SelfCheck(reference, self.vocab_size, self.max_model_len)
        try:
            gap = Gap.between(*check.compare(self._decoder))
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError) as error:
            raise RunFailed(
                f"the hf engine cannot serve {config.model_type!r}: its forward pass with a cache fails "
                f"({type(error).__name__}: {error}); use another model, or another rollout.engine"
            ) from error
        for draws in (1, MORE_DRAWS):
            limit = Limit.of(check.errors(draws))
            if limit.explains(gap):
                return
        finding = f"log-probabilities differ from transformers' plain forward pass by {limit.describe(gap)}"
        if reference is self._decoder:
            raise RunFailed(f"the hf engine cannot serve {config.model_type!r}: with a cache its {finding}")
        if wanted == "fast":
            raise RunFailed(f'the fast decoder\'s {finding}: use decoder="generic", and report this model')
        warnings.warn(f"the fast decoder's {finding}; the slower generic decoder is used instead", stacklevel=3)
        self._decoder = reference


def _copy_into(decoder: Decoder, weights: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Load weights into a decoder. Returns every name that is missing, unexpected or wrongly shaped."""
    wrong, loaded = list[str](), set[str]()
    for name, tensor in decoder.in_memory(weights):
        wanted, given = decoder.shapes.get(name), tuple(tensor.shape)
        if wanted is None:
            wrong.append(f"unexpected: {name} {given}")
        elif wanted != given:
            wrong.append(f"wrong shape: {name} {given}, expected {wanted}")
        elif not wrong:
            decoder.load(name, tensor.detach())
        loaded.add(name)
    decoder.finish_load()
    return wrong + [f"missing: {name} {shape}" for name, shape in decoder.shapes.items() if name not in loaded]


class _SelfCheck:
    """Two sequences that the model itself draws, and transformers' plain log-probabilities of their tokens."""

    def __init__(self, reference: GenericDecoder, vocab_size: int, max_length: int | None) -> None:
        self.reference = reference
        self.dtype = reference.model.dtype
        generator = torch.Generator().manual_seed(0)
        self.length = min(CHECKED_LENGTH, max_length or CHECKED_LENGTH)
        first = torch.randint(vocab_size, (2, 1), generator=generator)
        self.sequences: list[list[int]] = draw(reference.model, first, self.length, generator).tolist()
        self.wanted = self.plain()

    def plain(self) -> Float[Tensor, "2 T"]:
        with compute_in(self.dtype, self.reference.model):
            return torch.tensor([self.reference.plain_logprobs(sequence) for sequence in self.sequences])

    def errors(self, draws: int) -> Float[np.ndarray, " n"]:
        """Measure the rounding errors of the plain forward pass and of another one."""
        return rounding_errors(self, self.reference.model, lambda: self.plain().flatten(), draws=draws)

    def compare(self, decoder: Decoder) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
        """Return the decoder's log-probabilities, read whole and token by token, and the plain ones."""
        found, wanted = [torch.tensor(decoder.logprobs(self.sequences)).flatten()], [self.wanted.flatten()]
        prompts = [self.length // 2, self.length // 2 - 1]  # of unequal length, to test masks as well
        logits = decoder.admit([tuple(ids[:cut]) for ids, cut in zip(self.sequences, prompts, strict=True)])
        for offset in range(self.length - prompts[0]):
            logprobs = logits.float().log_softmax(-1).cpu()
            tokens = [ids[cut + offset] for ids, cut in zip(self.sequences, prompts, strict=True)]
            for row, (cut, token) in enumerate(zip(prompts, tokens, strict=True)):
                found.append(logprobs[row, token][None])
                wanted.append(self.wanted[row, cut + offset - 1][None])
            logits = decoder.step(torch.tensor(tokens, device=logits.device))
        decoder.reset()
        return torch.cat(found).double().numpy(), torch.cat(wanted).double().numpy()
