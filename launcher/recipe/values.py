"""Reads a value by its key's type in the schema, so that a name that looks like a number stays text."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

_STANDARD = "tag:yaml.org,2002:"
_NULL, _TEXT = f"{_STANDARD}null", f"{_STANDARD}str"
_QUOTES = ("'", '"')


def options(annotation: Any) -> list[Any]:
    """The single types that an annotation allows."""
    if typing.get_origin(annotation) is typing.Annotated:
        return options(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        return [inner for option in typing.get_args(annotation) for inner in options(option)]
    return [annotation]


def at(schema: Any, keys: Sequence[str]) -> Any:
    """The schema's annotation for the parts of a dotted key; None: the schema has no such key."""
    annotation = schema
    for key in keys:
        inside = next((found for option in options(annotation) if (found := _inside(option, key)) is not None), None)
        if inside is None:
            return None
        annotation = inside
    return annotation


def _inside(option: Any, key: str) -> Any:
    if dataclasses.is_dataclass(option):
        return typing.get_type_hints(option, include_extras=True).get(key)
    origin, arguments = typing.get_origin(option), typing.get_args(option)
    return arguments[1] if origin is dict else arguments[0] if origin is list else None


def is_text(annotation: Any) -> bool:
    """Whether a single value (no list, no mapping) must be text."""
    single = [o for o in options(annotation) if typing.get_origin(o) not in (list, dict) and o is not type(None)]
    return bool(single) and all(option is str for option in single)


def has_text(annotation: Any) -> bool:
    """Whether an annotation allows text, alone or inside a list or a mapping."""
    inner = [arguments[-1] for option in options(annotation) if (arguments := typing.get_args(option))]
    return any(option is str for option in options(annotation)) or any(is_text(one) for one in inner)


def allows_null(annotation: Any) -> bool:
    """Whether an annotation allows null."""
    return type(None) in options(annotation)


def read(typed: str, annotation: Any) -> Any:
    """The value of an override ``key=typed``, for a key whose annotation :func:`has_text`.

    Raises:
        yaml.YAMLError: ``typed`` has a tag, or begins like a list or a mapping and is not valid YAML.
    """
    import yaml

    if typed.startswith("!!"):
        raise yaml.YAMLError("YAML tags are not allowed here; put text that begins with !! in quotes")
    is_nested = any(typing.get_origin(option) in (list, dict) for option in options(annotation))
    if is_nested and typed[:1] in ("[", "{"):
        root = yaml.compose(typed, Loader=yaml.SafeLoader)
        retag(root, annotation)
        return yaml.safe_load(yaml.serialize(root, Dumper=yaml.SafeDumper))
    if allows_null(annotation) and typed in ("", "null"):
        return None
    is_quoted = typed[:1] in _QUOTES and typed[-1:] == typed[:1]
    # Text, unless it is a value of another type that is allowed; to YAML 2:4 is a number to the base of 60.
    if is_quoted or not (is_text(annotation) or ":" in typed):
        try:
            found = yaml.safe_load(typed)
        except yaml.YAMLError:
            return typed
        wanted = (str,) if is_quoted else [option for option in options(annotation) if option is not str]
        return found if type(found) in wanted else typed
    return typed


def retag(node: Any, annotation: Any) -> None:
    """Mark as text, in a composed YAML document, each value that must be text by the schema."""
    import yaml

    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if key.tag.startswith(_STANDARD) and not key.tag.endswith(":merge"):
                if _has_text_keys(annotation):
                    _quote(key)
                retag(value, at(annotation, [key.value]))
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            retag(item, at(annotation, ["0"]))
    elif annotation is not None and str in options(annotation) and not _means_other(node, annotation):
        _quote(node)


def _has_text_keys(annotation: Any) -> bool:
    mappings = [option for option in options(annotation) if typing.get_origin(option) is dict]
    return any(str in options(typing.get_args(option)[0]) for option in mappings)


def _means_other(node: Any, annotation: Any) -> bool:
    """Whether YAML reads a single value as one of the other types that the annotation allows.

    Not as a number to the base of 60, which 2:4 is to YAML.
    """
    if node.tag == _NULL:
        return allows_null(annotation) or node.value == ""
    others = {bool: "bool", int: "int", float: "float"}
    return ":" not in node.value and any(
        node.tag == f"{_STANDARD}{others[one]}" for one in options(annotation) if one in others
    )


def _quote(node: Any) -> None:
    node.tag = _TEXT
    if node.style is None:  # it has no quotes in the file
        node.style = "'"


def typed_values(node: Any, prefix: str = "") -> dict[str, str]:
    """The single values of a composed document as they were typed, by their dotted keys."""
    import yaml

    if isinstance(node, yaml.ScalarNode):
        return {prefix: node.value}
    is_mapping = isinstance(node, yaml.MappingNode)
    pairs = [(k.value, v) for k, v in node.value] if is_mapping else enumerate(node.value)
    found: dict[str, str] = {}
    for key, value in pairs:
        found |= typed_values(value, f"{prefix}.{key}" if prefix else str(key))
    return found
