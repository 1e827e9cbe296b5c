"""Where a disk is full or a folder cannot be made, commands that share a model say where, and what to do."""

from __future__ import annotations

import tempfile

import pytest

from launcher import cli
from launcher.errors import UsageError
from launcher.tools import explain
from tests.tools.test_push import run  # noqa: F401  a fixture


@pytest.fixture
def below_a_file(tmp_path):
    (tmp_path / "file").touch()
    return tmp_path / "file" / "folder"


def test_a_package_that_cannot_be_written(run, below_a_file, capsys):  # noqa: F811
    assert cli.main(["package", str(run), "--to", str(below_a_file)]) == 2
    assert f"{below_a_file}: cannot be written to: " in capsys.readouterr().err


def test_a_push_writes_nothing_into_the_run(run, tmp_path):  # noqa: F811
    before = sorted(run.path.rglob("*"))
    assert cli.main(["push", str(run), "--to", str(tmp_path / "shared")]) == 0
    assert sorted(run.path.rglob("*")) == before


def test_a_push_to_the_hub_without_room_for_temporary_files(run, below_a_file, capsys, monkeypatch):  # noqa: F811
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub, "get_token", lambda: "a token")
    monkeypatch.setattr(tempfile, "tempdir", str(below_a_file))
    assert cli.main(["push", str(run), "--to", "hub:me/model"]) == 2
    assert "TMPDIR" in capsys.readouterr().err


def test_pictures_that_have_no_place(run, below_a_file):  # noqa: F811
    pytest.importorskip("captum")
    with pytest.raises(UsageError, match=r"--out .*: cannot be made: "):
        explain.Explainer(str(run), below_a_file)
