"""`launch track`: what it ends with."""

from __future__ import annotations

import pytest

from launcher import cli
from launcher.commands import track


@pytest.mark.parametrize(("codes", "code"), [([0, 0], 0), ([0, 2], 2), ([-9], 1), ([-15, 0], 1)])
def test_a_tracker_that_was_killed_is_a_failure_as_any(codes, code, make_run, monkeypatch):
    class Ended:
        """Trackers that have ended."""

        alive = False

        def __init__(self, *_, **__):
            self.codes = codes

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def finish(self, _):
            pass

    monkeypatch.setattr(track, "Trackers", Ended)
    assert cli.main(["track", str(make_run("a").path), "--tensorboard", "--once"]) == code
