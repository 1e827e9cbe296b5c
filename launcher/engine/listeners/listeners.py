"""The listeners of a run, on rank 0: the recorder, and objects of the recipe's own (``train.listeners``).

A listener is any object with some of the methods that ``EVENTS`` lists. Each is called by name with those of the
arguments that its signature names, all plain values.
"""

from __future__ import annotations

import inspect
from collections import deque
from typing import TYPE_CHECKING, Any

from launcher.engine.user import objects as user_objects
from launcher.errors import UsageError, did_you_mean
from launcher.recipe import load as recipes
from launcher.recipe import user_code

if TYPE_CHECKING:
    from collections.abc import Iterator

    from launcher.engine.setup import Parts
    from launcher.recipe.schema_train import ListenerConfig

EVENTS: dict[str, tuple[str, ...]] = {
    "start": ("run_dir", "run_id", "recipe", "world_size", "num_steps", "epoch", "step"),
    "step": ("epoch", "step", "values"),
    "validation": ("epoch", "step", "values", "best"),
    "checkpoint": ("step", "path", "best"),
    "end": ("outcome", "best"),
}
"""The methods of a listener, each with what it can be told."""
OURS = ("seconds", "size_mb")
"""What only the recorder is told besides."""


class Listeners:
    """Tells all listeners of a rank; there are none but on rank 0.

    An error of a listener ends training: it is the user's own code, and would come again.

    Args:
        recorder: our own, which is told at once in whatever thread something happens; None: there is none.
        others: the recipe's, which are told in the thread that trains.
    """

    def __init__(self, recorder: Any, others: list[Any]) -> None:
        self._recorder = recorder
        self._others = others
        self._waiting: deque[tuple[str, dict[str, Any]]] = deque()

    def tell(self, event: str, **values: Any) -> None:
        """Tell all of an event, in the thread that trains."""
        if self._recorder:
            _call(self._recorder, event, values)
        self.deliver()
        self._call_others(event, values)

    def tell_later(self, event: str, **values: Any) -> None:
        """The same from any thread: the recipe's listeners hear of it at :meth:`deliver`."""
        if self._recorder:
            _call(self._recorder, event, values)
        if self._others:
            self._waiting.append((event, values))

    def deliver(self) -> None:
        """Tell what waits, in the thread that trains; costs nothing where nothing does."""
        while self._waiting:
            self._call_others(*self._waiting.popleft())

    def _call_others(self, event: str, values: dict[str, Any]) -> None:
        told = {name: value for name, value in values.items() if name not in OURS}
        for listener in self._others:
            _call(listener, event, told)


def _call(listener: Any, event: str, values: dict[str, Any]) -> None:
    method = getattr(listener, event, None)
    if method is not None:
        method(**{name: value for name, value in values.items() if user_objects.takes(method, name)})


def build_listeners(parts: Parts, recorder: Any) -> Listeners:
    """The recorder's and the recipe's listeners, on rank 0.

    Raises:
        UsageError: one is no listener.
    """
    others = []
    for row in rows(parts.recipe.train.listeners) if parts.ranks.rank == 0 else ():
        others.append(user_objects.build(row.listener, row.args, num_classes=len(parts.classes)))
        if problems := list(find_problems(others[-1])):
            raise UsageError(f"train.listeners: {user_code.shown(row.listener)} {'; '.join(problems)}")
    return Listeners(recorder, others)


def rows(listeners: list[str | ListenerConfig]) -> list[ListenerConfig]:
    """Each entry of ``train.listeners`` as a whole row."""
    from launcher.recipe.schema_train import ListenerConfig

    return [ListenerConfig(listener=row) if isinstance(row, str) else row for row in listeners]


def find_problems(listener: Any) -> Iterator[str]:
    """What keeps a class or an object from being a listener; words that follow its name."""
    methods = {event: getattr(listener, event) for event in EVENTS if callable(getattr(listener, event, None))}
    if not methods:
        found = ", ".join([name for name in dir(listener) if not name.startswith("_")][:8]) or "none"
        yield f"has no method that is called; valid: any of {', '.join(EVENTS)}; it has {found}"
    for event in methods:
        static = inspect.getattr_static(listener, event)
        is_unbound = isinstance(listener, type) and not isinstance(static, staticmethod | classmethod)
        for name in user_objects.needed(methods[event])[int(is_unbound) :]:
            if name not in EVENTS[event]:
                found, hint = f"has a method {event}() that needs {name!r};", did_you_mean(name, EVENTS[event])
                yield " ".join(filter(None, [found, hint, f"valid, by name: {', '.join(EVENTS[event])}"]))


def start_values(parts: Parts, *, epoch: int, step: int) -> dict[str, Any]:
    """What listeners are told when training begins or goes on."""
    return {
        "run_dir": str(parts.run.path),
        "run_id": parts.run_id,
        "recipe": recipes.to_dict(parts.recipe),
        "world_size": parts.ranks.world_size,
        "num_steps": parts.num_steps,
        "epoch": epoch,
        "step": step,
    }
