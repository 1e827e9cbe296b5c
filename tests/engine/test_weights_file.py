"""Weights in the files of other trainers, written here as those write them."""

from __future__ import annotations

import argparse
import datetime as dt
import io
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torchvision import models

from launcher.engine import recipe_checks as checks
from launcher.engine.checkpoints import checkpoint
from launcher.engine.checkpoints.checkpoint import Checkpoint, CheckpointError
from launcher.engine.network.fitting import load_weights
from launcher.engine.weights_file import read_weights_file
from launcher.errors import RecipeError, UsageError
from launcher.recipe.schema import ModelConfig, Recipe
from launcher.recipe.schema_data import DataConfig
from launcher.runs.run_dir import RunDir

ARCH = "shufflenet_v2_x0_5"  # small, and with BatchNorm's counters


def network(seed=1, classes=3):
    torch.manual_seed(seed)
    return models.get_model(ARCH, weights=None, num_classes=classes)


def loaded(path):
    """The state of a new model that was given a file's weights."""
    module = network(seed=0)
    load_weights(module, ModelConfig(arch=ARCH, weights=str(path)), image_size=32)
    return module.state_dict()


def is_of(state, module):
    return all(torch.equal(state[k], v) for k, v in module.state_dict().items())


def prefixed(state, prefix):
    return OrderedDict((f"{prefix}{key}", value) for key, value in state.items())


def timm(net):
    """CheckpointSaver._save: options as a Namespace, the metric as NumPy computed it."""
    args = argparse.Namespace(model=ARCH, lr=0.1, output=Path("out"), started=dt.datetime(2026, 1, 1))  # noqa: DTZ001
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    values = {"epoch": 3, "arch": ARCH, "state_dict": net.state_dict(), "optimizer": optimizer.state_dict()}
    ema = {key: value.clone() for key, value in network(seed=5).state_dict().items()}
    return values | {"version": 2, "args": args, "state_dict_ema": ema, "metric": np.float64(71.5)}


def torchvision_references(net):
    """references/classification/train.py with --model-ema: the average counts its updates, and has a prefix."""
    ema = AveragedModel(network(seed=5))
    return {
        "model": net.state_dict(),
        "optimizer": torch.optim.AdamW(net.parameters()).state_dict(),
        "lr_scheduler": {"base_lrs": [0.1]},
        "epoch": 3,
        "args": argparse.Namespace(data_path="/data", device="cuda"),
        "model_ema": ema.state_dict(),
    }


def only_an_average(net):
    return {"model_ema": AveragedModel(net).state_dict(), "epoch": np.int64(3)}


def lightning(net):
    """Trainer.save_checkpoint: the module's attribute is the prefix, and the loss has a buffer beside it."""
    state = prefixed(net.state_dict(), "model.") | {"criterion.weight": torch.ones(3)}
    callbacks = {"ModelCheckpoint{'monitor': 'val_loss'}": {"best_model_score": torch.tensor(0.5), "kth": {}}}
    return {"epoch": 3, "state_dict": state, "callbacks": callbacks, "hyper_parameters": {"lr": 0.1}, "loops": {}}


def ddp(net):
    return prefixed(net.state_dict(), "module.")


def compiled_in_ddp(net):
    return {"model_state_dict": prefixed(net.state_dict(), "module._orig_mod."), "loss": np.float32(0.3)}


def ddp_in_lightning_compiled(net):
    return {"state_dict": prefixed(net.state_dict(), "model._orig_mod.module.")}


def layers_compiled_one_by_one(net):
    """nn.Module.compile of a stage leaves names alone; torch.compile of it does not."""
    return OrderedDict((key.replace("stage2.", "stage2._orig_mod."), value) for key, value in net.state_dict().items())


def numpy_arrays(net):
    return {"model": {key: value.numpy() for key, value in net.state_dict().items()}}


def nested_twice(net):
    return {"checkpoint": {"ema": {"module": prefixed(net.state_dict(), "net.")}, "decay": 0.999}}


def basicsr(net):
    return {"params": net.state_dict()}


def another_name_in_the_users_module(net):
    return {"state_dict": prefixed(net.state_dict(), "student.backbone.")}


def beside_scalars(net):
    return {**net.state_dict(), "epoch": 3}


def momentum_first(net):
    """What has the names and shapes of weights need not be them."""
    return {"momentum": {k: torch.zeros_like(v) for k, v in net.state_dict().items()}, "net": net.state_dict()}


WRITERS = (
    *(timm, torchvision_references, only_an_average, lightning, ddp, compiled_in_ddp, ddp_in_lightning_compiled),
    *(layers_compiled_one_by_one, numpy_arrays, nested_twice, basicsr, another_name_in_the_users_module),
    *(beside_scalars, momentum_first),
)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("write", WRITERS)
def test_the_weights_of_another_trainer_are_found(write, zipped, tmp_path):
    net = network()
    path = tmp_path / "model_best.pth.tar"
    torch.save(write(net), path, _use_new_zipfile_serialization=zipped)
    assert is_of(loaded(path), net)
    assert read_weights_file(path, net.state_dict(), device="meta").state.keys() >= net.state_dict().keys()


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.net.", ""])
@pytest.mark.parametrize("name", ["w.safetensors", "pytorch_model.bin", "w"])
def test_safetensors_too_whatever_its_ending(prefix, name, tmp_path):
    net = network()
    save_file(dict(prefixed(net.state_dict(), prefix)), tmp_path / name)
    assert is_of(loaded(tmp_path / name), net)


def test_a_name_of_numpy_1_is_known_too(tmp_path):
    net, path = network(), tmp_path / "old.pth"
    torch.save({"state_dict": net.state_dict(), "best": np.float64(0.5)}, path)
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content.replace(b"numpy._core.", b"numpy.core.") if "data.pkl" in name else content)
    assert is_of(loaded(path), net)


def test_an_exact_fit_is_taken_before_one_that_lacks_something(tmp_path):
    net = network()
    part = {k: torch.zeros_like(v) for k, v in list(net.state_dict().items())[:-30]}
    torch.save({"state_dict": part, "ema": net.state_dict()}, tmp_path / "w.pth")
    assert is_of(loaded(tmp_path / "w.pth"), net)


class Anything:
    """A class that is only there where the file was made."""


def torchscript(path):
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), str(path))


FOREIGN = {
    "whole module": (lambda p: torch.save(network(), p), "it holds torchvision.models.shufflenetv2.ShuffleNetV2"),
    "Ultralytics": (lambda p: torch.save({"model": network(), "epoch": -1}, p), "which could run code; save the"),
    "whole module, old": (
        lambda p: torch.save(network(), p, _use_new_zipfile_serialization=False),
        "it holds torchvision.models.shufflenetv2.ShuffleNetV2",
    ),
    "a class of one's own": (
        lambda p: torch.save({"state_dict": network().state_dict(), "config": Anything()}, p),
        "Anything beside or around tensors, which could run code; save the weights alone",
    ),
    "pickle": (lambda p: p.write_bytes(pickle.dumps({"a": Anything()})), "cannot be read as weights"),
    "TorchScript": (
        torchscript,
        "it is TorchScript, a program; take the weights out of it: torch.save(torch.jit.load(",
    ),
    "Git LFS": (lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\noid"), "git lfs pull"),
    "web page": (lambda p: p.write_text("\n<!DOCTYPE html><html>Not Found"), "the download has failed"),
    "empty": (lambda p: p.write_bytes(b""), "it is empty"),
    "Keras": (lambda p: p.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(99)), "it is HDF5"),
    "other zip": (lambda p: zipfile.ZipFile(p, "w").writestr("a.txt", "a"), "it is no file of torch.save"),
}


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors", "w.ckpt"])
@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_what_cannot_be_read_is_said_in_our_own_words(kind, name, tmp_path):
    write, words = FOREIGN[kind]
    path = tmp_path / name
    write(path)
    with pytest.raises(UsageError, match="cannot be read as weights") as caught:
        loaded(path)
    text = str(caught.value)
    assert words in text
    assert not {"\x1b", "\n"} & set(text)
    assert "weights_only" not in text
    assert len(text.replace(str(path), "")) < 240


# NaN and infinite values; heads. By the checks that come before anything is started


@pytest.fixture
def check(images):
    def run(path, **options):
        data = DataConfig(path=str(images), image_size=32)
        checks.check(Recipe(model=ModelConfig(arch=ARCH, weights=str(path)), data=data), str, **options)

    return run


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["conv1.0.weight", "stage3.1.branch2.1.running_var"])
@pytest.mark.parametrize("save", [torch.save, save_file])
def test_weights_that_are_no_numbers_are_told_as_such(check, tmp_path, value, name, save):
    state = {k: v.clone() for k, v in network().state_dict().items()}
    state[name].view(-1)[-1] = value
    save(state, tmp_path / "w.pth")
    with pytest.raises(RecipeError, match=rf"model\.weights: .*w\.pth: NaN or infinite values in {name}: "):
        check(tmp_path / "w.pth")
    with pytest.raises(UsageError, match="NaN or infinite values"):
        loaded(tmp_path / "w.pth")


def test_a_head_that_is_not_taken_may_hold_anything(check, tmp_path, capsys):
    state = network(classes=5).state_dict()
    state["fc.weight"].fill_(float("nan"))
    torch.save(state, tmp_path / "w.pth")
    check(tmp_path / "w.pth")
    said = f"{tmp_path}/w.pth: a new head is put on for 3 classes (fc.weight, fc.bias): its own is for 5 classes\n"
    assert capsys.readouterr().out == said
    check(tmp_path / "w.pth", is_new=False)  # a run that goes on has its head already
    assert capsys.readouterr().out == ""


def test_a_new_head_is_told_and_one_that_fits_is_no_news(check, tmp_path, capsys):
    state = network().state_dict()
    torch.save(state, tmp_path / "w.pth")
    check(tmp_path / "w.pth")
    assert capsys.readouterr().out == ""
    torch.save({k: v for k, v in state.items() if not k.startswith("fc.")}, tmp_path / "w.pth")
    check(tmp_path / "w.pth")
    assert capsys.readouterr().out.endswith(
        "w.pth: a new head is put on for 3 classes (fc.weight, fc.bias): it has none\n"
    )


def test_where_several_fit_it_is_said_which_was_taken(check, tmp_path, capsys):
    torch.save(timm(network()), tmp_path / "w.pth")
    check(tmp_path / "w.pth")
    said = capsys.readouterr().out
    assert said == f"{tmp_path}/w.pth: the weights are those in state_dict; state_dict_ema would fit too\n"


def test_a_checkpoint_whose_weights_are_no_numbers_is_passed_over(tmp_path):
    run = RunDir(tmp_path / "run")
    run.create()
    for step, value in ((1, 1.0), (2, float("nan"))):
        model = {"a": torch.ones(2), "b": torch.full((2,), value)}
        checkpoint.write(run, Checkpoint(step=step, model=model, optimizer={}, state={"step": step}))
    with pytest.raises(
        CheckpointError, match=r"step-00000002/model\.safetensors: NaN or infinite values in 1 tensors, as b"
    ):
        checkpoint.load(run.checkpoint(2))
    assert checkpoint.load_newest(run).step == 1
    assert "NaN or infinite values" in run.events.read_text()


def test_bytes_that_are_neither(tmp_path):
    buffer = io.BytesIO()
    torch.save(network().state_dict(), buffer)
    (tmp_path / "w.pth").write_bytes(buffer.getvalue()[:2000])
    with pytest.raises(UsageError, match=r"it is no file of torch\.save or safetensors, or is damaged or cut short"):
        loaded(tmp_path / "w.pth")
