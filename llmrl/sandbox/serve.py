"""An HTTP server around the local sandbox: POST /run_code, with SandboxFusion's request and reply."""

from __future__ import annotations

import argparse
import os
from typing import Any

from llmrl.json_server import Client, Guard, JsonServer, Refused, add_arguments, guard_of
from llmrl.sandbox import BoxDied, Limits, Sandbox, SandboxUnavailable, open_sandbox

MAX_SECONDS = 120.0
MAX_MEMORY_MB = 16_384.0


def answer(box: Sandbox, request: dict[str, Any]) -> dict[str, Any]:
    """Run the program of one request and return SandboxFusion's answer.

    Args:
        box: where the program runs.
        request: `code`, `language` (`python`), `stdin`, `run_timeout` (seconds), `memory_limit_MB`. Larger limits than
            this server's are lowered to them.

    Raises:
        Refused: it is no such request.
    """
    if request.get("language", "python") not in ("python", "pytest"):
        return {"status": "SandboxError", "message": "only python is served", "run_result": None}
    seconds = min(_number(request, "run_timeout", 10.0), MAX_SECONDS)
    memory = round(min(_number(request, "memory_limit_MB", 0.0), MAX_MEMORY_MB))
    if not isinstance(request.get("code"), str) or not isinstance(request.get("stdin") or "", str):
        raise Refused(422, "not a run_code request: `code` (and `stdin`, if given) must be text")
    limits = Limits(
        cpu_seconds=max(1, round(seconds)), wall_seconds=seconds, memory_mb=memory if memory > 0 else Limits().memory_mb
    )
    try:
        end = box.run(str(request["code"]), str(request.get("stdin") or ""), limits)
    except BoxDied as error:
        return {"status": "Failed", "message": str(error), "run_result": _result("Error", 1, 0.0, "", str(error))}
    except SandboxUnavailable as error:
        return {"status": "SandboxError", "message": str(error), "run_result": None}
    state = {"ok": "Finished", "timeout": "TimeLimitExceeded"}.get(end.status, "Error")
    stderr = end.stderr + (f"{end.detail}\n" if end.detail else "")
    if end.status == "error":
        stderr = f"Traceback (most recent call last):\n{stderr}"
    code = None if end.status == "timeout" else end.exit_code
    return {
        "status": "Success" if end.status == "ok" else "Failed",
        "message": "",
        "compile_result": None,
        "run_result": _result(state, code, end.cpu_seconds, end.stdout, stderr),
        "executor_pod_name": None,
        "files": {},
    }


def _number(request: dict[str, Any], name: str, usual: float) -> float:
    value = request.get(name) or usual
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise Refused(422, f"not a run_code request: {name} must be a number from 0 on")
    return float(value) or usual


def _result(state: str, code: int | None, seconds: float, stdout: str, stderr: str) -> dict[str, Any]:
    return {"status": state, "return_code": code, "execution_time": seconds, "stdout": stdout, "stderr": stderr}


def make_server(box: Sandbox, host: str = "127.0.0.1", port: int = 0, guard: Guard | None = None) -> JsonServer:
    """Return a server that is ready for `serve_forever`; port 0 means any free port."""

    def run_code(request: dict[str, Any], client: Client) -> dict[str, Any]:
        return answer(box, request)

    return JsonServer(guard or Guard(host=host, port=port), {"/run_code": run_code})


def main(argv: list[str] | None = None) -> int:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(prog="serve_sandbox", description=__doc__)
    add_arguments(parser, port=8080, max_concurrency=os.cpu_count() or 1)
    parser.add_argument("--sandbox", choices=("auto", "bwrap", "lite"), default="auto")
    arguments = parser.parse_args(argv)
    guard = guard_of(arguments)
    box = open_sandbox(arguments.sandbox)
    server = make_server(box, guard=guard)
    print(f"{box.describe()}\nserving {server.url}/run_code", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()
        box.close()
    return 0
