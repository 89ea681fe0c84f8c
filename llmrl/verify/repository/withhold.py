"""Takes the expected values out of a test file, so that a program beside the tests cannot claim to have met them.

`assert f(2) == 14` becomes `assert __witness__("3", f(2))`: the value goes out of the box, and 14 never goes in. A
program that patches the test runner can report "passed", but has to report 14 as well, and nothing in its box says 14.
Withheld are literals that are compared for equality in test functions: in the comparison itself, in a local variable
that is used for nothing else, and in the rows of `pytest.mark.parametrize`. Easily guessed values (True, 0, "") stay.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass, field
from typing import Any

_EQUALITIES = {
    "assertEqual",
    "assertEquals",
    "assertListEqual",
    "assertDictEqual",
    "assertTupleEqual",
    "assertSetEqual",
}
_WITNESS, _TOKEN = "__witness__", "__withheld__"


@dataclass(kw_only=True, slots=True)
class Function:
    """What was withheld from one test function."""

    sites: list[str] = field(default_factory=list)
    """Comparisons that every passing run reaches."""
    tokens: bool = False
    """Its parameters hold withheld values, a different one in each row."""


@dataclass(kw_only=True, slots=True)
class Withheld:
    """A test file without its expected values."""

    source: str
    answers: dict[str, Any] = field(default_factory=dict)
    """The value that belongs to each comparison or parameter."""
    shown: dict[str, str] = field(default_factory=dict)
    """What pytest would put into the name of a test for each withheld parameter; it puts `<token>` there."""
    functions: dict[str, Function] = field(default_factory=dict)
    """By name, `test_f` or `TestClass::test_f`: test functions with at least one comparison that was withheld."""


def withhold(source: str, prefix: str, leave: frozenset[str] = frozenset()) -> Withheld:
    """Return a test file without expected values.

    Args:
        source: the file; one that does not parse is returned as it is.
        prefix: begins the names of comparisons and parameters, which are unique over all files.
        leave: names of comparisons to leave as they are.
    """
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return Withheld(source=source)
    found = Withheld(source=source)
    counter = _Names(prefix)
    for name, node in _test_functions(tree):
        function = _Transformer(found, counter, leave).function(node)
        if function.sites:
            found.functions[name] = function
    found.source = ast.unparse(tree) + "\n"
    return found


class _Names:
    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.counts = {"c": 0, "p": 0}

    def next(self, kind: str) -> str:
        """Return a new name. Comparisons and parameters are counted apart: leaving some changes no other name."""
        self.counts[kind] += 1
        return f"{self.prefix}.{kind}{self.counts[kind]}"


def _test_functions(tree: ast.Module) -> list[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    found: list[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]] = []
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name.startswith("test"):
            found.append((node.name, node))
        elif isinstance(node, ast.ClassDef):
            found += [
                (f"{node.name}::{inner.name}", inner)
                for inner in node.body
                if isinstance(inner, (ast.FunctionDef, ast.AsyncFunctionDef)) and inner.name.startswith("test")
            ]
    return found


def is_telling(value: Any) -> bool:
    """Return whether a value is worth withholding: nobody would guess it."""
    if value is None or isinstance(value, bool) or value is Ellipsis:
        return False
    if isinstance(value, (int, float, complex)):
        return abs(value) not in (0, 1, 2) if value == value else False
    return len(str(value)) > 4 if isinstance(value, (list, tuple, dict, set, frozenset)) else len(value) > 1


_NOT_LITERAL = object()


def _literal(node: ast.AST) -> Any:
    try:
        value = ast.literal_eval(node)  # type: ignore[arg-type]
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return _NOT_LITERAL
    return value if is_telling(value) else _NOT_LITERAL


class _Transformer:
    """Withholds what one test function compares with."""

    def __init__(self, found: Withheld, names: _Names, leave: frozenset[str]) -> None:
        self.found, self.names, self.leave = found, names, leave
        self.result = Function()

    def function(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> Function:
        self.uses, self.equalities = _uses(node), _compared(node)
        self.locals = _single_literals(node)
        self.rows = _literal_rows(node)
        self.compared: set[str] = set()
        always = {id(statement) for statement in node.body}
        for statement in list(node.body):
            if isinstance(statement, (ast.With, ast.AsyncWith)) and not _may_swallow(statement):
                always |= {id(inner) for inner in statement.body}
        for statement in _statements(node):
            self.statement(statement, id(statement) in always)
        for name in self.compared & self.rows.keys():
            self.withhold_rows(name)
        seen = [_literal(item) for item in ast.walk(node) if isinstance(item, ast.expr)]
        self.result.sites = [site for site in self.result.sites if not self.is_told(site, seen)]
        return self.result

    def is_told(self, site: str, seen: list[Any]) -> bool:
        """Return whether the test still holds the value of a comparison, for example as an argument."""
        return any(self.found.answers.get(site, _NOT_LITERAL) == value for value in seen if value is not _NOT_LITERAL)

    def statement(self, statement: ast.stmt, always: bool) -> None:
        sides = _equality(statement)
        if sides is None:
            return
        for expected, given in (sides, sides[::-1]):
            site = self.names.next("c") if self.answer(expected) else ""
            if not site or site in self.leave:
                continue
            self.compared |= {expected.id} if isinstance(expected, ast.Name) else set()
            value = self.answer(expected)
            assert value is not None
            if value[0] is not _NOT_LITERAL:
                self.found.answers[site] = value[0]
            self.replace(statement, site, given, expected)
            self.result.sites += [site] if always else []
            return

    def answer(self, node: ast.expr) -> tuple[Any] | None:
        """Return (value,) of a side that can be withheld; the value of a parameter is that of its row."""
        value = _literal(node)
        if value is not _NOT_LITERAL:
            return (value,)
        if isinstance(node, ast.Name):
            only_compared = self.uses.get(node.id, 0) == self.equalities.get(node.id, 0)
            if node.id in self.locals and only_compared:
                return (self.locals[node.id][1],)
            if node.id in self.rows and only_compared:
                return (_NOT_LITERAL,)
        return None

    def replace(self, statement: ast.stmt, site: str, given: ast.expr, expected: ast.expr) -> None:
        arguments: list[ast.expr] = [ast.Constant(site), given]
        if isinstance(expected, ast.Name):
            if expected.id in self.rows:
                arguments.append(ast.Name(expected.id, ast.Load()))
            else:
                self.locals[expected.id][0].value = ast.Constant(None)
        call = ast.Call(ast.Name(_WITNESS, ast.Load()), arguments, [])
        if isinstance(statement, ast.Assert):
            statement.test, statement.msg = call, None
        else:
            assert isinstance(statement, ast.Expr)
            statement.value = call
        ast.fix_missing_locations(statement)

    def withhold_rows(self, name: str) -> None:
        self.result.tokens = True
        for number, (holder, index, value) in enumerate(self.rows[name]):
            token = self.names.next("p")
            self.found.answers[token] = value
            numbered = isinstance(value, (list, tuple, dict, set, frozenset, complex))
            text = value.decode("ascii", "backslashreplace") if isinstance(value, bytes) else str(value)
            self.found.shown[token] = f"{name}{number}" if numbered else text
            call = ast.Call(ast.Name(_TOKEN, ast.Load()), [ast.Constant(token)], [])
            holder.elts[index] = ast.copy_location(call, holder.elts[index])
            ast.fix_missing_locations(holder)


def _statements(node: ast.AST) -> list[ast.stmt]:
    return [item for item in ast.walk(node) if isinstance(item, (ast.Assert, ast.Expr))]


def _may_swallow(statement: ast.With | ast.AsyncWith) -> bool:
    """Return whether a `with` block can end before its last statement and the test still pass."""
    text = " ".join(ast.unparse(item.context_expr) for item in statement.items)
    return any(word in text for word in ("raises", "suppress", "assertRaises", "warns", "subTest"))


def _equality(statement: ast.stmt) -> tuple[ast.expr, ast.expr] | None:
    """Return the two sides that a statement requires to be equal."""
    if isinstance(statement, ast.Assert):
        test = statement.test
        if isinstance(test, ast.Compare) and len(test.ops) == 1 and isinstance(test.ops[0], ast.Eq):
            return test.comparators[0], test.left
    elif isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
        call = statement.value
        if isinstance(call.func, ast.Attribute) and call.func.attr in _EQUALITIES and len(call.args) >= 2:
            return call.args[1], call.args[0]
    return None


def _uses(node: ast.AST) -> dict[str, int]:
    counts: dict[str, int] = {}
    for item in ast.walk(node):
        if isinstance(item, ast.Name) and isinstance(item.ctx, ast.Load):
            counts[item.id] = counts.get(item.id, 0) + 1
    return counts


def _compared(node: ast.AST) -> dict[str, int]:
    """Return how many uses of each name are a side of a required equality."""
    counts: dict[str, int] = {}
    for statement in _statements(node):
        for side in _equality(statement) or ():
            if isinstance(side, ast.Name):
                counts[side.id] = counts.get(side.id, 0) + 1
    return counts


def _single_literals(node: ast.FunctionDef | ast.AsyncFunctionDef) -> dict[str, tuple[ast.Assign, Any]]:
    """Return local variables that are assigned once, at the top of the function, and a literal."""
    stored: dict[str, int] = {}
    for item in ast.walk(node):
        if isinstance(item, ast.Name) and not isinstance(item.ctx, ast.Load):
            stored[item.id] = stored.get(item.id, 0) + 1
    found: dict[str, tuple[ast.Assign, Any]] = {}
    for statement in node.body:
        if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
            target = statement.targets[0]
            if isinstance(target, ast.Name) and stored.get(target.id) == 1:
                value = _literal(statement.value)
                if value is not _NOT_LITERAL:
                    found[target.id] = (statement, value)
    return found


_Row = tuple[ast.List | ast.Tuple, int, Any]


def _literal_rows(node: ast.FunctionDef | ast.AsyncFunctionDef) -> dict[str, list[_Row]]:
    """Return the parameters of a test with one `parametrize`, if every row gives them a literal worth withholding."""
    marks = [
        mark
        for mark in node.decorator_list
        if isinstance(mark, ast.Call) and ast.unparse(mark.func).endswith("parametrize")
    ]
    if len(marks) != 1 or len(marks[0].args) < 2:
        return {}
    names, rows = marks[0].args[:2]
    if not isinstance(names, ast.Constant) or not isinstance(names.value, str) or not isinstance(rows, ast.List):
        return {}
    split = [name.strip() for name in names.value.split(",")]
    found: dict[str, list[_Row]] = {}
    for position, name in enumerate(split):
        held: list[_Row] = []
        for number, row in enumerate(rows.elts):
            holder, index = (rows, number) if len(split) == 1 else (row, position)
            if not isinstance(holder, (ast.List, ast.Tuple)) or index >= len(holder.elts):
                break
            value = _literal(holder.elts[index])
            if value is _NOT_LITERAL:
                break
            held.append((holder, index, value))
        if held and len(held) == len(rows.elts):
            found[name] = held
    return found
