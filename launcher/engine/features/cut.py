"""Where a network can be cut: into what gives the same for an image in every epoch, since it is frozen, and the rest.

The network is traced by ``torch.fx``. What its frozen layers make of the images, and nothing random nor any layer that
learns takes part in, is fixed; the values that the rest takes of it are the features. On a few real images the two
parts must then give what the whole network gives: a forward pass that cannot be traced rightly is found by that.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn
from torch.utils._pytree import tree_leaves

from launcher.engine.layers import BatchNorm

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from contextlib import AbstractContextManager

    from torch.fx import Node

PLAIN = {f"torch.nn.modules.{name}" for name in ("activation", "pooling", "flatten", "padding", "linear", "upsampling")}
"""Modules of layers that compute the same in training mode, where they have no parameters (Identity is in linear). One
of them that is random, such as RReLU, is found on the real images."""
FULL_TOLERANCE, HALF_TOLERANCE = 1e-3, 3e-2
"""Parts of the largest number that the cut network may differ by in fp32 (where a GPU may take another algorithm for
another batch) and in 16 bits. What is random, or missing, differs by far more."""


class NoCutError(Exception):
    """Why a network cannot be cut; words that follow "but its features are not kept: "."""


class Front(nn.Module):
    """The part that is fixed.

    Args:
        graph: from images to features of any shapes.
    """

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__()
        self.graph = graph

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Features, N x F, of normalised images."""
        return torch.cat([found.flatten(1) for found in self.graph(images)], dim=1)


class Rest(nn.Module):
    """The part that comes after it; its layers and their parameters are the network's own.

    Args:
        graph: from features of those shapes to the output of the network.
        shapes: of an image's features.
        channels_last: the memory layout of those with height and width.
    """

    def __init__(self, graph: fx.GraphModule, shapes: Sequence[torch.Size], *, channels_last: bool) -> None:
        super().__init__()
        self.graph = graph
        self._shapes = list(shapes)
        self._channels_last = channels_last

    def forward(self, features: torch.Tensor) -> Any:
        """What the network gives for the images of these features, N x F."""
        parts = torch.split(features, [shape.numel() for shape in self._shapes], dim=1)
        shaped = [part.reshape(-1, *shape) for part, shape in zip(parts, self._shapes, strict=True)]
        if self._channels_last:
            last = torch.channels_last
            shaped = [one.contiguous(memory_format=last) if one.dim() == 4 else one for one in shaped]  # noqa: PLR2004
        return self.graph(*shaped)


@dataclass(frozen=True, kw_only=True)
class Cut:
    """A network in two parts."""

    front: Front
    """From images to features."""
    rest: Rest
    """From features to the output."""
    num_features: int
    """Numbers of an image."""
    dtype: torch.dtype
    """Of each."""
    rest_trains: bool
    """Whether a function of the rest is told that it trains, whatever mode the layers are in: that was traced."""

    @property
    def bytes_of_sample(self) -> int:
        """What an image's features take."""
        return self.num_features * self.dtype.itemsize


def moving_layers(module: nn.Module) -> set[nn.Module]:
    """Layers that are not the same after a step, of a network in the mode in which it trains."""
    return {
        layer
        for layer in module.modules()
        if any(p.requires_grad for p in layer.parameters(recurse=False))
        or (layer.training and any(True for _ in layer.buffers(recurse=False)))
    }


def find(
    module: nn.Module,
    moving: set[nn.Module],
    images: torch.Tensor,
    autocast: Callable[[], AbstractContextManager[None]],
    *,
    channels_last: bool,
) -> Cut:
    """Cut a network, in the mode that it is in, as late as it can be.

    Args:
        module: the network; its running statistics stay as they are.
        moving: of :func:`moving_layers`.
        images: a few, as the network takes them.
        autocast: the precision of forward passes.
        channels_last: their memory layout.

    Raises:
        NoCutError: there is no place to cut it.
    """
    try:
        graph = _Tracer().trace(module, _other_arguments(module))
    except Exception as error:  # whatever a network does that is none of torch's operations
        raise NoCutError(f"{type(module).__name__} cannot be traced by torch.fx ({_short(error)})") from error
    fixed = _fixed(module, graph, moving)
    ends = [node for node in graph.nodes if node in fixed and any(user not in fixed for user in node.users)]
    if not ends or any(node.op == "placeholder" for node in ends):
        raise NoCutError("layers that learn, or that are random, take the images themselves")
    front = Front(fx.GraphModule(module, _front_graph(graph, fixed, ends)))
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), autocast():
            shapes, dtype = _look_at(front.graph(images), len(images))
            rest_graph = _rest_graph(graph, fixed, ends)
            rest = Rest(fx.GraphModule(module, rest_graph), shapes, channels_last=channels_last)
            trains = any(node.op == "call_function" and _trains(node) for node in rest_graph.nodes)
            size = sum(shape.numel() for shape in shapes)
            cut = Cut(front=front, rest=rest, num_features=size, dtype=dtype, rest_trains=trains)
            _compare(module, cut, images)
    except NoCutError:
        raise
    except Exception as error:
        raise NoCutError(f"its parts do not compute ({_short(error)})") from error
    finally:
        for buffer, before in buffers:
            buffer.copy_(before)
    return cut


class _Tracer(fx.Tracer):
    """Takes BatchNorm of our own for one layer, as torch's."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether a module is not looked into."""
        return isinstance(m, BatchNorm) or super().is_leaf_module(m, module_qualified_name)


def _other_arguments(module: nn.Module) -> dict[str, Any] | None:
    """The defaults of a forward pass's arguments beside the images."""
    parameters = list(inspect.signature(module.forward).parameters.values())[1:]
    return {one.name: one.default for one in parameters if one.default is not one.empty} or None


def _fixed(module: nn.Module, graph: fx.Graph, moving: set[nn.Module]) -> set[Node]:
    """Nodes whose values come from the images and are the same in every epoch."""
    layers = dict(module.named_modules())
    same: set[Node] = set()
    from_images: set[Node] = set()
    for node in graph.nodes:
        if node.op == "output":
            continue
        if node.op == "placeholder" or not from_images.isdisjoint(node.all_input_nodes):
            from_images.add(node)
        if same.issuperset(node.all_input_nodes) and _is_same(module, layers, node, moving):
            same.add(node)
    return same & from_images


def _is_same(module: nn.Module, layers: dict[str, nn.Module], node: Node, moving: set[nn.Module]) -> bool:
    """Whether what a node computes from the same values is the same in every epoch."""
    if node.op == "call_module":
        layer = layers[str(node.target)]
        plain = type(layer).__module__ in PLAIN and not list(layer.parameters())
        return moving.isdisjoint(layer.modules()) and (plain or not layer.training)
    if node.op == "get_attr":
        return not getattr(_attribute(module, str(node.target)), "requires_grad", False)
    if node.op == "call_function":
        return not _trains(node)
    return True


def _trains(node: Node) -> bool:
    """Whether a function is told that it is in training, or may take it so, as ``dropout(x)`` does."""
    assert callable(node.target)  # noqa: S101
    try:
        called = inspect.signature(node.target).bind(*node.args, **node.kwargs)
    except (TypeError, ValueError):  # one of torch's own, in C
        return node.kwargs.get("training") is True
    called.apply_defaults()
    return called.arguments.get("training") is True


def _attribute(module: nn.Module, path: str) -> Any:
    found: Any = module
    for name in path.split("."):
        found = getattr(found, name)
    return found


def _front_graph(graph: fx.Graph, fixed: set[Node], ends: Sequence[Node]) -> fx.Graph:
    wanted, new = _with_sources(graph, fixed), fx.Graph()
    copies: dict[Node, Node] = {}
    for node in graph.nodes:
        if node in wanted:
            copies[node] = new.node_copy(node, copies.__getitem__)
    new.output(tuple(copies[node] for node in ends))
    return new


def _rest_graph(graph: fx.Graph, fixed: set[Node], ends: Sequence[Node]) -> fx.Graph:
    new = fx.Graph()
    copies = {node: new.placeholder(node.name) for node in ends}
    wanted = _with_sources(graph, {node for node in graph.nodes if node.op == "output"}) - fixed
    for node in graph.nodes:
        if node.op == "output":
            new.output(fx.map_arg(node.args[0], copies.__getitem__))
        elif node in wanted:
            copies[node] = new.node_copy(node, copies.__getitem__)
    return new


def _with_sources(graph: fx.Graph, nodes: Iterable[Node]) -> set[Node]:
    """Nodes, and those that their values come from."""
    found = set(nodes)
    for node in reversed(graph.nodes):
        if node in found:
            found.update(node.all_input_nodes)
    return found


def _look_at(found: Sequence[Any], num_images: int) -> tuple[list[torch.Size], torch.dtype]:
    """The shapes of an image's features, and their one kind of number."""
    for one in found:
        if not isinstance(one, torch.Tensor) or not one.is_floating_point() or one.dim() < 2 or len(one) != num_images:  # noqa: PLR2004
            raise NoCutError("what its frozen part gives is not a row of numbers for each image")
    if len({one.dtype for one in found}) > 1:
        raise NoCutError("what its frozen part gives is of several kinds of numbers")
    return [one.shape[1:] for one in found], found[0].dtype


def _compare(module: nn.Module, cut: Cut, images: torch.Tensor) -> None:
    """Raise NoCutError where the parts give anything else than the whole, or something random, or mix images."""
    torch.manual_seed(0)
    whole = tree_leaves(module(images))
    torch.manual_seed(1)
    features = cut.front(images)
    torch.manual_seed(2)
    first = cut.front(images[:1])
    torch.manual_seed(0)
    parts = tree_leaves(cut.rest(features.clone()))
    pairs = [(features[:1], first), *zip(whole, parts, strict=True)]
    if not all(_alike(one, other) for one, other in pairs if isinstance(one, torch.Tensor)):
        raise NoCutError("cut in two it gives something else than whole")


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    tolerance = FULL_TOLERANCE if one.dtype == torch.float32 else HALF_TOLERANCE
    difference = (one.double() - other.double()).abs().max()
    return bool(difference <= tolerance * one.double().abs().max())


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__
