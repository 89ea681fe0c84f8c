"""Every value that crosses a stage boundary: prompt -> rollout -> verify -> advantage -> loss -> weight sync.

Letters: P prompts, G rollouts of one task (the group), N = P * G, L tokens of one sequence, B rows and T columns of a
packed rectangle, V vocabulary. Ragged data is a list (or a one-dimensional array), rectangular data is a Tensor.

One alignment holds everywhere: entry t of any log-probability row is log p(input_ids[t] | input_ids[<t]).
Four names, never mixed: `rollout_logprobs` (the sampler's), `old_logprobs` (the trainer's when the batch was taken),
`ref_logprobs` (the reference model's), `logprobs` (the trainer's now, with gradient).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Literal, TypedDict

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Float, Int
    from torch import Tensor


class Message(TypedDict, total=False):
    """One chat message in the OpenAI format."""

    role: str
    content: Any
    tool_calls: list[dict[str, Any]]
    tool_call_id: str
    name: str


# --- 1 prompt ---------------------------------------------------------------------------------------------------------


def content_text(content: Any) -> str:
    """Return the content of a message as text; of a list of parts, their texts together."""
    if isinstance(content, list):
        return "".join(str(part.get("text") or "") for part in content if isinstance(part, dict))
    return str(content or "")


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One unit of work: what the policy sees, and what only the verifier sees. Never mutated.

    Example: Task(id="gsm8k-3f2a91c07d15", messages=[{"role": "user", "content": "2 + 2 = ?"}], answer="4")
    """

    id: str
    """Stable across runs and machines: dataset name and a hash of the row. Resume, ledger and seeds depend on it."""
    messages: list[Message]
    """The first prompt. A row of a plain-text dataset becomes a single user message."""
    answer: Any = None
    """What the verifier compares with. Never shown to the policy."""
    meta: dict[str, Any] = field(default_factory=dict)
    """The other columns of the row (tests, rubrics, difficulty ...), passed to environments and rewards by name."""
    tools: list[Any] | None = None
    """JSON schemas that the chat template shows to the policy."""
    template_options: dict[str, Any] = field(default_factory=dict)
    """Variables that this row sets for the chat template (`enable_thinking` ...)."""
    source: str = ""
    """Which of several sources it comes from; rewards can be limited to some of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelLimits:
    """What a model can take, as far as it is known before it loads."""

    context: int | None = None
    """Positions of prompt and completion together."""
    vocab_size: int | None = None
    """Rows of its embedding."""


# --- 2 rollout --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How an engine draws the tokens of one completion.

    `seed` fixes the random numbers of this request only, so its tokens do not depend on what else is in the batch.
    """

    max_tokens: int
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps the whole vocabulary."""
    stop_token_ids: tuple[int, ...] = ()
    """Generation ends after one of these; it is part of the completion."""
    seed: int = 0


Finish = Literal["stop", "length", "abort"]


@dataclass(kw_only=True, slots=True)
class Completion:
    """What an engine returns for one request."""

    token_ids: list[int]
    """[L] sampled tokens, including the stop token."""
    logprobs: list[float]
    """[L] log-probability of each under the distribution it was drawn from (temperature applied; natural log).
    Greedy completions carry the log-probabilities at temperature 1."""
    finish: Finish
    policy_version: tuple[int, int]
    """(oldest, newest) weights that produced these tokens."""
    version_spans: list[tuple[int, int]] = field(default_factory=list)
    """(version, number of tokens) in order, such as [(3, 17), (4, 5)], from engines that know it for each token."""


class Status(StrEnum):
    """How a rollout ended. Only `completed` and the truncated ones are scored."""

    COMPLETED = "completed"
    TRUNCATED_LENGTH = "truncated_length"
    TRUNCATED_TURNS = "truncated_turns"
    TRUNCATED_PROMPT = "truncated_prompt"
    ERROR_ENV = "error_env"
    ERROR_ENGINE = "error_engine"

    @property
    def is_error(self) -> bool:
        return self.value.startswith("error")

    @property
    def is_truncated(self) -> bool:
        return self.value.startswith("truncated")


@dataclass(kw_only=True, slots=True)
class Turn:
    """One engine call and what the environment replied.

    Turn 0: P0 -> C0, replies R0; turn 1: P1 = P0 + C0 + tokens(R0) -> C1; ... Only the C's are trained on, and tokens
    are never re-made from text.
    """

    prompt_ids: list[int]
    """Exactly what the engine was given."""
    completion_ids: list[int]
    """Exactly what it returned, including the stop token."""
    rollout_logprobs: list[float]
    """One per completion token."""
    finish: Finish
    policy_version: tuple[int, int]
    """(oldest, newest) weights that produced these tokens."""
    message: Message
    """The completion as an assistant message, for rewards and people."""
    replies: list[Message] = field(default_factory=list)
    """What the environment answered (tool results, user messages). Never trained on."""
    version_spans: list[tuple[int, int]] = field(default_factory=list)
    """(version, number of tokens) in order, from engines that know it for each token."""
    seconds: dict[str, float] = field(default_factory=dict)
    prefilled: str = ""
    """How the prompt already begins the assistant's message, such as `<think>`; the completion continues it."""


@dataclass(kw_only=True, slots=True)
class Rollout:
    """A complete episode: one attempt of the policy at one task."""

    task: Task
    index: int
    """Index in its group, 0..G-1."""
    turns: list[Turn] = field(default_factory=list)
    status: Status = Status.COMPLETED
    score: Score | None = None
    """Filled by stage 3. None until then, and for rollouts that ended in an error."""
    advantage: float | list[float] | None = None
    """Filled by stage 4: one number, or one per trained token."""
    token_scores: dict[str, list[float]] = field(default_factory=dict)
    """What stage 5 measured about each trained token, for the report (Token Hidden Reward ...)."""
    env_rewards: dict[str, float] = field(default_factory=dict)
    """Reward parts that the environment itself gave."""
    error: str | None = None
    """Traceback of what went wrong, when `status` is an error."""
    ref_logprobs: np.ndarray | None = None
    """[M] float32, its trained tokens under the reference, if they were computed beforehand (for a dataset)."""
    mismatched: Rollout | None = None
    """A completion of another task behind this one's prompt, from a dataset: measured by KTO, never trained on."""

    @property
    def completion(self) -> str:
        """Return the text of the last assistant message ('' if there is none)."""
        return content_text(self.turns[-1].message.get("content")) if self.turns else ""

    @property
    def prefilled(self) -> str:
        """Return how the prompt already begins the last assistant message ('' if it does not)."""
        return self.turns[-1].prefilled if self.turns else ""

    @property
    def messages(self) -> list[Message]:
        """Return the whole conversation: the task's messages, then each turn's message and replies."""
        conversation = list(self.task.messages)
        for turn in self.turns:
            conversation += [turn.message, *turn.replies]
        return conversation

    @property
    def num_completion_tokens(self) -> int:
        return sum(len(turn.completion_ids) for turn in self.turns)


@dataclass(kw_only=True, slots=True)
class RolloutGroup:
    """The G rollouts of one task: the unit of advantage, filtering and cancellation."""

    task: Task
    rollouts: list[Rollout]
    greedy_reward: float | None = None
    """Reward of the greedy completion, if the algorithm asks for one and it could be scored."""
    position: int = 0
    """Place of its task in the run's endless sequence of tasks."""


# --- 3 verify ---------------------------------------------------------------------------------------------------------


ENVIRONMENT = "env/"
"""Beginning of the names of the parts that an environment gave. Their weight is 1."""


@dataclass(kw_only=True, slots=True)
class Score:
    """A verifier's full verdict. `reward` None means "could not judge", which is never the same as 0, "wrong".

    Three outcomes: a score (reward is a number), an abstention (reward None, error None) and an infrastructure error
    (reward None, error holds the traceback). Only scores enter a baseline.
    """

    reward: float | None
    parts: dict[str, float | None] = field(default_factory=dict)
    """Unweighted, by reward name."""
    terms: dict[str, float] = field(default_factory=dict, compare=False)
    """What each weighted part adds to the reward, before its weight: gated and scaled."""
    info: dict[str, Any] = field(default_factory=dict)
    """Details for people: the extracted answer, the failing test, the judge's reason."""
    error: str | None = None
    token_rewards: list[float] | None = None
    """Dense rewards, one per completion token, if a verifier gives them. Algorithms that reward single tokens (PPO,
    IRCoCo) use these instead of `reward`; the others (GRPO) and the metrics use `reward`."""
    turn_rewards: list[float] | None = None
    """Rewards per turn, given for its last token. The rubric turns them into token rewards."""


# --- 4 advantage, 5 loss ----------------------------------------------------------------------------------------------


@dataclass(kw_only=True, slots=True)
class Preference:
    """One rollout of a group is preferred to another. The preferred one carries this."""

    over: int
    """Index of the other rollout."""
    targets: tuple[float, float] = (0.0, 0.0)
    """What a loss over the whole batch (AOT) compares this pair with: for the preferred rollout, and for the other."""


@dataclass(kw_only=True, slots=True)
class Sample:
    """One training sequence, ragged: a rollout whose turns extend each other, or a part of one that was rewritten.

    Streams hold one entry per trained token (M of them), in order. Untrained tokens have no entry, so none can leak.

    Example, prompt [5 6], completion [7 8]:
        input_ids        [5, 6, 7, 8]
        loss_mask        [F, F, T, T]
        advantages             [A, A]
        rollout_logprobs       [log mu(7|5 6), log mu(8|5 6 7)]
    """

    input_ids: np.ndarray
    """[L] int64."""
    loss_mask: np.ndarray
    """[L] bool: the policy sampled this token and is trained on it. Never True at 0."""
    advantages: np.ndarray
    """[M] float32."""
    rollout_logprobs: np.ndarray
    """[M] float32."""
    group: int
    """Position of its RolloutGroup in the batch."""
    index: int
    """Index of its rollout in that group."""
    extras: dict[str, np.ndarray] = field(default_factory=dict)
    """Further streams [M] float32 that an algorithm prepared (returns, weights ...)."""
    old_logprobs: np.ndarray | None = None
    """[M] float32, filled by the learner if more than one optimizer step uses the batch. With bypass, it always holds
    the sampler's."""
    ref_logprobs: np.ndarray | None = None
    """[M] float32, filled by the learner if the algorithm asks for the reference."""
    preferences: list[Preference] = field(default_factory=list)
    """The rollouts of its group that this one is preferred to. If several samples share it, the first has them."""
    probe: bool = False
    """Not trained on: the algorithm reads its `old_logprobs` in `refine`, and removes it from the batch there."""

    @property
    def num_tokens(self) -> int:
        """M, the trained tokens."""
        return len(self.advantages)


@dataclass(frozen=True, kw_only=True, slots=True)
class Counts:
    """The denominators of one optimizer step, counted over all ranks and micro-batches before anything is left out.

    Therefore micro-batch size, packing, the number of processes and skipping sequences without signal change only the
    speed.
    """

    num_tokens: int
    """Trained tokens (True in a loss_mask)."""
    num_sequences: int
    """Sequences with at least one trained token."""
    num_groups: int
    max_completion_length: int
    """The configured limit; the constant that Dr. GRPO divides by."""
    num_pairs: int = 1
    """Number of preferences."""
    num_preferred_tokens: int = 1
    """Trained tokens of preferred rollouts, counted once per preference."""
    num_skipped_tokens: int = 0
    """Trained tokens of sequences without signal, which are in `num_tokens` and are not computed."""

    @property
    def num_computed_tokens(self) -> int:
        """What the mean over tokens of a metric divides by: nothing was measured on the others."""
        return max(1, self.num_tokens - self.num_skipped_tokens)


@dataclass(kw_only=True, slots=True)
class TrainBatch:
    """All samples of one step, the same on every rank."""

    samples: list[Sample]
    num_groups: int
    policy_version: int
    max_completion_length: int = 0
    """Tokens of a rollout, for losses that divide by it; 0 where none does."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Metrics measured while preparing it (fraction of groups without signal ...)."""
    groups: list[RolloutGroup] = field(default_factory=list)
    """Where the samples come from: `groups[sample.group]`."""
    sampled: bool = True
    """Whether an engine drew the tokens. If False they come from a dataset, and `rollout_logprobs` mean nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Visibility:
    """Which earlier positions of its row each position sees, in numbers per position instead of a [T, T] mask.

    `model/attention.py` makes of it what an attention kernel takes, on the device and for one pass: a mask, a block
    mask, or the boundaries of sequences.
    """

    segment_ids: Int[Tensor, "B T"]
    """Positions with different numbers do not see each other; 0 is padding."""
    branch_ids: Int[Tensor, "B T"] | None = None
    """0 in a prefix that sequences share, else the number of the branch behind it. A position sees its segment's prefix
    and its own branch. None: restarting positions keep the sequences of a row apart, and transformers sees to that."""
    causal_head: int = 0
    """This many positions at the beginning of every row see everything before them."""
    boundaries: Int[Tensor, " S+1"] | None = None
    """int32; where each sequence begins in the flattened rows, and B * T. None where sequences share a prefix."""
    longest: int = 0
    """Positions between the boundaries that are farthest apart."""
    alone: bool = False
    """Every row holds one sequence, with padding behind it at most, so that causal attention needs no mask."""


@dataclass(kw_only=True, slots=True)
class MicroBatch:
    """What one forward pass sees: packed rows, and streams over their M trained tokens.

    Two sequences [5 6 | 7] and [8 | 9] (prompt | completion) in one row of length 6:
        input_ids        [[5, 6, 7, 8, 9, 0]]
        position_ids     [[0, 1, 2, 0, 1, 0]]
        segment_ids      [[1, 1, 1, 2, 2, 0]]     0 is padding
        targets          [7, 9]
        predict_from     [1, 3]                   flat positions whose hidden state predicts the targets
        sequence_ids     [0, 1]
        sequence_lengths [1, 1]
    """

    input_ids: Int[Tensor, "B T"]
    position_ids: Int[Tensor, "B T"]
    visibility: Visibility
    """How the sequences of a row are kept apart."""
    targets: Int[Tensor, " M"]
    predict_from: Int[Tensor, " M"]
    """Index into the B * T positions: `targets[m]` is predicted by the hidden state there."""
    sequence_ids: Int[Tensor, " M"]
    """Which of this micro-batch's S sequences a trained token belongs to."""
    sequence_lengths: Int[Tensor, " S"]
    """Trained tokens of each sequence."""
    advantages: Float[Tensor, " M"]
    rollout_logprobs: Float[Tensor, " M"]
    old_logprobs: Float[Tensor, " M"] | None = None
    ref_logprobs: Float[Tensor, " M"] | None = None
    extras: dict[str, Float[Tensor, " M"]] = field(default_factory=dict)
    sample_indices: list[int] = field(default_factory=list)
    """[S] index in the batch of each sequence's sample, to return results to it."""
    samples: list[Sample] = field(default_factory=list)
    """[S] the samples themselves, for what concerns a whole sequence."""

    @property
    def segment_ids(self) -> Int[Tensor, "B T"]:
        return self.visibility.segment_ids


@dataclass(kw_only=True, slots=True)
class ForwardOutputs:
    """What the policy computed for the trained tokens of a micro-batch."""

    logprobs: Float[Tensor, " M"]
    """With gradient."""
    entropy: Float[Tensor, " M"]
    """Entropy of the next-token distribution, in nats; with gradient if the algorithm asked for it."""
    hidden: Float[Tensor, "M H"] | None = None
    """Input of the output head; without gradient, and only if the algorithm asked for it."""
    kl: Float[Tensor, " M"] | None = None
    """KL(policy || reference) of the next-token distribution, in nats; with gradient, and only if asked for."""
    values: Float[Tensor, " M"] | None = None
    """The critic's value of the state before each trained token."""
    extras: dict[str, Float[Tensor, " M"]] = field(default_factory=dict)
    """Further streams that a special policy computes (B-Coder's advantages)."""


# --- 6 weight sync ----------------------------------------------------------------------------------------------------


WeightSource = Callable[[], Iterable[tuple[str, "Tensor"]]]
"""Yields (name, full tensor) of what `save_pretrained` would write of the policy, adapters merged in. It yields one
layer at a time, so that nobody holds the model twice. Tied weights appear once, under the input embedding's name."""


@dataclass(kw_only=True, slots=True)
class Adapter:
    """Low-rank adapters as peft saves them, for engines that keep the base weights themselves."""

    config: dict[str, Any]
    """Contents of adapter_config.json."""
    tensors: dict[str, Tensor]
    """Contents of adapter_model.safetensors."""


@dataclass(kw_only=True, slots=True)
class Receipt:
    """Proof of what an engine serves after a push: its log-probabilities on a fixed probe, against the learner's."""

    version: int
    max_gap: float
    """Largest |engine - learner| log-probability over the probe tokens (nats)."""
    mean_gap: float = 0.0
    """Their mean (nats)."""
    limit: float = math.inf
    """The largest mean that rounding explains (nats)."""
    change: float
    """Largest change of the learner's probe log-probabilities since the previous push (nats)."""
    seconds: float
    """Duration of the whole push."""
    proof_seconds: float = 0.0
    """The part of it that the proof took."""
