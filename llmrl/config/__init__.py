"""Configuration: nested dataclasses (the only defaults in the project) and the parser that fills them.

A recipe's YAML mirrors this tree and holds only what differs; any field can be given dotted on the command line
(`--train.learning_rate 2e-6`). Fields that mean what a Hugging Face or TRL field means keep its name.
Everything that can be wrong with the arguments is said here, before any model loads.
"""

from llmrl.config.adapters import LoraConfig
from llmrl.config.algo import AlgoConfig, Preset
from llmrl.config.bcoder import BCoderConfig
from llmrl.config.checks import validate
from llmrl.config.critic import CriticConfig
from llmrl.config.evaluation import EvalRun
from llmrl.config.fields import (
    MISSING,
    Config,
    DataConfig,
    EvalConfig,
    ModelConfig,
    RewardConfig,
    RolloutConfig,
    TrackConfig,
    TrainConfig,
    VerifyConfig,
)
from llmrl.config.ircoco import PrefixEvaluatorConfig
from llmrl.config.parsing import load_config, parse, save_config, to_dict
from llmrl.config.preference import LevelConfig, PairLoss, PreferenceConfig
from llmrl.config.vllm import VllmConfig
from llmrl.config.vllm_server import VllmServerConfig

__all__ = [
    "MISSING",
    "AlgoConfig",
    "BCoderConfig",
    "Config",
    "CriticConfig",
    "DataConfig",
    "EvalConfig",
    "EvalRun",
    "LevelConfig",
    "LoraConfig",
    "ModelConfig",
    "PairLoss",
    "PreferenceConfig",
    "PrefixEvaluatorConfig",
    "Preset",
    "RewardConfig",
    "RolloutConfig",
    "TrackConfig",
    "TrainConfig",
    "VerifyConfig",
    "VllmConfig",
    "VllmServerConfig",
    "load_config",
    "parse",
    "save_config",
    "to_dict",
    "validate",
]
