"""One run, killed again and again at random moments, and what it comes to in the end."""

from __future__ import annotations

import contextlib
import random
import signal
import time
from collections import Counter

import psutil

from launcher.runs.history import events
from launcher.runs.run_dir import RunDir
from tests.faults import records
from tests.faults.bench import DEADLINE_S, STEPS_PER_EPOCH, Bench, Launched, Outcome, step
from tests.faults.slowly import SLOWLY

MOMENTS = ("start-up", "step", "step", "validation", "checkpoint")
VICTIMS = ("rank", "rank", "loader", "supervisor", "everything")
STEPS_A_KILL = 4
"""Steps that an attempt may get on before it is killed, so that the run is long enough for all its kills."""
START_UP_S = 3.0
CRAFT_KILLS = 5
CRAFT = (
    "optim.name=adamw",
    "optim.schedule=one_cycle",
    "optim.layer_decay=0.9",
    "train.phases=[{epochs: 2, freeze: [backbone], optim: {lr: 0.01}}, {freeze: [conv1]}]",
    "train.ema=0.9",
    "train.label_smoothing=0.1",
    "data.mixup=0.4",
    "data.cutmix=1.0",
    "data.erase=0.5",
    "data.balance=sampler",
)
"""What the recipe has besides: phases, rates in mid-cycle, EMA, mixed images and balanced classes are killed too."""


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
        """Kills by victim."""

    def go(self) -> None:
        """Start the run, kill it as often as it shall be, and see it to its end."""
        launched = self._bench.launch(self._run.path, *self._changes)
        for moment, victim in zip(self._deal(MOMENTS), self._deal(VICTIMS), strict=True):
            self._wait_for(moment, victim, launched)
            assert launched.process.poll() is None, f"over after {self.done.total()} kills: {launched.output}"
            attempts = len(events(self._run, "attempt_started"))
            self._kill(launched, victim)
            self.done[victim] += 1
            launched = self._started_again(launched, attempts)
        if launched.process.wait(timeout=600) != 0:
            launched = self._bench.resume(self._run.path)
            assert launched.process.wait(timeout=600) == 0, launched.output
        assert launched.leaves_nobody()

    def _deal(self, cards: tuple[str, ...]) -> list[str]:
        """As many as there are kills, in an order by chance, each about equally often."""
        packs = [self._chance.sample(cards, len(cards)) for _ in range(-(-self._kills // len(cards)))]
        return [card for pack in packs for card in pack][: self._kills]

    def _wait_for(self, moment: str, victim: str, launched: Launched) -> None:
        """Until a moment of that kind comes; start-up is that of the workers where one of them is to be killed."""
        begun = step(self._run)
        until = begun + self._chance.randint(1, STEPS_A_KILL)

        def has_come() -> bool:
            if victim in ("rank", "loader") and not self._found(launched, victim):
                return False
            now = step(self._run)
            if moment == "start-up" or now >= until:
                return True
            if moment == "validation":
                return now > begun and now % STEPS_PER_EPOCH == 0
            return moment == "checkpoint" and now > begun and bool(list(self._run.checkpoints.glob(".*")))

        launched.until(has_come, f"{moment} of a {victim}", every_s=0.005)
        longest = 0.05 if moment != "start-up" else 0.5 if victim in ("rank", "loader") else START_UP_S
        end = time.monotonic() + self._chance.uniform(0, longest)
        while time.monotonic() < end and step(self._run) < until:
            time.sleep(0.002)

    def _found(self, launched: Launched, victim: str) -> list[psutil.Process]:
        try:
            workers = launched.workers(self._run)
            return workers if victim == "rank" else [child for worker in workers for child in worker.children()]
        except psutil.NoSuchProcess:
            return []

    def _kill(self, launched: Launched, victim: str) -> None:
        """kill -9."""
        if victim == "everything":
            launched.signal(signal.SIGKILL)
        elif victim == "supervisor":
            launched.process.kill()
        else:
            found: list[psutil.Process] = []
            launched.until(lambda: found.extend(self._found(launched, victim)) or found, f"there is a {victim}")
            with contextlib.suppress(psutil.NoSuchProcess):  # gone that very moment
                self._chance.choice(found).kill()

    def _started_again(self, launched: Launched, attempts: int) -> Launched:
        """Wait until the supervisor has started the workers again; where it is gone, resume at once.

        A loader that had nothing left to do is not missed: then the run goes on as it is.
        """
        end, killed_at = time.monotonic() + DEADLINE_S, step(self._run)
        while launched.process.poll() is None:
            if len(events(self._run, "attempt_started")) > attempts or step(self._run) > killed_at + 2:
                return launched
            assert time.monotonic() < end, f"not started again: {launched.output}"
            time.sleep(0.02)
        if not self._run.exists:  # killed before there was a run
            return self._bench.launch(self._run.path, *self._changes)
        return self._bench.resume(self._run.path)


def at_random_moments(bench: Bench) -> Outcome:
    return _killed(bench, bench.kills)


def of_the_whole_craft(bench: Bench) -> Outcome:
    """With all at once that a step, its images and its rates may depend on."""
    return _killed(bench, CRAFT_KILLS, *CRAFT)


def _killed(bench: Bench, kills: int, *craft: str) -> Outcome:
    epochs = 3 + kills * STEPS_A_KILL // STEPS_PER_EPOCH
    own = (*craft, f"train.epochs={epochs}")
    expected = bench.undisturbed(*own)
    run = RunDir(bench.place(f"kills-seed-{bench.seed}") / "run")
    killer = Killer(bench, run, (*own, SLOWLY, "data.workers=1", "launch.max_restarts=1000"), kills)
    killer.go()
    lost = records.went_on(run, expected, epochs=epochs)
    attempts = len(events(run, "attempt_started"))
    counted = ", ".join(f"{count} x {name}" for name, count in killer.done.most_common())
    return Outcome(
        happened=f"{killer.done.total()} kills ({counted}; seed {bench.seed}), {attempts} attempts at "
        f"{epochs * STEPS_PER_EPOCH} steps: the same bits, no sample repeated or missed",
        steps_lost=lost,
    )
