"""Files that users bring: each is imported under a private name, together with the files beside it that it imports.

The files of a folder form a private package, so that two folders may both have a `helpers.py`, and a `math.py` hides
nothing. `import helpers` in such a file finds the private `helpers` because each file of the package gets an
`__import__` of its own. Python's search path stays as it is: all threads share it, and a change made for one file would
hold for every other import that happens meanwhile.
"""

from __future__ import annotations

import builtins
import difflib
import hashlib
import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

from llmrl.errors import UserError

PREFIX = "llmrl_plugin_"
"""Beginning of the names of private packages; the rest is a hash of the folder."""


def load_file(file: Path) -> ModuleType:
    """Import a file under a private name: once, and again when it or a file that it imported beside it has changed.

    Raises:
        UserError: importing it failed; the message has the file and the line.
    """
    file = file.resolve()
    _forget_changed(PREFIX + _hash(file.parent))
    package = _package_of(file.parent)
    name = f"{package.__name__}.{_module_name(file)}"
    if name in sys.modules:
        return sys.modules[name]
    module_spec = importlib.util.spec_from_file_location(name, file, loader=_Loader(name, str(file)))
    assert module_spec is not None and module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[name] = module
    try:
        module_spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if not isinstance(error, Exception):
            raise
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
        own_syntax = isinstance(error, SyntaxError) and error.filename == str(file)
        line = error.lineno if isinstance(error, SyntaxError) and own_syntax else lines[-1] if lines else "?"
        text = repr(error).replace(f"{package.__name__}.", "")
        raise UserError(
            f"reward file {file}, line {line}: importing it failed: {text}{_hint(error, file.parent)}"
        ) from error
    return module


def _hint(error: Exception, folder: Path) -> str:
    """Return what a failed import probably wanted, if it lies beside the file."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        known = [path.stem for path in folder.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()]
        near = difflib.get_close_matches(error.name, known, n=1, cutoff=0.7)
        return f". Did you mean {near[0]!r}, which lies beside it?" if near else ""
    missing = error.filename if isinstance(error, FileNotFoundError) else None
    if isinstance(missing, str) and not Path(missing).is_absolute() and (folder / missing).exists():
        return f". It lies beside the file: open Path(__file__).parent / {missing!r}"
    return ""


def _forget_changed(package: str) -> None:
    """Forget the modules of a package if a file of it has changed: in a notebook, the old function would stay."""
    modules = {name: module for name, module in sys.modules.items() if name.startswith(f"{package}.")}
    stamped = [module for module in modules.values() if _STAMP in vars(module)]  # not folders, not compiled modules
    if any(vars(module)[_STAMP] != _stamp(module.__file__) for module in stamped):
        for name in (*modules, package):
            sys.modules.pop(name, None)


def _stamp(file: str | None) -> tuple[int, int]:
    """Return what changes with a file's contents."""
    try:
        status = os.stat(file or "")
    except OSError:
        return 0, 0
    return status.st_mtime_ns, status.st_size


_STAMP = "__llmrl_stamp__"


def _hash(folder: Path) -> str:
    return hashlib.sha256(str(folder).encode()).hexdigest()[:12]


def _module_name(file: Path) -> str:
    if file.stem.isidentifier():
        return file.stem
    readable = "".join(c if c.isalnum() else "_" for c in file.stem)
    return f"{readable}_{hashlib.sha256(file.name.encode()).hexdigest()[:8]}"


# --- the private package of a folder ----------------------------------------------------------------------------------


def _package_of(folder: Path) -> ModuleType:
    """Return the private package of a folder, whose modules are the files and packages in it."""
    name = PREFIX + _hash(folder)
    if name not in sys.modules:
        spec = ModuleSpec(name, None, is_package=True)
        spec.submodule_search_locations = [str(folder)]
        sys.modules[name] = importlib.util.module_from_spec(spec)
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    return sys.modules[name]


class _Finder:
    """Finds the modules of private packages as Python does, and gives them the loader that sets their `__import__`."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if not name.startswith(PREFIX):
            return None
        found = PathFinder.find_spec(name, path, target)
        if found is not None and type(found.loader) is SourceFileLoader:
            found.loader = _Loader(found.loader.name, found.loader.path)
        return found


class _Loader(SourceFileLoader):
    """Runs a file with an `__import__` that looks beside it (beside its top-level package, if it is in one)."""

    def exec_module(self, module: ModuleType) -> None:
        package = module.__name__.partition(".")[0]
        find = _Import(package, Path(sys.modules[package].__path__[0]))
        module.__dict__[_STAMP] = _stamp(module.__file__)
        module.__dict__["__builtins__"] = vars(builtins) | {"__import__": find}
        super().exec_module(module)


class _Import:
    """`__import__` for the files of a private package."""

    def __init__(self, package: str, folder: Path) -> None:
        self.package, self.folder = package, folder
        self.known: dict[str, bool] = {}
        """Names that the file has imported, and whether they lie beside it: functions import again in every call."""

    def __call__(
        self,
        name: str,
        globals: Mapping[str, Any] | None = None,
        locals: Mapping[str, Any] | None = None,
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> ModuleType:
        top = name.partition(".")[0]
        importer = globals or {}
        own = f"{self.package}.{top}"
        # A file `openai.py` that imports openai means the installed one, not itself; a package may mean itself.
        itself = own == importer.get("__name__") and "__path__" not in importer
        if level != 0 or itself or not self._lies_beside(top):
            return builtins.__import__(name, globals, locals, fromlist or (), level)
        module = builtins.__import__(f"{self.package}.{name}", globals, locals, fromlist or (), 0)
        return module if fromlist else sys.modules[own]

    def _lies_beside(self, top: str) -> bool:
        if top not in self.known:
            self.known[top] = _is_neighbor(self.folder, top)
        return self.known[top]


def _is_neighbor(folder: Path, top: str) -> bool:
    """Return whether `import top` in a file of this folder means a file or package of the folder.

    As for a script that is run there, neighbors come before installed packages, and a folder without `__init__.py`
    after them. Other than there, the standard library comes first. What a usual import finds at the same place (the
    folder is on Python's path) is imported as usual, so that it does not exist twice.
    """
    if top in sys.stdlib_module_names or top == "llmrl":
        return False
    candidates = (folder / top / "__init__.py", folder / f"{top}.py")
    file = next((candidate for candidate in candidates if candidate.is_file()), None)
    if file is None and not ((folder / top).is_dir() and any((folder / top).glob("*.py"))):
        return False
    try:
        usual = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        usual = None
    if usual is None:
        return True
    if file is None:
        return False
    return usual.origin is None or Path(usual.origin).resolve() != file
