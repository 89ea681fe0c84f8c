"""A nested configuration in, one flat dictionary with dotted keys out."""

from __future__ import annotations

from typing import Any


def flatten(config: dict[str, Any]) -> dict[str, Any]:
    """Return a nested configuration as one flat dictionary with dotted keys, the form that trackers take."""
    flat: dict[str, Any] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{prefix}{key}.", inner)
        else:
            flat[prefix[:-1]] = value if isinstance(value, (int, float, str, bool)) else str(value)

    walk("", config)
    return flat
