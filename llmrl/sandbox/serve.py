"""An HTTP server around the local sandbox: POST /run_code, with SandboxFusion's request and reply."""

from __future__ import annotations

import argparse
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from llmrl.sandbox import BoxDied, Limits, Sandbox, SandboxUnavailable, open_sandbox

_MAX_BODY = 64 << 20


def answer(box: Sandbox, request: dict[str, Any]) -> dict[str, Any]:
    """Run the program of one request and return SandboxFusion's answer.

    Args:
        box: where the program runs.
        request: `code`, `language` (`python`), `stdin`, `run_timeout` (seconds), `memory_limit_MB`.
    """
    if request.get("language", "python") not in ("python", "pytest"):
        return {"status": "SandboxError", "message": "only python is served", "run_result": None}
    seconds = float(request.get("run_timeout") or 10.0)
    memory = int(request.get("memory_limit_MB") or 0)
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


def _result(state: str, code: int | None, seconds: float, stdout: str, stderr: str) -> dict[str, Any]:
    return {"status": state, "return_code": code, "execution_time": seconds, "stdout": stdout, "stderr": stderr}


def make_server(box: Sandbox, host: str, port: int) -> ThreadingHTTPServer:
    """Return a server that is ready for `serve_forever`; port 0 means any free port."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            size = int(self.headers.get("Content-Length") or 0)
            if self.path != "/run_code" or size > _MAX_BODY:
                self.send_error(404 if self.path != "/run_code" else 413)
                return
            try:
                request = json.loads(self.rfile.read(size))
                body = json.dumps(answer(box, request)).encode()
            except (ValueError, TypeError, KeyError) as error:
                self.send_error(422, f"not a run_code request: {type(error).__name__}")
                return
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer((host, port), Handler)
    server.daemon_threads = True
    return server


def main(argv: list[str] | None = None) -> int:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(prog="serve_sandbox", description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--sandbox", choices=("auto", "bwrap", "lite"), default="auto")
    arguments = parser.parse_args(argv)
    box = open_sandbox(arguments.sandbox)
    server = make_server(box, arguments.host, arguments.port)
    print(f"{box.describe()}\nserving http://{arguments.host}:{server.server_address[1]}/run_code", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()
        box.close()
    return 0
