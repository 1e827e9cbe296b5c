"""Where each value of a recipe came from (a line of the file, an override, a flag), and errors that say so."""

from __future__ import annotations

import dataclasses
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.errors import Problem, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pydantic import ValidationError


@dataclass(frozen=True, kw_only=True)
class Source:
    """A recipe as read, not yet checked."""

    path: str
    """The file, as the user named it."""
    values: dict[str, Any]
    """Nested plain values: the file with overrides and flags applied, interpolations resolved."""
    origins: dict[str, str]
    """Dotted key to ``FILE:LINE``, the override or the flag."""
    problems: tuple[Problem, ...] = ()
    """What was wrong with the overrides and interpolations themselves."""

    def where(self, key: str) -> str:
        """Where ``key`` was given, or the nearest key above it, or the file."""
        while key:
            if key in self.origins:
                return self.origins[key]
            key = key.rpartition(".")[0]
        return self.path


def read(path: str, overrides: Sequence[str], flags: dict[str, tuple[str, Any]]) -> Source:
    """Read a YAML file and apply overrides (``a.b=c``) and flags (key to (flag, value)).

    Raises:
        RecipeError: the file is missing, is no YAML, or is no mapping.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    text = _read_text(path)
    origins = {key: f"{path}:{line}" for key, line in _key_lines(path, text)}
    config: Any = OmegaConf.create(text) if origins else OmegaConf.create({})
    problems = []
    if "name" not in origins:
        config["name"] = Path(path).stem
    for item in overrides:
        key, equals, _ = item.partition("=")
        if not equals or not key:
            problems.append(Problem(key="", where="command line", message=f"{item!r} is no override; write key=value"))
            continue
        origins[key] = f"command line ({item})"
        try:
            config.merge_with_dotlist([item])
        except (OmegaConfBaseException, ValueError, TypeError) as error:
            problems.append(Problem(key=key, where="command line", message=str(error).splitlines()[0]))
    for key, (flag, value) in flags.items():
        origins[key] = f"command line ({flag} {value})"
        OmegaConf.update(config, key, value)
    values = OmegaConf.to_container(config, resolve=False)
    if not isinstance(values, dict):
        raise _file_error(path, 1, "the recipe must be a mapping of keys to values")
    _resolve(config, values, "", origins, path, problems)
    return Source(path=path, values=typing.cast("dict[str, Any]", values), origins=origins, problems=tuple(problems))


def explain(error: ValidationError, source: Source, schema: type) -> list[Problem]:
    """Turn pydantic's errors into ours: one per key, with what was found, what is valid and the nearest name."""
    problems: dict[str, Problem] = {}
    for detail in error.errors(include_url=False):
        key, annotation, siblings = _locate(detail["loc"], schema)
        if key in problems:  # the other branches of a union
            continue
        if detail["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            name = key.rpartition(".")[2]
            message = " ".join(
                filter(None, ["unknown key;", did_you_mean(name, siblings), f"valid: {', '.join(siblings)}"])
            )
        else:
            message = f"found {_show(_value_at(source.values, key))}; valid: {_describe(annotation)}"
        problems[key] = Problem(key=key, where=source.where(key), message=message)
    return list(problems.values())


def without(values: dict[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """A copy of nested ``values`` that lacks the dotted ``keys``."""
    copy: dict[str, Any] = {}
    for key, value in values.items():
        if str(key) not in keys:
            inner = [k.partition(".")[2] for k in keys if k.partition(".")[0] == str(key)]
            copy[key] = without(value, inner) if isinstance(value, dict) else [] if inner else value
    return copy


def _read_text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        from launcher.errors import RecipeError

        folder = Path(path).parent
        near = did_you_mean(Path(path).name, [p.name for p in folder.glob("*.yaml")]) if folder.is_dir() else ""
        message = " ".join(filter(None, ["no such file;", near or "`launch recipes` lists those that come with it"]))
        raise RecipeError([Problem(key="", where=path, message=message)]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise _file_error(path, 1, f"cannot be read as text: {error}") from None


def _file_error(path: str, line: int, message: str) -> Exception:
    from launcher.errors import RecipeError

    return RecipeError([Problem(key="", where=f"{path}:{line}", message=message)])


def _key_lines(path: str, text: str) -> list[tuple[str, int]]:
    """Dotted keys of a YAML text, each with its line (from 1)."""
    import yaml

    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = mark.line if mark else 0
        lines = text.splitlines()
        shown = lines[line].rstrip() if line < len(lines) else ""
        pointer = " " * (mark.column if mark else 0) + "^"
        raise _file_error(path, line + 1, f"not valid YAML: {error.problem}\n      {shown}\n      {pointer}") from None
    except yaml.YAMLError as error:
        raise _file_error(path, 1, f"not valid YAML: {error}") from None
    if root is None:
        return []
    if not isinstance(root, yaml.MappingNode):
        raise _file_error(path, root.start_mark.line + 1, "the recipe must be a mapping of keys to values")
    return list(_walk_lines(path, root, ""))


def _walk_lines(path: str, node: Any, prefix: str) -> Iterator[tuple[str, int]]:
    import yaml

    seen: set[str] = set()
    for key_node, value_node in node.value:
        key = f"{prefix}{key_node.value}"
        line = key_node.start_mark.line + 1
        if key in seen:
            raise _file_error(path, line, f"{key} is given twice")
        seen.add(key)
        yield key, line
        if isinstance(value_node, yaml.MappingNode):
            yield from _walk_lines(path, value_node, f"{key}.")


def _resolve(
    config: Any, values: Any, prefix: str, origins: dict[str, str], path: str, problems: list[Problem]
) -> None:
    """Replace interpolations and ``???`` in ``values`` by what ``config`` resolves them to, collecting what fails."""
    from omegaconf.errors import OmegaConfBaseException

    keys = list(values) if isinstance(values, dict) else range(len(values))
    for key in keys:
        value, dotted = values[key], f"{prefix}{key}"
        where = origins.get(dotted, path)
        if isinstance(value, dict | list):
            _resolve(
                config[key],
                value,
                f"{dotted}.",
                origins,
                path,
                problems,
            )
        elif value == "???":
            del values[key]
            if dotted != "data.path":  # reported with its own advice by the schema's checks
                problems.append(Problem(key=dotted, where=where, message=f"missing (???); give it as {dotted}=VALUE"))
        elif isinstance(value, str) and "${" in value:
            try:
                values[key] = config[key]
            except OmegaConfBaseException as error:
                problems.append(Problem(key=dotted, where=where, message=f"{value}: {str(error).splitlines()[0]}"))
                del values[key]


def _locate(location: tuple[int | str, ...], schema: type) -> tuple[str, Any, list[str]]:
    """Follow an error's location as far as it names fields: dotted key, the field's annotation, the names beside it."""
    names: list[str] = []
    annotation: Any = schema
    siblings: list[str] = []
    for part in location:
        if dataclasses.is_dataclass(annotation):
            hints = typing.get_type_hints(annotation, include_extras=True)
            siblings = list(hints)
            siblings = [name for name in siblings if not name.startswith("__")]
            names.append(str(part))
            annotation = hints.get(str(part))
            if annotation is None:
                break
        elif typing.get_origin(_strip(annotation)) in (dict, list) and len(names) < len(location):
            names.append(str(part))
            break
        else:
            break
    return ".".join(names), annotation, siblings


def _value_at(values: Any, dotted: str) -> Any:
    for part in dotted.split("."):
        if isinstance(values, dict):
            values = values.get(part, values.get(int(part)) if part.isdigit() else None)
        elif isinstance(values, list) and part.isdigit() and int(part) < len(values):
            values = values[int(part)]
        else:
            return None
    return values


def _show(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value)


def _strip(annotation: Any) -> Any:
    return typing.get_args(annotation)[0] if typing.get_origin(annotation) is typing.Annotated else annotation


def _describe(annotation: Any) -> str:
    """Say in words what an annotation allows, as in ``a whole number >= 1, or auto``."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return " and ".join([_describe(args[0]), *_describe_limits(args[1:])]).replace(" and ", " ", 1)
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
