"""The configuration of a judge: a recipe's mapping in, checked settings out."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any, Literal

from llmrl.errors import UserError


@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """Which judge, how it samples, and what it may cost. In a recipe: the mapping under `args.judge` of a reward."""

    base_url: str
    """Such as http://localhost:8000/v1; requests go to base_url/chat/completions."""
    model: str
    api_key_env: str | None = None
    """Name of the environment variable with the key; None sends none."""
    temperature: float = 0.0
    max_output_tokens: int = 1024
    extra_body: dict[str, Any] = field(default_factory=dict)
    """Further fields of the request, such as {"chat_template_kwargs": {"enable_thinking": false}}; null removes one."""
    structured: bool = True
    """Ask for decoding constrained to the answer's JSON schema; a server that refuses is asked without from then on."""
    timeout_s: float = 120.0
    """Per attempt."""
    retries: int = 5
    """Further attempts after a transport failure: connection, timeout, 429, 5xx."""
    format_retries: int = 2
    """Further attempts after an answer that cannot be read, each telling the judge what was wrong with it."""
    max_concurrency: int = 32
    max_chars: int = 60_000
    """Longer texts lose their middle before they are shown to the judge."""
    cache_dir: str | None = None
    """Where readable replies are kept by content, for all runs; None asks again each time."""
    ledger_file: str | None = None
    """Where each call is recorded; a budget then holds over ranks and restarts. None counts in this process only."""
    input_price: float = 0.0
    """Cost of a million input tokens, in any currency."""
    output_price: float = 0.0
    budget_tokens: int | None = None
    """Input plus output tokens after which the run stops."""
    budget_cost: float | None = None
    canary_rate: float = 0.02
    """Known cases per paid question."""
    canary_max_failure: float = 0.2
    """Above this share of wrong canaries the judge is not to be trusted."""
    canary_min_count: int = 20
    """No conclusion from fewer."""
    on_canary_failure: Literal["error", "warn"] = "error"

    def __post_init__(self) -> None:
        found = []
        if not self.base_url.startswith(("http://", "https://")):
            found.append(f"base_url is {self.base_url!r}: give a URL such as http://localhost:8000/v1")
        if self.api_key_env is not None and not os.environ.get(self.api_key_env):
            found.append(f"api_key_env: the environment variable {self.api_key_env} is not set")
        if self.budget_cost is not None and not (self.input_price or self.output_price):
            found.append(
                "budget_cost is set but input_price and output_price are 0, so nothing would ever cost anything"
            )
        if self.on_canary_failure not in ("error", "warn"):
            found.append(f"on_canary_failure is {self.on_canary_failure!r}: use error or warn")
        if not 0 <= self.canary_rate <= 1:
            found.append(f"canary_rate is {self.canary_rate}: must lie between 0 and 1")
        if self.max_concurrency < 1 or self.timeout_s <= 0 or self.retries < 0 or self.format_retries < 0:
            found.append("max_concurrency and timeout_s must be above 0, retries and format_retries not negative")
        if found:
            raise UserError("judge:\n" + "\n".join(f"  - {line}" for line in found))
