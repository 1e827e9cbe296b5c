"""Makes a recipe's losses, metrics and listeners from what their references name: a class, a function, an object."""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING, Any

from torch import nn

from launcher.errors import UsageError
from launcher.recipe.user_code import shown
from launcher.runs import user_code

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


def build(reference: str, args: Mapping[str, Any], *, num_classes: int, takes: int = 0) -> Any:
    """What a reference stands for, ready for use.

    A class is called with ``args``; so is a function that needs nothing else (a factory). A function that needs more is
    itself what is meant, and gets ``args`` whenever it is called. Any other object is taken as it is.

    Args:
        reference: as the run's recipe has it.
        args: of the recipe.
        num_classes: outputs of the model; passed where ``num_classes`` is "auto", or has no value of its own.
        takes: how many arguments by position a function that is meant itself is called with; 0: it is a factory.

    Raises:
        UsageError: a class or a factory does not take ``args``.
    """
    found = user_code.load(reference)
    if not (isinstance(found, type) or inspect.isroutine(found)):
        return found
    parameters = user_code.parameters_of(found) or {}
    given = {name: num_classes if (name, value) == ("num_classes", "auto") else value for name, value in args.items()}
    if "num_classes" in parameters and parameters["num_classes"].default in (inspect.Parameter.empty, None):
        given.setdefault("num_classes", num_classes)
    if "reduction" in parameters:  # torch's losses: sums over samples need each
        given.setdefault("reduction", "none")
    if takes and not isinstance(found, type) and not is_factory(found, given):
        return functools.partial(found, **given)
    try:
        return found(**given)
    except (TypeError, ValueError) as error:
        if not args:
            raise
        raise UsageError(f"{shown(reference)} with {dict(args)}: {type(error).__name__}: {error}") from error


def takes(function: Callable[..., Any], name: str) -> bool:
    """Whether a function, or an object that is called, takes an argument of that name."""
    called = function.forward if isinstance(function, nn.Module) else function
    parameters = user_code.parameters_of(called) or {}
    return name in parameters or any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values())


def is_factory(function: Callable[..., Any], given: Mapping[str, Any]) -> bool:
    """Whether a function needs no more than what is ``given``."""
    parameters = user_code.parameters_of(function)
    if parameters is None or any(one.kind is inspect.Parameter.VAR_POSITIONAL for one in parameters.values()):
        return False
    return not set(needed(function)) - set(given)


def needed(function: Callable[..., Any]) -> list[str]:
    """Arguments without which a function cannot be called."""
    various = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = (user_code.parameters_of(function) or {}).items()
    return [name for name, one in parameters if one.default is one.empty and one.kind not in various]
