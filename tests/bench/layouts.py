"""Memory layouts on the CPU: by which factor a training step and a forward pass are faster with channels last.

    python -m tests.bench.layouts [--models NAME …] [--px 160] [--batch 8] [--rounds 4]

Both layouts in turn, in one process with one thread; CPU seconds, of which the least of the rounds counts. The last
column is what ``train.channels_last: auto`` takes on a CPU.
"""

from __future__ import annotations

import argparse
import os
import time
from typing import TYPE_CHECKING

from launcher.system import allocator

if TYPE_CHECKING:
    from collections.abc import Callable

MODELS = [
    *("alexnet", "vgg11", "squeezenet1_1", "resnet18", "resnet50", "resnext50_32x4d", "regnet_y_400mf", "densenet121"),
    *("googlenet", "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small", "shufflenet_v2_x0_5", "efficientnet_b0"),
    *("convnext_tiny", "swin_t", "vit_b_32"),
]


def time_layouts(arch: str, *, px: int, batch: int, rounds: int) -> tuple[float, float, bool]:
    """How many times as fast channels last is: (a step, a forward pass); and whether it is what we take."""
    import torch
    from torchvision import models

    from launcher.engine.layers import prefers_channels_last

    sides: dict[bool, tuple[Callable[[], object], Callable[[], object]]] = {}
    for nhwc in (False, True):
        torch.manual_seed(0)
        options = {"image_size": px} if arch.startswith("vit") else {}
        options |= {"init_weights": True, "aux_logits": False} if arch == "googlenet" else {}
        model, images = models.get_model(arch, num_classes=10, **options), torch.randn(batch, 3, px, px)
        taken = prefers_channels_last(model)
        if nhwc:
            model.to(memory_format=torch.channels_last)
            images = images.contiguous(memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, fused=True)

        def step(model=model, images=images, optimizer=optimizer) -> None:
            torch.nn.functional.cross_entropy(model(images), torch.zeros(batch, dtype=torch.long)).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        def forward(model=model, images=images) -> None:
            with torch.inference_mode():
                model(images)

        sides[nhwc] = step, forward
    least = {}
    for number in range(rounds + 1):
        for nhwc, functions in sides.items():
            for kind, function in enumerate(functions):
                start = time.process_time()
                function()
                took = time.process_time() - start
                if number:  # the first makes the optimizer's state
                    least[nhwc, kind] = min(took, least.get((nhwc, kind), took))
    return least[False, 0] / least[True, 0], least[False, 1] / least[True, 1], taken


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--px", type=int, default=160)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=4)
    args = parser.parse_args()
    os.environ |= {**allocator.HUGE_PAGES, "OMP_NUM_THREADS": "1"}
    allocator.keep_freed()
    print(f"at {args.px} px, batch {args.batch}\n\n| model | a step | forward | auto takes it |\n|---|---|---|---|")
    for arch in args.models:
        step, forward, taken = time_layouts(arch, px=args.px, batch=args.batch, rounds=args.rounds)
        print(f"| {arch} | {step:.2f} | {forward:.2f} | {'yes' if taken else 'no'} |", flush=True)


if __name__ == "__main__":
    main()
