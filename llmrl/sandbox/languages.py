"""Programs in C++, Java, JavaScript, Rust and Go: where the toolchain is, and how a program is compiled and started."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from llmrl.errors import UserError

_QUESTION_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Toolchain:
    """An installed compiler or interpreter."""

    program: str
    """Absolute path of the compiler, or of the interpreter."""
    read: list[str] = field(default_factory=list)
    """Folders that it needs besides the system's."""
    version: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Language:
    """How programs of one language are compiled and run."""

    title: str
    labels: tuple[str, ...]
    """Its names, as code blocks and data sets write them; the first is the one that messages use."""
    install: str
    """What installs the toolchain."""
    find: Callable[[], Toolchain | None]
    file_name: Callable[[str], str]
    """Name of the source file, by the program."""
    compile: Callable[[str, str], list[str]]
    """Arguments of the toolchain's program that compile a file in the working folder, by file name and program."""
    start: Callable[[str, str, int], list[str]]
    """What starts it: by the toolchain's program, the program's text and the memory limit in MB. Paths are relative."""
    keep: str
    """Which files of the compiler's folder the program consists of, as a pattern."""
    hello: str
    """A program that prints 42."""
    slack_mb: int = 64
    """Memory of the runtime itself, on top of the program's."""
    stack_mb: int = 256
    env: dict[str, str] = field(default_factory=dict)
    """Environment of the compiler."""


def language(name: str) -> Language:
    """Return the language of a name such as `cpp`, `C++` or `js`.

    Raises:
        UserError: no such language.
    """
    for one in LANGUAGES:
        if name.lower() in one.labels:
            return one
    known = ", ".join(("python", *(one.labels[0] for one in LANGUAGES)))
    raise UserError(f"language {name!r} is unknown: use one of {known}")


@cache
def toolchain(name: str) -> Toolchain | None:
    """Return the installed toolchain of a language, or None. `name` is the first of its labels."""
    return language(name).find()


def _said(*argv: str) -> str:
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=_QUESTION_SECONDS, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return (done.stdout or done.stderr).strip() if done.returncode == 0 else ""


def _outside_usr(folder: Path) -> list[str]:
    return [] if str(folder).startswith("/usr/") else [str(folder)]


def _find_cpp() -> Toolchain | None:
    for name in ("g++", "clang++", "c++"):
        program = shutil.which(name)
        if program and (said := _said(program, "--version")):
            return Toolchain(program=program, version=said.split("\n")[0], read=_outside_usr(Path(program).parent))
    return None


def _find_java() -> Toolchain | None:
    program = shutil.which("javac")
    if not program or not (said := _said(program, "-version")):
        return None
    home = Path(os.path.realpath(program)).parents[1]
    settings = [str(path) for path in Path("/etc").glob("java-*")]  # Debian's JDK has links to there
    return Toolchain(program=str(home / "bin" / "javac"), version=said, read=[*_outside_usr(home), *settings])


def _find_javascript() -> Toolchain | None:
    program = shutil.which("node") or shutil.which("nodejs")
    if not program or not (said := _said(program, "--version")):
        return None
    real = Path(os.path.realpath(program))
    return Toolchain(program=str(real), version=f"node {said}", read=_outside_usr(real.parents[1]))


def _find_rust() -> Toolchain | None:
    program = shutil.which("rustc")
    sysroot = _said(program, "--print", "sysroot") if program else ""
    if not sysroot:
        return None
    real = Path(sysroot) / "bin" / "rustc"
    if not real.exists():
        return None
    return Toolchain(program=str(real), version=_said(str(real), "--version"), read=_outside_usr(Path(sysroot)))


def _find_go() -> Toolchain | None:
    program = shutil.which("go")
    root = _said(program, "env", "GOROOT") if program else ""
    if not root:
        return None
    real = os.path.realpath(Path(root) / "bin" / "go")
    return Toolchain(program=real, version=_said(real, "version"), read=_outside_usr(Path(root)))


_JAVA_MAIN = re.compile(r"\b(?:static\s+(?:public\s+)?(?:final\s+)?void\s+main\b|void\s+main\s*\()")
_JAVA_CLASS = re.compile(r"\b(?:class|enum|record|interface)\s+([A-Za-z_]\w*)")
_JAVA_PUBLIC = re.compile(
    r"\bpublic\s+(?:(?:final|abstract|strictfp|sealed)\s+)*(?:class|enum|record|interface)\s+(\w+)"
)


def java_file(source: str) -> str:
    """Return the file name that a Java program needs: that of its public class."""
    found = _JAVA_PUBLIC.search(_without_java_comments(source))
    return f"{found.group(1)}.java" if found else "Main.java"


def java_main(source: str) -> str:
    """Return the class that holds `main`: the public one if it does, else the last class that begins before it."""
    text = _without_java_comments(source)
    package = re.search(r"^\s*package\s+([\w.]+)\s*;", text, re.MULTILINE)
    main = _JAVA_MAIN.search(text)
    before = _top_level_classes(text[: main.start()] if main else text)
    name = before[-1] if before else "Main"
    return f"{package.group(1)}.{name}" if package else name


def _top_level_classes(text: str) -> list[str]:
    return [found.group(1) for found in _JAVA_CLASS.finditer(text) if _depth(text[: found.start()]) == 0]


def _depth(text: str) -> int:
    plain = re.sub(r'"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\'', "", text)
    return plain.count("{") - plain.count("}")


def _without_java_comments(source: str) -> str:
    return re.sub(r'("(?:\\.|[^"\\\n])*")|//[^\n]*|/\*.*?\*/', lambda m: m.group(1) or " ", source, flags=re.DOTALL)


def _javascript_file(source: str) -> str:
    is_module = re.search(r"^\s*(?:import\s+[\w{*\"']|export\s)", source, re.MULTILINE)
    return "main.mjs" if is_module else "main.js"


def _java_command(compiler: str, source: str, memory_mb: int) -> list[str]:
    flags = [f"-Xmx{memory_mb}m", "-Xss64m", "-XX:+UseSerialGC", "-XX:-UsePerfData", "-XX:-UseContainerSupport"]
    flags += ["-XX:TieredStopAtLevel=1", "-Xshare:auto", "-XX:ErrorFile=/dev/null", "-Dfile.encoding=UTF-8"]
    return [str(Path(compiler).with_name("java")), *flags, "-cp", ".", java_main(source)]


def _node_command(program: str, source: str, memory_mb: int) -> list[str]:
    return [program, "--stack-size=60000", f"--max-old-space-size={memory_mb}", _javascript_file(source)]


def _binary(_: str, __: str, ___: int) -> list[str]:
    return ["./main"]


_GO_ENV = {"GO111MODULE": "off", "CGO_ENABLED": "0", "GOFLAGS": "", "GOTOOLCHAIN": "local", "GOPROXY": "off"}

LANGUAGES = (
    Language(
        title="C++",
        labels=("cpp", "c++", "cc", "cxx", "c++17", "c++20", "cpp17"),
        install="apt-get install g++",
        find=_find_cpp,
        file_name=lambda _: "main.cpp",
        compile=lambda name, _: ["-O2", "-std=gnu++17", "-pipe", "-w", "-o", "main", name],
        start=_binary,
        keep="main",
        hello="#include <iostream>\nint main() { int x; std::cin >> x; std::cout << x * 6 << '\\n'; }\n",
    ),
    Language(
        title="Java",
        labels=("java",),
        install="apt-get install default-jdk-headless",
        find=_find_java,
        file_name=java_file,
        compile=lambda name, _: [
            *("-proc:none", "-nowarn", "-encoding", "UTF-8", "-J-XX:-UsePerfData", "-J-XX:+UseSerialGC"),
            *("-J-XX:TieredStopAtLevel=1", "-J-Xmx1g", "-d", ".", name),
        ],
        start=_java_command,
        keep="**/*.class",
        hello="import java.util.*;\npublic class Main { public static void main(String[] a) {"
        " System.out.println(6 * new Scanner(System.in).nextInt()); } }\n",
        slack_mb=1536,
        stack_mb=8,
    ),
    Language(
        title="JavaScript",
        labels=("javascript", "js", "node", "nodejs"),
        install="apt-get install nodejs",
        find=_find_javascript,
        file_name=_javascript_file,
        compile=lambda name, _: ["--check", name],
        start=_node_command,
        keep="main.*js",
        hello="console.log(6 * Number(require('fs').readFileSync(0, 'utf8')));\n",
        slack_mb=1024,
        stack_mb=64,
    ),
    Language(
        title="Rust",
        labels=("rust", "rs"),
        install="apt-get install rustc",
        find=_find_rust,
        file_name=lambda _: "main.rs",
        compile=lambda name, _: ["-O", "--edition", "2021", "--cap-lints", "allow", "-o", "main", name],
        start=_binary,
        keep="main",
        hello="fn main() { let mut s = String::new(); std::io::stdin().read_line(&mut s).unwrap();"
        ' println!("{}", 6 * s.trim().parse::<i32>().unwrap()); }\n',
    ),
    Language(
        title="Go",
        labels=("go", "golang"),
        install="apt-get install golang-go",
        find=_find_go,
        file_name=lambda _: "main.go",
        compile=lambda name, _: ["build", "-o", "main", name],
        start=_binary,
        keep="main",
        hello='package main\nimport "fmt"\nfunc main() { var x int; fmt.Scan(&x); fmt.Println(6 * x) }\n',
        slack_mb=512,
        stack_mb=8,
        env=_GO_ENV,
    ),
)
