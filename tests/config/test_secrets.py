"""Keys and passwords never get into a configuration, nor into what is said about it."""

from __future__ import annotations

from typing import Any

import pytest

from llmrl.config import Config, DataConfig, ModelConfig, RewardConfig, RolloutConfig, VllmServerConfig
from llmrl.config.config import check
from llmrl.config.secrets import findings
from llmrl.errors import UserError

SECRET = "s3cr3t-value"


@pytest.mark.parametrize(
    "args",
    [
        {"judge": {"base_url": f"https://user:{SECRET}@host/v1", "model": "m"}},
        {"judge": {"base_url": f"https://{SECRET}@host/v1", "model": "m"}},
        {"judge": {"base_url": "http://host/v1", "model": "m", "api_key": SECRET}},
        {"judges": [{"extra_headers": {"Authorization": f"Bearer {SECRET}"}}]},
        {"hf_token": SECRET},
        {"openai_api_key": SECRET},
        {"APIKEY": SECRET},
        {"password": SECRET},
    ],
)
def test_a_secret_is_refused_and_not_repeated(args: dict[str, Any]) -> None:
    config = Config(
        model=ModelConfig(path="m"),
        data=DataConfig(path="d"),
        rewards=[RewardConfig(fn="rewards/judge.py:judge", args=args)],
    )
    with pytest.raises(
        UserError, match=r"rewards\[0\]\.args\.\S+ holds (a key|an address with a password), which"
    ) as refused:
        check(config)
    assert SECRET not in str(refused.value)


def test_addresses_of_servers_are_looked_at_too() -> None:
    urls = ["http://ok:8000", f"http://me:{SECRET}@node:8000"]
    rollout = RolloutConfig(engine="vllm_server", server=VllmServerConfig(urls=urls))
    (found,) = findings(Config(rollout=rollout))
    assert found.startswith("rollout.server.urls[1] holds an address with a password") and SECRET not in found


@pytest.mark.parametrize(
    "args",
    [
        {"judge": {"base_url": "http://host:8000/v1", "model": "me@host", "api_key_env": "OPENAI_API_KEY"}},
        {"pad_token": "<pad>", "max_tokens": "5", "token": "x", "key": "answer", "separator": "a@b"},
        {"api_key": ""},
        {"api_key": None},
        {"prompt": "write to http://example.com/@me or a@b.com"},
    ],
)
def test_what_is_no_secret_passes(args: dict[str, Any]) -> None:
    assert findings(Config(rewards=[RewardConfig(fn="f.py:f", args=args)])) == []
