from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from torchvision import models

from launcher.errors import LaunchError, UsageError
from launcher.recipe import catalog

ARCHS = models.list_models(module=models)

WEIGHTS_FILE = """
_META = {"num_params": 7, "_ops": 1.0, "_file_size": 2.0}
class Tiny_Weights(WeightsEnum):
    V1 = Weights(
        url="https://host/path/tiny-0123abcd.pth?download=1",
        transforms=partial(ImageClassification, crop_size=CROP),
        meta={**_META, "categories": _IMPORTED, "_metrics": {"ImageNet-1K": {"acc@1": 50.0, "acc@5": 75.0}}},
    )
    DEFAULT = V1
@register_model(name="tiny")
def _tiny(*, weights: Optional[Tiny_Weights] = None): ...
@register_model()
def bare(*, weights: ANNOTATION = None): ...
"""


def known(arch):
    return catalog.classification_models()[arch]


def fraction(percent):
    return None if percent != percent else percent / 100  # noqa: PLR0124 - nan


def test_the_models_are_those_that_torchvision_registers_for_classification():
    assert len(ARCHS) >= 80
    assert list(catalog.classification_models()) == ARCHS
    assert [entry.arch for entry in catalog.classification_models().values()] == ARCHS


@pytest.mark.parametrize("arch", ARCHS)
def test_every_field_equals_torchvisions_own(arch):
    enum = models.get_model_weights(arch)
    entry = known(arch)
    assert entry.default == enum.DEFAULT.name
    assert [weights.name for weights in entry.weights] == [member.name for member in enum]
    for weights, member in zip(entry.weights, enum, strict=True):
        transforms, metrics = member.transforms(), member.meta["_metrics"]["ImageNet-1K"]
        assert weights == catalog.WeightsEntry(
            name=member.name,
            url=member.url,
            file_name=member.url.split("/")[-1],
            image_size=transforms.crop_size[0],
            resize_size=transforms.resize_size[0],
            interpolation=transforms.interpolation.value,
            mean=tuple(transforms.mean),
            std=tuple(transforms.std),
            top1=fraction(metrics["acc@1"]),
            top5=fraction(metrics["acc@5"]),
            num_params=member.meta["num_params"],
            gflops=member.meta["_ops"],
            file_size_mb=member.meta["_file_size"],
        )


def test_weights_that_cannot_classify_have_no_accuracy():
    weights = known("vgg16").find_weights("IMAGENET1K_FEATURES")
    assert (weights.top1, weights.top5) == (None, None)


def test_the_catalog_and_the_plain_table_import_no_torch():
    code = (
        "import sys\n"
        "from launcher.recipe import catalog\n"
        "catalog.image_size('resnet50', None)\n"
        "catalog.find_model('resnet50').find_weights('DEFAULT')\n"
        "from launcher.commands import models\n"
        "models.main(['resnet50'])\n"
        "heavy = {name.partition('.')[0] for name in sys.modules} & {'torch', 'torchvision', 'numpy', 'omegaconf'}\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    root = Path(catalog.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "IMAGENET1K_V2" in done.stdout


def test_weights_are_found_by_name_and_as_default():
    entry = known("resnet50")
    assert entry.find_weights("IMAGENET1K_V1").name == "IMAGENET1K_V1"
    assert entry.find_weights("DEFAULT").name == "IMAGENET1K_V2"


def test_unknown_weights_are_answered_with_the_nearest_and_all_valid_names():
    with pytest.raises(UsageError) as caught:
        known("vit_b_16").find_weights("IMAGENET1K_SWAG")
    message = str(caught.value)
    assert "found 'IMAGENET1K_SWAG'; vit_b_16 has no such weights" in message
    assert "did you mean 'IMAGENET1K_SWAG_E2E_V1'" in message
    assert "valid: DEFAULT, IMAGENET1K_V1, IMAGENET1K_SWAG_E2E_V1, IMAGENET1K_SWAG_LINEAR_V1" in message


def test_a_model_without_weights_offers_null_and_no_default():
    entry = catalog.ModelEntry(arch="bare", weights=(), default=None)
    with pytest.raises(UsageError, match=r"valid: null \(random\)"):
        entry.find_weights("DEFAULT")


@pytest.mark.parametrize(
    ("typed", "meant"), [("resnt50", "resnet50"), ("ResNet50", "resnet50"), ("vit_b16", "vit_b_16")]
)
def test_an_unknown_model_is_answered_with_the_nearest(typed, meant):
    with pytest.raises(UsageError) as caught:
        catalog.find_model(typed)
    assert f"found {typed!r}" in str(caught.value)
    assert f"did you mean '{meant}'" in str(caught.value)
    assert "`launch models` lists them" in str(caught.value)


@pytest.mark.parametrize("arch", ["fcn_resnet50", "quantized_resnet50", "r3d_18", "raft_large", "ResNet"])
def test_models_for_other_tasks_are_not_in_the_catalog(arch):
    with pytest.raises(UsageError):
        catalog.find_model(arch)


@pytest.mark.parametrize(
    ("arch", "weights", "size"),
    [
        ("vit_b_16", "IMAGENET1K_SWAG_E2E_V1", 384),
        ("vit_b_16", "DEFAULT", 224),
        ("inception_v3", "DEFAULT", 299),
        ("regnet_y_128gf", None, 384),
        ("regnet_y_128gf", "mine/weights.pth", 384),
    ],
)
def test_the_image_size_is_that_of_the_weights_else_of_default(arch, weights, size):
    assert catalog.image_size(arch, weights) == size


def test_a_model_without_weights_is_trained_at_224(monkeypatch):
    bare = catalog.ModelEntry(arch="bare", weights=(), default=None)
    monkeypatch.setattr(catalog, "classification_models", lambda: {"bare": bare})
    assert catalog.image_size("bare", None) == 224


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Puts a file where torchvision's models are looked for, and takes the cache away."""

    def install(text):
        (tmp_path / "models").mkdir()
        (tmp_path / "models" / "tiny.py").write_text(text, encoding="utf-8")
        spec = importlib.util.spec_from_loader("torchvision", loader=None, is_package=True)
        spec.submodule_search_locations = [str(tmp_path)]
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
        return tmp_path / "models" / "tiny.py"

    catalog.classification_models.cache_clear()
    yield install
    catalog.classification_models.cache_clear()


def test_a_registered_name_wins_and_any_form_of_annotation_is_read(installed):
    installed(WEIGHTS_FILE.replace("CROP", "32").replace("ANNOTATION", "Tiny_Weights | None"))
    assert list(catalog.classification_models()) == ["bare", "tiny"]
    weights = catalog.find_model("bare").find_weights("DEFAULT")
    assert (weights.file_name, weights.image_size, weights.resize_size) == ("tiny-0123abcd.pth", 32, 256)
    assert (weights.top1, weights.num_params) == (0.5, 7)


@pytest.mark.parametrize(
    ("crop", "annotation", "line"),
    [("[32 for _ in ()]", "Tiny_Weights", 4), ("_IMPORTED", "Tiny_Weights", 4), ("32", "Optional[Imported]", 13)],
)
def test_a_form_that_cannot_be_read_is_an_error_with_its_place(installed, crop, annotation, line):
    file = installed(WEIGHTS_FILE.replace("CROP", crop).replace("ANNOTATION", annotation))
    with pytest.raises(LaunchError, match="cannot read") as caught:
        catalog.classification_models()
    assert f"{file}:{line}: " in str(caught.value)


def test_without_torchvision_it_says_what_to_install(monkeypatch, installed):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LaunchError, match="pip install torchvision"):
        catalog.classification_models()
