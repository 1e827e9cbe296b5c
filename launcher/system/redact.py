"""Finds secrets, or what looks like one, in values that would be written down, and hides them in text."""

from __future__ import annotations

import os
import re
import textwrap
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

HIDDEN = "***"
MIN_CHARS = 8
"""Ignore secrets with fewer characters: they would be found in ordinary text."""

_NAMES = r"(?:API_?KEY|ACCESS_?KEY|SECRET_?KEY|PRIVATE_?KEY|TOKEN|SECRET|PASSWO?R?D|CREDENTIALS?)"
_SECRET_NAME = re.compile(rf"{_NAMES}$", re.IGNORECASE)
# Not a secret: a path or a variable, which say where one is, and a word (resnet50), which may be ordinary text.
_ORDINARY = re.compile(r"[~.]{0,2}/(?:[a-z0-9_/-]+|.*\..*)|\$.*|[A-Za-z][a-z_-]{,20}\d{,3}")
_EDGE, _END = r"(?<![A-Za-z0-9])", r"(?![A-Za-z0-9])"
_SHAPES: Mapping[str, re.Pattern[str]] = {
    "a private key": re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END|\Z)", re.DOTALL),
    "a Hugging Face token": re.compile(rf"{_EDGE}hf_[A-Za-z0-9]{{30,}}{_END}"),
    "a GitHub token": re.compile(rf"{_EDGE}(?:gh[opusr]_[A-Za-z0-9]{{36,}}|github_pat_\w{{22,}}){_END}"),
    "a GitLab token": re.compile(rf"{_EDGE}glpat-[\w-]{{20,}}"),
    "a key of wandb": re.compile(rf"{_EDGE}wandb_v1_\w{{20,}}"),
    "an AWS key": re.compile(rf"{_EDGE}(?:AKIA|ASIA)[0-9A-Z]{{16}}{_END}"),
    "an API key": re.compile(r"(?<![\w-])sk-(?=[\w-]*\d)(?=[\w-]*[A-Z])[\w-]{20,}"),
    "a Slack token": re.compile(rf"{_EDGE}xox[abeoprs]-(?=[\w-]*\d{{6}})[A-Za-z0-9-]{{20,}}"),
    "a JSON web token": re.compile(rf"{_EDGE}eyJ[\w-]{{10,}}\.[\w-]{{10,}}\.[\w-]{{10,}}"),
    "a password in an address": re.compile(r"(?<=://)[^\s/:@]+:[^\s/@]+(?=@)"),
}
# NAME=value as a shell has it; and 40 hexadecimal digits, which are an old key of wandb after such a name, else a hash.
_ASSIGNED = re.compile(rf"(?P<name>\b[A-Z0-9_]*{_NAMES})=(?P<quote>[\"']?)(?P<value>[^\s\"'`]{{{MIN_CHARS},}})")
_HEX = re.compile(rf"(?P<name>{_NAMES}[\"']?\s*[=:]\s*[\"']?)[0-9a-f]{{32,64}}\b", re.IGNORECASE)


def redact(text: str) -> str:
    """``text`` with all that is or looks like a secret replaced by ``***``."""
    for value in _of_environment():
        text = text.replace(value, HIDDEN)
    for shape in _SHAPES.values():
        text = shape.sub(HIDDEN, text)
    text = _HEX.sub(rf"\g<name>{HIDDEN}", text)
    return _ASSIGNED.sub(_hide_assigned, text)


def one_line(error: BaseException) -> str:
    """An error's kind and message, redacted and short."""
    return textwrap.shorten(redact(f"{type(error).__name__}: {error}"), 300, placeholder=" …")


def redact_all(value: Any) -> Any:
    """Plain nested values with every text in them redacted."""
    if isinstance(value, dict):
        return {key: redact_all(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redact_all(item) for item in value]
    return redact(value) if isinstance(value, str) else value


def find_secret(value: str, name: str = "") -> str | None:
    """What kind of secret a value is or holds, in words that do not tell it; None where it is an ordinary one.

    Args:
        value: as in a recipe, a profile or an override.
        name: of the key that it stands under.
    """
    for secret, variable in _of_environment().items():
        if secret in value:
            return f"the value of {variable}"
    for kind, shape in _SHAPES.items():
        if shape.search(value):
            return kind
    assigned = next((found for found in _ASSIGNED.finditer(value) if not _ORDINARY.fullmatch(found["value"])), None)
    if assigned:
        return f"a value of {assigned['name']}"
    if _HEX.search(value):
        return "an API key"
    return f"a value of {name}" if _names_secret(name, value) else None


def _names_secret(name: str, value: str) -> bool:
    return bool(_SECRET_NAME.search(name)) and len(value) >= MIN_CHARS and not _ORDINARY.fullmatch(value)


def _of_environment() -> dict[str, str]:
    """Secret values among the environment variables, each with its name, the longest first."""
    found = {value: name for name, value in os.environ.items() if _names_secret(name, value)}
    return dict(sorted(found.items(), key=lambda item: -len(item[0])))


def _hide_assigned(found: re.Match[str]) -> str:
    ordinary = _ORDINARY.fullmatch(found["value"])
    return found[0] if ordinary else f"{found['name']}={found['quote']}{HIDDEN}"
