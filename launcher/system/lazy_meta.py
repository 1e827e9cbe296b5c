"""torch's kernels for its meta device, in Python, are imported when the first tensor is made there.

A tensor on the meta device has a shape and no values. ``import torch`` registers 850 kernels for such tensors at its
end, which is a fifth of all that a node imports, and a run has no use for one. So their module is light at first; who
makes a tensor there, or asks the module for anything, has the real one imported. All that traces or compiles does.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.abc
import importlib.machinery
import sys
import threading
from types import ModuleType
from typing import TYPE_CHECKING, Any

from launcher.system.lazy_dynamo import Imported

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

NAME = "torch._meta_registrations"
BEHIND, BESIDE = ("torch._decomp", "torch._prims", "torch._refs"), ("torch.utils._content_store",)
"""What only this module imports of torch's: packages, which are found as attributes of torch, too, and others."""
FACTORIES = (("empty", "memory_format"), ("empty_strided", "default"))
"""The operators by which every tensor on the meta device is made."""

_lock = threading.RLock()
_watch: list[Any] = []
"""torch's library object that holds the factories while the kernels are not imported."""


class _Finder(importlib.abc.MetaPathFinder):
    """Puts the light module in place, and has the real one imported first by who imports what only that brings.

    torch's own modules rely on that order.
    """

    is_light = False
    """Whether the light module is in place."""

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,  # noqa: ARG002
        target: ModuleType | None = None,  # noqa: ARG002
    ) -> importlib.machinery.ModuleSpec | None:
        if not self.is_light:
            return importlib.machinery.ModuleSpec(NAME, _Light(self)) if fullname == NAME else None
        if ".".join(fullname.split(".")[:2]) in BEHIND or fullname in BESIDE:
            _import_real()
            return Imported.spec(fullname) if fullname in sys.modules else None
        return None


class _Light(importlib.abc.Loader):
    """Makes a module that has the real one imported at its first use."""

    def __init__(self, finder: _Finder) -> None:
        self._finder = finder

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:  # noqa: ARG002
        return None

    def exec_module(self, module: ModuleType) -> None:
        import torch

        self._finder.is_light = True
        for name in BEHIND:
            setattr(torch, name.rpartition(".")[2], _Behind(name))  # until the import of the real one puts that there
        vars(module)["__getattr__"] = _attribute
        _begin_to_watch()


class _Behind(ModuleType):
    """A submodule of torch that is imported at the first use of what it has."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # inspect asks each module for its file
            raise AttributeError(name)
        return getattr(importlib.import_module(self.__name__), name)


def put_off() -> None:
    """Have the kernels imported at their first use, here and in processes that are forked; before torch is imported."""
    if "torch" not in sys.modules and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def is_put_off() -> bool:
    """Whether torch is imported and the kernels are not."""
    return bool(_watch)


@contextlib.contextmanager
def shapes_only() -> Iterator[None]:
    """Make tensors on the meta device here, and compute nothing with them: that takes no kernels."""
    with _lock:
        waiting = is_put_off()
        _end_watch()
        try:
            yield
        finally:
            if waiting:
                _begin_to_watch()


def _begin_to_watch() -> None:
    """Have the factories import the kernels."""
    import torch

    make: Any = torch.library.Library  # which torch gives no types
    library = make("aten", "IMPL", "Meta")
    for name, overload in FACTORIES:
        operator = getattr(getattr(torch.ops.aten, name), overload)
        library.impl(operator, _after_import(operator), "Meta")
    _watch.append(library)


def _end_watch() -> None:
    while _watch:
        _watch.pop()._destroy()  # noqa: SLF001  the only way to take a kernel back


def _after_import(operator: Callable[..., Any]) -> Callable[..., Any]:
    def make(*args: Any, **kwargs: Any) -> Any:
        _import_real()
        return operator(*args, **kwargs)

    return make


def _attribute(name: str) -> Any:
    if name.startswith("__"):  # inspect asks each module for its file
        raise AttributeError(name)
    return getattr(_import_real(), name)


def _import_real() -> ModuleType:
    with _lock:
        sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _Finder)]
        _end_watch()
        found = sys.modules.get(NAME)
        if found is None or (found.__spec__ and isinstance(found.__spec__.loader, _Light)):
            sys.modules.pop(NAME, None)
            found = importlib.import_module(NAME)
        return found
