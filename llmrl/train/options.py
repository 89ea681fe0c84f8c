"""Options of the learner and the length of a run."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from annotated_types import Ge, Lt
from pydantic import BeforeValidator

from llmrl.option import Count, Natural, NotNegative, Place, Positive, option

Decay = Annotated[float, Ge(0), Lt(1)]


def _last_if_true(value: Any) -> Any:
    """Take true for `last` and false for null, as transformers does."""
    text = str(value).lower() if isinstance(value, (bool, str)) else None
    return {"true": "last", "false": None}.get(text or "", value)


@option
class TrainConfig:
    """The optimizer, the length of the run, and what is saved."""

    output_dir: Place = "runs/default"
    """The run's folder."""
    max_steps: Count = 100
    """Batches of rollouts to train on."""
    seed: Natural = 0
    """Fixes every random number of the run."""
    learning_rate: NotNegative = 1e-6
    """AdamW's learning rate, after warm-up."""
    adam_beta1: Decay = 0.9
    """Decay of the first moment."""
    adam_beta2: Decay = 0.999
    """Decay of the second moment."""
    adam_epsilon: Positive = 1e-8
    """Added to the denominator."""
    weight_decay: NotNegative = 0.0
    """Decoupled weight decay."""
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the learning rate after `warmup_steps` of linear warm-up."""
    warmup_steps: Natural = 0
    """Optimizer steps."""
    max_grad_norm: NotNegative = 1.0
    """0 leaves the gradient as it is (its norm is still logged)."""
    max_tokens_per_micro_batch: Count | None = None
    """Tokens (padding included) in one forward pass of one process. Changes memory and speed, never the result.
    Default: 2,048 on a CPU, whose caches hold no more, 16,384 on an accelerator."""
    packing: bool = True
    """Place short sequences one after another in a row, so that rows need no padding."""
    share_prefixes: bool = True
    """Compute what a group's sequences have in common (their prompt) once, where the model allows it and it pays."""
    dropout: bool = False
    """Leave on in optimizer steps what is random in the model: its own dropout, `lora_dropout`, noise of a router. All
    other log-probabilities are computed without, so ratios then differ from 1 before anything has moved."""
    max_skipped_steps: Natural = 5
    """Optimizer steps with a non-finite gradient are skipped and recorded; more than this many stop the run."""
    save_steps: Natural = 50
    """Save a checkpoint every `save_steps` steps; 0 only at the end."""
    save_total_limit: Natural = 2
    """Older checkpoints are deleted; 0 keeps all."""
    grace_s: NotNegative = 25.0
    """SIGTERM (a scheduler, a preemption) gives the run this many seconds to finish its step and save it. Schedulers
    kill what is left 30 seconds later or so."""
    resume_from_checkpoint: Annotated[Place | None, BeforeValidator(_last_if_true)] = None
    """`last` (or true), a checkpoint folder, or a run folder (its last checkpoint). Another run's begins a branch in a
    new `output_dir`. false: start anew."""
