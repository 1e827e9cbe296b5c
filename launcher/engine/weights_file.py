"""Finds the weights in a file, whichever trainer wrote it; nothing in the file is ever run."""

from __future__ import annotations

import contextlib
import re
import warnings
import zipfile
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from launcher.engine.network.timm_names import family_of, to_torchvision
from launcher.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    State = dict[str, torch.Tensor]
    Places = dict[tuple[str, ...], State]

PLACES = (
    *("state_dict", "model", "model_state_dict", "model_state", "net", "network", "module", "weights", "params"),
    *("model_ema", "state_dict_ema", "ema", "ema_state_dict", "ema_model", "params_ema"),
)
"""Under which keys trainers keep weights, the likeliest first; of several that fit alike the first is taken."""
MAX_DEPTH = 3
"""Mappings in mappings, as ``{"checkpoint": {"ema": {"module": {…}}}}``."""
WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
"""What torch.compile, FSDP and activation checkpointing put into names, also in the middle of one."""
OLD_NAMES = (  # in the files that torchvision itself offers, which its builders rename while they load
    (re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)"), r"\1\2"),
    (re.compile(r"\.mlp\.linear_1\."), ".mlp.0."),
    (re.compile(r"\.mlp\.linear_2\."), ".mlp.3."),
)
SAVE = "save the weights alone where it was made: torch.save(model.state_dict(), 'weights.pth')"
OTHER_FORMATS = {  # by how a file begins
    b"version https://git-lfs": "it is a pointer of Git LFS, not the file itself: git lfs pull fetches it",
    b"<": "it is a web page, so the download has failed",
    b"\x89HDF": f"it is HDF5, as Keras writes it; {SAVE}",
}


@dataclass(frozen=True, kw_only=True)
class Weights:
    """What was found in a file."""

    state: State
    """Tensors by the names that the model has for them, as far as they fit."""
    place: str
    """Where in the file they were, as in ``model_ema.module``; empty: they are all of it."""
    also: tuple[str, ...]
    """Other places whose tensors fit just as well."""
    is_timms: bool
    """Whether they had timm's names."""
    differs: str
    """What is other in some of timm's models, a sentence; empty: nothing."""


def read_weights_file(path: Path, wanted: Mapping[str, torch.Tensor], *, device: str = "cpu") -> Weights:
    """The state dict in a file of torch.save or safetensors that fits a model best.

    It may lie in a checkpoint beside other things, and its names may have a prefix in common (``module.`` of DDP,
    ``model.`` of Lightning, …), which is taken off where the rest then fits. timm's names become torchvision's. The
    content decides, not the name.

    Args:
        path: the file.
        wanted: the model's state dict.
        device: where the tensors go; ``meta`` reads their shapes only.

    Raises:
        UsageError: it cannot be read, or holds no state dict.
    """
    return fit(read_states(path, device=device), wanted)


def read_states(path: Path, *, device: str = "cpu") -> Places:
    """All that a file has of named tensors, by the keys that lead there.

    Raises:
        UsageError: it cannot be read, or holds no state dict.
    """
    found = _read_safetensors(path, device) if _is_safetensors(path) else _load(path, device)
    states = dict(_states(found, ()))
    if not states:
        raise UsageError(f"{path}: holds no state dict (a mapping of names to tensors); {SAVE}")
    return states


def fit(states: Places, wanted: Mapping[str, torch.Tensor]) -> Weights:
    """What of :func:`read_states` fits a model best."""
    fitted = {place: _without_prefix(to_torchvision(state, wanted), wanted) for place, state in states.items()}
    num_fitting = {place: _num_fitting(state, wanted) for place, state in fitted.items()}
    most = max(num_fitting.values())
    first, *others = sorted((place for place, num in num_fitting.items() if num == most), key=_likelihood)
    also, family = others if most else [], family_of(states[first], wanted)
    return Weights(
        state=fitted[first],
        place=".".join(first),
        also=tuple(map(".".join, also)),
        is_timms=family is not None,
        differs=family[0].differs if family else "",
    )


def present_name(key: str) -> str:
    """A parameter's name of an older torchvision as it is today."""
    for old, new in OLD_NAMES:
        key = old.sub(new, key)
    return key


def _states(value: Any, place: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], State]]:
    """The named tensors of every mapping in nested ones, each with the keys that lead to it."""
    if not isinstance(value, dict):
        return
    named = {key: _as_tensor(item) for key, item in value.items() if isinstance(key, str)}
    state = {_plain_name(key): tensor for key, tensor in named.items() if tensor is not None}
    if state:
        yield place, state
    if len(place) < MAX_DEPTH:
        for key, item in value.items():
            yield from _states(item, (*place, str(key)))


def _as_tensor(value: Any) -> torch.Tensor | None:
    import numpy as np

    if isinstance(value, np.ndarray) and value.dtype.kind in "fiu":
        return torch.from_numpy(value)
    return value if isinstance(value, torch.Tensor) else None


def _plain_name(key: str) -> str:
    for wrapper in WRAPPERS:
        key = key.replace(wrapper, "")
    return present_name(key)


def _without_prefix(state: State, wanted: Mapping[str, torch.Tensor]) -> State:
    """``state`` without the prefix that most of the model's names have in it, if most of them are there at all."""
    counts: Counter[str] = Counter()
    for key, tensor in state.items():
        parts = key.split(".")
        for start in range(len(parts)):
            name = ".".join(parts[start:])
            if name in wanted and wanted[name].shape == tensor.shape:
                counts[key.removesuffix(name)] += 1
    prefix, num = max(counts.items(), key=lambda item: (item[1], -len(item[0])), default=("", 0))
    # torch counts the batches of each BatchNorm since 0.4.1 only; AveragedModel counts its updates beside the model.
    num_wanted = sum(not key.endswith("num_batches_tracked") for key in wanted)
    if not prefix or 2 * num < num_wanted:
        return {key: tensor for key, tensor in state.items() if key != "n_averaged"}
    return {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}


def _num_fitting(state: State, wanted: Mapping[str, torch.Tensor]) -> int:
    return sum(key in state and state[key].shape == tensor.shape for key, tensor in wanted.items())


def _likelihood(place: tuple[str, ...]) -> tuple[int, ...]:
    """Sorts places: the likeliest first."""
    return tuple(PLACES.index(key) if key in PLACES else len(PLACES) for key in place)


# --- the formats


def _is_safetensors(path: Path) -> bool:
    head = _head(path)
    return head[8:9] == b"{" or (path.suffix == ".safetensors" and not head.startswith((b"PK", b"\x80")))


def _read_safetensors(path: Path, device: str) -> State:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            if device == "meta":
                shapes = {k: file.get_slice(k).get_shape() for k in file.keys()}  # noqa: SIM118  it is no mapping
                return {k: torch.empty(shape, device="meta") for k, shape in shapes.items()}
            return {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise _unreadable(path, _other_format(path) or f"it is damaged or cut short ({error})") from error


def _load(path: Path, device: str) -> Any:
    if _other_format(path):
        raise _unreadable(path, _other_format(path))
    is_zip = zipfile.is_zipfile(path)
    if is_zip and _is_torchscript(path):
        script = f"torch.save(torch.jit.load({path.name!r}).state_dict(), 'weights.pth')"
        raise _unreadable(path, f"it is TorchScript, a program; take the weights out of it: {script}")
    try:
        with torch.serialization.safe_globals(_harmless()), contextlib.ExitStack() as stack, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a pickle protocol that others write
            # torch 2.14 goes by the name where it ends in .safetensors, but not for an open file.
            is_misnamed = path.suffix == ".safetensors"
            source = stack.enter_context(path.open("rb")) if is_misnamed else path
            return torch.load(source, map_location=device, weights_only=True, mmap=is_zip and not is_misnamed)
    except Exception as error:  # whatever a foreign file's bytes make the reader raise; its text is for programmers
        kind = re.search(r"GLOBAL (\S+) was not an allowed global|Trying to load unsupported GLOBAL (\S+)", str(error))
        if kind:
            name = kind[1] or kind[2]
            raise _unreadable(
                path, f"it holds {name} beside or around tensors, which could run code; {SAVE}"
            ) from error
        cause = "it is no file of torch.save or safetensors, or is damaged or cut short"
        raise _unreadable(path, f"{cause}; get it again, or {SAVE}") from error


def _harmless() -> list[Any]:
    """What trainers keep beside weights and cannot do anything: options, paths, NumPy's numbers; by old names too."""
    import argparse
    import codecs
    import datetime as dt
    import pathlib
    import types

    import numpy as np

    numbers = [type(np.dtype(code)) for code in np.typecodes["All"].replace("O", "")]
    # By the names of numpy 1 and 2; their present place need not be either.
    made_by = {"scalar": np.float64(0).__reduce__()[0], "_reconstruct": np.zeros(0).__reduce__()[0]}
    arrays = [(make, f"numpy.{core}.multiarray.{name}") for core in ("core", "_core") for name, make in made_by.items()]
    # As paths of no system in particular: WindowsPath cannot be made elsewhere.
    pure = {"PosixPath": pathlib.PurePosixPath, "WindowsPath": pathlib.PureWindowsPath}
    paths = [(kind, f"{module}.{name}") for module in ("pathlib", "pathlib._local") for name, kind in pure.items()]
    plain = [argparse.Namespace, types.SimpleNamespace, dt.datetime, dt.timedelta, codecs.encode]
    return [*plain, np.ndarray, np.dtype, *dict.fromkeys(numbers), *arrays, *paths, *pure.values()]


def _is_torchscript(path: Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _other_format(path: Path) -> str:
    head = _head(path)
    known = (text for start, text in OTHER_FORMATS.items() if head.lstrip().startswith(start))
    return next(known, "" if head else "it is empty")


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(64)
    except OSError as error:
        raise _unreadable(path, error.strerror or type(error).__name__) from None


def _unreadable(path: Path, why: str) -> UsageError:
    return UsageError(f"{path}: cannot be read as weights: {why}")
