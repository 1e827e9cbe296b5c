"""torch's compiler (``torch._dynamo``) is imported when something compiles, and not before.

torchvision, DDP and the optimizers import it, and call a few functions of it that do nothing unless something compiles.
It was 2.5 of 5.2 seconds of CPU time of what a node imports. So modules of these few functions stand in its place; who
asks them for anything else has the real ones imported, which take their place.
"""

from __future__ import annotations

import functools
import importlib
import importlib.abc
import importlib.machinery
import sys
import threading
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

NAME = "torch._dynamo"
_lock = threading.RLock()


class _StandIn(ModuleType):
    """A module of the few functions; any other attribute is that of the real one."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # inspect asks each module for its file
            raise AttributeError(name)
        return getattr(_load(self.__name__), name)


class _Finder(importlib.abc.MetaPathFinder):
    """Has the real package imported where a module of it is that no other stands in for."""

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,  # noqa: ARG002
        target: ModuleType | None = None,  # noqa: ARG002
    ) -> importlib.machinery.ModuleSpec | None:
        if not fullname.startswith(f"{NAME}."):
            return None
        _load(fullname)
        return Imported.spec(fullname)


class Imported(importlib.abc.Loader):
    """Hands on a module that is imported already."""

    @classmethod
    def spec(cls, name: str) -> importlib.machinery.ModuleSpec:
        """For who is importing ``name`` and had it imported meanwhile."""
        # Out of the table, into which create_module's result goes: what is in there would be run a second time.
        return importlib.machinery.ModuleSpec(name, cls(sys.modules.pop(name)))

    def __init__(self, module: ModuleType) -> None:
        self._module, self._spec = module, module.__spec__

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:  # noqa: ARG002
        """The module itself."""
        return self._module

    def exec_module(self, module: ModuleType) -> None:
        """Nothing is left to do but to undo what the import did."""
        vars(module)["__spec__"] = self._spec  # some modules refuse new attributes


def is_put_off() -> bool:
    """Whether stand-ins are there and the real modules are not."""
    return isinstance(sys.modules.get(NAME), _StandIn)


def put_off() -> None:
    """Have torch's compiler imported at its first use, here and in processes that are forked.

    Nothing changes where it is imported already.
    """
    if NAME in sys.modules:
        return
    package, utils, rules = (_StandIn(name) for name in (NAME, f"{NAME}.utils", f"{NAME}.trace_rules"))
    vars(package).update(
        __path__=[],
        disable=_disable,
        graph_break=lambda *_: None,
        utils=utils,
        trace_rules=rules,
    )
    vars(utils).update(
        is_compile_supported=lambda device: _load(utils.__name__).is_compile_supported(device),
        get_optimize_ddp_mode=lambda: "ddp_optimizer",  # its default
    )
    vars(rules).update(clear_lru_cache=lambda: None)
    sys.modules.update({module.__name__: module for module in (package, utils, rules)})
    sys.meta_path.insert(0, _Finder())


def _load(name: str) -> ModuleType:
    """The real module of a name; from now on all others are the real ones, too."""
    with _lock:
        if is_put_off():
            sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _Finder)]
            for other in [key for key, module in sys.modules.items() if isinstance(module, _StandIn)]:
                del sys.modules[other]
        return importlib.import_module(name)


def _disable(fn: Callable[..., Any] | None = None, *args: Any, **options: Any) -> Callable[..., Any]:
    """``torch._dynamo.disable``: as long as nothing compiles, there is nothing to be disabled."""
    if fn is None:
        return functools.partial(_disable, *args, **options)
    disabled: list[Callable[..., Any]] = []

    @functools.wraps(fn)
    def call(*positional: Any, **named: Any) -> Any:
        if is_put_off():
            return fn(*positional, **named)
        if not disabled:
            disabled.append(importlib.import_module(NAME).disable(fn, *args, **options))
        return disabled[0](*positional, **named)

    return call
