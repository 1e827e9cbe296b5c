"""The smallest DDP script: what `launch` is measured against (startup.py)."""

import time

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torchvision.models import resnet18

dist.init_process_group("gloo")
model = DistributedDataParallel(resnet18(num_classes=10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
torch.nn.functional.cross_entropy(model(torch.randn(32, 3, 32, 32)), torch.randint(10, (32,))).backward()
optimizer.step()
if dist.get_rank() == 0:
    print(f"first step at {time.time()}", flush=True)
dist.destroy_process_group()
