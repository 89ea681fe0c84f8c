"""Options: frozen dataclasses that check themselves, and choices among them by a field `kind`.

An option class lives in the package that reads it and is the one argument of what reads it. Its types carry the
ranges; its field docstrings are the text of `--help` and of the tables in the documentation.
"""

from __future__ import annotations

import os
from dataclasses import field
from typing import Annotated, TypeVar, cast, dataclass_transform

from annotated_types import Ge, Gt, Le
from pydantic import AfterValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass as pydantic_dataclass

T = TypeVar("T")

MISSING = "???"
"""Value of a required text that is not set."""

Count = Annotated[int, Ge(1)]
Natural = Annotated[int, Ge(0)]
Positive = Annotated[float, Gt(0)]
NotNegative = Annotated[float, Ge(0)]
Share = Annotated[float, Ge(0), Le(1)]
PositiveShare = Annotated[float, Gt(0), Le(1)]
Place = Annotated[str, AfterValidator(os.path.expanduser)]
"""A file or folder, in which ~ is the home directory; or the name of something on the hub."""


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(field, Field))
def option(cls: type[T]) -> type[T]:
    """Make `cls` an option class: keyword arguments only, frozen, unknown names and wrong types refused.

    Change one with `dataclasses.replace`, which checks again.
    """
    config = ConfigDict(extra="forbid", allow_inf_nan=False)
    return cast("type[T]", pydantic_dataclass(kw_only=True, frozen=True, config=config)(cls))


KIND = Field(discriminator="kind")
"""Marks a choice among option classes by their field `kind`: `Annotated[A | B, KIND]`. Without a `kind`, the first is
meant."""
