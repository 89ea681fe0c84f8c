"""Post-training of language models by reinforcement learning.

`import llmrl` is light: names are loaded when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmrl.config import Config, load_config
    from llmrl.errors import LlmrlError, RunFailed, UserError
    from llmrl.run.trainer import Trainer
    from llmrl.types import Rollout, RolloutGroup, Score, Task
    from llmrl.verify.rubric import Part, Rubric

__version__ = "0.1.0"

_HOME = {
    "Config": "config",
    "load_config": "config",
    "LlmrlError": "errors",
    "RunFailed": "errors",
    "UserError": "errors",
    "Trainer": "run.trainer",
    "Rollout": "types",
    "RolloutGroup": "types",
    "Score": "types",
    "Task": "types",
    "Part": "verify.rubric",
    "Rubric": "verify.rubric",
}

__all__ = [
    "Config",
    "LlmrlError",
    "Part",
    "Rollout",
    "RolloutGroup",
    "Rubric",
    "RunFailed",
    "Score",
    "Task",
    "Trainer",
    "UserError",
    "load_config",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'llmrl' has no attribute {name!r}")
    return getattr(import_module(f"llmrl.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
