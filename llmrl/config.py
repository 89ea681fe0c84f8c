"""Configuration: nested dataclasses (the only defaults in the project) and the parser that fills them.

A recipe's YAML mirrors this tree and holds only what differs; any field can be given dotted on the command line
(`--train.learning_rate 2e-6`). Fields that mean what a Hugging Face or TRL field means keep its name.
Everything that can be wrong with the arguments is said here, before any model loads.
"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from llmrl.errors import UserError


@dataclass
class LoraConfig:
    """Low-rank adapters (peft). The reference model is the same network with its adapter switched off."""

    r: int = 16
    """Rank."""
    lora_alpha: float = 32
    """The update is scaled by lora_alpha / r (by lora_alpha / sqrt(r) with use_rslora)."""
    lora_dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"
    """Names (or a regular expression) of layers that get an adapter; `all-linear`: every linear layer but the head."""
    use_rslora: bool = False
    use_dora: bool = False


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

    engine: Literal["hf"] = "hf"
    """`hf`: the sampler of this project, in the trainer's process."""
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
    max_num_seqs: int = 128
    """Rows decoded together by the `hf` engine; a finished row's place goes to the next waiting one."""


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


Preset = Literal[
    "grpo", "dr_grpo", "dapo", "lite_ppo", "gspo", "gspo_token", "luspo", "gmpo", "cispo", "sapo", "vespo", "clip_cov",
    "kl_cov", "rloo", "opo", "remax", "optimal_token", "reinforce_pp", "reinforce_pp_baseline", "gdpo", "passk", "thr",
    "nthr", "c_grpo",
]  # fmt: skip


@dataclass
class AlgoConfig:
    """What turns rewards into a gradient. A field left out has the value of the preset that `name` names.

    An option that the other choices leave without a reader stays None, and giving it is an error.
    """

    name: Preset = "grpo"
    """The preset: a row of `llmrl/algo/presets.py`. What is given below wins over it."""
    baseline: (
        Literal["group", "batch", "none", "leave_one_out", "length_weighted", "greedy", "optimal_token", "passk"] | None
    ) = None
    """What is subtracted from a reward: its group's mean, the batch's mean, nothing; the mean of the others (RLOO); the
    mean weighted by length (OPO); the greedy completion's reward (ReMax); one per token (optimal token baseline); or
    the analytic pass@k advantage."""
    scale_rewards: Literal["group", "batch", "none"] | None = None
    """... and what it is divided by: the standard deviation of its group, of the batch, or nothing (Dr. GRPO)."""
    batch_std_of: Literal["raw", "centred"] | None = None
    """The batch's deviation is that of the rewards, or of the rewards less the baseline."""
    whiten_advantages: bool | None = None
    """Then shift and scale all tokens' advantages of the batch to mean 0, deviation 1 (REINFORCE++)."""
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] | None = None
    """Several rewards: add them up, or standardise each in its group first and the sum over the batch (GDPO)."""
    passk_k: int | None = None
    """k of the pass@k advantage."""
    passk_mix: float | None = None
    """Share of the pass@k advantage; the rest is the group-standardised one."""
    rubric_alpha: float | None = None
    """C-GRPO: share of the rubric part in the reward of correct rollouts; 0 takes the reward as it is."""
    rubric_norm: Literal["none", "group_max", "group_max_correct"] | None = None
    """C-GRPO: the rubric part is divided by the group's largest (the paper), that of correct rollouts, or not."""
    overlong_buffer: float | None = None
    """Soft punishment of length: over this last share of max_completion_length the reward falls by 1; 0 is off."""
    mask_truncated_completions: bool | None = None
    """Leave truncated rollouts out of the loss and its denominators; their rewards still enter the baselines."""
    dynamic_sampling: bool | None = None
    """Draw further tasks in place of groups whose accuracies are all equal, until the batch is full."""
    dynamic_sampling_max_batches: int | None = None
    """... at most so many times num_prompts tasks; then groups without signal fill the rest."""
    policy_loss: Literal["clip", "cispo", "sapo", "gmpo", "vespo", "clip_cov", "kl_cov"] | None = None
    """The loss of a token, as a function of its probability ratio and advantage."""
    importance_sampling_level: Literal["token", "sequence", "sequence_token"] | None = None
    """The ratio is a token's, the geometric mean over its sequence (GSPO), or that with a token's gradient."""
    loss_type: Literal["grpo", "dapo", "dr_grpo", "sequence_sum", "prompt_mean"] | None = None
    """Aggregation of token losses: mean of sequence means, mean over all tokens, sum over B * max_completion_length,
    mean of sequence sums, or mean over prompts of their token means."""
    epsilon: float | None = None
    """The ratio stops mattering below 1 - epsilon (gmpo: the log-ratio beyond +- epsilon)."""
    epsilon_high: float | None = None
    """... and above 1 + epsilon_high (default: the preset's, else epsilon)."""
    delta: float | None = None
    """Two-sided clipping: the ratio of tokens with negative advantage is capped here too; above 1 + epsilon_high."""
    dual_clip: float | None = None
    """Dual clipping: a token with negative advantage loses at most dual_clip * |A|; above 1."""
    max_ratio: float | None = None
    """cispo: the weight of a token is its ratio, at most this (an absolute cap)."""
    sapo_temperature_pos: float | None = None
    """sapo: steepness of the soft gate for positive advantages."""
    sapo_temperature_neg: float | None = None
    vespo_k_pos: float | None = None
    """vespo: weight W^k exp(lambda (1 - W)) of the sequence ratio W, for positive and negative advantages."""
    vespo_lambda_pos: float | None = None
    vespo_k_neg: float | None = None
    vespo_lambda_neg: float | None = None
    cov_fraction: float | None = None
    """clip_cov, kl_cov: share of the batch's tokens with a high covariance that is held back."""
    kl_cov_coef: float | None = None
    """kl_cov: weight of |logprobs - old_logprobs| on those tokens."""
    off_policy_mask_threshold: float | None = None
    """Drop sequences of negative advantage whose mean log(sampler / policy) exceeds this (nats; try 0.5). None: off."""
    beta: float | None = None
    """Weight of the KL penalty to the reference model; 0 needs no reference."""
    kl_in: Literal["loss", "reward"] | None = None
    """The penalty is a term of the loss, or is subtracted from the reward."""
    kl_estimator: Literal["k1", "k2", "k3", "abs"] | None = None
    """Per-token estimator. k1 belongs in the reward, the others in the loss."""
    use_bias_correction_kl: bool | None = None
    """Multiply the penalty by the (differentiated) ratio: unbiased when the batch is off-policy."""
    kl_target: float | None = None
    """Adapt beta so that the measured KL (nats per token) stays near this; unset: constant."""
    kl_horizon: int | None = None
    """Rollouts over which an adaptive beta changes by a factor of about e^0.2."""
    entropy_coef: float | None = None
    """Weight of the mean token entropy, which the loss then raises."""
    top_entropy_quantile: float | None = None
    """Policy loss on this share of the tokens only, those with the highest entropy; 1 is all."""
    token_weighting: Literal["none", "thr", "nthr"] | None = None
    """Token Hidden Reward: reweight advantages by each token's influence on the correct responses' likelihood."""
    thr_p: float | None = None
    """thr: factor 1 + p on tokens that raise it, 1 - p on those that lower it: above 0 exploits, below 0 explores."""
    thr_p_end: float | None = None
    """thr: p moves linearly to here over `thr_p_steps` (default: thr_p)."""
    thr_p_steps: int | None = None
    thr_threshold: Literal["nthr_min", "mean", "quantile", "none"] | None = None
    """Tokens whose |score| is not above it get no advantage (thr): scale * least mean score of a correct response;
    scale * the mean of those; the quantile `thr_threshold_value` of |score|; or no threshold."""
    thr_threshold_value: float | None = None
    nthr_eta: float | None = None
    """nthr: factor on the selected tokens of incorrect responses (default: 2 |0.5 - success rate|)."""
    num_iterations: int | None = None
    """Passes over each batch of rollouts."""
    num_mini_batches: int | None = None
    """Optimizer steps per pass; groups are dealt out whole."""


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
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    track: TrackConfig = field(default_factory=TrackConfig)


MISSING = "???"


def validate(config: Config) -> None:
    """Check what types cannot say: required fields, ranges, and settings that contradict each other.

    Raises:
        UserError: with the field, its value, and the fix. All findings are listed, not only the first.
    """
    from llmrl.algo.presets import contradictions

    c, found = config, contradictions(config)

    def check(ok: bool, message: str) -> None:
        if not ok:
            found.append(message)

    check(c.model.path != MISSING, "model.path is not set: give a hub id or a local folder")
    check(c.data.path != MISSING, "data.path is not set: give a hub id or a local file")
    check(bool(c.rewards), "rewards is empty: name at least one, such as `fn: rewards/math_answer.py:math_answer`")
    for i, reward in enumerate(c.rewards):
        check(reward.fn != MISSING, f"rewards[{i}].fn is not set")
        check(reward.time_limit_s > 0, f"rewards[{i}].time_limit_s is {reward.time_limit_s}: must be above 0")
    positive = {
        "rollout.num_prompts": c.rollout.num_prompts,
        "rollout.max_completion_length": c.rollout.max_completion_length,
        "rollout.max_num_seqs": c.rollout.max_num_seqs,
        "train.max_steps": c.train.max_steps,
        "train.max_tokens_per_micro_batch": _given(c.train.max_tokens_per_micro_batch, 1),
        "eval.num_generations": c.eval.num_generations,
    }
    for name, value in positive.items():
        check(value >= 1, f"{name} is {value}: must be at least 1")
    at_least_zero = {
        "train.learning_rate": c.train.learning_rate,
        "train.warmup_steps": c.train.warmup_steps,
        "train.max_grad_norm": c.train.max_grad_norm,
        "train.save_steps": c.train.save_steps,
        "train.save_total_limit": c.train.save_total_limit,
        "eval.steps": c.eval.steps,
        "eval.temperature": c.eval.temperature,
    }
    for name, value in at_least_zero.items():
        check(value >= 0, f"{name} is {value}: must not be negative")
    check(
        c.rollout.temperature > 0,
        f"rollout.temperature is {c.rollout.temperature}: greedy rollouts are all alike and carry no signal; use 1.0",
    )
    check(
        c.rollout.top_p == 1.0 and c.rollout.top_k == 0,
        f"rollout.top_p {c.rollout.top_p} / top_k {c.rollout.top_k} cut the support that rollouts are drawn from, "
        "which biases every probability ratio by the mass cut off; train with top_p 1 and top_k 0",
    )
    check(
        0 <= c.verify.max_unscored_frac <= 1,
        f"verify.max_unscored_frac is {c.verify.max_unscored_frac}: must lie between 0 and 1",
    )
    check(
        c.eval.steps == 0 or c.eval.data is not None,
        "eval.steps is set but eval.data is not: say where the held-out tasks come from (eval.data.path)",
    )
    if c.eval.data is not None:
        check(c.eval.data.path != MISSING, "eval.data.path is not set")
        check(c.eval.steps > 0, "eval.data is set but eval.steps is 0, so it would never be used: set eval.steps")
    if found:
        raise UserError("configuration:\n" + "\n".join(f"  - {line}" for line in found))


def _given(value: Any, otherwise: Any) -> Any:
    return otherwise if value is None else value


def load_config(argv: list[str] | None = None, *, config_class: type = Config, prog: str | None = None) -> Any:
    """Parse `--config FILE.yaml` and dotted overrides, and validate the result.

    Args:
        argv: the arguments after the program's name; default sys.argv[1:].
        config_class: `Config`, or a recipe's subclass of it with further fields.
        prog: program name shown in `--help`.

    Returns:
        An instance of `config_class`. `--help` and `--print_config` print and exit 0.

    Raises:
        UserError: unknown field, wrong type, missing file, contradiction; the message names file, line and field.
    """
    config = parse(argv, config_class=config_class, prog=prog)
    validate(config)
    return config


def parse(argv: list[str] | None = None, *, config_class: type = Config, prog: str | None = None) -> Any:
    """`load_config` without the final check of what types cannot say."""
    from jsonargparse import ArgumentError, ArgumentParser, Namespace, set_parsing_settings

    argv = list(sys.argv[1:] if argv is None else argv)
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(prog=prog, exit_on_error=False, allow_abbrev=False, description=config_class.__doc__)
    parser.add_argument("--config", action="config", help="YAML file with any of the fields below")
    parser.add_class_arguments(config_class, None)
    try:
        namespace = parser.parse_args(argv)
    except ArgumentError as error:
        raise UserError(_explain(str(error), argv)) from None
    namespace.pop("config", None)
    config = parser.instantiate(Namespace(**vars(namespace)))
    return config_class(**{f.name: config[f.name] for f in dataclasses.fields(config_class)})


def _explain(message: str, argv: list[str]) -> str:
    """Add file and line of the offending YAML key to a parser message, where one can be found."""
    files = [argv[i + 1] for i, a in enumerate(argv[:-1]) if a == "--config"]
    files += [a.split("=", 1)[1] for a in argv if a.startswith("--config=")]
    for file in files:
        if not Path(file).is_file():
            return f"--config {file}: no such file"
        for line, dotted in _yaml_keys(Path(file)):
            if f'"{dotted}"' in message or f"'{dotted}'" in message or f"'{dotted.split('.')[-1]}'" in message:
                return f"{file}, line {line}, field {dotted}: {message}"
    return message


def _yaml_keys(file: Path) -> list[tuple[int, str]]:
    """(line, dotted key) of every key in a YAML file, deepest first."""
    import yaml

    try:
        root = yaml.compose(file.read_text())
    except yaml.YAMLError:
        return []
    found: list[tuple[int, str]] = []

    def walk(node: Any, prefix: str) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                walk(value, f"{prefix}{key.value}.")
                found.append((key.start_mark.line + 1, f"{prefix}{key.value}"))
        elif isinstance(node, yaml.SequenceNode):
            for value in node.value:
                walk(value, prefix)

    walk(root, "")
    return found


def to_dict(config: Any) -> dict[str, Any]:
    """The resolved configuration as plain values, ready for YAML or JSON."""
    return dataclasses.asdict(config)


def save_config(config: Any, file: str | Path) -> None:
    """Write the resolved configuration as YAML; `load_config(["--config", file])` gives it back."""
    import yaml

    Path(file).write_text(yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True))
