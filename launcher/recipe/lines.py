"""Reads the text of a recipe file: the line of each key, and YAML that a recipe cannot use."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.errors import Problem, RecipeError, did_you_mean
from launcher.recipe import values as recipe_types

if TYPE_CHECKING:
    from collections.abc import Iterator

_STANDARD = "tag:yaml.org,2002:"
_VALUE_TAGS = {_STANDARD + name for name in ("null", "bool", "int", "float", "str", "seq", "map", "timestamp")}
_KEY_TAGS = {_STANDARD + name for name in ("str", "int")}
_MERGE_TAG = _STANDARD + "merge"


def read_text(path: str) -> str:
    """The file as text.

    Raises:
        RecipeError: the file is missing or is not text.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        folder = Path(path).parent
        near = did_you_mean(Path(path).name, [p.name for p in folder.glob("*.yaml")]) if folder.is_dir() else ""
        message = " ".join(filter(None, ["no such file;", near or "`launch recipes` lists those that come with it"]))
        raise RecipeError([Problem(key="", where=path, message=message)]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise _error(path, 1, f"cannot be read as text: {error}") from None


def key_lines(path: str, text: str) -> dict[str, int]:
    """Dotted keys of a YAML text, each with its line (from 1).

    Raises:
        RecipeError: the text is not YAML, not a mapping, or has YAML that a recipe cannot use.
    """
    import yaml

    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = mark.line if mark else 0
        lines = text.splitlines()
        shown = lines[line].rstrip() if line < len(lines) else ""
        pointer = " " * (mark.column if mark else 0) + "^"
        raise _error(path, line + 1, f"not valid YAML: {error.problem}\n      {shown}\n      {pointer}") from None
    except yaml.YAMLError as error:
        raise _error(path, 1, f"not valid YAML: {error}") from None
    if root is None:
        return {}
    if not isinstance(root, yaml.MappingNode):
        raise _error(path, root.start_mark.line + 1, "the recipe must be a mapping of keys to values")
    return dict(_walk(path, root, "", ()))


def typed(text: str, schema: type) -> tuple[str, dict[str, str]]:
    """The YAML that :func:`key_lines` has checked, with quotes around each value that is text by the schema.

    Returns:
        That YAML, and the single values as the user typed them, by their dotted keys.
    """
    import yaml

    root = yaml.compose(text, Loader=yaml.SafeLoader)
    found = recipe_types.typed_values(root)
    recipe_types.retag(root, schema)
    return yaml.serialize(root, Dumper=yaml.SafeDumper, allow_unicode=True, width=1 << 30), found


def _walk(path: str, node: Any, prefix: str, above: tuple[Any, ...]) -> Iterator[tuple[str, int]]:
    """Yield the keys of a mapping and of those inside it; ``above`` are the nodes that contain it."""
    seen: set[str] = set()
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if key_node.tag == _MERGE_TAG:  # <<: *defaults
            continue
        if key_node.tag not in _KEY_TAGS:
            found = key_node.value if isinstance(key_node.value, str) else "a list or mapping"
            raise _error(path, line, f"{prefix}{found}: a key must be text; put it in quotes")
        key = f"{prefix}{key_node.value}"
        if key in seen:
            raise _error(path, line, f"{key} is given twice")
        seen.add(key)
        yield key, line
        yield from _walk_value(path, value_node, key, (*above, node))


def _walk_value(path: str, node: Any, key: str, above: tuple[Any, ...]) -> Iterator[tuple[str, int]]:
    import yaml

    line = node.start_mark.line + 1
    if node.tag not in _VALUE_TAGS:
        raise _error(path, line, f"{key}: the tag {node.tag.replace(_STANDARD, '!!')} cannot be used in a recipe")
    if node in above:
        raise _error(path, line, f"{key}: contains itself")
    if isinstance(node, yaml.MappingNode):
        yield from _walk(path, node, f"{key}.", above)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield f"{key}.{index}", item.start_mark.line + 1
            yield from _walk_value(path, item, f"{key}.{index}", (*above, node))


def _error(path: str, line: int, message: str) -> RecipeError:
    return RecipeError([Problem(key="", where=f"{path}:{line}", message=message)])
