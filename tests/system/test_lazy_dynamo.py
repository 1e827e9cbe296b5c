"""torch's compiler is imported when something compiles, and then is torch's own. In processes of their own."""

from __future__ import annotations

import pytest

from tests.system import forks

START = """
import sys
from launcher.system import lazy_dynamo
lazy_dynamo.put_off()
from launcher.engine import worker
import torch, torchvision
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
"""
TRAIN = """
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
def step():
    model = torch.nn.Linear(2, 1)
    for kind in (torch.optim.SGD, torch.optim.AdamW):
        optimizer = kind(model.parameters(), lr=0.1)
        DistributedDataParallel(model)(torch.ones(3, 2)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
step()
assert lazy_dynamo.is_put_off()
assert "sympy" not in sys.modules
"""
USES = {
    "compile": "assert torch.compile(lambda x: x + 1, backend='eager')(torch.ones(1)) == 2",
    "a module": "import torch._dynamo.config as config; assert config.optimize_ddp is True",
    "from a module": "from torch._dynamo.eval_frame import innermost_fn; assert innermost_fn(step) is step",
    "an attribute": "assert torch._dynamo.config.optimize_ddp is True",
    "disable": "import torch._dynamo; assert torch._dynamo.reset() is None",
    "onnx": "import io; torch.onnx.export(torch.nn.Linear(2, 1), (torch.ones(1, 2),), io.BytesIO(), dynamo=True)",
}
REAL = """
assert not lazy_dynamo.is_put_off()
import torch._dynamo, torch._dynamo.utils, torch._dynamo.trace_rules, torch._dynamo.config, torch._dynamo.eval_frame
for name, module in list(sys.modules.items()):
    if name.startswith("torch._dynamo"):
        assert type(module).__module__ != lazy_dynamo.__name__, name
        assert module.__spec__.name == name
        assert module.__spec__.loader.__class__.__module__ != lazy_dynamo.__name__, name
step()
"""


@pytest.fixture(scope="module")
def errors():
    return forks.errors(START, {name: f"{TRAIN}\n{use}\n{REAL}" for name, use in USES.items()})


@pytest.mark.parametrize("use", USES)
def test_training_does_without_and_who_compiles_has_the_real_one(use, errors):
    assert errors[use] == ""


def test_where_it_is_imported_already_nothing_changes():
    code = "from launcher.system import lazy_dynamo\nlazy_dynamo.put_off()\nassert not lazy_dynamo.is_put_off()"
    assert forks.errors("import torch._dynamo", {"": code}) == {"": ""}
