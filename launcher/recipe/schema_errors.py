"""Says in words what pydantic found wrong with a recipe or a profile."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from typing import TYPE_CHECKING, Any

from launcher.errors import Problem, did_you_mean
from launcher.recipe import other_names

if TYPE_CHECKING:
    from pydantic import ValidationError

    from launcher.recipe.source import Source


def explain(error: ValidationError, source: Source, schema: type) -> list[Problem]:
    """Turn pydantic's errors into ours: one per key, with what was found, what is valid and the nearest name."""
    problems: dict[str, Problem] = {}
    for detail in error.errors(include_url=False):
        key, annotation, siblings = _locate(detail["loc"], schema)
        if key in problems:  # the other branches of a union
            continue
        if detail["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            message = f"unknown key; {_other_key(key, source, schema) or _near(key, siblings)}"
        else:
            found = _show(_value_at(source.values, key), source.typed.get(key))
            other = _other_key(key, source, schema) if dataclasses.is_dataclass(annotation) else None
            message = f"found {found}; {other or _valid(annotation, _value_at(source.values, key))}"
        problems[key] = Problem(key=key, where=source.where(key), message=message)
    return list(problems.values())


def _valid(annotation: Any, value: Any) -> str:
    """What is valid, behind the nearest of the names that a key may have."""
    inner = _strip(annotation)
    branches = typing.get_args(inner) if typing.get_origin(inner) in (types.UnionType, typing.Union) else [inner]
    said = [
        one for branch in branches if typing.get_origin(branch) is typing.Literal for one in typing.get_args(branch)
    ]
    names = {one.lower(): one for one in said if isinstance(one, str)}
    near = did_you_mean(names.get(value.lower(), value), names.values()) if isinstance(value, str) else ""
    return " ".join(filter(None, [near, f"valid: {_describe(annotation)}"]))


def _other_key(key: str, source: Source, schema: type) -> str | None:
    """What to write where the name is a key of another section, or what other tools call one of ours."""
    if isinstance(_value_at(source.values, key), dict):  # a section
        return None
    typed = source.typed.get(key)
    is_flag = typed in ("true", "false")  # pretrained=true: what the key here wants is something else
    value = f"={typed}" if typed and not is_flag and "(" in source.where(key) else ""
    known = [f"{one}{value}" for one in other_names.keys_of(key.rpartition(".")[2], schema)]
    return f"it is {' or '.join(known)} here" if known else None


def _near(key: str, siblings: list[str]) -> str:
    name = key.rpartition(".")[2]
    return " ".join(filter(None, [did_you_mean(name, siblings), f"valid: {', '.join(siblings)}"]))


def _locate(location: tuple[int | str, ...], schema: type) -> tuple[str, Any, list[str]]:
    """Follow an error's location as far as it names fields: dotted key, the field's annotation, the names beside it."""
    names: list[str] = []
    annotation: Any = schema
    siblings: list[str] = []
    for part in location:
        if dataclasses.is_dataclass(annotation):
            hints = typing.get_type_hints(annotation, include_extras=True)
            siblings = [name for name in hints if not name.startswith("__")]
            names.append(str(part))
            annotation = hints.get(str(part))
            if annotation is None:
                break
        elif typing.get_origin(_strip(annotation)) in (dict, list) and len(names) < len(location):
            names.append(str(part))
            items = typing.get_args(_strip(annotation))[-1]
            if not dataclasses.is_dataclass(items):
                break
            annotation = items
        else:
            break
    return ".".join(names), annotation, siblings


def _value_at(values: Any, dotted: str) -> Any:
    pairs = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in pairs:  # a user's key may contain dots
        if dotted == str(key):
            return value
        if dotted.startswith(f"{key}."):
            return _value_at(value, dotted.removeprefix(f"{key}."))
    return None


def _show(value: Any, typed: str | None) -> str:
    """A value as it was ``typed``, if that is known; interpolations and lists as they were read."""
    if value is None:
        return "null"
    if isinstance(value, str):
        return repr(value if typed is None or "${" in typed else typed)
    if isinstance(value, bool | int | float) and math.isfinite(value) and typed and "${" not in typed:
        return typed
    return str(value).lower() if isinstance(value, bool) else repr(value)


def _strip(annotation: Any) -> Any:
    return typing.get_args(annotation)[0] if typing.get_origin(annotation) is typing.Annotated else annotation


def _describe(annotation: Any) -> str:
    """Say in words what an annotation allows, as in ``a whole number >= 1, or auto``."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        words = (info if isinstance(info, str) else getattr(info, "description", None) for info in args[1:])
        said = next(filter(None, words), "")  # a text says it where the schema's description is the key's docstring
        is_list = typing.get_origin(args[0]) is list
        limits = _list_limits(args[1:]) if is_list else [" and ".join(_describe_limits(args[1:]))]
        return str(said) or (", " if is_list else " ").join([_describe(args[0]), *filter(None, limits)])
    if origin is typing.Literal:
        return ", ".join(str(a) for a in args)
    if origin in (types.UnionType, typing.Union):
        return ", or ".join(_describe(a) for a in args)
    if origin in (list, dict):
        return f"a {'list' if origin is list else 'mapping'} of {' to '.join(_describe(a) for a in args)}"
    if dataclasses.is_dataclass(annotation):
        return f"a mapping with the keys {', '.join(f.name for f in dataclasses.fields(annotation))}"
    return {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}[
        annotation
    ]


def _list_limits(metadata: tuple[Any, ...]) -> list[str]:
    """How many values a list has, as in ``2 of them``."""
    constraints = [constraint for info in metadata for constraint in getattr(info, "metadata", [info])]
    least, most = (
        next((getattr(one, name) for one in constraints if hasattr(one, name)), None)
        for name in ("min_length", "max_length")
    )
    if least == most:
        return [f"{least} of them"] if least is not None else []
    return [text for text, end in ((f"at least {least}", least), (f"at most {most}", most)) if end is not None]


def _describe_limits(metadata: tuple[Any, ...]) -> list[str]:
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    limits = []
    for info in metadata:
        for constraint in getattr(info, "metadata", [info]):
            limits += [
                f"{sign} {getattr(constraint, name):g}" for name, sign in signs.items() if hasattr(constraint, name)
            ]
            if getattr(constraint, "pattern", None):
                limits.append(f"matching {constraint.pattern}")
            if hasattr(constraint, "max_length"):
                limits.append(f"of at most {constraint.max_length} characters")
    return limits
