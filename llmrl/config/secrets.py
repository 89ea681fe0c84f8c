"""Keys and passwords in a configuration: refused, because config.yaml, trackers and messages would show them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

IN_URL = re.compile(r"\w+://[^/\s@]+@")
NAMES = re.compile(
    r"(^|_)((api|access|secret|private)_?key|(hf|hub|auth|access|api|bearer)_?token|password|passwd|secret|authorization)$",
    re.IGNORECASE,
)


def findings(config: object) -> list[str]:
    """Return where a configuration holds something secret; the secret itself is not repeated."""
    return [
        f"{place} holds {what}, which config.yaml, trackers and messages would show: put it into an environment "
        "variable and name that (api_key_env, or os.environ in code of your own)"
        for place, what in _secrets("", config)
    ]


def _secrets(place: str, value: Any) -> Iterator[tuple[str, str]]:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        for name, inner in value.items():
            below = f"{place}.{name}" if place else str(name)
            if isinstance(inner, str) and inner and NAMES.search(str(name)):
                yield below, "a key"
            else:
                yield from _secrets(below, inner)
    elif isinstance(value, (list, tuple)):
        for i, inner in enumerate(value):
            yield from _secrets(f"{place}[{i}]", inner)
    elif isinstance(value, str) and IN_URL.search(value):
        yield place, "an address with a password"
