"""The subcommands of ``launch``, one module each, imported at first use."""

from __future__ import annotations

import argparse
import re
from dataclasses import fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from launcher.plan.request import Request


def nodes(typed: str) -> int | str:
    """The value of ``--nodes``; what numbers are allowed is for the recipe's schema to say.

    Raises:
        argparse.ArgumentTypeError: it is neither a number nor MIN:MAX.
    """
    if not re.fullmatch(r"-?[0-9]+(:[0-9]+)?", typed):
        raise argparse.ArgumentTypeError(f"found {typed!r}; valid: a number, or MIN:MAX as in 2:4")
    return typed if ":" in typed else int(typed)


def request_of(args: argparse.Namespace, **more: Any) -> Request:
    """What the arguments of a command ask for; ``profile.key=value`` changes the profile, all else the recipe."""
    from launcher.plan.request import Request

    known = {field.name for field in fields(Request)}
    values = {name: value for name, value in vars(args).items() if name in known} | more
    given = values.pop("overrides")
    return Request(
        overrides=tuple(item for item in given if not item.startswith("profile.")),
        profile_overrides=tuple(item for item in given if item.startswith("profile.")),
        **values,
    )
