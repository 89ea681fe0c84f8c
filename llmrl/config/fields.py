"""The options of a run and their defaults, but for those of the algorithm (`algo.py`) and its critic (`critic.py`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from llmrl.config.adapters import LoraConfig
from llmrl.config.algo import AlgoConfig
from llmrl.config.bcoder import BCoderConfig
from llmrl.config.critic import CriticConfig
from llmrl.config.preference import PreferenceConfig
from llmrl.config.vllm import VllmConfig
from llmrl.config.vllm_server import VllmServerConfig

MISSING = "???"
"""Stands for a required field that nobody has set."""


@dataclass
class ModelConfig:
    """The policy."""

    path: str = "???"
    """Hub id, local folder, or `tiny:ARCH` (a small random model with a byte tokenizer, to try things offline)."""
    revision: str | None = None
    tokenizer: str | None = None
    """Hub id or folder of the tokenizer, where it is not the model's own."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type the weights are held in. float32 with `accelerate`'s mixed precision keeps master weights."""
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3"] = "sdpa"
    trust_remote_code: bool = False
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    lora: LoraConfig | None = None
    """Train adapters instead of the whole model."""


@dataclass
class DataConfig:
    """Where tasks come from. Rows become tasks: a prompt the policy sees, an answer it does not."""

    path: str = "???"
    """A hub id, with the dataset's configuration after a colon where it has several (`openai/gsm8k:main`); or a local
    .json / .jsonl / .csv / .parquet file, a folder of such files, or one written by `datasets.save_to_disk`."""
    split: str = "train"
    """Of a hub dataset or a folder; a folder's split is its file of that name."""
    prompt_column: str | None = None
    """Column with the prompt (text or messages). Default: the first of messages, prompt, question, problem, text."""
    answer_column: str | None = None
    """Column with the hidden answer. Default: the first of answer, solution, target. `none` where rewards need none."""
    system_prompt: str | None = None
    prompt_template: str | None = None
    """Wraps a text prompt; `{prompt}` stands for it, any other `{column}` for that column, `{{...}}` for braces."""
    prompt_format: Literal["chat", "text"] = "chat"
    """`chat` renders messages with the tokenizer's chat template; `text` gives the prompt to the model as it is."""
    chat_template: str | None = None
    """A Jinja file to use instead of the tokenizer's own chat template."""
    limit: int | None = None
    """Use the first so many rows only."""
    shuffle: bool = True
    """A fresh seeded order each epoch."""
    max_prompt_length: int | None = None
    """Tasks with longer prompts (tokens) are left out at start-up; how many is said."""


@dataclass
class RolloutConfig:
    """How completions are drawn."""

    engine: Literal["hf", "vllm", "vllm_server"] = "hf"
    """`hf`: the sampler of this project, in the trainer's process. `vllm`: vLLM beside the trainer, on its devices.
    `vllm_server`: vLLM servers, on this machine or on others."""
    vllm: VllmConfig | None = None
    """Options of the vLLM engines."""
    server: VllmServerConfig | None = None
    """Which servers, with `vllm_server`."""
    num_prompts: int = 16
    """P: tasks per step, over all processes."""
    num_generations: int = 8
    """G: rollouts of each task, the group."""
    max_completion_length: int = 512
    """Tokens per rollout."""
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps the whole vocabulary. Training needs the full support (top_p 1, top_k 0): see `validate`."""
    max_staleness: int = 0
    """Generate ahead while the learner updates: rollouts may be up to so many policy versions old when they are trained
    on. 0: strictly on-policy, generation and training take turns."""
    max_num_seqs: int = 128
    """Rows an engine decodes together; a finished row's place goes to the next waiting one."""


@dataclass
class RewardConfig:
    """One reward function. The first one with weight > 0 is the accuracy that pass@k and filters look at."""

    fn: str = "???"
    """`rewards/file.py:function`, `package.module:function`, or the name of an installed `llmrl.rewards` entry."""
    weight: float = 1.0
    """0 logs it without training on it."""
    args: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments fixed for the whole run."""
    gate: str | None = None
    """Name of another reward: this one counts only where that one is above 0."""
    scale: tuple[float, float] | None = None
    """[low, high]: the value is mapped from there to [0, 1] and clipped before it is weighted."""
    time_limit_s: float = 20.0
    """Per call, for rewards that run in the pool of worker processes."""


@dataclass
class VerifyConfig:
    """How rewards are computed."""

    num_workers: int | None = None
    """Worker processes for CPU-bound rewards. Default: the cores of this machine shared by its training processes."""
    memory_limit_gb: float = 4.0
    """Address space of each worker process."""
    max_unscored_frac: float = 0.05
    """The run stops when more than this share of a step's rollouts could not be scored because something failed."""


@dataclass
class TrainConfig:
    """The optimizer, the length of the run, and what is saved."""

    output_dir: str = "runs/default"
    max_steps: int = 100
    """Batches of rollouts to train on."""
    seed: int = 0
    learning_rate: float = 1e-6
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    weight_decay: float = 0.0
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "constant"
    """After `warmup_steps` of linear warm-up."""
    warmup_steps: int = 0
    """Optimizer steps."""
    max_grad_norm: float = 1.0
    """0 leaves the gradient as it is (its norm is still logged)."""
    max_tokens_per_micro_batch: int | None = None
    """Tokens (padding included) in one forward pass of one process. Changes memory and speed, never the result.
    Default: 2,048 on a CPU, whose caches hold no more, 16,384 on an accelerator."""
    packing: bool = True
    """Lay short sequences behind each other in a row, so that rows need no padding."""
    share_prefixes: bool = True
    """Compute what a group's sequences have in common (their prompt) once, where the model allows it and it pays."""
    max_skipped_steps: int = 5
    """Optimizer steps with a non-finite gradient are skipped and recorded; more than this many stop the run."""
    save_steps: int = 50
    """A checkpoint every so many steps; 0 only at the end."""
    save_total_limit: int = 2
    """Older checkpoints are deleted; 0 keeps all."""
    resume_from_checkpoint: str | None = None
    """`last`, or a checkpoint folder."""


@dataclass
class EvalConfig:
    """Evaluation on held-out tasks while training."""

    data: DataConfig | None = None
    steps: int = 0
    """Evaluate every so many steps (and at the end); 0 never."""
    num_generations: int = 1
    temperature: float = 0.0
    """0 is greedy."""


@dataclass
class TrackConfig:
    """What is written and shown. metrics.jsonl and rollouts.jsonl are always written."""

    report_to: list[str] = field(default_factory=list)
    """Trackers of accelerate: tensorboard, wandb, trackio, mlflow ..."""
    project: str = "llmrl"
    run_name: str | None = None
    save_rollouts: Literal["all", "sample", "none"] = "all"
    """rollouts.jsonl: every rollout, the first group of each step, or nothing."""
    console: Literal["auto", "rich", "plain", "quiet"] = "auto"
    """`auto`: rich on a terminal, plain lines elsewhere."""


@dataclass
class Config:
    """One run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    rewards: list[RewardConfig] = field(default_factory=list)
    verify: VerifyConfig = field(default_factory=VerifyConfig)
    algo: AlgoConfig = field(default_factory=AlgoConfig)
    critic: CriticConfig | None = None
    """Read by algorithms with a value function (ppo, vapo)."""
    preference: PreferenceConfig | None = None
    """Read by the DPO family (`algo.name` dpo, online_dpo, kto ...)."""
    bcoder: BCoderConfig | None = None
    """Read by `algo.name bcoder`."""
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    track: TrackConfig = field(default_factory=TrackConfig)
