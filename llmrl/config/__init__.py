"""Configuration: the options of a run, put together from the packages that read them, and the parser that fills them.

A recipe's YAML mirrors this tree and holds only what differs; any option can be given dotted on the command line
(`--train.learning_rate 2e-6`). Options that mean what a Hugging Face or TRL option means keep its name. Whatever can be
wrong with the arguments is reported here, all findings at once, before any model loads.
"""

from llmrl.config.config import (
    PRESETS,
    AlgorithmOptions,
    Config,
    EvalConfig,
    OfflineEvalConfig,
    RunConfig,
    check,
    complete,
    findings,
)
from llmrl.config.evaluation import EvalRun
from llmrl.config.parsing import from_dotted, load_config, parse, preset, save_config, to_dict
from llmrl.data.options import DataConfig, PreferenceData, PreferenceRows, RowsConfig, TaskRows
from llmrl.engines.vllm.options import VllmConfig, VllmServerConfig
from llmrl.model.options import AdapterCritic, LoraConfig, ModelConfig, SeparateCritic, SharedCritic
from llmrl.option import MISSING
from llmrl.rollout.options import BatchConfig, RolloutConfig, SamplingConfig
from llmrl.track.options import TrackConfig
from llmrl.train.options import TrainConfig
from llmrl.verify.options import RewardConfig, VerifyConfig

__all__ = [
    "MISSING",
    "PRESETS",
    "AdapterCritic",
    "AlgorithmOptions",
    "BatchConfig",
    "Config",
    "DataConfig",
    "EvalConfig",
    "EvalRun",
    "LoraConfig",
    "ModelConfig",
    "OfflineEvalConfig",
    "PreferenceData",
    "PreferenceRows",
    "RewardConfig",
    "RolloutConfig",
    "RowsConfig",
    "RunConfig",
    "SamplingConfig",
    "SeparateCritic",
    "SharedCritic",
    "TaskRows",
    "TrackConfig",
    "TrainConfig",
    "VerifyConfig",
    "VllmConfig",
    "VllmServerConfig",
    "check",
    "complete",
    "findings",
    "from_dotted",
    "load_config",
    "parse",
    "preset",
    "save_config",
    "to_dict",
]  # fmt: skip
