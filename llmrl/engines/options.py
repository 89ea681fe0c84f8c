"""Options of the engine that samples from the policy."""

from __future__ import annotations

from typing import Literal

from llmrl.engines.vllm.options import VllmConfig, VllmServerConfig
from llmrl.option import Count, option


@option
class EngineConfig:
    """Which engine samples, and how it runs."""

    engine: Literal["hf", "vllm", "vllm_server"] = "hf"
    """`hf`: this project's own sampler, in the trainer's process. `vllm`: vLLM beside the trainer, on its devices.
    `vllm_server`: vLLM servers, on this machine or on others."""
    vllm: VllmConfig | None = None
    """Options of both vLLM engines."""
    server: VllmServerConfig | None = None
    """Which servers to use, with `vllm_server`."""
    max_num_seqs: Count = 128
    """Completions an engine decodes together. As soon as one finishes, the next waiting request takes its place."""

    def findings(self) -> list[str]:
        """Return what contradicts itself in these options: one line each, with the full path of the option."""
        return self._vllm_findings() + self._server_findings()

    def _vllm_findings(self) -> list[str]:
        if self.vllm is None:
            return []
        if self.engine == "hf":
            return ["rollout.vllm is set, but rollout.engine hf does not read it: remove it, or choose engine vllm"]
        found = []
        if self.engine == "vllm_server":
            if self.vllm.weight_transfer != "auto":
                found.append(
                    f"rollout.vllm.weight_transfer {self.vllm.weight_transfer} is for engine vllm: vllm_server reads "
                    "rollout.server.weight_transfer"
                )
            if self.vllm.enable_sleep_mode:
                found.append(
                    "rollout.vllm.enable_sleep_mode is for engine vllm: servers do not share their GPUs with the "
                    "learner, so remove it"
                )
        return found

    def _server_findings(self) -> list[str]:
        if self.server is None:
            return []
        found = []
        if self.engine != "vllm_server":
            found.append(
                f"rollout.server is set, but rollout.engine {self.engine} does not read it: remove it, or choose "
                "engine vllm_server"
            )
        found += [
            f"rollout.server.urls: {url!r} is not an address such as http://node5:8000"
            for url in self.server.urls
            if not url.startswith(("http://", "https://"))
        ]
        if twice := sorted({url for url in self.server.urls if self.server.urls.count(url) > 1}):
            found.append(f"rollout.server.urls names {', '.join(twice)} twice: name each server once")
        return found


def staleness_findings(options: EngineConfig, max_staleness: int) -> list[str]:
    """Return the engine options that do not go with generating ahead, one line each with the full path.

    Args:
        options: of the engine.
        max_staleness: `rollout.max_staleness`, the versions that generation may run ahead of the learner.
    """
    vllm = options.vllm
    if vllm is None or max_staleness == 0 or options.engine == "hf":
        return []
    found = []
    if vllm.enable_sleep_mode:
        found.append(
            "rollout.vllm.enable_sleep_mode lends the GPU to the learner while it updates, which is when "
            f"rollout.max_staleness {max_staleness} generates: choose one"
        )
    if vllm.on_update == "abort":
        found.append(
            f"rollout.vllm.on_update abort throws away what rollout.max_staleness {max_staleness} has generated ahead, "
            "whenever new weights come: use keep or wait"
        )
    return found
