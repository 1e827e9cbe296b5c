"""What the text of a Python file says of how its functions and classes can be called. Nothing is run."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from launcher.errors import did_you_mean

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Assign | ast.AnnAssign | ast.alias
"""What gives a name of a module its meaning."""


@dataclass(frozen=True, kw_only=True)
class Call:
    """How the launcher calls what a reference names."""

    keywords: tuple[str, ...] = ()
    """Arguments that are always passed, by name."""
    offered: tuple[str, ...] = ()
    """Arguments that are passed, by name, where the signature names them."""
    positional: tuple[str, ...] = ()
    """Arguments that are always passed, by position; the names are for messages."""

    def __str__(self) -> str:
        """As it stands in messages."""
        told = [*self.positional, *(f"{name}=…" for name in self.keywords)]
        where_named = f", and {', '.join(self.offered)} where it names them" if self.offered else ""
        return f"({', '.join(told)}){where_named}"


_OBJECT_INIT = next(ast.walk(ast.parse("def __init__(self): ..."))).body[0]  # type: ignore[attr-defined]
"""What a class has that writes no constructor and has no base."""


def names(tree: ast.Module) -> list[str]:
    """Names that a module defines or imports, in their order."""
    return list(dict.fromkeys(name for name, _ in _definitions(tree.body)))


def find(tree: ast.Module, name: str) -> Definition | None:
    """The last definition of a name in a module."""
    found = [node for defined, node in _definitions(tree.body) if defined == name]
    return found[-1] if found else None


def has_unknown_names(tree: ast.Module) -> bool:
    """Whether a module has names that its text does not show: ``from x import *`` or ``__getattr__``."""
    return any(name in ("*", "__getattr__") for name, _ in _definitions(tree.body))


def _definitions(body: Sequence[ast.stmt]) -> Iterator[tuple[str, Definition]]:
    for node in body:
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                yield node.name, node
            case ast.Assign(targets=targets):
                for target in targets:
                    yield from ((part.id, node) for part in ast.walk(target) if isinstance(part, ast.Name))
            case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr()):
                yield name, node
            case ast.Import(names=aliases) | ast.ImportFrom(names=aliases):
                yield from ((alias.asname or alias.name.partition(".")[0], alias) for alias in aliases)
            case _:  # within if, try, with, for
                for field in ("body", "handlers", "orelse", "finalbody"):
                    for inner in getattr(node, field, []):
                        yield from _definitions(inner.body if isinstance(inner, ast.ExceptHandler) else [inner])


def find_problems(node: Definition, call: Call, args: dict[str, Any], *, is_method: bool = False) -> Iterator[str]:
    """What keeps a definition from being called, as far as the text shows; words that follow its name.

    Args:
        node: from :func:`find`.
        call: how it is called.
        args: what the recipe passes besides.
        is_method: it stands in a class, and is called on the class.
    """
    if isinstance(node, ast.Assign | ast.AnnAssign):
        if isinstance(node.value, ast.Constant | ast.List | ast.Dict | ast.Tuple | ast.Set):
            yield f"is {ast.unparse(node.value)[:40]}, which cannot be called; it is called with {call}"
        return
    if isinstance(node, ast.AsyncFunctionDef):
        yield "is async, and nobody awaits it; write a plain function"
        return
    function = _constructor(node) if isinstance(node, ast.ClassDef) else node
    if not isinstance(function, ast.FunctionDef) or _is_changed(function):
        return
    bound = isinstance(node, ast.ClassDef) or (is_method and "staticmethod" not in _decorators(function))
    yield from _compare(function.args, call, args, skip=int(bound))


def _constructor(node: ast.ClassDef) -> ast.FunctionDef | None:
    """``__init__`` of a class, where the text shows it."""
    if node.decorator_list or node.keywords:  # a dataclass, a metaclass
        return None
    methods = {member.name: member for member in node.body if isinstance(member, ast.FunctionDef)}
    if "__new__" in methods:
        return None
    return methods.get("__init__") or (None if node.bases else _OBJECT_INIT)


def _decorators(node: ast.FunctionDef) -> set[str]:
    return {ast.unparse(one) for one in node.decorator_list}


def _is_changed(node: ast.FunctionDef) -> bool:
    """Whether a decorator may have given it another signature."""
    return bool(_decorators(node) - {"staticmethod", "classmethod", "functools.cache", "cache", "torch.no_grad()"})


def _compare(spec: ast.arguments, call: Call, args: dict[str, Any], *, skip: int) -> Iterator[str]:
    positional = [argument.arg for argument in (*spec.posonlyargs, *spec.args)][skip:]
    by_name = [argument.arg for argument in (*spec.args, *spec.kwonlyargs)][max(0, skip - len(spec.posonlyargs)) :]
    given = [*call.keywords, *args]
    if len(call.positional) > len(positional) and not spec.vararg:
        yield f"takes {len(positional)} arguments by position; it is called with {call}"
    taken = set(positional[: len(call.positional)])
    for name in given:
        if name in taken or (name not in by_name and not spec.kwarg):
            hint = did_you_mean(name, by_name)
            takes = ", ".join(by_name) or "nothing"
            yield f"does not take {name!r}; {f'{hint} ' if hint else ''}it takes {takes}, and is called with {call}"
    num_required = len(positional) - len(spec.defaults)
    required = positional[len(call.positional) : max(0, num_required)]
    required += [a.arg for a, d in zip(spec.kwonlyargs, spec.kw_defaults, strict=True) if d is None]
    yield from _required(required, given, call)


def _required(required: Iterable[str], given: Sequence[str], call: Call) -> Iterator[str]:
    missing = [name for name in required if name not in given and name not in call.offered]
    if missing:
        hints = filter(None, (did_you_mean(name, [*given, *call.offered]) for name in missing))
        hint = next((f"{text} " for text in hints), "")
        yield f"needs {', '.join(map(repr, missing))}, which nobody passes; {hint}it is called with {call}"
