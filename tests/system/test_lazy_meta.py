"""torch's kernels for the meta device are imported by the first tensor there, and are all there then. In processes."""

from __future__ import annotations

import pytest

from tests.system import forks

START = """
import sys
from launcher.system import lazy_dynamo, lazy_meta
lazy_dynamo.put_off()
lazy_meta.put_off()
import torch, torchvision
from launcher.engine import worker
from launcher.engine.layers import build_meta, head_modules
from torch.utils.data import DataLoader, RandomSampler
"""
TRAIN = """
model = build_meta("resnet18", 10)
assert head_modules("vit_b_16") == ("heads.head",)
layer = torch.nn.Linear(2, 1)
optimizer = torch.optim.AdamW(layer.parameters())
layer(torch.ones(3, 2)).sum().backward()
optimizer.step()
generator = torch.Generator().manual_seed(0)
numbers = torch.arange(6.0)
for workers in (0, 1):
    loaded = DataLoader(numbers, sampler=RandomSampler(numbers, generator=generator), num_workers=workers)
    assert sorted(map(float, loaded)) == [0, 1, 2, 3, 4, 5]
torch.fx.symbolic_trace(layer)
torch.nn.functional.dropout(torch.rand(4, generator=generator)).topk(2)
assert lazy_meta.is_put_off()
assert "torch._decomp" not in sys.modules
"""
USES = {
    "a forward pass": "assert model(torch.empty(2, 3, 32, 32, device='meta')).shape == (2, 10)",
    "the module": "import torch._meta_registrations as meta; assert meta.meta_index_Tensor.__module__ == meta.__name__",
    "from a package behind it": "from torch._refs.nn import functional; assert functional.gelu",
    "what it has imported": "import torch.utils._content_store as store; assert store.ContentStoreReader",
    "export": "torch.export.export(torch.nn.Linear(2, 1), (torch.ones(1, 2),))",
}
REAL = """
assert not lazy_meta.is_put_off()
import torch._meta_registrations, torch._decomp, torch._prims, torch._refs
for module in (torch._meta_registrations, torch._decomp, torch._prims, torch._refs):
    assert module.__file__ and module is sys.modules[module.__name__]
assert torch.nn.Conv2d(3, 4, 3, device="meta")(torch.empty(1, 3, 8, 8, device="meta")).shape == (1, 4, 6, 6)
assert torch._C.DispatchKey.Meta in torch.ops.aten.convolution.default.py_kernels
"""


@pytest.fixture(scope="module")
def errors():
    return forks.errors(START, {name: f"{TRAIN}\n{use}\n{REAL}" for name, use in USES.items()})


@pytest.mark.parametrize("use", USES)
def test_training_does_without_and_who_uses_them_has_all(use, errors):
    assert errors[use] == ""


def test_where_torch_is_imported_already_nothing_changes():
    code = """
from launcher.system import lazy_meta
lazy_meta.put_off()
assert not lazy_meta.is_put_off()
with lazy_meta.shapes_only():
    torch.empty(2, device="meta")
assert torch._decomp.decomposition_table
"""
    assert forks.errors("import torch", {"": code}) == {"": ""}
