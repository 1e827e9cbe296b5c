"""A server that several tests ask."""

from __future__ import annotations

import pytest

from tests.served import serving
from tests.tools.test_predict import write_model


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """An ONNX file whose logits are the mean red, green and blue of an image."""
    return write_model(tmp_path_factory.mktemp("served") / "model.onnx")


@pytest.fixture(scope="session")
def server(model):
    """One that is asked by several tests."""
    with serving(model, "--max-body-mb", "2", "--max-pixels", "1000000") as found:
        yield found
