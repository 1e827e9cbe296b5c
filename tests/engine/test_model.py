from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision import models
from torchvision.models.vision_transformer import VisionTransformer, interpolate_embeddings

from launcher.engine import recipe_checks as checks
from launcher.engine.layers import build_meta, head_modules
from launcher.engine.model import (
    FineTunedModel,
    build_model,
    build_module,
    split_outputs,
)
from launcher.engine.network.fitting import fit_weights, load_weights
from launcher.engine.weights_file import read_weights_file
from launcher.errors import UsageError
from launcher.recipe.schema import ModelConfig, Recipe
from launcher.recipe.schema_data import DataConfig
from launcher.recipe.schema_train import EarlyStoppingConfig, TrainConfig

ARCHS = models.list_models(module=models)
HEAD = ("classifier.1.weight", "classifier.1.bias")  # of squeezenet1_1, the smallest there is


def squeezenet(num_classes, seed=1):
    torch.manual_seed(seed)
    return models.squeezenet1_1(weights=None, num_classes=num_classes)


def config_of(path, arch="squeezenet1_1"):
    return ModelConfig(arch=arch, weights=str(path))


def loaded(path, *, num_classes=7, arch="squeezenet1_1"):
    """A module with new weights, before and after it was given those of a file."""
    torch.manual_seed(0)
    module = build_module(config_of(path, arch), num_classes=num_classes, image_size=32)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    load_weights(module, config_of(path, arch), image_size=32)
    return before, module.state_dict()


# Building


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_every_classification_model_passes_the_checks_with_seven_classes(arch, tmp_path):
    for split in ("train", "val"):
        for label in range(7):
            (tmp_path / split / str(label)).mkdir(parents=True)
    recipe = Recipe(model=ModelConfig(arch=arch, weights=None), data=DataConfig(path=str(tmp_path)))
    checks.check(recipe, str)


@pytest.mark.parametrize(
    ("arch", "size", "fits"), [("vit_b_32", 64, True), ("vit_b_32", 100, False), ("maxvit_t", 96, False)]
)
def test_the_checks_say_which_image_sizes_a_model_does_not_take(tmp_path, arch, size, fits):
    (tmp_path / "train" / "one").mkdir(parents=True)
    recipe = Recipe(model=ModelConfig(arch=arch, weights=None), data=DataConfig(path=str(tmp_path), image_size=size))
    if fits:
        checks.check(recipe, str)
    else:
        with pytest.raises(UsageError, match=f"{arch} does not take images of {size} px"):
            checks.check(recipe, str)


@pytest.mark.parametrize(("num_classes", "good"), [(5, False), (6, True)])
def test_top_5_of_five_classes_chooses_nothing(tmp_path, num_classes, good):
    for index in range(num_classes):
        (tmp_path / "train" / str(index)).mkdir(parents=True)
    stop = EarlyStoppingConfig(metric="val/top5", mode="max")
    recipe = Recipe(
        model=ModelConfig(arch="resnet18", weights=None),
        data=DataConfig(path=str(tmp_path), image_size=32),
        train=TrainConfig(early_stopping=stop),
    )
    if good:
        checks.check(recipe, str)
    else:
        with pytest.raises(
            UsageError, match="'val/top5', which is the same for every model with 5 classes; use val/top1"
        ):
            checks.check(recipe, str)


@pytest.mark.parametrize("arch", ["resnet18", "squeezenet1_1", "mnasnet0_5"])
def test_a_real_model_gives_a_logit_for_each_class(arch):
    module = build_module(ModelConfig(arch=arch, weights=None), num_classes=7, image_size=32)
    assert module(torch.zeros(2, 3, 32, 32)).shape == (2, 7)


def test_new_weights_follow_from_the_recipes_seed():
    config = ModelConfig(arch="squeezenet1_1", weights=None)

    def state(seed):
        torch.rand(3)
        recipe = Recipe(seed=seed, model=config)
        return build_model(recipe, num_classes=7, image_size=32, with_weights=True).module.state_dict()

    first, again, other = state(3), state(3), state(4)
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not any(torch.equal(first[k], other[k]) for k in first if k.endswith("weight"))


def test_only_rank_0_reads_the_weights(tmp_path):
    recipe = Recipe(model=config_of(tmp_path / "absent.pth"))
    build_model(recipe, num_classes=7, image_size=32, with_weights=False)
    with pytest.raises(UsageError, match=r"absent\.pth"):
        build_model(recipe, num_classes=7, image_size=32, with_weights=True)


# Weights from files


def plain(state, path):
    torch.save(state, path)


def before_torch_1_6(state, path):
    """The format of many of torchvision's own files: vgg, alexnet, squeezenet, densenet, mobilenet_v2, googlenet."""
    torch.save(state, path, _use_new_zipfile_serialization=False)


def in_a_checkpoint(state, path):
    torch.save({"epoch": 3, "state_dict": state, "best_acc1": torch.tensor(71.0), "optimizer": {"lr": 0.1}}, path)


def as_torchvisions_references_do(state, path):
    torch.save({"model": state, "epoch": 3}, path)


def of_ddp(state, path):
    torch.save({f"module.{k}": v for k, v in state.items()}, path)


def of_ddp_in_a_checkpoint(state, path):
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, path)


def safetensors(state, path):
    save_file(state, path)


WRITERS = [
    (plain, ".pth"),
    (plain, ".pt"),
    (before_torch_1_6, ".pth"),
    (in_a_checkpoint, ".pth"),
    (as_torchvisions_references_do, ".pth"),
    (of_ddp, ".pth"),
    (of_ddp_in_a_checkpoint, ".pt"),
    (safetensors, ".safetensors"),
]


@pytest.mark.parametrize(("write", "suffix"), WRITERS)
@pytest.mark.parametrize("classes", [7, 10])
def test_a_files_weights_are_taken_and_a_head_for_other_classes_stays_new(tmp_path, write, suffix, classes):
    saved = squeezenet(classes).state_dict()
    path = tmp_path / f"weights{suffix}"
    write(saved, path)
    before, after = loaded(path)
    new = set(HEAD) if classes == 10 else set()
    for name, tensor in after.items():
        assert torch.equal(tensor, before[name] if name in new else saved[name])


@pytest.mark.parametrize(("write", "suffix"), WRITERS)
def test_the_checks_read_shapes_without_values(tmp_path, write, suffix):
    saved = squeezenet(10).state_dict()
    path = tmp_path / f"weights{suffix}"
    write(saved, path)
    found = read_weights_file(path, saved, device="meta").state
    assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in saved.items()}
    assert {v.device.type for v in found.values()} == {"meta"}


def test_a_file_without_a_head_fits(tmp_path):
    saved = {k: v for k, v in squeezenet(10).state_dict().items() if k not in HEAD}
    plain(saved, tmp_path / "features.pth")
    before, after = loaded(tmp_path / "features.pth")
    assert all(torch.equal(after[k], saved.get(k, before[k])) for k in after)


def test_the_statistics_of_batch_norm_come_along(tmp_path):
    torch.manual_seed(1)
    module = models.shufflenet_v2_x0_5(weights=None, num_classes=7)
    for buffer in module.buffers():
        buffer.add_(torch.arange(buffer.numel()).reshape(buffer.shape))
    safetensors(module.state_dict(), tmp_path / "weights.safetensors")
    _, after = loaded(tmp_path / "weights.safetensors", arch="shufflenet_v2_x0_5")
    assert all(torch.equal(after[k], v) for k, v in module.state_dict().items())


def test_mnasnet_takes_weights_although_it_asks_for_their_version(tmp_path):
    torch.manual_seed(1)
    module = models.mnasnet0_5(weights=None, num_classes=7)
    plain(module.state_dict(), tmp_path / "weights.pth")
    _, after = loaded(tmp_path / "weights.pth", arch="mnasnet0_5")
    assert all(torch.equal(after[k], v) for k, v in module.state_dict().items())


def old_densenet_names(name):
    for part in ("norm1", "norm2", "conv1", "conv2"):
        name = name.replace(f".{part}.", f".{part[:-1]}.{part[-1]}.") if "denselayer" in name else name
    return name


def old_vit_names(name):
    return name.replace(".mlp.0.", ".mlp.linear_1.").replace(".mlp.3.", ".mlp.linear_2.")


@pytest.mark.parametrize(("arch", "old"), [("densenet121", old_densenet_names), ("vit_b_32", old_vit_names)])
def test_the_names_in_torchvisions_own_files_of_these_models_fit(arch, old):
    state = build_meta(arch, 1000).state_dict()
    renamed = {old(k): v for k, v in state.items()}
    assert len(renamed.keys() - state.keys()) > 40
    module = build_meta(arch, 7)
    fitting = fit_weights(renamed, module, config_of("weights.pth", arch), image_size=224)
    head = tuple(f"{name}." for name in head_modules(arch))
    assert fitting.keys() == {k for k in state if not k.startswith(head)}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("features.3.squeeze.weight"), ["1 keys missing: features.3.squeeze.weight"]),
        (lambda s: s.update(extra=torch.zeros(1)), ["1 keys unknown: extra"]),
        (
            lambda s: s.update({"features.0.weight": torch.zeros(64, 1, 3, 3)}),
            ["1 of another shape: features.0.weight (64x1x3x3, needs 64x3x3x3)"],
        ),
        (
            lambda s: [s.update({f"backbone_{k}": s.pop(k)}) for k in list(s)],
            [
                "50 keys missing: features.0.weight, features.0.bias, ",
                ", …",
                "52 keys unknown: backbone_features.0.weight",
            ],
        ),
    ],
)
def test_a_file_that_does_not_fit_names_the_keys(tmp_path, change, words):
    state = squeezenet(10).state_dict()
    change(state)
    path = tmp_path / "weights.pth"
    plain(state, path)
    with pytest.raises(UsageError) as caught:
        loaded(path)
    for word in [f"{path} does not fit squeezenet1_1: ", *words]:
        assert word in str(caught.value)


def test_weights_of_another_architecture_leave_the_module_as_it_was(tmp_path):
    plain(models.shufflenet_v2_x0_5(weights=None).state_dict(), tmp_path / "weights.pth")
    module = squeezenet(7)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    with pytest.raises(UsageError, match=r"keys missing: .*; .* keys unknown: conv1"):
        load_weights(module, config_of(tmp_path / "weights.pth"), image_size=32)
    assert all(torch.equal(module.state_dict()[k], v) for k, v in before.items())


class Malicious:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


def as_pickle(value, path):
    path.write_bytes(pickle.dumps(value))


@pytest.mark.parametrize("write", [torch.save, before_torch_1_6, as_pickle])
def test_a_file_with_code_is_refused_and_the_code_is_not_run(tmp_path, write):
    path = tmp_path / "weights.pth"
    write({"features.0.weight": Malicious(tmp_path / "owned")}, path)
    with pytest.raises(UsageError, match="cannot be read as weights") as caught:
        loaded(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "owned").exists()
    pickle.loads(pickle.dumps(Malicious(tmp_path / "owned")))  # noqa: S301  it would have
    assert (tmp_path / "owned").exists()


@pytest.mark.parametrize("value", [[torch.zeros(1)], {"a": 1}, torch.zeros(3), {"state_dict": {"a": "b"}}, squeezenet])
def test_a_file_without_a_state_dict_is_refused(tmp_path, value):
    path = tmp_path / "weights.pth"
    torch.save(value, path)
    with pytest.raises(UsageError, match=r"holds no state dict|cannot be read as weights") as caught:
        loaded(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("write", "suffix"), [(plain, ".pth"), (before_torch_1_6, ".pth"), (safetensors, ".safetensors")]
)
@pytest.mark.parametrize("kept", [0.0, 0.1, 0.9])
def test_a_truncated_file_is_refused(tmp_path, write, suffix, kept):
    path = tmp_path / f"weights{suffix}"
    write(squeezenet(7).state_dict(), path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(UsageError, match="cannot be read as weights") as caught:
        loaded(path)
    assert str(path) in str(caught.value)


# Vision transformers


def transformer(image_size):
    torch.manual_seed(1)
    return VisionTransformer(image_size, 32, num_layers=1, num_heads=2, hidden_dim=16, mlp_dim=8, num_classes=7)


@pytest.mark.parametrize(("trained", "wanted"), [(128, 64), (64, 128), (96, 96)])
def test_position_embeddings_are_interpolated_to_another_image_size(trained, wanted):
    state = transformer(trained).state_dict()
    state["encoder.pos_embedding"] = torch.randn_like(state["encoder.pos_embedding"])
    module = transformer(wanted)
    fitting = fit_weights(state, module, config_of("vit.pth", "vit_b_32"), image_size=wanted)
    found = fitting["encoder.pos_embedding"]
    assert found.shape == (1, 1 + (wanted // 32) ** 2, 16)
    assert torch.equal(found[:, 0], state["encoder.pos_embedding"][:, 0])  # the class token's
    reference = interpolate_embeddings(wanted, 32, dict(state))["encoder.pos_embedding"]
    assert torch.equal(found, reference)
    assert fitting.keys() == state.keys()
    module.load_state_dict(fitting)
    assert module(torch.zeros(2, 3, wanted, wanted)).shape == (2, 7)


@pytest.mark.parametrize("wanted", [64, 128])
def test_the_checks_take_position_embeddings_of_another_size(wanted):
    with torch.device("meta"):
        state, module = transformer(96).state_dict(), transformer(wanted)
    fitting = fit_weights(state, module, config_of("vit.pth", "vit_b_32"), image_size=wanted)
    assert fitting.keys() == state.keys()


@pytest.mark.parametrize(("size", "positions"), [(64, 5), (224, 50)])
def test_a_transformer_is_built_for_the_image_size(size, positions):
    with torch.device("meta"):
        module = build_module(ModelConfig(arch="vit_b_32", weights=None), num_classes=7, image_size=size)
    assert module.encoder.pos_embedding.shape[1] == positions


# Auxiliary heads


@pytest.mark.parametrize(("arch", "weights"), [("inception_v3", [0.4]), ("googlenet", [0.3, 0.3])])
@pytest.mark.parametrize("start", [None, "DEFAULT"])
def test_auxiliary_heads_give_logits_in_training_and_none_in_evaluation(arch, weights, start):
    with torch.device("meta"):
        module = build_module(ModelConfig(arch=arch, weights=start), num_classes=7, image_size=299)
        images = torch.empty(2, 3, 299, 299)
    assert module.transform_input == (start is not None)
    logits, auxiliary = split_outputs(arch, module.train()(images))
    assert logits.shape == (2, 7)
    assert [(weight, tuple(o.shape)) for weight, o in auxiliary] == [(weight, (2, 7)) for weight in weights]
    logits, auxiliary = split_outputs(arch, module.eval()(images))
    assert (tuple(logits.shape), auxiliary) == ((2, 7), [])


# What is frozen


def fine_tuned(arch="mobilenet_v2", **config):
    return FineTunedModel(build_meta(arch, 7), ModelConfig(arch=arch, weights=None, **config))


def learning(model):
    return {name for name, parameter in model.module.named_parameters() if parameter.requires_grad}


def beneath(model, *names):
    return {p for p, _ in model.module.named_parameters() if any(p.startswith(f"{name}.") for name in names)}


def test_layers_freeze_by_pattern_and_learn_again_from_their_epoch():
    model = fine_tuned(freeze=["backbone"], unfreeze={1: "features.1[78]", 3: ["features.0", "features.2"]})
    everything = {name for name, _ in model.module.named_parameters()}
    assert learning(model) == everything
    expected = [
        {"classifier"},
        {"classifier", "features.17", "features.18"},
        {"classifier", "features.17", "features.18"},
        {"classifier", "features.17", "features.18", "features.0", "features.2"},
    ]
    changes = []
    for epoch, tops in enumerate(expected):
        changes.append(model.freeze(epoch))
        assert learning(model) == beneath(model, *tops)
        assert model.frozen_parameters(epoch) == everything - beneath(model, *tops)
    assert changes == [True, True, False, True]
    assert model.freeze(0) is True
    assert learning(model) == beneath(model, "classifier")
    assert fine_tuned().freeze(0) is False


def test_a_pattern_that_matches_nothing_is_an_error():
    with pytest.raises(UsageError, match="layr1"):
        fine_tuned("resnet18", freeze=["layr1"]).freeze(0)
    with pytest.raises(UsageError, match="layr2"):
        fine_tuned("resnet18", freeze=["layer1"], unfreeze={2: "layr2"}).freeze(2)


def test_what_is_frozen_forgets_its_gradient():
    model = FineTunedModel(nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1)), ModelConfig(arch="resnet18", freeze=["0"]))
    model.module(torch.ones(1, 1)).backward()
    model.freeze(0)
    assert model.module[0].weight.grad is None
    assert model.module[1].weight.grad is not None


def test_what_is_frozen_as_a_whole_runs_in_eval_mode_and_all_else_trains():
    model = fine_tuned("resnet18", freeze=["conv1", "bn1", "layer1", "layer2.0.conv1", "layer2.0.bn2"])
    model.freeze(0)
    for _ in range(2):  # evaluation in between must not matter
        model.eval()
        assert not any(module.training for module in model.module.modules())
        model.train()
        still = {name for name, module in model.module.named_modules() if name and not module.training}
        inside = {name for name, _ in model.module.named_modules() if name.startswith("layer1.")}
        assert still == {"conv1", "bn1", "layer1", "layer2.0.conv1", "layer2.0.bn2"} | inside


def test_dropout_is_off_in_what_is_frozen_and_on_in_what_learns():
    model = fine_tuned("vit_b_32", freeze=["encoder"])
    model.freeze(0)
    model.train()
    assert {m.training for m in model.module.encoder.modules()} == {False}
    model = fine_tuned("mobilenet_v2", freeze=["features"])
    model.freeze(0)
    model.train()
    assert {m.training for m in model.module.features.modules()} == {False}
    assert model.module.classifier[0].training
