"""Shared by the schemas of recipes and profiles: pydantic's configuration, and types of numbers."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter
from pydantic_core import PydanticKnownError

Schema = TypeVar("Schema")

# Strict: "20" is not a number, 1 not a boolean.
STRICT = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=False, allow_inf_nan=False)

Auto = Literal["auto"]
Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Argument = bool | int | float | str | list[bool | int | float | str] | None
"""What a recipe can pass to the user's own code."""
NodeRange = Annotated[str, Field(pattern=r"^[1-9][0-9]{0,5}:[1-9][0-9]{0,5}$", description="MIN:MAX, as in 2:4")]
Fraction = Annotated[float, Field(ge=0, le=1)]


def _no_boolean(value: object) -> object:
    """To Python, and so to Literal, true is 1."""
    if isinstance(value, bool):
        raise PydanticKnownError("literal_error", {"expected": "1 or 3"})
    return value


Channels = Annotated[Literal[1, 3], BeforeValidator(_no_boolean)]

_ADAPTERS: dict[type, TypeAdapter[Any]] = {}
"""To make one takes a tenth of a second."""


def validate(schema: type[Schema], values: dict[str, Any]) -> Schema:
    """Make a ``schema`` of nested plain values.

    Raises:
        pydantic.ValidationError: lists all values that do not fit.
    """
    if schema not in _ADAPTERS:
        _ADAPTERS[schema] = TypeAdapter(schema)
    # Through JSON, because pydantic's strict mode accepts a mapping for a dataclass only from JSON.
    found: Schema = _ADAPTERS[schema].validate_json(json.dumps(values, default=str))
    return found


def describe(schema: type[Any]) -> dict[str, Any]:
    """The JSON Schema of a schema, in which the attributes' docstrings are descriptions.

    To read those takes longer than all else about a schema, and who only validates does without them.
    """
    STRICT["use_attribute_docstrings"] = True
    try:
        return TypeAdapter(schema).json_schema()
    finally:
        STRICT["use_attribute_docstrings"] = False
