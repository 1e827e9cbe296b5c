"""What the schemas of recipes and profiles are made from: pydantic's strictness, and the kinds of numbers."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import ConfigDict, Field, TypeAdapter

Schema = TypeVar("Schema")

# Attribute docstrings become the descriptions in the JSON Schema; strict, so that "20" is no number and 1 no boolean.
STRICT = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True, allow_inf_nan=False)

Auto = Literal["auto"]
Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Argument = bool | int | float | str | list[bool | int | float | str] | None
"""What a recipe can pass to the user's own code."""
Fraction = Annotated[float, Field(ge=0, le=1)]


def validate(schema: type[Schema], values: dict[str, Any]) -> Schema:
    """Make a ``schema`` of nested plain values.

    Raises:
        pydantic.ValidationError: lists all values that do not fit.
    """
    # By way of JSON: pydantic's strict mode takes mappings for dataclasses from JSON only.
    return TypeAdapter(schema).validate_json(json.dumps(values, default=str))
