"""The pool: a fault costs its own call an error, and every other call still gets its result.

Only calls that never return have a short limit, so that nothing here depends on how busy the machine is.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llmrl.verify.pool import (
    LOAD_LIMIT_S,
    CallFailed,
    CallRefused,
    CallTimedOut,
    Pool,
    PoolError,
    WorkerDied,
    _Worker,
)

pytestmark = pytest.mark.slow

FAULTS = """
import ctypes, os, signal, sys, time

armed = []

def faults(do, text=""):
    if armed:
        os._exit(9)
    if do == "hang":
        if text: open(text, "w").close()  # shows that the call is running
        while True: pass
    if do == "hang holding the interpreter lock":
        import re
        if text: open(text, "w").close()
        re.match(r"(a+)+$", "a" * 60 + "b")
    if do == "segfault":
        ctypes.string_at(0)
    if do == "os._exit":
        os._exit(3)
    if do == "sys.exit":
        sys.exit(0)
    if do == "eat memory":
        eaten = []
        while True: eaten.append(bytearray(50 << 20))
    if do == "be interrupted by an alarm":
        def handler(*_): raise ValueError("alarm went off")
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        time.sleep(10)
    if do == "leave an alarm behind":
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        return "left"
    if do == "leave what kills the next call":
        armed.append(True)
        return "left"
    if do == "start a process that hangs":
        import subprocess
        subprocess.run(["sleep", "1000"])
    if do == "print a lot":
        for _ in range(20_000): print("x" * 50)
    if do == "return something unreadable":
        return Local()
    if do == "return something unpicklable":
        return lambda: 1
    if do == "refuse":
        from llmrl.errors import UserError
        raise UserError("the row has no tests")
    if do == "say who":
        return os.getpid()
    return len(text)

async def waits(do):
    import asyncio
    await asyncio.sleep(0.01)
    return do

class Local: pass
"""
HANG_LIMIT_S = 2.0
"""For calls that never return."""
LIMIT_S = 300.0
"""For all other calls; never reached."""


def wait_until(condition: Callable[[], bool], seconds: float = 120.0) -> None:
    """Return when the condition holds, or after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)


@pytest.fixture
def spec(tmp_path: Path) -> str:
    file = tmp_path / "faults.py"
    file.write_text(FAULTS)
    return f"{file}:faults"


@pytest.fixture
def pool() -> Iterator[Pool]:
    pool = Pool(2, memory_limit_bytes=512 << 20)
    yield pool
    pool.shut_down()


@pytest.mark.parametrize(
    ("do", "error", "message"),
    [
        ("hang", CallTimedOut, "timed out after 2 s"),
        ("hang holding the interpreter lock", CallTimedOut, "timed out after 2 s"),
        ("start a process that hangs", CallTimedOut, "timed out after 2 s"),
        ("segfault", WorkerDied, "SIGSEGV"),
        ("os._exit", WorkerDied, "exit code 3"),
        ("sys.exit", CallFailed, "SystemExit"),
        ("eat memory", CallFailed, "MemoryError"),
        ("be interrupted by an alarm", CallFailed, "alarm went off"),
        ("return something unreadable", CallFailed, "cannot read"),
        ("return something unpicklable", CallFailed, "pickle"),
    ],
)
def test_a_fault_costs_its_own_call_an_error_and_no_other(
    pool: Pool, spec: str, do: str, error: type[PoolError], message: str
) -> None:
    limit_s = HANG_LIMIT_S if error is CallTimedOut else LIMIT_S

    async def main() -> list[object]:
        await pool.warm([spec])
        calls = [pool.call(spec, {"do": "measure", "text": "abc"}, LIMIT_S) for _ in range(6)]
        calls.insert(2, pool.call(spec, {"do": do}, limit_s))
        results = await asyncio.gather(*calls, return_exceptions=True)
        return [*results, await pool.call(spec, {"do": "measure", "text": "abcd"}, LIMIT_S)]

    results = asyncio.run(main())
    failed = results.pop(2)
    assert isinstance(failed, error)
    assert message in str(failed)
    assert results == [3] * 6 + [4]


def test_a_limit_ends_its_own_call_alone(pool: Pool, spec: str) -> None:
    async def main() -> None:
        unlimited = asyncio.create_task(pool.call(spec, {"do": "hang"}, LIMIT_S))
        with pytest.raises(CallTimedOut):
            await pool.call(spec, {"do": "hang"}, 0.5)
        assert not unlimited.done()
        unlimited.cancel()

    asyncio.run(main())


def test_what_a_call_leaves_behind_does_not_hurt_the_next(pool: Pool, spec: str) -> None:
    async def main() -> list[object]:
        found = []
        for do in ("leave an alarm behind", "leave what kills the next call", "print a lot"):
            found.append(await pool.call(spec, {"do": do}, LIMIT_S))
            await asyncio.sleep(0.15)  # an alarm that was left running goes off
            calls = (pool.call(spec, {"do": "measure", "text": "ab"}, LIMIT_S) for _ in range(4))
            found += await asyncio.gather(*calls)
        return found

    assert asyncio.run(main()) == ["left", *[2] * 4, "left", *[2] * 4, 0, *[2] * 4]


def test_a_call_whose_worker_was_killed_by_an_earlier_one_is_tried_again(spec: str) -> None:
    async def main(pool: Pool) -> object:
        await pool.call(spec, {"do": "leave what kills the next call"}, LIMIT_S)
        return await pool.call(spec, {"do": "measure", "text": "abc"}, LIMIT_S)

    pool = Pool(1)
    try:
        assert asyncio.run(main(pool)) == 3
    finally:
        pool.shut_down()


@pytest.mark.parametrize("text", ["\ud800 lone surrogate", "NUL \x00 byte", "x" * 10_000_000, ""])
def test_any_text_arrives_whole(pool: Pool, spec: str, text: str) -> None:
    assert asyncio.run(pool.call(spec, {"do": "measure", "text": text}, LIMIT_S)) == len(text)


def test_async_functions_run_in_a_worker(pool: Pool, spec: str) -> None:
    assert asyncio.run(pool.call(spec.replace(":faults", ":waits"), {"do": "this"}, LIMIT_S)) == "this"


def test_arguments_that_cannot_be_pickled_are_an_error_of_their_call(pool: Pool, spec: str) -> None:
    async def main() -> object:
        with pytest.raises((AttributeError, TypeError, ValueError)):
            await pool.call(spec, {"do": lambda: 1}, LIMIT_S)
        return await pool.call(spec, {"do": "measure", "text": "a"}, LIMIT_S)

    assert asyncio.run(main()) == 1


def test_warm_starts_every_worker_once(pool: Pool, spec: str) -> None:
    async def main() -> set[object]:
        await pool.warm([spec])
        pids: set[object] = {worker.process.pid for worker in pool._workers if worker.process is not None}
        assert len(pids) == 2
        calls = [pool.call(spec, {"do": "say who"}, LIMIT_S) for _ in range(20)]
        return pids - set(await asyncio.gather(*calls))

    assert len(asyncio.run(main())) < 2


def test_warm_names_the_module_that_cannot_be_imported(pool: Pool, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("import no_such_module_anywhere\n")
    with pytest.raises(CallFailed, match=r"broken\.py, line 1"):
        asyncio.run(pool.warm([f"{tmp_path}/broken.py:broken"]))


def test_warm_up_runs_once_in_each_worker_outside_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "slow_start.py"
    file.write_text("calls = []\ndef warm_up(): calls.append(1)\ndef f(): return len(calls)\n")
    limits: list[float] = []
    receive = _Worker._receive

    def recording(self: _Worker, spec: str, time_limit_s: float) -> Any:
        limits.append(time_limit_s)
        return receive(self, spec, time_limit_s)

    monkeypatch.setattr(_Worker, "_receive", recording)

    async def main(pool: Pool) -> list[object]:
        return [await pool.call(f"{file}:f", {}, LIMIT_S) for _ in range(3)]

    pool = Pool(1)
    try:
        assert asyncio.run(main(pool)) == [1, 1, 1]
        assert limits == [LOAD_LIMIT_S, *[LIMIT_S] * 3]
    finally:
        pool.shut_down()


def test_a_fault_among_quick_calls_in_one_message_costs_only_its_own_call(pool: Pool, spec: str) -> None:
    faults = {5: "hang", 9: "segfault", 10: "return something unpicklable", 30: "os._exit"}

    async def main() -> list[object]:
        await pool.warm([spec])
        for _ in range(3):  # now calls of this spec are known to be quick
            await asyncio.gather(*(pool.call(spec, {"do": "measure"}, LIMIT_S) for _ in range(8)))
        calls = [
            pool.call(spec, {"do": faults[i]}, HANG_LIMIT_S if faults[i] == "hang" else LIMIT_S)
            if i in faults
            else pool.call(spec, {"do": "measure", "text": "x" * i}, LIMIT_S)
            for i in range(60)
        ]
        calls.append(pool.call(spec, {"do": "measure", "text": (x for x in "cannot be sent")}, LIMIT_S))
        return await asyncio.gather(*calls, return_exceptions=True)

    results = asyncio.run(main())
    assert [r for i, r in enumerate(results[:60]) if i not in faults] == [i for i in range(60) if i not in faults]
    assert [type(results[i]) for i in faults] == [CallTimedOut, WorkerDied, CallFailed, WorkerDied]
    assert isinstance(results[60], TypeError)


def test_results_arrive_as_soon_as_each_is_ready(pool: Pool, spec: str) -> None:
    async def main() -> None:
        await pool.warm([spec])
        slow = asyncio.create_task(pool.call(spec, {"do": "hang"}, LIMIT_S))
        await asyncio.gather(*(pool.call(spec, {"do": "measure"}, LIMIT_S) for _ in range(20)))
        assert not slow.done()
        slow.cancel()

    asyncio.run(main())


def test_one_pool_serves_event_loops_in_several_threads(pool: Pool, spec: str) -> None:
    found: list[object] = []

    def use() -> None:
        found.append(asyncio.run(pool.call(spec, {"do": "measure", "text": "abc"}, LIMIT_S)))

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [3] * 4


def test_close_ends_running_calls_and_leaves_no_process(spec: str, tmp_path: Path) -> None:
    running = tmp_path / "running"

    async def main() -> list[int]:
        pool = Pool(2)
        await pool.warm([spec])
        pids = [worker.process.pid for worker in pool._workers if worker.process is not None]
        call = asyncio.create_task(pool.call(spec, {"do": "hang", "text": str(running)}, LIMIT_S))
        await asyncio.to_thread(wait_until, running.exists)
        await pool.close()
        await pool.close()
        with pytest.raises(WorkerDied, match="closed"):
            await call
        with pytest.raises(WorkerDied, match="closed"):
            await pool.call(spec, {"do": "measure"}, LIMIT_S)
        return pids

    pids = asyncio.run(main())
    assert running.exists() and len(pids) == 2
    assert not [pid for pid in pids if is_running(pid)]


def test_a_user_error_comes_back_without_a_traceback(pool: Pool, spec: str) -> None:
    with pytest.raises(CallRefused) as error:
        asyncio.run(pool.call(spec, {"do": "refuse"}, LIMIT_S))
    assert str(error.value) == "the row has no tests"


def test_a_worker_that_is_closed_while_it_starts_leaves_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = _Worker(0)
    started: list[subprocess.Popen[Any]] = []
    popen = subprocess.Popen

    def slow_start(*args: Any, **keywords: Any) -> subprocess.Popen[bytes]:
        worker.kill()  # from the thread that closes the pool
        started.append(popen(*args, **keywords))
        return started[0]

    monkeypatch.setattr(subprocess, "Popen", slow_start)
    with pytest.raises(WorkerDied, match="closed"):
        worker.load("math_answer")
    assert started[0].returncode is not None


@pytest.mark.parametrize("end", ["os.kill(os.getpid(), 9)", "pass"])
def test_workers_die_with_a_script_that_does_not_close_the_pool(spec: str, tmp_path: Path, end: str) -> None:
    """The script has no `__main__` guard, and is not imported by the workers."""
    script, running = tmp_path / "script.py", tmp_path / "running"
    script.write_text(
        textwrap.dedent(f"""
        import asyncio, os
        from llmrl.verify.pool import Pool
        print("started", flush=True)
        pool = Pool(2)
        async def main():
            await pool.warm([{spec!r}])
            arguments = {{"do": "hang holding the interpreter lock", "text": {str(running)!r}}}
            call = asyncio.create_task(pool.call({spec!r}, arguments, 1000))
            while not os.path.exists({str(running)!r}):
                await asyncio.sleep(0.01)
            print(*(worker.process.pid for worker in pool._workers), flush=True)
            {end}
            call.cancel()
        asyncio.run(main())
        """)
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment)
    first, *rest = done.stdout.split("\n")
    assert first == "started", done.stderr
    pids = [int(pid) for pid in rest[0].split()]
    assert len(pids) == 2, done.stderr
    assert "started" not in rest
    wait_until(lambda: not any(map(is_running, pids)))
    assert not [pid for pid in pids if is_running(pid)]


def is_running(pid: int) -> bool:
    """Whether a process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
