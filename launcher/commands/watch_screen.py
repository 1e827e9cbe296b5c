"""The screen of ``launch watch``: a box for each run, drawn anew as its files grow."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from launcher.commands.watched import LOOK_S, View, slowest_text, state_text
from launcher.report.templating import duration

if TYPE_CHECKING:
    from collections.abc import Sequence

    from launcher.commands.watched import Watched
    from launcher.runs.progress import Snapshot

BLOCKS = "▁▂▃▄▅▆▇█"
MOST_WIDE = 110
"""Columns of a box, at most: longer lines are hard to read."""
COLORS = {"running": "green", "failed": "red", "completed": "cyan", "early_stopped": "cyan"}
"""Of a state; others are yellow."""


def show(watched: Sequence[Watched], *, once: bool) -> None:
    """Show runs until all have ended; raises KeyboardInterrupt where that is not waited for."""
    console = Console()
    if once:
        console.print(Group(*(box(one.look(), console.width) for one in watched)))
        return
    with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
        while True:
            ended = [one.has_ended() for one in watched]
            live.update(Group(*(box(one.look(), console.width) for one in watched)), refresh=True)
            if all(ended):
                return
            time.sleep(LOOK_S)


def box(view: View, width: int) -> RenderableType:
    """A run, in so many columns."""
    snapshot, inner = view.snapshot, min(width, MOST_WIDE) - 4
    rows: list[RenderableType] = [_head(view)]
    if snapshot.part is not None:
        rows.append(_bar(snapshot, inner))
    rows += [row for row in _curves(snapshot, inner) if row]
    if snapshot.train:
        rows.append(Text("  ".join(_speed(snapshot)), no_wrap=True, overflow="ellipsis"))
    if snapshot.slowest:
        rows.append(Text(slowest_text(snapshot.slowest), style="yellow", no_wrap=True, overflow="ellipsis"))
    if event := snapshot.last_event:
        message = event.get("message") or event.get("reason") or ""
        ago = duration(max(0.0, time.time() - event["time"]))
        text = (
            f"{event['kind']} on {event.get('host', '?')}, {ago} ago  {str(message).splitlines()[0] if message else ''}"
        )
        rows.append(Text(text.rstrip(), style="dim", no_wrap=True, overflow="ellipsis"))
    return Panel(
        Group(*rows), title=Text(snapshot.run, overflow="ellipsis", no_wrap=True), title_align="left", width=inner + 4
    )


def _head(view: View) -> Text:
    snapshot, job = view.snapshot, view.job
    state = state_text(view)
    text = Text(state, style=f"bold {COLORS.get(state, 'yellow')}", no_wrap=True, overflow="ellipsis")
    more = [
        f"job {job.job_id}" if job else "",
        f"expected to start {job.expected}" if job and job.expected else "",
        f"attempt {snapshot.attempt}" if (snapshot.attempt or 1) > 1 else "",
        f"on {snapshot.nodes} nodes" if snapshot.nodes else "",
    ]
    return text.append("".join(f"  {one}" for one in more if one), style="default not bold")


def _bar(snapshot: Snapshot, width: int) -> RenderableType:
    left = "" if snapshot.seconds_left is None else f"{duration(snapshot.seconds_left)} left"
    place = f"epoch {snapshot.epoch}/{snapshot.epochs}  step {snapshot.step}/{snapshot.num_steps}"
    row = Table.grid(padding=(0, 1))
    row.add_row(
        ProgressBar(total=1.0, completed=snapshot.part or 0.0, width=max(10, width // 4)),
        f"{snapshot.part or 0.0:4.0%}",
        Text(f"{place}  {left}", no_wrap=True, overflow="ellipsis"),
    )
    return row


def _curves(snapshot: Snapshot, width: int) -> Sequence[Text]:
    rows = []
    if snapshot.losses:
        rows.append((f"loss {snapshot.losses[-1]:.4f}", snapshot.losses, ""))
    if snapshot.metrics:
        best = snapshot.best
        so_far = f"best {best['value']:.4f} in epoch {best['epoch'] + 1}" if best else ""
        rows.append((f"{snapshot.metric} {snapshot.metrics[-1]:.4f}", snapshot.metrics, so_far))
    wide = max((len(label) for label, _, _ in rows), default=0)
    room = max(8, width // 3)
    return [
        Text(f"{label:<{wide}}  {sparkline(values, room):<{room}}  {more}", no_wrap=True, overflow="ellipsis")
        for label, values, more in rows
    ]


def _speed(snapshot: Snapshot) -> Sequence[str]:
    train = snapshot.train
    known = {
        "images_per_s": "{:.0f} images/s",
        "lr": "rate {:.2g}",
        "grad_norm": "gradient norm {:.2f}",
        "data_wait": "{:.0%} waiting for data",
        "memory_mb": "{:,.0f} MB",
    }
    return [text.format(train[name]) for name, text in known.items() if name in train]


def sparkline(values: Sequence[float], width: int) -> str:
    """The last values, or means of several, as bars of at most ``width`` characters; what is not finite is a space."""
    size = max(1, -(-len(values) // width))
    groups = [values[start : start + size] for start in range(0, len(values), size)]
    means = [sum(group) / len(group) for group in groups]
    finite = [mean for mean in means if abs(mean) < float("inf")]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[round((mean - low) * scale)] if abs(mean) < float("inf") else " " for mean in means)
