"""One run, killed again and again at random moments, and what it comes to in the end."""

from __future__ import annotations

import random
import time
from collections import Counter
from typing import TYPE_CHECKING

import psutil

from launcher.history import events
from launcher.run_dir import RunDir
from tests.faults import records
from tests.faults.bench import STEPS_PER_EPOCH, Bench, Launched, Outcome, step

if TYPE_CHECKING:
    import signal

MOMENTS = ("start-up", "step", "step", "validation", "checkpoint")
VICTIMS = ("rank", "rank", "loader", "supervisor", "everything")
STEPS_A_KILL = 6
"""Steps that an attempt may get on before it is killed, so that the run is long enough for all its kills."""
PATIENCE_S = 5.0


class Killer:
    """Kills a run at random moments, and starts it again where nothing else does.

    Args:
        bench: where it happens.
        run: the run directory, not made yet.
        changes: of the recipe.
        kills: how many.
    """

    def __init__(self, bench: Bench, run: RunDir, changes: tuple[str, ...], kills: int) -> None:
        self._bench = bench
        self._run = run
        self._changes = changes
        self._kills = kills
        self._chance = random.Random(bench.seed)  # noqa: S311  no secret
        self.done: Counter[str] = Counter()
        """Kills by moment and victim."""

    def go(self) -> None:
        """Start the run, kill it as often as it shall be, and see it to its end."""
        launched = self._bench.launch(self._run.path, *self._changes)
        while self.done.total() < self._kills:
            moment, victim = self._chance.choice(MOMENTS), self._chance.choice(VICTIMS)
            self._wait_for(moment, launched)
            if launched.process.poll() is None and self._kill(launched, victim):
                self.done[f"{victim} at {moment}"] += 1
            launched = self._started_again(launched)
            assert self._run.read_status()["state"] != "completed", f"over after {self.done.total()} kills"
        if launched.process.wait(timeout=600) != 0:
            launched = self._bench.resume(self._run.path)
            assert launched.process.wait(timeout=600) == 0, launched.output
        assert launched.leaves_nobody()

    def _wait_for(self, moment: str, launched: Launched) -> None:
        """Until a moment of that kind, or until it does not come."""
        begun = step(self._run)
        if moment == "start-up":
            time.sleep(self._chance.uniform(0, 3))
            return
        until = begun + self._chance.randint(1, STEPS_A_KILL)
        end = time.monotonic() + PATIENCE_S + 10
        while launched.process.poll() is None and time.monotonic() < end and step(self._run) < until:
            if moment == "validation" and step(self._run) % STEPS_PER_EPOCH == 0 and step(self._run) > begun:
                break
            if moment == "checkpoint" and step(self._run) > begun and list(self._run.checkpoints.glob(".*")):
                break
            time.sleep(0.002)
        time.sleep(self._chance.uniform(0, 0.05))

    def _kill(self, launched: Launched, victim: str) -> bool:
        """kill -9; return whether there was somebody of that kind."""
        if victim == "everything":
            launched.signal(9)
            return True
        if victim == "supervisor":
            launched.process.kill()
            return True
        try:
            workers = launched.workers()
            found = workers if victim == "rank" else [child for worker in workers for child in worker.children()]
            if not found:
                return False
            self._chance.choice(found).kill()
        except psutil.NoSuchProcess:
            return False
        return True

    def _started_again(self, launched: Launched) -> Launched:
        """Wait until the supervisor has started the workers again; where it is gone, resume at once."""
        attempts = len(events(self._run, "attempt_started"))
        end = time.monotonic() + PATIENCE_S
        while launched.process.poll() is None and time.monotonic() < end:
            if len(events(self._run, "attempt_started")) > attempts:
                return launched
            time.sleep(0.02)
        if launched.process.poll() is None:
            return launched
        if not self._run.exists:
            return self._bench.launch(self._run.path, *self._changes)
        return self._bench.resume(self._run.path)


def at_random_moments(bench: Bench) -> Outcome:
    epochs = 3 + bench.kills * STEPS_A_KILL // STEPS_PER_EPOCH
    changes = (f"train.epochs={epochs}", "data.workers=1", "launch.max_restarts=1000")
    expected = bench.undisturbed(f"train.epochs={epochs}")
    run = RunDir(bench.place(f"kills-seed-{bench.seed}") / "run")
    killer = Killer(bench, run, changes, bench.kills)
    killer.go()
    lost = records.went_on(run, expected, epochs=epochs)
    attempts = len(events(run, "attempt_started"))
    victims = Counter[str]()
    for name, count in killer.done.items():
        victims[name.partition(" ")[0]] += count
    counted = ", ".join(f"{count} x {name}" for name, count in victims.most_common())
    return Outcome(
        happened=f"{killer.done.total()} kills ({counted}; seed {bench.seed}), {attempts} attempts at {epochs * STEPS_PER_EPOCH} "
        "steps: the same bits, no sample repeated or missed",
        steps_lost=lost,
    )
