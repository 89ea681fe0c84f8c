"""Folders depend downward only, and no modules import each other in a circle.

Every import counts: those inside functions, those for type checkers only, and modules that are named in a string.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]

LAYERS: tuple[tuple[str, ...], ...] = (
    ("types", "errors"),
    ("option", "noise", "endpoint", "json_server"),
    ("algo", "track", "sandbox", "tiny"),
    ("data", "model", "report"),
    ("engines", "verify", "train"),
    ("rollout", "rewards"),
    ("methods", "envs"),
    ("config",),
    ("run",),
    ("cli", "doctor", "recipes", "llmrl"),
    ("__main__",),
)
"""The lowest first. A name is a folder or a file of llmrl/, or a folder beside it; `llmrl` is llmrl/__init__.py."""

SAME_LAYER: dict[tuple[str, str], str] = {
    ("cli", "doctor"): "`llmrl doctor` is one of the commands",
    ("cli", "llmrl"): "`llmrl --version`",
    ("recipes", "llmrl"): "a recipe uses `llmrl.Trainer`, as a user does",
}
"""Arrows (from, to) between two folders of one layer that the code needs, each with its reason."""

LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


@dataclass(frozen=True, slots=True)
class Arrow:
    """One import: `source` uses `target`, both dotted modules, at a line of a file."""

    source: str
    target: str
    place: str

    def __str__(self) -> str:
        return f"{self.place.removeprefix(f'{REPOSITORY}/')}: {self.source} -> {self.target}"


def files(repository: Path = REPOSITORY) -> dict[str, Path]:
    """All modules of llmrl/, rewards/, recipes/ and envs/: dotted name -> file."""
    found = {}
    for root in ("llmrl", "rewards", "recipes", "envs"):
        for file in sorted((repository / root).rglob("*.py")):
            parts = file.relative_to(repository).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def folder(module: str) -> str:
    """The name in `LAYERS` that a module belongs to."""
    first, *rest = module.split(".")
    return rest[0] if first == "llmrl" and rest else first


def targets(node: ast.AST, package: str, modules: dict[str, Path]) -> Iterator[str]:
    """Dotted names that one syntax node imports."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
        base = ".".join(part for part in (base, node.module) if part)
        for alias in node.names:
            inner = f"{base}.{alias.name}"
            yield inner if inner in modules else base
    elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("llmrl."):
        yield node.value.partition(":")[0]


def arrows(modules: dict[str, Path]) -> list[Arrow]:
    """Every import of one of `modules` by another."""
    found = []
    for source, file in modules.items():
        package = source if file.name == "__init__.py" else source.rpartition(".")[0]
        for node in ast.walk(ast.parse(file.read_text())):
            for target in sorted(set(targets(node, package, modules))):
                if package.startswith("recipes"):  # a script's own folder is on the path: neighbors by bare name
                    target = target if target in modules else f"{package}.{target}"
                if target in modules and target != source:
                    found.append(Arrow(source, target, f"{file}:{getattr(node, 'lineno', 0)}"))
    return found


def is_allowed(arrow: Arrow) -> bool:
    source, target = folder(arrow.source), folder(arrow.target)
    return source == target or LEVEL[target] < LEVEL[source] or (source, target) in SAME_LAYER


def circles(found: list[Arrow]) -> list[list[str]]:
    """Sets of modules of which each reaches each other (strongly connected components; Tarjan 1972)."""
    edges: dict[str, set[str]] = {}
    for arrow in found:
        edges.setdefault(arrow.source, set()).add(arrow.target)
    index: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    result = []

    def visit(module: str) -> None:
        index[module] = lowest[module] = len(index)
        stack.append(module)
        for other in sorted(edges.get(module, ())):
            if other not in index:
                visit(other)
            if other in stack:
                lowest[module] = min(lowest[module], lowest[other])
        if lowest[module] == index[module]:
            members = [stack.pop()]
            while members[-1] != module:
                members.append(stack.pop())
            if len(members) > 1:
                result.append(sorted(members))

    for module in sorted(edges):
        if module not in index:
            visit(module)
    return result


def test_every_folder_has_its_layer() -> None:
    unknown = {folder(module) for module in files()} - LEVEL.keys()
    assert not unknown, f"give these a place in LAYERS: {sorted(unknown)}"


def test_folders_depend_downward_only() -> None:
    wrong = [arrow for arrow in arrows(files()) if not is_allowed(arrow)]
    assert not wrong, f"{len(wrong)} imports that do not point to a lower layer:\n" + "\n".join(map(str, wrong))


def test_what_one_layer_allows_is_needed() -> None:
    used = {(folder(arrow.source), folder(arrow.target)) for arrow in arrows(files())}
    assert SAME_LAYER.keys() <= used, f"no longer needed: {sorted(SAME_LAYER.keys() - used)}"


def test_no_circles() -> None:
    found = arrows(files())
    lines = []
    for circle in circles(found):
        lines += [f"circle of {len(circle)}: {', '.join(circle)}"]
        lines += [f"  {arrow}" for arrow in found if arrow.source in circle and arrow.target in circle]
    assert not lines, "modules import each other:\n" + "\n".join(lines)


def test_imports_of_every_kind_are_read(tmp_path: Path) -> None:
    root = tmp_path / "llmrl"
    for name, text in {
        "algo/__init__.py": "",
        "algo/a.py": "def f():\n    from llmrl.run import b\n",
        "algo/c.py": "if TYPE_CHECKING:\n    from llmrl.run.b import B\n",
        "algo/d.py": "import_module('llmrl.run.b')\n",
        "algo/e.py": "from ..run import b as other\n",
        "algo/f.py": "import llmrl.run.b\n",
        "run/__init__.py": "",
        "run/b.py": "import llmrl.algo.a\n",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    found = arrows(files(tmp_path))
    assert {arrow.source[-1] for arrow in found if not is_allowed(arrow)} == set("acdef")
    assert circles(found) == [["llmrl.algo.a", "llmrl.run.b"]]
