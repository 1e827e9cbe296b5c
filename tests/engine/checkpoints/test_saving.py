"""What the ranks do where no checkpoint is whole: all the same, whatever lies in their nodes' caches."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from launcher.engine.checkpoints.saving import Saving
from launcher.recipe import load as recipes

WEIGHTS = "hub/checkpoints/resnet18-f37072fd.pth"


@pytest.mark.parametrize("has_weights", [True, False])
def test_rank_0_alone_tells_whether_the_weights_are_gone(
    make_run, engine, in_ranks, tmp_path, monkeypatch, has_weights
):
    run = make_run(model={"arch": "resnet18", "weights": "DEFAULT"})
    run.checkpoint(1).mkdir(parents=True)
    (run.checkpoint(1) / "state.json").write_text('{"step": 1}')  # of a checkpoint that was cut
    place = tmp_path / f"node-{0 if has_weights else 1}" / WEIGHTS
    place.parent.mkdir(parents=True)
    place.touch()

    def restore(ranks):
        monkeypatch.setenv("TORCH_HOME", str(tmp_path / f"node-{ranks.rank}"))
        parts = SimpleNamespace(recipe=recipes.read_resolved(run.recipe), run=run)
        records = None if ranks.rank else engine.records(run)
        saving = Saving(parts, SimpleNamespace(release=None), records, SimpleNamespace())
        try:
            return saving.restore()
        except Exception as error:  # what it says goes back to the test
            return str(error)

    of_ranks = in_ranks(2, restore)
    assert of_ranks[0] == of_ranks[1]
    assert of_ranks[0] is False if has_weights else "are gone" in of_ranks[0]
