"""Whether each format can be made of each architecture, and says what the checkpoint says of every validation image.

    python -m tests.bench.formats [--arch ARCH …] [--format NAME …] [--size 64]

Each architecture learns scikit-learn's digits from random weights for one epoch, then `launch export` makes the formats
and measures them. Printed: the agreement of each with the checkpoint, or why it was not made or not accepted; the
greatest difference of a logit; milliseconds for one image. Ends with 1 where a float32 file is not accepted.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from launcher.runs.run_dir import RunDir
from launcher.system.cpu import saturates_int8

ROOT = Path(__file__).parents[2]
ARCHITECTURES = (
    *("resnet18", "mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0"),
    *("vit_b_16", "convnext_tiny", "swin_t", "densenet121"),
)
FLOAT32 = ("onnx", "torch_export", "torchscript", "state_dict", "safetensors", "aotinductor")
ROUNDED = ("onnx_baked", "int8", "fp16", "int8_weights", "int8_dynamic")


def export(folder: Path, arch: str, formats: list[str], size: int) -> RunDir:
    """Train for an epoch, make the files; the run."""
    run = RunDir(folder / arch)
    launch = [sys.executable, "-m", "launcher"]
    small = ["batch.size=16", "optim.lr=0.01", "train.epochs=1", f"data.image_size={size}"]
    options = [f"model.arch={arch}", *small, "post.enabled=false", "tracking.wandb.mode=disabled"]
    _run([*launch, "quickstart", "--run-dir", str(run.path), *options], {0})
    wanted = [part for name in formats for part in ("--format", name)]
    _run([*launch, "export", str(run.path), *wanted], {0, 1})  # 1: none was accepted, which the manifest says, too
    return run


def _run(command: list[str], codes: set[int]) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode not in codes:
        sys.exit(f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def main() -> int:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", default=ARCHITECTURES)
    parser.add_argument("--format", nargs="+", default=[*FLOAT32, *ROUNDED], choices=[*FLOAT32, *ROUNDED])
    parser.add_argument("--size", type=int, default=64, help="pixels of what the network sees")
    args = parser.parse_args()
    print(f"int8 saturates on this CPU: {saturates_int8()}")
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        for arch in args.arch:
            run = export(Path(folder), arch, args.format, args.size)
            manifest = json.loads((run.exports / "manifest.json").read_text(encoding="utf-8"))
            reference = manifest["reference"]
            print(f"\n{arch}: checkpoint: top-1 {reference['top1']:.3f}, {reference['latency_p50_ms']:.2f} ms")
            rows = {row["format"]: row for row in [*manifest["not_made"], *manifest["exports"]]}
            for name in args.format:
                row = rows[name]
                is_accepted = row.get("accepted", False)
                failed |= name in FLOAT32 and not is_accepted
                said = f"agreement {row['agreement']:.4f}" if "agreement" in row else "not made"
                if row.get("max_logit_diff") is not None:
                    said += f", logits within {row['max_logit_diff']:.1e}"
                if row.get("latency_p50_ms") is not None:
                    said += f", {row['latency_p50_ms']:.2f} ms"
                print(f"  {name}: {said}" if is_accepted else f"  {name}: {said}: {row['reason']}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
