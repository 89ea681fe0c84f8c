from __future__ import annotations

import contextlib
import math
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from llmrl.errors import UserError
from llmrl.sandbox import (
    BoxDied,
    CannotTravel,
    Handle,
    Limits,
    ProgramEnded,
    Raised,
    Sandbox,
    SandboxUnavailable,
    bwrap,
    default_sandbox,
    lite,
    open_sandbox,
)
from llmrl.sandbox.local import LocalSandbox
from tests.sandbox.sandboxes import LIMITS, SHORT, any_box, same, wait_until

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", params=["bwrap", "lite"])
def box(request: pytest.FixtureRequest) -> Iterator[LocalSandbox]:
    try:
        sandbox = LocalSandbox(request.param, max_servers=2)
    except SandboxUnavailable as error:
        pytest.skip(str(error))
    yield sandbox
    sandbox.close()


def call(box: Sandbox, source: str, *args: Any, limits: Limits = LIMITS) -> Any:
    with box.open(source, limits) as session:
        session.load(source)
        return session.name("f")(*args)


# --- functions in the box ---------------------------------------------------------------------------------------------


def test_calls_carry_values_both_ways(box: LocalSandbox) -> None:
    source = "def f(*args, **kwargs): return args, kwargs"
    with box.open(source, LIMITS) as session:
        session.load(source)
        args, kwargs = session.name("f")(1, 1.0, True, (2,), {3}, {"k": None}, b"x", math.inf, int, key=[1])
        assert same(args, (1, 1.0, True, (2,), {3}, {"k": None}, b"x", math.inf, int))
        assert kwargs == {"key": [1]}
        assert session.name("f")(range(3)) == ((range(3),), {})
        for refused in (lambda: 1, open, eval, object(), getattr):  # this file is no test code of a row
            with pytest.raises(CannotTravel):
                session.name("f")(refused)


def test_an_object_stays_in_the_box_and_can_be_used_again(box: LocalSandbox) -> None:
    source = """
class Node:
    def __init__(self, value): self.value, self.next = value, None
    def __eq__(self, other): return True
    def up(self, step=1): return self.value + step
def total(node): return 0 if node is None else node.value + total(node.next)
def squares(n): return (i * i for i in range(n))
"""
    with box.open(source, LIMITS) as session:
        session.load(source)
        node = session.name("Node")(1)
        assert isinstance(node, Handle)
        node.next = session.name("Node")(41)
        assert session.name("total")(node) == 42
        assert (node.next.value, node.up(step=5)) == (41, 6)
        assert (node == node, node != node) == (True, False) and node not in [1, "x"]
        assert list(session.name("squares")(4)) == [0, 1, 4, 9]
        with pytest.raises(TypeError):
            _ = session.name("squares")(4) < 3


def test_an_exception_keeps_its_built_in_class_and_ends_nothing(box: LocalSandbox) -> None:
    source = "class Mine(ValueError): pass\ndef f(x):\n    if x: raise Mine('bad')\n    return 1"
    with box.open(source, LIMITS) as session:
        session.load(source)
        with pytest.raises(ValueError) as caught:
            session.name("f")(1)
        assert isinstance(caught.value, Raised) and caught.value.detail == "Mine: bad"
        assert session.name("f")(0) == 1
        with pytest.raises(Raised, match="does not define 'missing'"):
            session.name("missing")


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        ("def f(:", "compile_error"),
        ("x = '\\0" + "\0" + "'", "compile_error"),
        ("1 / 0", "error"),
        ("raise SystemExit(0)", "error"),
        ("import os; os._exit(0)", "error"),
        ("while True: pass", "timeout"),
        ("import time; time.sleep(1000)", "timeout"),
        ("import signal; signal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass", "timeout"),
    ],
)
def test_a_program_that_does_not_load_ends_with_the_reason(box: LocalSandbox, source: str, kind: str) -> None:
    with box.open(source, SHORT if kind == "timeout" else LIMITS) as session:
        with pytest.raises(ProgramEnded) as ended:
            session.load(source)
        assert ended.value.kind == kind
        with pytest.raises(ProgramEnded):
            session.name("f")


def test_the_box_is_empty_cut_off_and_not_root(box: LocalSandbox) -> None:
    source = """
import os, sys
def f():
    def tried(action):
        try: return repr(action())[:60]
        except Exception as error: return type(error).__name__
    return {
        "uid": os.getuid(), "gid": os.getgid(), "groups": sorted(set(os.getgroups()) - {65534}),
        "environment": sorted(os.environ), "argv": sys.argv,
        "passwd": tried(lambda: open("/etc/passwd").read()), "home": tried(lambda: os.listdir(os.path.expanduser("~"))),
        "proc": tried(lambda: open("/proc/1/cmdline").read()), "socket": tried(lambda: __import__("socket").socket()),
        "fork": tried(os.fork), "write": tried(lambda: open("/var/tmp/x", "w")), "kill": tried(lambda: os.kill(1, 0)),
        "exec": tried(lambda: os.execv("/bin/true", ["true"])), "llmrl": tried(lambda: __import__("torch")),
    }
"""
    seen = call(box, source)
    environment = {"PATH", "HOME", "LANG", "PYTHONHASHSEED", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"}
    assert set(seen.pop("environment")) - {"PWD", "LC_CTYPE"} == environment
    if os.getuid() == 0 or box.kind == "bwrap":
        assert (seen["uid"], seen["gid"]) == (65534, 65534)
    assert seen["groups"] == []
    assert seen["argv"] == ["program.py"]
    assert seen["passwd"] in ("PermissionError", "FileNotFoundError") and seen["home"] != "[]"
    assert {seen[name] for name in ("socket", "fork", "exec", "kill")} == {"PermissionError"}
    assert seen["proc"] == "PermissionError" and seen["write"] in ("PermissionError", "OSError", "FileNotFoundError")
    assert seen["llmrl"] == "ModuleNotFoundError"


def test_limits_hold_and_the_next_program_is_not_affected(box: LocalSandbox) -> None:
    with pytest.raises(MemoryError):
        call(box, "def f(): return len(bytearray(300_000_000))")
    assert call(box, "def f(): return len(bytearray(100_000_000))") == 100_000_000
    with pytest.raises(ProgramEnded, match="answer of"):
        call(box, "def f(): return 'x' * 3_000_000")
    with pytest.raises(ProgramEnded, match="limit"):
        call(box, "import time\ndef f(): time.sleep(1000)", limits=Limits(wall_seconds=0.5))
    assert call(box, "def f(): return 1") == 1


def test_threads_and_event_loops_work(box: LocalSandbox) -> None:
    source = """
import asyncio, threading
async def later(x):
    await asyncio.sleep(0)
    return x + 1
def f(x):
    found = []
    threads = [threading.Thread(target=lambda: found.append(asyncio.run(later(x)))) for _ in range(4)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    return found
"""
    assert call(box, source, 1) == [2, 2, 2, 2]


def test_numpy_is_there_and_its_numbers_are_plain(box: LocalSandbox) -> None:
    pytest.importorskip("numpy")
    source = "import numpy as np\ndef f(x): return np.array(x).sum(), [np.float32(0.5), np.bool_(True)], np.array(x)"
    total, others, array = call(box, source, [1, 2])
    assert same([total, others], [3, [0.5, True]]) and array.tolist() == [1, 2]


def test_runs_are_the_same_every_time(box: LocalSandbox) -> None:
    source = "import random\ndef f(): return random.random(), list({'a', 'b', 'c', 'd'}), hash('x')"
    assert call(box, source) == call(box, source)


def test_no_program_finds_what_another_left(box: LocalSandbox) -> None:
    source = """
import builtins, os
def f():
    seen = os.path.exists("/tmp/left"), hasattr(builtins, "left")
    builtins.left = 1
    try:
        open("/tmp/left", "w").write("x")
        return seen, "written"
    except OSError:
        return seen, "refused"
"""
    expected = ((False, False), "written" if box.kind == "bwrap" else "refused")
    assert [call(box, source) for _ in range(3)] == [expected] * 3


# --- programs that read standard input --------------------------------------------------------------------------------


def test_a_script_runs_as_python_would_run_it(box: LocalSandbox) -> None:
    source = """
import atexit, sys, threading, time
def late():
    time.sleep(0.1)
    print("thread")
atexit.register(print, "exit")
if __name__ == "__main__":
    print(sys.stdin.read().upper(), end="")
    print("to stderr", file=sys.stderr)
    threading.Thread(target=late).start()
    raise SystemExit(None)
"""
    end = box.run(source, "h\u00e9llo\n", LIMITS)
    assert (end.status, end.exit_code, end.stdout) == ("ok", 0, "H\u00c9LLO\nthread\nexit\n")
    assert end.stderr == "to stderr\n" and end.cpu_seconds > 0 and end.memory_mb > 1


@pytest.mark.parametrize(
    ("source", "status"),
    [
        ("print(1", "compile_error"),
        ("1 / 0", "error"),
        ("import sys; sys.exit(3)", "error"),
        ("import sys; sys.exit('no')", "error"),
        ("import os; os.abort()", "error"),
        ("import ctypes; ctypes.string_at(0)", "error"),
        ("while True: pass", "timeout"),
        ("import time; time.sleep(1000)", "timeout"),
        ("import sys\nwhile True: sys.stdout.buffer.write(b'x' * 1000000)", "output_limit"),
    ],
)
def test_how_a_script_ended(box: LocalSandbox, source: str, status: str) -> None:
    end = box.run(source, "", SHORT if status == "timeout" else LIMITS)
    assert end.status in ((status, "error") if status == "output_limit" else (status,))
    assert len(end.stdout) <= SHORT.output_mb << 20


def test_output_that_is_not_text_is_replaced(box: LocalSandbox) -> None:
    assert box.run(r"import sys; sys.stdout.buffer.write(b'\xff1')", "", LIMITS).stdout == "\ufffd1"


# --- the pool ---------------------------------------------------------------------------------------------------------


def pids(box: LocalSandbox) -> list[int]:
    return [server._process.pid for group in box._idle.values() for server in group]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def left_alive(numbers: list[int]) -> list[int]:
    """Wait for processes to end; return those that do not."""
    wait_until(lambda: not any(map(alive, numbers)))
    return [number for number in numbers if alive(number)]


def test_many_threads_share_few_servers(box: LocalSandbox) -> None:
    def work(number: int) -> Any:
        return call(box, f"def f(x): return x + {number}", 1)

    with ThreadPoolExecutor(max_workers=8) as pool:
        assert list(pool.map(work, range(40))) == [number + 1 for number in range(40)]
    assert 1 <= len(pids(box)) <= 2


def test_a_server_outlives_the_thread_that_started_it(box: LocalSandbox) -> None:
    sandbox = LocalSandbox(box.kind, packages=())
    thread = threading.Thread(target=call, args=(sandbox, "def f(): return 1"))
    thread.start()
    thread.join()
    # The kernel would kill the server when the thread itself is gone, which is a moment after `join`.
    wait_until(lambda: not Path(f"/proc/self/task/{thread.native_id}").exists())
    before = pids(sandbox)
    assert all(map(alive, before)) and call(sandbox, "def f(): return 2") == 2 and pids(sandbox) == before
    sandbox.close()
    sandbox.close()
    assert left_alive(before) == []
    with pytest.raises(SandboxUnavailable, match="closed"):
        call(sandbox, "def f(): return 2")


def test_a_dead_server_is_replaced(box: LocalSandbox) -> None:
    call(box, "def f(): return 1")
    for server in [server for group in box._idle.values() for server in group]:
        os.killpg(server._process.pid, signal.SIGKILL)
        server._control.settimeout(120)
        with contextlib.suppress(ConnectionResetError):  # what is inside bubblewrap dies a moment after it
            assert server._control.recv(1, socket.MSG_PEEK) == b""
    assert call(box, "def f(): return 2") == 2


def test_a_server_that_dies_with_its_program_is_not_a_verdict(box: LocalSandbox) -> None:
    source = "import time\ndef f(): time.sleep(1000)"
    with box.open(source, LIMITS) as session:
        session.load(source)
        (sessions,) = _running_servers(box)
        threading.Timer(0.3, os.killpg, (sessions, signal.SIGKILL)).start()  # an earlier death is found as well
        with pytest.raises(BoxDied):
            session.name("f")()
    assert call(box, "def f(): return 1") == 1


def _running_servers(box: LocalSandbox) -> list[int]:
    """Return the session numbers of this process's servers that are not idle."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) not in pids(box):
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                boxed = b"import json, socket, sys, types" in (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if boxed and int(fields[1]) == os.getpid() and fields[0] != "Z":
                found.append(int(entry.name))
    return found


def test_a_forked_copy_of_the_owner_gets_servers_of_its_own(box: LocalSandbox) -> None:
    assert call(box, "def f(): return 1") == 1
    before = pids(box)
    child = os.fork()
    if child == 0:
        answer = 1
        try:
            answer = 0 if call(box, "def f(): return 5") == 5 and pids(box) != before else 2
            box.close()
        finally:
            os._exit(answer)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert pids(box) == before and call(box, "def f(): return 6") == 6


def test_everything_dies_with_the_owner(box: LocalSandbox) -> None:
    source = f"""
import os, sys, time
from llmrl.sandbox import Limits
from llmrl.sandbox.local import LocalSandbox
box = LocalSandbox({box.kind!r}, packages=())
program = "import time\\ndef f(): time.sleep(1000)"
session = box.open(program, Limits(cpu_seconds=60, wall_seconds=1000))
session.load(program)
copy = os.fork()
if copy == 0:
    time.sleep(1000)  # holds a copy of every descriptor
    os._exit(0)
print("ready", copy, flush=True)
session.name("f")()
"""
    owner = subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE, cwd=ROOT)
    assert owner.stdout is not None
    word, copy = owner.stdout.readline().split()
    assert word == b"ready"
    family = descendants(owner.pid)
    boxed = [pid for pid in family if b"import json, socket, sys, types" in cmdline(pid)]
    assert len(boxed) >= 2
    owner.kill()
    owner.wait()
    owner.stdout.close()
    try:
        assert left_alive(boxed) == [] and alive(int(copy))
    finally:
        os.kill(int(copy), signal.SIGKILL)


def cmdline(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def descendants(root: int) -> set[int]:
    family = {root}
    for _ in range(6):
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                except OSError:
                    continue
                if parent in family:
                    family.add(int(entry.name))
    return family - {root}


# --- choice -----------------------------------------------------------------------------------------------------------


def test_without_bubblewrap_the_lite_box_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    any_box(packages=()).close()
    monkeypatch.setattr(bwrap.shutil, "which", lambda *_: None)
    with pytest.raises(SandboxUnavailable, match="apt-get install bubblewrap"):
        open_sandbox("bwrap")
    box = open_sandbox("auto", packages=())
    assert box.describe().startswith("sandbox lite: rlimits + Landlock + seccomp")
    box.close()


def test_where_no_box_works_nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(packages: tuple[str, ...]) -> Any:
        raise SandboxUnavailable("not here")

    monkeypatch.setattr(bwrap, "plan", broken)
    monkeypatch.setattr(lite, "plan", broken)
    with pytest.raises(SandboxUnavailable, match=r"(?s)bwrap: not here.*lite: not here.*[Ii]nstall bubblewrap"):
        open_sandbox("auto")


@pytest.mark.skipif(not os.path.exists("/etc/passwd"), reason="there is no file to leak")
def test_a_box_that_lets_something_through_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    any_box(packages=()).close()
    whole = lite.plan

    def leaky(packages: tuple[str, ...]) -> Any:
        plan = whole(packages)
        plan.read_paths.append("/etc")
        return plan

    monkeypatch.setattr(lite, "plan", leaky)
    with pytest.raises(SandboxUnavailable, match=r"does not confine programs here.*read /etc/passwd"):
        LocalSandbox("lite", packages=())


def test_a_box_that_cannot_start_gives_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = lite.plan

    def broken(packages: tuple[str, ...]) -> Any:
        plan = whole(packages)
        plan.wrap = lambda command, _: [command[0], "-c", "raise SystemExit('no such luck')"]
        return plan

    monkeypatch.setattr(lite, "plan", broken)
    with pytest.raises(SandboxUnavailable, match="no such luck"):
        LocalSandbox("lite", packages=())


def test_the_choice_can_be_made_by_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMRL_SANDBOX", "docker")
    with pytest.raises(UserError, match="'docker' is unknown: use auto, bwrap, lite or the http"):
        default_sandbox()
    kind = any_box(packages=()).kind
    monkeypatch.setenv("LLMRL_SANDBOX", kind)
    assert default_sandbox() is default_sandbox()
    assert default_sandbox().describe().startswith(f"sandbox {kind}: ")


def test_importing_the_sandbox_does_not_import_torch() -> None:
    code = "import sys, llmrl.verify.code.check, llmrl.sandbox.local; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_a_lower_limit_of_the_owner_is_kept() -> None:
    any_box(packages=()).close()
    source = """
import resource
from llmrl.sandbox import Limits, open_sandbox
resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
resource.setrlimit(resource.RLIMIT_NOFILE, (50, 50))
box = open_sandbox(packages=())
print(box.run("import resource; print(resource.getrlimit(resource.RLIMIT_NOFILE))", "", Limits(memory_mb=4096)).stdout)
box.close()
"""
    done = subprocess.run([sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["(50,", "50)"], done.stderr


# --- what a program finds ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "printed"),
    [
        ("print(9)\nexit()\nprint(8)", "9\n"),
        ("print(9)\nquit(0)", "9\n"),
        ("print(len(str(10**5000)))", "5001\n"),
        ("print(int('7' * 5000) % 10)", "7\n"),
        ("print(__file__)", "program.py\n"),
        ("import resource as r\nr.setrlimit(r.RLIMIT_STACK, (r.getrlimit(r.RLIMIT_STACK)[1],) * 2)\nprint(1)", "1\n"),
    ],
)
def test_a_program_finds_what_python_gives_it(box: Sandbox, source: str, printed: str) -> None:
    end = box.run(source, "", LIMITS)
    assert (end.status, end.stdout) == ("ok", printed), end


@pytest.mark.parametrize(
    ("source", "printed"),
    [
        (
            "print(Counter('aab').most_common(1), inf, pow(2, 10, 1000), List[int])",
            "[('a', 2)] inf 24 typing.List[int]\n",
        ),
        ("print(math.gcd(4, 6), bisect.bisect_left([1, 2], 2), datetime.date(2020, 1, 1))", "2 1 2020-01-01\n"),
        (
            "def gcd(a): return 'mine'\nprint(gcd(1), 'gcd' in globals(), 'lcm' in globals(), lcm(2, 3))",
            "mine True False 6\n",
        ),
        ("def f(n): return n and 1 + f(n - 1)\nprint(f(49000))", "49000\n"),
        ("@cache\ndef f(n): return n and 1 + f(n - 1)\nprint(f(24000))", "24000\n"),
        ("def f(): return 3\nprint(f())\nif f():\n    return\nprint(4)", "3\n"),
    ],
)
def test_a_program_for_a_judge_finds_what_judges_give_it(box: Sandbox, source: str, printed: str) -> None:
    end = box.run(source, "", Limits(cpu_seconds=60, wall_seconds=300.0), "judge")
    assert (end.status, end.stdout) == ("ok", printed), end
    assert box.run(source, "", LIMITS).status in ("error", "compile_error")  # and not from Python itself


def test_programs_import_the_packages_that_were_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "given").mkdir()
    (tmp_path / "given" / "__init__.py").write_text("VALUE = 42\n")
    (tmp_path / "single.py").write_text("VALUE = 43\n")
    (tmp_path / "hidden.py").write_text("VALUE = 44\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        asked = open_sandbox(packages=("given", "single"))
    except SandboxUnavailable as error:
        pytest.skip(str(error))
    with contextlib.closing(asked):
        end = asked.run("import given, single\nprint(given.VALUE, single.VALUE)", "", LIMITS)
        assert (end.status, end.stdout) == ("ok", "42 43\n"), end
        assert asked.run("import hidden", "", LIMITS).status == "error"
    with pytest.raises(UserError, match="packages: 'not_there' is not installed, .* pip install not_there"):
        open_sandbox(packages=("numpy", "not_there"))
