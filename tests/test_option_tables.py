"""The tables of options in docs/ are those of the option classes, and scripts/option_tables makes them as it says."""

from __future__ import annotations

import re
import sys
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from llmrl.config.config import PRESETS, Config, RunConfig
from llmrl.config.schema import option_fields, walk
from llmrl.option import KIND, MISSING, Count, PositiveShare, option

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))

import option_tables  # noqa: E402

FILES = (".py", ".md", ".jsonl", ".yaml")
NOT_OPTIONS = {"rollout.completion", "rollout.task.meta", "rewards.unit_tests"}
"""Dotted names in the documentation that look like options: attributes and modules in examples of Python."""


@option
class Plain:
    """One class.

    More about it, which no table holds.
    """

    path: str = MISSING
    """A folder
    or a file."""
    share: PositiveShare = 0.5
    """Share of a | b."""


@option
class Child(Plain):
    """It inherits."""

    limit: Count | None = None
    """Use only the first `limit` rows."""
    extra: dict[str, Any] = field(default_factory=dict)


@option
class Red:
    """The first member."""

    kind: Literal["red"] = "red"
    depth: int = 1
    """How deep."""
    own: float = 2e-5
    """Its own."""


@option
class Blue:
    """The second member."""

    kind: Literal["blue"] = "blue"
    depth: int = 1
    """As in kind red."""


@option
class Holder:
    """It holds a choice."""

    color: Annotated[Red | Blue, KIND] = field(default_factory=Red)
    """Which color."""
    child: Child | None = None
    items: list[Plain] = field(default_factory=list)


@pytest.fixture(autouse=True)
def roots(monkeypatch: pytest.MonkeyPatch) -> None:
    for cls in (Plain, Child, Holder):
        monkeypatch.setitem(option_tables.ROOTS, cls.__name__.lower(), [cls])


@pytest.mark.parametrize("page", option_tables.pages(), ids=lambda page: page.name)
def test_a_page_is_current(page: Path) -> None:
    text = page.read_text()
    assert option_tables.rewrite(text) == text, f"{page} is stale: run scripts/option_tables"


def test_every_option_that_the_documentation_names_exists() -> None:
    found = dict(walk(RunConfig)) | dict(walk(Config))
    for options in PRESETS.values():
        found |= dict(walk(type(options), "algo."))
    known = {*found, *(f"{path}.kind" for path, option in found.items() if option.tagged)}
    sections = "|".join(option_fields(Config))
    dotted = re.compile(rf"(?<![\w./])((?:{sections})\.[a-z_0-9.]*[a-z_0-9])")
    repository = SCRIPTS.parent
    for page in [*repository.glob("docs/**/*.md"), repository / "README.md", repository / "recipes" / "README.md"]:
        named = {name for name in dotted.findall(page.read_text()) if not name.endswith(FILES)}
        unknown = named - known - NOT_OPTIONS
        assert not unknown, f"{page.name} names options that do not exist: {sorted(unknown)}"


def test_every_section_has_a_table() -> None:
    marked = {found[2] for page in option_tables.pages() for found in option_tables.MARKED.finditer(page.read_text())}
    assert {root for root in option_tables.ROOTS if root not in ("plain", "child", "holder")} <= marked


def test_a_class_becomes_one_table() -> None:
    assert option_tables.table("plain") == (
        "| option | type | default | meaning |\n"
        "| --- | --- | --- | --- |\n"
        "| `path` | text | required | A folder or a file. |\n"
        "| `share` | number, above 0, at most 1 | `0.5` | Share of a \\| b. |\n"
    )


def test_an_inherited_option_keeps_its_meaning() -> None:
    rows = option_tables.table("child").splitlines()[2:]
    assert rows[0] == "| `path` | text | required | A folder or a file. |"
    assert rows[2] == "| `limit` | int, at least 1 \\| null | `null` | Use only the first `limit` rows. |"
    assert rows[3] == "| `extra` | mapping | `{}` |  |"


def test_a_union_lists_its_members_and_then_the_options_with_their_members() -> None:
    assert option_tables.table("holder.color") == (
        "| kind | meaning |\n"
        "| --- | --- |\n"
        "| `red` | The first member. |\n"
        "| `blue` | The second member. |\n"
        "\n"
        "| option | kind | type | default | meaning |\n"
        "| --- | --- | --- | --- | --- |\n"
        "| `depth` | all | int | `1` | How deep. |\n"
        "| `own` | `red` | number | `2e-5` | Its own. |\n"
    )


def test_a_holder_names_choices_options_and_lists() -> None:
    rows = option_tables.table("holder").splitlines()[2:]
    assert rows == [
        "| `color` | choice | `red` | Which color. |",
        "| `child` | options \\| null | `null` |  |",
        "| `items` | list of options | `[]` |  |",
    ]
    assert option_tables.table("holder.child") == option_tables.table("child")
    assert option_tables.table("holder.items") == option_tables.table("plain")


@pytest.mark.parametrize(
    ("path", "message"),
    [("nope", "'nope' is not a known root"), ("child.nope", "no option 'nope'"), ("child.limit", "a single value")],
)
def test_a_wrong_path_is_an_error(path: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        option_tables.find(path)


def test_a_page_is_rewritten_between_its_marks_only() -> None:
    page = "before\n<!-- options: plain -->\nstale\n<!-- /options -->\nafter\n"
    new = option_tables.rewrite(page)
    assert new == f"before\n<!-- options: plain -->\n{option_tables.table('plain')}<!-- /options -->\nafter\n"
    assert option_tables.rewrite(new) == new


def test_many_members_are_named_by_those_that_lack_an_option() -> None:
    everyone = list("abcdefgh")
    assert option_tables.name_owners(everyone, everyone) == "all"
    assert option_tables.name_owners(everyone[:-1], everyone) == "all but `h`"
    assert option_tables.name_owners(everyone[:4], everyone) == "`a`, `b`, `c`, `d`"
    assert option_tables.name_owners(["a"], ["a"]) == "`a`"


def test_check_names_a_stale_page_and_leaves_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "docs" / "page.md"
    page.parent.mkdir()
    page.write_text("<!-- options: plain -->\n<!-- /options -->\n")
    (tmp_path / "docs" / "other.md").write_text("no table\n")
    monkeypatch.setattr(option_tables, "REPOSITORY", tmp_path)
    assert option_tables.main(["--check"]) == 1
    assert capsys.readouterr().out == "docs/page.md\n" and "| `path` |" not in page.read_text()
    assert option_tables.main([]) == 0 and "| `path` |" in page.read_text()
    assert option_tables.main(["--check"]) == 0
