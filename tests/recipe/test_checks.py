from __future__ import annotations

import importlib.util
import shutil

import pytest
from safetensors.numpy import save_file

from launcher.errors import RecipeError
from launcher.recipe import checks as recipe_checks
from launcher.recipe import load as recipes
from launcher.recipe import notes
from launcher.recipe.source import Source


@pytest.fixture
def problems(images):
    """The problems of a recipe whose single values are right, key to message; each is where its key was given."""

    def run(**sections):
        values = {"data": {"path": str(images)}, **sections}
        source = Source(path="r.yaml", values=values, origins={"optim.lr": "r.yaml:7", "model": "r.yaml:3"})
        found = recipe_checks.find_problems(recipes.from_dict(values), source)
        assert all(problem.where == source.where(problem.key) for problem in found)
        return [(problem.key, problem.message) for problem in found]

    return run


def test_a_recipe_of_defaults_needs_data_and_nothing_else(problems):
    assert problems() == []
    ((key, message),) = problems(data={})
    assert key == "data.path"
    assert message.startswith(
        "missing: the folder that holds train/ and val/, or a list (.csv, .jsonl, .parquet); give"
    )


# --- training


@pytest.mark.parametrize(
    ("metric", "mode"),
    [("train/loss", "min"), ("val/loss", "min"), ("val/top1", "max"), ("val/top5", "max"), ("val/f1", "max")],
)
def test_each_metric_has_the_mode_that_means_better(metric, mode, problems):
    assert problems(train={"early_stopping": {"metric": metric, "mode": mode}}) == []
    other = {"min": "max", "max": "min"}[mode]
    assert problems(train={"early_stopping": {"metric": metric, "mode": other}}) == [
        ("train.early_stopping.mode", f"found '{other}', which would keep the worst {metric}; valid: {mode}")
    ]


@pytest.mark.parametrize(
    ("metric", "hint"),
    [("val/accuracy", "did you mean 'val/top1'? "), ("top1", "did you mean 'val/top1'? "), ("", "")],
    ids=["other", "half", ""],
)
def test_early_stopping_on_a_metric_that_does_not_exist(metric, hint, problems):
    assert problems(train={"early_stopping": {"metric": metric}}) == [
        (
            "train.early_stopping.metric",
            (
                f"found {metric!r}; no such metric; {hint}valid: train/loss, val/loss, val/top1, val/top5, val/f1, "
                "val/f1_micro, val/f1_weighted, val/precision, val/balanced_accuracy, val/auroc, "
                "val/average_precision, val/ece"
            ),
        )
    ]


@pytest.mark.parametrize(
    ("section", "values", "note"),
    [
        ("optim", {"warmup_epochs": 1}, None),
        ("optim", {"warmup_epochs": 0}, None),
        ("optim", {"warmup_epochs": 4}, "4 epochs are more than train.epochs (1): the rates end at 25% of theirs"),
        ("optim", {"power": 3.0}, "no effect with optim.schedule=cosine; it is read by polynomial"),
        ("optim", {"step_epochs": [0.5], "schedule": "step"}, None),
        (
            "optim",
            {"step_epochs": [0.5, 30], "schedule": "step"},
            "its drop at 30 never comes: train.epochs is 1",
        ),
        ("model", {"freeze": ["layer1"], "unfreeze": {0: "layer1"}}, None),
        (
            "model",
            {"freeze": ["layer1"], "unfreeze": {0: "layer1", 3: "layer1"}},
            "epoch 3 never comes: train.epochs is 1, counted from 0",
        ),
        ("train", {"swa": 1}, "its mean of the weights never begins: train.epochs is 1"),
    ],
)
def test_any_recipe_can_be_tried_for_one_epoch_and_says_what_it_does_not_come_to(section, values, note, problems):
    sections = {section: values} | {"train": {"epochs": 1, **(values if section == "train" else {})}}
    assert problems(**sections) == []
    recipe = recipes.from_dict(sections)
    assert [text for _, text in notes.find_notes(recipe)] == ([note] if note else [])


@pytest.mark.parametrize(
    ("sections", "key", "words"),
    [
        ({"data": {"crop_scale": [0.9, 0.2]}}, "data.crop_scale", "the first, the least, must not be more"),
        ({"data": {"mixup": 0.2}, "batch": {"size": 1}}, "batch.size", "data.mixup mixes the images of a batch"),
        ({"data": {"cutmix": 1.0}, "train": {"feature_views": 2}}, "train.feature_views", "data.cutmix mixes images"),
        ({"data": {"cutmix": 1.0}, "batch": {"size": 1}}, "batch.size", "data.cutmix mixes the images of a batch"),
        ({"train": {"clip_grad_norm": 1.0, "clip_grad_value": 1.0}}, "train.clip_grad_value", "not both"),
        ({"train": {"ema": 0.9, "swa": 2}}, "train.swa", "give swa or ema, not both"),
    ],
)
def test_what_does_not_go_together(sections, key, words, problems, images):
    sections["data"] = {"path": str(images), **sections.get("data", {})}
    ((found, message),) = problems(**sections)
    assert (found, words in message) == (key, True)


def test_accumulation_is_given_or_follows_from_the_global_size(problems):
    assert problems(batch={"accumulate": 2}) == []
    assert problems(batch={"global_size": 64}) == []
    ((key, message),) = problems(batch={"global_size": 64, "accumulate": 2})
    assert key == "batch.accumulate"
    assert "give global_size or accumulate, not both" in message


def test_int8_is_made_from_onnx(problems):
    assert problems(post={"export": ["torchscript"], "quantize": []}) == []
    assert problems(post={"export": ["torchscript"]}) == [
        ("post.quantize", "int8, fp16: made from the onnx export; add onnx to post.export")
    ]


# --- placement


@pytest.mark.parametrize(
    ("launch", "key", "message"),
    [
        ({"gpus": 8, "device": "cpu"}, "launch.device", "cpu, but 8 GPUs per node are asked for; use --procs"),
        ({"gpus": 8, "procs": 4}, "launch.procs", "found 4, but there is one worker per GPU and launch.gpus is 8"),
        ({"backend": "local", "nodes": 2}, "launch.backend", "local is one process on this machine; use torchrun"),
        ({"backend": "local", "procs": 2}, "launch.backend", "local is one process on this machine; use torchrun"),
        ({"backend": "local", "gpus": 2}, "launch.backend", "local is one process on this machine; use torchrun"),
    ],
)
def test_settings_that_contradict_each_other(launch, key, message, problems):
    ((found_key, found),) = problems(launch=launch)
    assert found_key == key
    assert found.startswith(message)


@pytest.mark.parametrize(
    "launch",
    [
        {"gpus": 8},
        {"gpus": 8, "procs": 8, "device": "cuda"},
        {"procs": 4, "device": "cpu", "nodes": 2},
        {"backend": "local", "procs": 1},
        {"backend": "local", "gpus": 1},
    ],
)
def test_settings_that_agree(launch, problems):
    assert problems(launch=launch) == []


# --- the model


@pytest.mark.parametrize(
    ("arch", "nearest"), [("resnett50", "'resnet50'"), ("ResNet18", "'resnet18'"), ("mobilenetv2", "'mobilenet_v2'")]
)
def test_an_unknown_architecture_names_the_nearest(arch, nearest, problems):
    ((key, message),) = problems(model={"arch": arch})
    assert key == "model.arch"
    assert message.startswith(f"found {arch!r}; torchvision has no such classification model; did you mean {nearest}")
    assert message.endswith("`launch models` lists them")


def test_weights_that_an_architecture_does_not_have(problems):
    ((key, message),) = problems(model={"arch": "resnet18", "weights": "IMAGENET1K_V2"})
    assert key == "model.weights"
    assert "resnet18 has no such weights; did you mean 'IMAGENET1K_V1'? valid: DEFAULT, IMAGENET1K_V1" in message


@pytest.mark.parametrize("weights", ["DEFAULT", "IMAGENET1K_V1", None])
def test_weights_that_it_has(weights, problems):
    assert problems(model={"arch": "resnet18", "weights": weights}) == []


def test_weights_without_a_classifier_are_refused(problems):
    ((key, message),) = problems(model={"arch": "vgg16", "weights": "IMAGENET1K_FEATURES"})
    assert key == "model.weights"
    assert "is no whole model" in message


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors", "sub/w"])
def test_a_weights_file_that_is_not_there(name, tmp_path, problems):
    path = tmp_path / name
    ((key, message),) = problems(model={"weights": str(path)})
    assert key == "model.weights"
    assert message.startswith(f"{path}: no such file; a name such as DEFAULT is torchvision's, null is none")


def test_a_folder_in_the_place_of_a_weights_file(tmp_path, problems):
    save_file({}, tmp_path / "model.safetensors")
    ((key, message),) = problems(model={"weights": str(tmp_path)})
    assert key == "model.weights"
    assert message == f"{tmp_path}: is a folder; name the file with the weights (files in it: model.safetensors)"


def test_a_weights_file_that_is_there_is_not_read_here(tmp_path, problems):
    save_file({}, tmp_path / "w.safetensors")
    assert problems(model={"weights": str(tmp_path / "w.safetensors")}) == []


def test_thawing_needs_something_frozen(problems):
    message = "nothing is frozen; name the layers in model.freeze first"
    assert problems(model={"unfreeze": {3: "layer1"}}) == [("model.unfreeze", message)]
    assert problems(model={"freeze": ["layer1"], "unfreeze": {0: "layer1", 19: "layer1"}}) == []


# --- the data (test_image_folder has every way in which a folder can be wrong)


def test_every_problem_of_the_folder_is_one_of_the_recipe(images, tmp_path, problems):
    photos = shutil.copytree(images, tmp_path / "photos")
    shutil.rmtree(photos / "val/cat")
    (photos / "val/elk").mkdir()
    found = problems(data={"path": str(photos)}, model={"num_classes": 1})
    assert [key for key, _ in found] == ["data.path"] * 3
    assert "'cat' in train/ but not in val/" in found[0][1]
    assert "'elk' in val/ but not in train/" in found[1][1]
    assert "no images in 'elk'" in found[2][1]


@pytest.mark.parametrize(("num", "good"), [("auto", True), (3, True), (5, True), (2, False)])
def test_the_head_has_an_output_for_every_class(num, good, images, problems):
    found = problems(model={"num_classes": num})
    assert found == ([] if good else [("model.num_classes", f"found 2, but {images}/train has 3 class folders")])


def test_digits_need_no_path_but_scikit_learn(problems, monkeypatch, tmp_path):
    monkeypatch.setenv("FINETUNE_LAUNCHER_CACHE", str(tmp_path))
    assert problems(data={"name": "digits"}) == []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    ((key, message),) = problems(data={"name": "digits"})
    assert key == "data.name"
    assert "pip install scikit-learn" in message
    (tmp_path / "digits").mkdir()  # written already: nothing more is needed
    assert problems(data={"name": "digits"}) == []


def test_digits_are_not_trained_on_in_place_of_a_folder_that_was_named(problems):
    ((key, message),) = problems(data={"name": "digits", "path": "/my/photos"})
    assert key == "data.path"
    assert "for the images in /my/photos add data.name=imagefolder" in message


# --- all of it together


def test_problems_of_all_kinds_come_together_each_where_it_was_given(problems, recipe_file):
    path = recipe_file(
        "data: {path: /nowhere/photos}\nmodel: {arch: resnett50}\noptim:\n  warmup_epochs: 30\n"
        "train:\n  early_stopping: {metric: val/acc}\n  epochs: ten\nlaunch: {gpus: 2}\n"
    )
    with pytest.raises(RecipeError) as caught:
        recipes.load(str(path), ["post.export=[]"], {"launch.procs": ("--procs", 3)})
    found = {problem.key: problem.where.replace(str(path), "F") for problem in caught.value.problems}
    assert found == {
        "train.epochs": "F:7",
        "train.early_stopping.metric": "F:6",
        "launch.procs": "command line (--procs 3)",
        "post.quantize": "F",
        "model.arch": "F:2",
        "data.path": "F:1",
    }
