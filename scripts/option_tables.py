"""Make the tables of options in the documentation from the option classes: name, type, default, meaning.

PATH in `<!-- options: PATH -->` is a section of a configuration or a family of algorithms, followed by options in it:
`model.lora` are the adapters of the model, `policy_gradient.loss` is `algo.loss` of that family.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from llmrl.algo.policy_gradient.options import PolicyGradient
from llmrl.algo.ppo.options import PPO
from llmrl.algo.preference.options import DPO, KTO, OnlineDPO, OnlineKTO
from llmrl.config.config import Config
from llmrl.config.schema import OptionField, option_fields, type_text
from llmrl.data.options import PreferenceData
from llmrl.methods.bcoder.options import BCoderOptions
from llmrl.option import MISSING

REPOSITORY = Path(__file__).resolve().parents[1]

ROOTS: dict[str, list[type]] = {
    **{name: [*field.members.values()] for name, field in option_fields(Config).items() if name != "algo"},
    "preferences": [PreferenceData],
    "policy_gradient": [PolicyGradient],
    "ppo": [PPO],
    "preference": [DPO, OnlineDPO, KTO, OnlineKTO],
    "bcoder": [BCoderOptions],
}
"""The option classes that a path can begin with; several of them are a choice."""

MARKED = re.compile(r"(<!-- options: ([\w.]+) -->\n).*?(<!-- /options -->)", re.DOTALL)
TAGS = {"kind": "kind", "name": "preset"}
"""The fields that tell the members of a choice apart, and what a table calls them."""
AS_IN = re.compile(r"As in kind (\w+)\.")
"""A field docstring of this form stands for that of another member of the choice."""


def find(path: str) -> list[type]:
    """Return the option classes at `path`: one, or the members of a choice.

    Raises:
        ValueError: the path names nothing, or a single value.
    """
    root, *names = path.split(".")
    if root not in ROOTS:
        raise ValueError(f"options: {path}: {root!r} is not a known root; use one of {', '.join(ROOTS)}")
    classes = ROOTS[root]
    for name in names:
        found = [option_fields(cls)[name] for cls in classes if name in option_fields(cls)]
        if not found:
            known = ", ".join(dict.fromkeys(option for cls in classes for option in option_fields(cls)))
            raise ValueError(f"options: {path}: there is no option {name!r}; use one of {known}")
        classes = list(dict.fromkeys(cls for field in found for cls in field.members.values()))
    if not classes:
        raise ValueError(f"options: {path} is a single value, not a set of options")
    return classes


# --- a cell ---


def cell(text: str) -> str:
    """Put text on one line that a table can hold."""
    return " ".join(text.split()).replace("|", "\\|")


def describe_type(field: OptionField) -> str:
    """Describe a type as `--help` does, but do not list the members of a choice: they have a table of their own."""
    if not field.members or not field.tagged:
        return cell(type_text(field.hint))
    return ("list of choices" if field.many else "choice") + (r" \| null" if field.optional else "")


def describe_default(field: OptionField) -> str:
    """Describe a default: a value, the kind of a choice, `{}` for options with their own defaults, or "required"."""
    value = field.default
    if value in (MISSING, dataclasses.MISSING):
        return "required"
    if hasattr(value, "__dataclass_fields__"):
        return f"`{getattr(value, 'kind', '{}')}`"
    return f"`{value}`" if isinstance(value, str) else f"`{json.dumps(value).replace('e-0', 'e-')}`"


# --- a table ---


def markdown(head: list[str], rows: Iterable[Iterable[str]]) -> str:
    return "".join(f"| {' | '.join(row)} |\n" for row in [head, ["---"] * len(head), *rows])


def option_row(field: OptionField) -> tuple[str, ...]:
    return f"`{field.name}`", describe_type(field), describe_default(field), cell(field.doc)


def tag_of(classes: list[type]) -> str | None:
    """Return the field that tells the members of a choice apart; None for a class that stands alone."""
    if all("kind" in {f.name for f in dataclasses.fields(cls)} for cls in classes):
        return "kind"
    return "name" if len(classes) > 1 else None


def table(path: str) -> str:
    """Return the table of the options at `path`. A choice has two: its members, and the options with their members."""
    classes = find(path)
    tag = tag_of(classes)
    if tag is None:
        rows = (option_row(field) for field in option_fields(classes[0]).values())
        return markdown(["option", "type", "default", "meaning"], rows)
    by_tag = {getattr(cls, tag): cls for cls in classes}
    summaries = ([f"`{kind}`", cell((cls.__doc__ or "").split("\n\n")[0])] for kind, cls in by_tag.items())
    rows = merged_rows(by_tag, tag)
    options = "\n" + markdown(["option", TAGS[tag], "type", "default", "meaning"], rows) if rows else ""
    return markdown([TAGS[tag], "meaning"], summaries) + options


def merged_rows(by_tag: dict[str, type], tag: str) -> list[list[str]]:
    """Return one row for each option of a choice, with all the members in which it is the same."""
    owners: dict[tuple[str, ...], list[str]] = {}
    for kind, cls in by_tag.items():
        for field in option_fields(cls).values():
            *row, text = option_row(field)
            if other := AS_IN.match(text):
                text = cell(option_fields(by_tag[other[1]])[field.name].doc)
            if field.name != tag:
                owners.setdefault((*row, text), []).append(kind)
    names = [f"`{name}`" for cls in by_tag.values() for name in option_fields(cls)]
    return [
        [row[0], name_owners(of, list(by_tag)), *row[1:]]
        for row, of in sorted(owners.items(), key=lambda item: names.index(item[0][0]))
    ]


def name_owners(of: list[str], everyone: list[str]) -> str:
    """Name the members that have an option, or the few that lack it."""
    others = [f"`{kind}`" for kind in everyone if kind not in of]
    if not others and len(everyone) > 1:
        return "all"
    return "all but " + ", ".join(others) if 0 < len(others) < len(of) / 3 else ", ".join(f"`{kind}`" for kind in of)


# --- the pages ---


def rewrite(text: str) -> str:
    """Return a page with its tables made anew."""
    return MARKED.sub(lambda found: f"{found[1]}{table(found[2])}{found[3]}", text)


def pages() -> list[Path]:
    """Return the pages that hold a table."""
    return [page for page in sorted(REPOSITORY.glob("docs/**/*.md")) if MARKED.search(page.read_text())]


def main(arguments: list[str]) -> int:
    """Rewrite the stale pages, or with --check only name them. Returns the exit status."""
    stale = {page: new for page in pages() if (new := rewrite(page.read_text())) != page.read_text()}
    for page, text in stale.items():
        print(page.relative_to(REPOSITORY))
        if "--check" not in arguments:
            page.write_text(text)
    return int("--check" in arguments and bool(stale))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
