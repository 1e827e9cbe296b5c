"""docs/extending.md: its files are taken out of it and run as they stand."""

from __future__ import annotations

import csv
import re
import shutil
from pathlib import Path

import pytest

from launcher.runs.run_dir import RunDir

DOC = Path(__file__).parents[2] / "docs" / "extending.md"
FILES = dict(re.findall(r"<!-- file: (\S+) -->\n```\w+\n(.*?)```", DOC.read_text(encoding="utf-8"), re.DOTALL))
RECIPES = [name for name in FILES if name.endswith(".yaml")]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_of_the_page_trains(recipe, project, images):
    for name, text in FILES.items():
        project.write(name, text)
    photos = project.folder / "photos"
    shutil.copytree(images, photos)
    for split in ("train", "val"):
        with (photos / f"{split}.csv").open("w") as file:
            rows = csv.writer(file)
            rows.writerow(("file", "label"))
            rows.writerows((str(f.relative_to(photos)), f.parent.name) for f in sorted((photos / split).rglob("*.png")))
    run = project.folder.parent / "run"
    project.launch(recipe, "--debug", "--run-dir", run)
    assert RunDir(run).read_status()["step"] > 0
