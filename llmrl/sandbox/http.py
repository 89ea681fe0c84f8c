"""A remote sandbox with the run-code protocol of SandboxFusion (POST /run_code).

The protocol can only run whole programs, so for each call a session sends its program with all requests so far and
reads the last answer. That takes one HTTP request per call and is correct for deterministic programs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llmrl.sandbox import wire
from llmrl.sandbox.limits import Conventions, Limits, RunResult, SandboxUnavailable, Status
from llmrl.sandbox.session import ProgramEnded, Session

_HERE = Path(__file__).parent
_PACKAGE = __name__.rpartition(".")[0]
_GUEST = ("rich", "wire", "conventions", "driver")
_RETRIES = 2
_EXTRA_SECONDS = 30.0
"""Time the server may take on top of the program's wall time, for its queue."""
_GLUE = """
import sys, types
for name, source in {modules!r}:
    module = sys.modules[name] = types.ModuleType(name)
    module.__path__ = []
    parent, _, child = name.rpartition(".")
    parent and setattr(sys.modules[parent], child, module)
    exec(compile(source, name, "exec"), module.__dict__)
"""
_COMPILE_ERROR = "compile error: "
_SCRIPT = """
def report(message):
    kind, _, text = message.get("compile_error") or message["error"]
    print(({compile_error!r} if "compile_error" in message else "") + f"{{kind}}: {{text}}", file=sys.stderr)
module.conventions.complete_python()
code = module.run_script({request!r}, report)
sys.stderr.flush()
module.os._exit(code)
"""


class HttpSandbox:
    """Runs programs on a run-code server.

    Args:
        address: address of the server, such as http://host:8080 (`/run_code` is added).

    Raises:
        SandboxUnavailable: the server does not run a first program.
    """

    def __init__(self, address: str) -> None:
        base = address.rstrip("/")
        self.url = base if base.endswith("/run_code") else f"{base}/run_code"
        modules = [(name, "") for name in ("llmrl", _PACKAGE)]
        modules += [(f"{_PACKAGE}.{name}", (_HERE / f"{name}.py").read_text()) for name in _GUEST]
        self._glue = _GLUE.format(modules=modules)
        if self.run("print(6 * 7)", "", Limits()).stdout != "42\n":
            raise SandboxUnavailable(f"{self.url} does not run programs: print(6 * 7) did not give 42")

    def describe(self) -> str:
        """Return one line that names the box in use and what it consists of."""
        return f"sandbox http: programs run on {self.url}, under the limits of that server"

    def run(self, source: str, stdin: str, limits: Limits, conventions: Conventions = "python") -> RunResult:
        """Run a program from standard input to standard output.

        Raises:
            SandboxUnavailable: the server cannot be reached or reports a failure of its own.
        """
        script = _SCRIPT.format(request={"source": source, "conventions": conventions}, compile_error=_COMPILE_ERROR)
        return self._run(self._glue + script, stdin, limits)

    def replay(self, requests: str, limits: Limits) -> RunResult:
        """Answer the requests of a session, the first of which holds the program."""
        return self._run(f"{self._glue}module.replay()\n", requests, limits)

    def _run(self, script: str, stdin: str, limits: Limits) -> RunResult:
        result = self._post(script, stdin, limits)
        stderr = str(result.get("stderr") or "")
        code = result.get("return_code")
        return RunResult(
            status=_status(result, stderr),
            exit_code=code if isinstance(code, int) else 1,
            stdout=str(result.get("stdout") or "")[: limits.output_mb << 20],
            stderr=stderr[-4000:],
            detail=_last_line(stderr).removeprefix(_COMPILE_ERROR)[:500],
            cpu_seconds=float(result.get("execution_time") or 0.0),
            seconds=float(result.get("execution_time") or 0.0),
        )

    def open(self, source: str, limits: Limits) -> Session:
        """Return a session in which functions of the program can be called, once it is loaded."""
        return Session(_Replay(self, limits), lambda: None)

    def close(self) -> None:
        """Do nothing: there are no boxes or connections to close."""

    def _post(self, code: str, stdin: str, limits: Limits) -> dict[str, Any]:
        body = {
            "code": code,
            "language": "python",
            "stdin": stdin,
            "run_timeout": limits.wall_seconds,
            "compile_timeout": limits.wall_seconds,
            "memory_limit_MB": limits.memory_mb,
        }
        answer = self._send(body, limits.wall_seconds + _EXTRA_SECONDS)
        result = answer.get("run_result")
        if answer.get("status") not in ("Success", "Failed") or not isinstance(result, dict):
            raise SandboxUnavailable(f"{self.url}: {answer.get('status')}: {str(answer.get('message'))[:500]}")
        return result

    def _send(self, body: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        # Imported here, because a local sandbox works without the packages of the HTTP client.
        from llmrl.endpoint import EndpointError, post_json
        from llmrl.json_server import key_headers

        options = {"headers": key_headers(), "timeout_s": timeout_s, "retries": _RETRIES, "retried_status": ()}
        try:
            return post_json(self.url, body, **options)
        except EndpointError as error:
            raise SandboxUnavailable(f"the sandbox does not answer: {error}") from error


def _status(result: dict[str, Any], stderr: str) -> Status:
    if result.get("status") == "TimeLimitExceeded":
        return "timeout"
    if result.get("status") == "Finished" and result.get("return_code") == 0:
        return "ok"
    return "compile_error" if _last_line(stderr).startswith(_COMPILE_ERROR) else "error"


def _last_line(text: str) -> str:
    """Return what a program's error output ends with, without the exit code that `serve` adds."""
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("exit code ")]
    return lines[-1] if lines else ""


class _Replay:
    """An Exchange that sends all requests so far each time and returns the last answer."""

    calls_back = False

    def __init__(self, box: HttpSandbox, limits: Limits) -> None:
        self.box, self.limits = box, limits
        self.requests: list[dict[str, Any]] = []
        self._seconds = 0.0

    def next_test(self) -> None:
        """Do nothing: the server limits each request anew."""

    @property
    def seconds(self) -> float:
        """The time that the server reports for all requests."""
        return self._seconds

    def __call__(self, request: dict[str, Any]) -> dict[str, Any]:
        self.requests.append(request)
        end = self.box.replay(json.dumps(self.requests), self.limits)
        self._seconds += end.cpu_seconds
        if end.status == "timeout":
            raise ProgramEnded("timeout", "time limit")
        try:
            return wire.load(end.stdout.encode())
        except wire.BadValue:
            how = end.detail or f"exit code {end.exit_code}"
            raise ProgramEnded("error", f"the program ended by itself ({how})") from None
