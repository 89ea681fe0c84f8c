"""`llmrl serve`: vLLM servers for the model of a recipe, in the foreground, until interrupted."""

from __future__ import annotations

import json
import signal
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from llmrl.errors import UserError

if TYPE_CHECKING:
    from llmrl.engines.vllm.launch import ServerProcesses

USAGE = """usage: llmrl serve RECIPE.yaml [--print_command] [--field value ...]

Start vLLM servers for the model of a recipe, ready for `rollout.engine vllm_server`, and stop them when interrupted.
Any field of the recipe can be given, dotted; the ones that matter here:
  --model.path, --model.dtype, --model.lora.r   what is served
  --rollout.server.num_replicas, .host, .port, .gpus   how many, and where
  --rollout.vllm.tensor_parallel_size, .max_model_len, ...   how each one runs
  --print_command   print the commands instead, for another launcher (slurm, kubernetes ...)"""


def run(argv: list[str]) -> int:
    """Run the command: block until interrupted, then return exit code 0.

    Raises:
        UserError: the arguments are wrong, vLLM cannot serve the model here, or a port or a GPU is missing.
        RunFailed: a server ended and could not be restarted.
    """
    from llmrl.config import parse
    from llmrl.engines.vllm.launch import ServerProcesses, check_model, is_loopback, plan
    from llmrl.engines.vllm.options import VllmConfig, VllmServerConfig
    from llmrl.option import MISSING

    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    only_print = "--print_command" in argv
    config = parse([a for a in argv if a != "--print_command"], prog="llmrl serve RECIPE.yaml")
    if config.model.path == MISSING:
        raise UserError("llmrl serve: model.path is not set: name a recipe, or give --model.path")
    launches = plan(config.model, config.rollout)
    if only_print:
        print("\n".join(launch.shell() for launch in launches))
        return 0
    check_model(config.model)
    options, vllm = config.rollout.server or VllmServerConfig(), config.rollout.vllm or VllmConfig()
    folder = Path(config.train.output_dir) / "servers"
    processes = ServerProcesses(launches, folder, max_restarts=options.max_restarts, say=say)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        processes.start().wait_until_ready(vllm.start_timeout_s)
        urls = processes.urls
        if not is_loopback(options.host):  # for the machines that train
            urls = [url.replace("127.0.0.1", socket.gethostname()) for url in urls]
        say(f"train with: --rollout.engine vllm_server --rollout.server.urls '{json.dumps(urls)}'")
        _keep_up(processes)
    except KeyboardInterrupt:
        say("stopping the servers")
    finally:
        processes.close()
    return 0


def say(text: str) -> None:
    """Print a line at once, so that it shows even if the output goes to a file."""
    print(text, flush=True)


def _keep_up(processes: ServerProcesses) -> None:
    """Restart servers that end, until interrupted."""
    while True:
        for url in processes.urls:
            processes.revive(url)
        time.sleep(1)


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
