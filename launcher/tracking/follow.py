"""Sends a run's records as they come, each once, however often the tracker is killed and started again."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

from launcher.runs import whereabouts
from launcher.tracking.place import Place
from launcher.tracking.records import Feed

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from launcher.recipe.schema import Recipe
    from launcher.runs.run_dir import RunDir
    from launcher.tracking.records import Record, Story
    from launcher.tracking.sink import Sink

LOOK_S = 1.0
"""Seconds between two looks at the run's files."""
PIECE = 500
"""Records between two marks of how far a sink has come that confirms what it takes."""


def follow(run: RunDir, recipe: Recipe, sink: Sink, *, over: Callable[[float], bool]) -> int:
    """Send what a sink lacks, until the run is over; return how many records were sent.

    Args:
        run: the run directory.
        recipe: the run's.
        sink: where to.
        over: waits so many seconds at most; whether nothing more will come.

    Raises:
        TakenError: another process does this.
        UnreachableError: the sink's server cannot be used; nothing was sent.
    """
    feed = Feed(run, recipe)
    with Place(run, sink.name) as place:
        known = place.read()
        _remove_unfinished(sink, known.get("before"))
        is_over = over(0.0)
        records = feed.new(final=is_over)
        if is_over and _has_all(run, feed, known):
            return 0
        place.write(before=sorted(file.name for file in sink.files()))
        start = sink.open(feed.story(), int(known.get("sent", 0)))
        sent = 0
        while True:
            sent += _send(records, start, sink, feed, place)
            if is_over:
                break
            is_over = over(LOOK_S)
            records = feed.new(final=is_over)
        story = feed.story()
        artifacts = _artifacts(run, story)
        sink.close(story, artifacts=[name for name, now in artifacts.items() if known.get(name) != now])
        place.write(sent=feed.count, before=None, state=story.state, **artifacts)
    return sent


def _send(records: Sequence[Record], start: int, sink: Sink, feed: Feed, place: Place) -> int:
    """Send those of the records that the sink lacks."""
    wanted = [record for record in records if record.number >= start]
    for first in range(0, len(wanted), PIECE):
        piece = wanted[first : first + PIECE]
        for record in piece:
            sink.send(record)
        sink.flush(feed.story())
        if sink.confirms:
            place.write(sent=piece[-1].number + 1)
    if not wanted:
        sink.flush(feed.story())
    return len(wanted)


def _remove_unfinished(sink: Sink, before: list[str] | None) -> None:
    """Remove what a tracker that was killed has left: it is written again, whole."""
    if before is None:
        return
    for file in sink.files():
        if file.name in before:
            continue
        if file.is_dir():
            shutil.rmtree(file)
        else:
            file.unlink()


def _has_all(run: RunDir, feed: Feed, known: dict[str, Any]) -> bool:
    """Whether a tracker that ended well has sent all that there is."""
    story = feed.story()
    same = all(known.get(name) == now for name, now in _artifacts(run, story).items())
    return (
        known.get("before") is None and known.get("sent") == feed.count and known.get("state") == story.state and same
    )


def _artifacts(run: RunDir, story: Story) -> dict[str, str]:
    """What of a run that is over is worth keeping elsewhere, each with what tells it from an older one."""
    found = {}
    if story.state in (*whereabouts.TRAINED, "failed", "cancelled") and run.best_checkpoint.exists():
        found["best"] = run.best_checkpoint.resolve().name
    if run.export_manifest.exists():
        found["exports"] = str(run.export_manifest.stat().st_mtime_ns)
    return found
