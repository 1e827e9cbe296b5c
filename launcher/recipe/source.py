"""Where each value of a recipe came from (a line of the file, an override, a flag), and errors that say so."""

from __future__ import annotations

import dataclasses
import itertools
import re
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.errors import Problem, RecipeError
from launcher.recipe import lines as recipe_yaml
from launcher.recipe import values as recipe_types
from launcher.system import redact

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

NO_SECRETS = (
    "this looks like a secret, and would be written into files that others can read. Remove it and export it in the "
    "shell that starts `launch`; SLURM passes it on to the job (for wandb, `wandb login` works too)"
)


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
    typed: dict[str, str] = field(default_factory=dict)
    """Dotted key to what was typed for its value, in the file or the override."""

    def where(self, key: str) -> str:
        """Where ``key`` was given, or the nearest key above it, or the file."""
        while key:
            if key in self.origins:
                return self.origins[key]
            key = key.rpartition(".")[0]
        return self.path


def read(
    path: str, overrides: Sequence[str], flags: dict[str, tuple[str, Any]], *, schema: type, prefix: str = ""
) -> Source:
    """Read a YAML file and apply overrides (``a.b=c``) and flags (key to (flag, value)).

    Args:
        path: the file.
        overrides: as typed.
        flags: by key.
        schema: the type of each key.
        prefix: text before the key in each override.

    Raises:
        RecipeError: the file is missing, is not YAML, or is not a mapping.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    text = recipe_yaml.read_text(path)
    origins = {key: f"{path}:{line}" for key, line in recipe_yaml.key_lines(path, text).items()}
    try:
        text, typed = recipe_yaml.typed(text, schema) if origins else ("", {})
        config: Any = OmegaConf.create(text) if origins else OmegaConf.create({})
    except OmegaConfBaseException as error:  # an interpolation that cannot be parsed
        key = str(error.full_key or "")
        raise RecipeError([Problem(key=key, where=origins.get(key, path), message=_first_line(error))]) from None
    if "name" not in origins:
        config["name"] = Path(path).stem
    return _apply(config, Source(path=path, values={}, origins=origins, typed=typed), overrides, flags, schema, prefix)


def from_values(
    path: str, values: dict[str, Any], overrides: Sequence[str], *, schema: type, prefix: str = ""
) -> Source:
    """A source made from nested plain values, without interpolation; errors show ``path`` as the file."""
    from omegaconf import OmegaConf

    source = Source(path=path, values={}, origins={})
    return _apply(OmegaConf.create(_escaped(values)), source, overrides, {}, schema, prefix)


def _escaped(value: Any) -> Any:
    """Nested values with ``${`` escaped, so that OmegaConf interpolates nothing."""
    if isinstance(value, dict):
        return {key: _escaped(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_escaped(inner) for inner in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def _apply(
    config: Any,
    source: Source,
    overrides: Sequence[str],
    flags: dict[str, tuple[str, Any]],
    schema: type,
    prefix: str,
) -> Source:
    """Complete a ``source`` that has only origins so far: its values, with overrides and flags applied."""
    from omegaconf import OmegaConf

    origins = source.origins
    problems = list(_override(config, overrides, source, schema, prefix))
    for key, (flag, value) in flags.items():
        origins[key] = f"command line ({flag} {value})"
        section = OmegaConf.select(config, key.rpartition(".")[0])
        if section is None or OmegaConf.is_dict(section):  # else the schema says what is wrong with the section
            OmegaConf.update(config, key, value)
    values = typing.cast("dict[str, Any]", OmegaConf.to_container(config, resolve=False))
    source = dataclasses.replace(source, values=values)
    problems += _resolve(config, values, "", source.where)
    return _without_secrets(dataclasses.replace(source, problems=tuple(problems)))


def _without_secrets(source: Source) -> Source:
    """Refuse each value that is or looks like a secret; errors show neither it nor the override that gave it."""
    secrets = {key: (value, kind) for key, value, kind in _find_secrets(source.values, "")}
    if not secrets:
        return source
    values = [value for value, _ in secrets.values()]
    origins = {key: _hide(origin, values) for key, origin in source.origins.items()}
    problems = [
        dataclasses.replace(problem, where=_hide(problem.where, values), message=_hide(problem.message, values))
        for problem in source.problems
    ]
    clean = dataclasses.replace(source, values=without(source.values, list(secrets)), origins=origins)
    problems += [
        Problem(key=key, where=clean.where(key), message=f"{kind}: {NO_SECRETS}") for key, (_, kind) in secrets.items()
    ]
    return dataclasses.replace(clean, problems=tuple(problems))


def _find_secrets(values: Any, prefix: str) -> Iterator[tuple[str, str, str]]:
    """Key, value and kind of each secret in nested values."""
    for key, value in values.items() if isinstance(values, dict) else enumerate(values):
        if isinstance(value, dict | list):
            yield from _find_secrets(value, f"{prefix}{key}.")
        elif isinstance(value, str) and (kind := redact.find_secret(value, str(key))):
            yield f"{prefix}{key}", value, kind


def _hide(text: str, values: Sequence[str]) -> str:
    for value in values:
        text = text.replace(value, redact.HIDDEN)
    return text


def _override(config: Any, overrides: Sequence[str], source: Source, schema: type, prefix: str) -> Iterator[Problem]:
    """Apply overrides to ``config`` and note where they came from."""
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    yield from _no_overrides(overrides, prefix)
    origins = source.origins
    for typed in overrides:
        item = typed.removeprefix(prefix)
        name, equals, value = item.partition("=")
        if not equals or not name:
            continue
        parts = re.findall(r"\[([^\]]*)\]|([^.\[\]]+)", name)
        keys = [bracketed or plain for bracketed, plain in parts]
        key = ".".join(keys)
        entries = [found for found in origins if value[:1] == "[" and found.startswith(f"{key}.")]  # of another list
        origins.update(dict.fromkeys([key, *entries], f"command line ({typed})"))
        source.typed[key] = value
        annotation = recipe_types.at(schema, keys)
        if annotation is None and (problem := _too_deep(schema, keys, value, prefix)):
            yield Problem(key=key, where=origins[key], message=problem)
            continue
        _blame(config, name, origins, origins[key])
        try:
            if annotation is not None and recipe_types.has_text(annotation):
                OmegaConf.update(config, name, recipe_types.read(value, annotation))
            else:
                config.merge_with_dotlist([item])
        except (OmegaConfBaseException, yaml.YAMLError, ValueError, TypeError, IndexError) as error:
            yield Problem(key=key, where=origins[key], message=_first_line(error))


def _no_overrides(overrides: Sequence[str], prefix: str) -> Iterator[Problem]:
    """The arguments that are not ``key=value``; those side by side are one problem: ``train.epochs = 5``."""
    is_one = re.compile(r"[^=]+=").match
    before = ""
    for fits, group in itertools.groupby(overrides, lambda typed: bool(is_one(typed.removeprefix(prefix)))):
        typed = list(group)
        if not fits:
            parts = [before, *typed] if before.endswith("=") else typed
            joined = "".join(parts) if any("=" in part for part in parts) else "=".join(parts)
            meant = joined if re.fullmatch(r"[a-z_]+(\.[^=\s]+)?=[^=]+", joined) else "key=value"
            message = f"{' '.join(typed)!r} is not an override; write {meant}"
            yield Problem(key="", where="command line", message=message)
        before = typed[-1]


def _too_deep(schema: type, keys: Sequence[str], value: str, prefix: str) -> str | None:
    """What to write where a name with dots (a layer) was read as several keys; None: it was not."""
    for depth in range(1, len(keys) - 1):
        outer = recipe_types.at(schema, keys[:depth])
        if any(typing.get_origin(option) is dict for option in recipe_types.options(outer)):
            right = f"{prefix}{'.'.join(keys[:depth])}[{'.'.join(keys[depth:])}]"
            return f"put a name with dots into brackets: '{right}={value}'"
    return None


def without(values: dict[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """A copy of nested ``values`` that lacks the dotted ``keys``."""
    copy: dict[str, Any] = {}
    for key, value in values.items():
        if str(key) not in keys:
            inner = [k.partition(".")[2] for k in keys if k.partition(".")[0] == str(key)]
            copy[key] = without(value, inner) if isinstance(value, dict) else [] if inner else value
    return copy


def _blame(config: Any, key: str, origins: dict[str, str], origin: str) -> None:
    """Make an override the origin of the values above its key that it replaces, because they are not mappings."""
    from omegaconf import OmegaConf

    while key := key.rpartition(".")[0]:
        found = OmegaConf.select(config, key, throw_on_resolution_failure=False)
        if found is not None and not OmegaConf.is_dict(found):
            origins[key] = origin


def _resolve(config: Any, values: Any, prefix: str, where: Callable[[str], str]) -> Iterator[Problem]:
    """Replace interpolations in ``values`` by their result in ``config``; remove those that are missing or fail."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    missing = []
    for key in list(values) if isinstance(values, dict) else range(len(values)):
        value, dotted = values[key], f"{prefix}{key}"
        if isinstance(value, dict | list):
            yield from _resolve(config[key], value, f"{dotted}.", where)
        elif value == "???":
            missing.append(key)
            if dotted != "data.path":  # reported with its own advice by the recipe's checks
                message = f"missing (???); give it as {dotted}=VALUE"
                yield Problem(key=dotted, where=where(dotted), message=message)
        elif isinstance(value, str) and "${" in value:
            try:
                found = config[key]
                values[key] = OmegaConf.to_container(found, resolve=True) if OmegaConf.is_config(found) else found
            except OmegaConfBaseException as error:
                missing.append(key)
                yield Problem(key=dotted, where=where(dotted), message=f"{value}: {_first_line(error)}")
    for key in reversed(missing):
        del values[key]


def _first_line(error: Exception) -> str:
    return str(getattr(error, "problem", None) or error).splitlines()[0]
