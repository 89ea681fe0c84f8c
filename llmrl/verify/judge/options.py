"""Options of a judge: the mapping in a recipe in, checked settings out."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any, Literal

from llmrl.errors import UserError


@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """Which judge to ask, how it samples, what it may cost. In a recipe: the mapping under a reward's `args.judge`."""

    base_url: str
    """For example http://localhost:8000/v1; requests go to base_url/chat/completions."""
    model: str
    api_key_env: str | None = None
    """Name of the environment variable that holds the key; None sends no key."""
    temperature: float = 0.0
    max_output_tokens: int = 1024
    extra_body: dict[str, Any] = field(default_factory=dict)
    """Further request fields, such as {"chat_template_kwargs": {"enable_thinking": false}}; null removes a field."""
    structured: bool = True
    """Request decoding constrained to the answer's JSON schema. If the server refuses, later requests leave it out."""
    top_logprobs: int = 20
    """Alternatives whose log-probabilities a decision reads; servers have a limit (vLLM: --max-logprobs)."""
    timeout_s: float = 120.0
    """Seconds per attempt."""
    retries: int = 5
    """Further attempts of a request that fails (connection, timeout, 429, 5xx) while the judge answers others."""
    outage_budget_s: float = 600.0
    """Seconds for which the judge may answer nobody, as while it is restarted. Requests wait that long; then they are
    abstentions."""
    format_retries: int = 2
    """Further attempts after an answer that cannot be read; each states what was wrong with the answer."""
    max_concurrency: int = 32
    """Requests in flight at once, per process."""
    max_chars: int = 60_000
    """The middle of a longer text is cut out before the judge sees it."""
    cache_dir: str | None = None
    """Folder that caches readable replies by the content of the request, for all runs. None: no cache."""
    ledger_file: str | None = None
    """File that records each call, so a budget holds across ranks and restarts. None: count in this process only."""
    input_price: float = 0.0
    """Cost of a million input tokens, in any currency."""
    output_price: float = 0.0
    """Cost of a million output tokens, in the same currency."""
    budget_tokens: int | None = None
    """Input plus output tokens after which the run stops."""
    budget_cost: float | None = None
    """Cost after which the run stops; needs prices."""
    canary_rate: float = 0.02
    """Canaries (cases with a known verdict) per paid question."""
    canary_max_failure: float = 0.2
    """Largest share of wrong canaries at which the judge is still trusted."""
    canary_min_count: int = 20
    """Draw no conclusion from fewer canaries than this."""
    on_canary_failure: Literal["error", "warn"] = "error"
    """Stop the run, or warn once."""

    def __post_init__(self) -> None:
        found = []
        if not self.base_url.startswith(("http://", "https://")):
            found.append(f"base_url is {self.base_url!r}: give a URL such as http://localhost:8000/v1")
        if self.api_key_env is not None and not os.environ.get(self.api_key_env):
            found.append(f"api_key_env: the environment variable {self.api_key_env} is not set")
        if self.budget_cost is not None and not (self.input_price or self.output_price):
            found.append(
                "budget_cost is set, but input_price and output_price are 0, so the cost stays 0: set the prices"
            )
        if self.on_canary_failure not in ("error", "warn"):
            found.append(f"on_canary_failure is {self.on_canary_failure!r}: use error or warn")
        if not 0 <= self.canary_rate <= 1:
            found.append(f"canary_rate is {self.canary_rate}: must lie between 0 and 1")
        if self.max_concurrency < 1 or self.timeout_s <= 0 or self.retries < 0 or self.format_retries < 0:
            found.append("max_concurrency and timeout_s must be above 0, retries and format_retries at least 0")
        if self.top_logprobs < 1:
            found.append(f"top_logprobs is {self.top_logprobs}: must be at least 1")
        if self.outage_budget_s < 0:
            found.append(f"outage_budget_s is {self.outage_budget_s}: must be at least 0")
        if found:
            raise UserError("judge:\n" + "\n".join(f"  - {line}" for line in found))
