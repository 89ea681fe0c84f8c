"""Engines that a configuration must not get."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llmrl.config import Config, RolloutConfig, VllmConfig
from llmrl.errors import UserError
from llmrl.train.engines import make_engine


@pytest.mark.parametrize("options", [None, VllmConfig(on_update="keep")])
def test_seeded_requests_are_not_kept_over_an_update_on_a_cpu(options: VllmConfig | None) -> None:
    config = Config(rollout=RolloutConfig(engine="vllm", max_staleness=1, vllm=options))
    accelerator: Any = SimpleNamespace(device=torch.device("cpu"))
    nothing: Any = None
    with pytest.raises(UserError, match=r"set rollout\.vllm\.on_update wait"):
        make_engine(config, nothing, nothing, accelerator)
