"""A pool of killable worker processes: a spec and arguments go in, the function's value or a PoolError comes out.

A call that hangs, crashes, exits or uses too much memory gets an error and its worker is replaced; other calls are not
affected. Each worker has its own pipe and a thread that kills it at the time limit. Workers start as fresh
interpreters: they do not import the caller's script, so a script needs no `__main__` guard.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import pickle
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

LOAD_LIMIT_S = 180.0
"""Time limit for importing a reward's module in a worker, in seconds. It does not count toward the call's own limit."""
MESSAGE_S = 0.01
"""Calls that are expected to take less than this in total (seconds) share one message, which saves wake-ups."""
MESSAGE_CALLS = 32
"""Most calls that share the message of another one."""


def available_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class PoolError(Exception):
    """A call did not return a value. The message holds the worker's traceback if there is one."""


class CallTimedOut(PoolError):
    """The call was still running at its time limit; its worker was killed."""


class WorkerDied(PoolError):
    """The worker's process ended during the call, twice (crash, os._exit, out of memory); or the pool was closed."""


class CallFailed(PoolError):
    """The function raised; the message is its traceback."""


class CallRefused(CallFailed):
    """The function raised a UserError, because its row or its arguments are wrong; the message is the error's."""


@dataclass(slots=True, eq=False)
class _Job:
    """One call. With `arguments` None the worker only starts and loads `specs`."""

    specs: list[str]
    arguments: dict[str, Any] | None
    time_limit_s: float
    future: asyncio.Future[Any]
    """Belongs to the caller's event loop, which alone may set its result."""
    barrier: threading.Barrier | None = None


_Outcome = tuple[_Job, Any, Exception | None]
"""A job, the value it returned, and the error if it did not return one."""


class Pool:
    """Runs reward functions in worker processes. Usable from any thread and any event loop.

    Args:
        num_workers: number of processes; each starts when it is first needed, and again after it was killed.
        memory_limit_bytes: address space of each worker; a call that needs more gets a MemoryError. 0: no limit.
    """

    def __init__(self, num_workers: int, *, memory_limit_bytes: int = 4 << 30) -> None:
        self.num_workers = num_workers
        self.memory_limit_bytes = memory_limit_bytes
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._workers: list[_Worker] = []
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._closed = False

    async def call(self, spec: str, arguments: dict[str, Any], time_limit_s: float) -> Any:
        """Run the function that `spec` names with keyword `arguments` in a worker.

        Args:
            spec: see `llmrl.verify.spec.FORMS`; the worker loads it once.
            arguments: keyword arguments; values must be picklable.
            time_limit_s: seconds from the start of the function; waiting for a free worker does not count.

        Raises:
            CallTimedOut: the call was still running at its time limit.
            WorkerDied: the worker's process ended during the call, twice, or the pool was closed.
            CallFailed: the function raised.
            CallRefused: the function raised a UserError.
        """
        return await self._submit([spec], arguments, time_limit_s)

    async def warm(self, specs: Iterable[str]) -> None:
        """Start every worker and import `specs` in it, so that the first calls do not wait for imports.

        Raises:
            CallFailed: a module cannot be imported in a worker; the message is the traceback.
        """
        barrier = threading.Barrier(self.num_workers)
        names = list(specs)
        await asyncio.gather(*(self._submit(names, None, LOAD_LIMIT_S, barrier) for _ in range(self.num_workers)))

    async def close(self) -> None:
        """Kill the workers and wait for them to end. Running calls get WorkerDied. Safe to call twice."""
        await asyncio.to_thread(self.shut_down)

    def shut_down(self) -> None:
        """Do the same as `close` without an event loop."""
        with self._lock:
            self._closed = True
            threads, workers = self._threads, self._workers
            self._threads, self._workers = [], []
        for _ in threads:
            self._jobs.put(None)
        for worker in workers:
            worker.kill()
        for thread in threads:
            thread.join()

    def _submit(
        self,
        specs: list[str],
        arguments: dict[str, Any] | None,
        time_limit_s: float,
        barrier: threading.Barrier | None = None,
    ) -> asyncio.Future[Any]:
        job = _Job(specs, arguments, time_limit_s, asyncio.get_running_loop().create_future(), barrier)
        with self._lock:
            if self._closed:
                raise WorkerDied("the pool of reward workers is closed")
            if not self._threads:
                self._workers = [_Worker(self.memory_limit_bytes) for _ in range(self.num_workers)]
                self._threads = [threading.Thread(target=self._serve, args=(w,), daemon=True) for w in self._workers]
                for thread in self._threads:
                    thread.start()
            self._jobs.put(job)
        return job.future

    def _serve(self, worker: _Worker) -> None:
        """Run in one worker's thread until the pool is closed: take jobs, run them, deliver the results."""
        while (job := self._jobs.get()) is not None:
            self._run_jobs(worker, deque([job, *self._companions(worker, job)]))
            if job.barrier is not None:  # a worker that is done must not take another one's warm-up job
                with contextlib.suppress(threading.BrokenBarrierError):
                    job.barrier.wait(LOAD_LIMIT_S)
        worker.kill()

    def _companions(self, worker: _Worker, first: _Job) -> list[_Job]:
        """Take waiting jobs that share the first one's message: only quick ones, and at most this worker's share."""
        jobs: list[_Job] = []
        seconds = worker.expected_s(first)
        share = min(MESSAGE_CALLS, self._jobs.qsize() // self.num_workers)
        while len(jobs) < share and seconds < MESSAGE_S:
            try:
                job = self._jobs.get_nowait()
            except queue.Empty:
                break
            if job is None or job.arguments is None:  # the end of a worker and warm-up jobs: one for each worker
                self._jobs.put(job)
                break
            jobs.append(job)
            seconds += worker.expected_s(job)
        return jobs

    def _run_jobs(self, worker: _Worker, jobs: deque[_Job]) -> None:
        """Run jobs in order. A job in which the worker dies is tried once more, because the cause may be something that
        an earlier call left behind.
        """
        tried: _Job | None = None
        while jobs:
            outcomes: list[_Outcome] = []
            try:
                if self._closed:
                    raise WorkerDied("the pool of reward workers was closed before this call started")
                for value, error in worker.work(list(jobs)):
                    outcomes.append((jobs.popleft(), value, error))
                    if not worker.has_answer():  # otherwise deliver it together with the next one
                        outcomes = _deliver(outcomes)
            except WorkerDied as error:
                if worker.retired:
                    error = WorkerDied("the pool of reward workers was closed during this call")
                elif jobs[0] is tried:
                    error = WorkerDied(f"{error}, and again when the call was repeated")
                if self._closed or jobs[0] is tried:
                    outcomes.append((jobs.popleft(), None, error))
                else:
                    tried = jobs[0]
            except Exception as error:  # if this thread ended here, its callers would wait forever
                if jobs:
                    outcomes.append((jobs.popleft(), None, error))
            _deliver(outcomes)


def _deliver(outcomes: list[_Outcome]) -> list[_Outcome]:
    """Set the results of futures, waking each event loop once. Return an empty list, for the next outcomes."""
    loops = {id(loop): loop for loop in (job.future.get_loop() for job, _, _ in outcomes)}
    for key, loop in loops.items():
        with contextlib.suppress(RuntimeError):  # the loop is closed, so no one waits for the result
            loop.call_soon_threadsafe(_settle, [o for o in outcomes if id(o[0].future.get_loop()) == key])
    return []


def _settle(outcomes: list[_Outcome]) -> None:
    for job, value, error in outcomes:
        if job.future.done():  # the caller was cancelled
            continue
        if error is None:
            job.future.set_result(value)
        else:
            job.future.set_exception(error)


class _Worker:
    """One process and the pipe to it. Used by one thread, except for `kill`."""

    def __init__(self, memory_limit_bytes: int) -> None:
        self.memory_limit_bytes = memory_limit_bytes
        self.process: subprocess.Popen[bytes] | None = None
        self.connection: Connection | None = None
        self.loaded: set[str] = set()
        self.seconds: dict[str, float] = {}
        """Recent duration of a spec's calls: their maximum, which fades by a tenth with each call."""
        self.retired = False

    def expected_s(self, job: _Job) -> float:
        """Return the seconds that a job will probably take; infinity if none like it has run yet."""
        return math.inf if job.arguments is None else self.seconds.get(job.specs[0], math.inf)

    def has_answer(self) -> bool:
        """Return whether the next answer has arrived."""
        return self.process is not None and self.connection is not None and self.connection.poll(0)

    def work(self, jobs: list[_Job]) -> Iterator[tuple[Any, Exception | None]]:
        """Run jobs in order and yield (value, error) for each; stop early when a call had to be killed.

        Raises:
            WorkerDied: the process ended during the first job that was not yielded.
        """
        requests: list[bytes] = []
        for job in jobs:
            try:
                for spec in job.specs:
                    self.load(spec)
                if job.arguments is not None:
                    requests.append(_pickled((job.specs[0], job.arguments)))
            except WorkerDied:
                raise
            except Exception as error:  # this job cannot be imported or sent; run the jobs before it first
                if not requests:
                    yield None, error
                    return
                break
        if not requests:  # a warm-up job: loading was all it asked for
            yield None, None
            return
        self._send(requests)
        for job in jobs[: len(requests)]:
            started = time.perf_counter()
            try:
                outcome = self._receive(job.specs[0], job.time_limit_s), None
            except (CallFailed, CallTimedOut) as error:
                outcome = None, error
            seconds = time.perf_counter() - started
            self.seconds[job.specs[0]] = max(seconds, 0.9 * self.seconds.get(job.specs[0], 0.0))
            yield outcome
            if self.process is None:
                return

    def load(self, spec: str) -> None:
        """Import `spec` in the process, after starting the process if necessary."""
        if self.process is None or self.process.poll() is not None:
            self._start()
        if spec not in self.loaded:
            self._send([_pickled((spec, None))])
            self._receive(spec, LOAD_LIMIT_S)
            self.loaded.add(spec)

    def _send(self, requests: list[bytes]) -> None:
        """Send requests as one message, because two sides that both write can block each other."""
        assert self.connection is not None
        try:
            self.connection.send_bytes(_pickled(requests))
        except OSError:
            raise WorkerDied(f"worker died before the call ({self._stop(grace_s=1.0)})") from None

    def _receive(self, spec: str, time_limit_s: float) -> Any:
        """Return the value of the next answer; kill the process if no answer comes in time.

        Raises:
            CallTimedOut, WorkerDied, CallFailed, CallRefused: see `Pool.call`.
        """
        assert self.connection is not None
        started = time.perf_counter()
        try:
            if not self.connection.poll(time_limit_s):
                self._stop()
                raise CallTimedOut(f"timed out after {time_limit_s:g} s: {spec} was still running and was killed")
            answer = self.connection.recv_bytes()
        except (EOFError, OSError):
            seconds = time.perf_counter() - started
            raise WorkerDied(f"worker died {seconds:.1f} s into {spec} ({self._stop(grace_s=1.0)})") from None
        try:
            ok, value = pickle.loads(answer)
        except Exception as error:
            raise CallFailed(f"{spec} returned something this process cannot read: {error!r}") from None
        if ok:
            return value
        if ok is None:
            raise CallRefused(value)
        if value.startswith("MemoryError"):  # a process that ran out of memory may be broken in other places
            self._stop()
        raise CallFailed(value)

    def _start(self) -> None:
        self._stop()
        if self.retired:
            raise WorkerDied("the pool of reward workers was closed")
        ours, theirs = socket.socketpair()
        with theirs:
            arguments = (theirs.fileno(), self.memory_limit_bytes, os.getpid())
            boot = f"import sys; sys.path[:] = {sys.path!r}; from llmrl.verify.worker import main; main{arguments!r}"
            self.process = subprocess.Popen(
                [sys.executable, "-c", boot],
                stdin=subprocess.DEVNULL,
                stdout=2,  # a reward's prints go to stderr, because stdout may be the output of a command
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # so that killing the group also kills what the function started
                env=os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
            )
        self.connection = Connection(ours.detach())
        self.loaded = set()
        if self.retired:  # `kill` was called while the process was being created and missed it
            self._stop()
            raise WorkerDied("the pool of reward workers was closed")

    def _stop(self, grace_s: float = 0.0) -> str:
        """Kill the process and all that it started. Return how it ended if it ended by itself within `grace_s`."""
        if self.process is None:
            return "not started"
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(grace_s)
        ended = self.process.returncode
        _kill_group(self.process)
        self.process.wait()
        if self.connection is not None:
            self.connection.close()
        self.process = None
        if ended is None:
            return "killed"
        return f"signal {signal.Signals(-ended).name}" if ended < 0 else f"exit code {ended}"

    def kill(self) -> None:
        """Kill the process and never start another. Any thread may call this; the worker's own thread sees it die."""
        self.retired = True
        if (process := self.process) is not None:
            _kill_group(process)
            process.wait()


def _pickled(value: Any) -> bytes:
    return pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
