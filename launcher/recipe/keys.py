"""Lists a recipe's dotted keys with their values, and writes a value as YAML."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator


def flat(section: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of a recipe, in the order of the schema."""
    for field in dataclasses.fields(section):
        value, key = getattr(section, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            yield from flat(value, f"{key}.")
        elif isinstance(value, list):
            yield key, [dataclasses.asdict(item) if dataclasses.is_dataclass(item) else item for item in value]  # type: ignore[arg-type]
        else:
            yield key, value


def show(value: Any) -> str:
    """A value as YAML, on one line."""
    import yaml

    return str(yaml.safe_dump(value, default_flow_style=True, width=1000)).removesuffix("\n").removesuffix("\n...")
