"""How a rank gets batches from its loader processes: told at once of one that is lost, and never deaf to a stop."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections import deque
from dataclasses import dataclass
from itertools import chain
from multiprocessing.context import ForkContext, ForkProcess
from multiprocessing.queues import Queue
from typing import TYPE_CHECKING, Any, Self

import torch
from torch.utils.data import DataLoader

from launcher.engine.device import is_out_of_memory
from launcher.errors import InterruptedRunError, MachineError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from contextlib import AbstractContextManager
    from types import FrameType

    from launcher.engine.schedule import Step

Batch = tuple[torch.Tensor, ...]
"""Images, uint8 N x C x S x S, targets (class indices, int64 N) and, where not all losses count the same, what each
does."""

LOOK_S = 1.0
"""How often a rank that waits for a batch looks whether it is to stop."""
TIMED_OUT = "DataLoader timed out"
AHEAD = 4
"""Micro-batches of the next step that a rank holds, at most, before it takes a step."""


@dataclass(frozen=True, kw_only=True)
class Lost:
    """What comes in the place of a batch that a loader process could not hand over."""

    message: str
    """Why."""


class _LoaderProcess(ForkProcess):
    """One of ours, so that no others are ended with them."""


class _ResultQueue(Queue):  # type: ignore[type-arg]  # it is no generic class at run time
    """Python's own drops what cannot be sent, and whoever waits for it waits for ever."""

    def _on_queue_feeder_error(self, error: Exception, item: Any) -> None:
        number, _ = item
        self.put((number, Lost(message=f"{type(error).__name__}: {error}")))


class _LoaderContext(ForkContext):
    """Forks, because torch is imported already: a new import would cost seconds."""

    Process = _LoaderProcess

    def Queue(self, maxsize: int = 0) -> Any:  # noqa: N802  Python's name
        return _ResultQueue(maxsize, ctx=self.get_context())


class _Source:
    """Where the positions of the samples of the batches come from; another time from elsewhere."""

    def __init__(self, batches: Iterable[Sequence[Any]]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Sequence[Any]]:
        return iter(self.batches)


class Loader(DataLoader[Batch]):
    """Batches in their order; none is waited for in vain.

    Args:
        dataset: the samples.
        batches: the positions of the samples of each batch.
        workers: loader processes; 0: this one.
        prefetch: batches that each makes ahead.
        lives_on: whether the processes wait for other ``batches`` when these are loaded, until :meth:`close`.
        options: torch's.
    """

    def __init__(
        self,
        dataset: Any,
        batches: Iterable[Sequence[Any]],
        *,
        workers: int,
        prefetch: int,
        lives_on: bool = False,
        **options: Any,
    ) -> None:
        if workers:
            options |= {"prefetch_factor": prefetch, "multiprocessing_context": _LoaderContext()}
            options["timeout"] = LOOK_S  # after which a rank only looks around, see Batches.get
            options["persistent_workers"] = lives_on
        self.source = _Source(batches)
        super().__init__(dataset, batch_sampler=self.source, num_workers=workers, **options)  # type: ignore[arg-type]

    def __iter__(self) -> Batches:  # type: ignore[override]  # torch's class of iterators is not public
        living: Any = self._iterator
        if living is None:
            return Batches(super().__iter__())
        # Its processes answer first, one after the other, and finish what they were in the middle of.
        living._timeout, Batches.waiting_since = 0, time.monotonic()  # noqa: SLF001
        try:
            return Batches(super().__iter__())
        finally:
            living._timeout, Batches.waiting_since = LOOK_S, None  # noqa: SLF001

    def close(self) -> None:
        """End the processes that live on."""
        living: Any = self._iterator
        if living is not None:
            living._shutdown_workers()  # noqa: SLF001
            self._iterator = None


class Batches:
    """What a loader gives, one after the other."""

    waiting_since: float | None = None
    """When this process, whose thread for signals it is, began to wait for a batch; None: it does not."""

    def __init__(self, loaded: Iterator[Batch | Lost]) -> None:
        self._loaded = loaded

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        batch = self.get(lambda: False)
        assert batch is not None  # noqa: S101  it does not stop
        return batch

    def get(self, stop: Callable[[], bool]) -> Batch | None:
        """The next batch; None where this rank was asked to stop before it came.

        Raises:
            StopIteration: there is none.
            MachineError: it could not be handed over; says why and what to do.
        """
        while True:
            Batches.waiting_since = time.monotonic()
            try:
                found = next(self._loaded)
            except (RuntimeError, OSError, EOFError) as error:
                if stop():  # whatever it is: the loader processes may have been ended for that
                    return None
                if not str(error).startswith(TIMED_OUT):
                    raise
            else:
                if isinstance(found, Lost):
                    raise MachineError(f"a loader process could not hand over a batch: {found.message}")
                return found
            finally:
                Batches.waiting_since = None


def heed_stop_signal() -> None:
    """Have SIGTERM, which comes again every second, end loader processes that are waited for in vain.

    A rank that takes a batch out of a loader process's hands waits for that process where no time runs out.
    """
    before = signal.getsignal(signal.SIGTERM)

    def on_signal(number: int, frame: FrameType | None) -> None:
        if callable(before):
            before(number, frame)
        since = Batches.waiting_since
        if since is not None and time.monotonic() - since > 2 * LOOK_S:
            end_loaders()

    signal.signal(signal.SIGTERM, on_signal)


class Feed:
    """The batches of a rank's steps. Where loader processes make them, the next step's are held before one is taken.

    Of these the first goes to the device by then, and each other one beside what is computed from the one before. Those
    that are not held go there when they are taken.
    Only a step that is taken counts: what was held or sent for the next one is made again by a run that goes on.

    Ranks agree to stop while they take a step. Were one then left waiting for the next step's batches, its peers would
    wait for it in that step's collectives, where nobody can stop.

    Args:
        steps: of this rank, in their order.
        batches: a batch for each of their micro-batches.
        stop: whether this rank was asked to stop.
        wait: is entered to get a batch.
        send: begins to copy a batch to the device; calling what it returns gives it there.
        ahead: whether loader processes make the batches; this process cannot stop while it makes one itself.
    """

    def __init__(
        self,
        steps: Iterable[Step],
        batches: Batches,
        stop: Callable[[], bool],
        wait: Callable[[], AbstractContextManager[None]],
        send: Callable[[Batch], Callable[[], Batch]],
        *,
        ahead: bool,
    ) -> None:
        self._wait = wait
        self._send = send
        self._steps = iter(steps)
        self._ahead = AHEAD if ahead else 0
        self._batches = batches
        self._stop = stop
        self._held: deque[tuple[Step, list[Callable[[], Batch]], list[Batch]]] = deque()
        """Of each step its first batch, which is being sent, and those after it; none where none is made ahead."""
        self.starved = False
        """Whether this rank was asked to stop while it waited."""

    def hold(self) -> None:
        """Get one more step, if there is one, and wait for its batches; a stop ends that, and then there is none."""
        step = next(self._steps, None)
        if step is None:
            return
        found = []
        for _ in step.micro_batches[: self._ahead]:
            batch = self._get()
            if batch is None:
                self.starved = True
                return
            found.append(batch)
        self._held.append((step, [*map(self._begin, found[:1])], found[1:]))

    def take(self) -> tuple[Step, Iterator[Batch]] | None:
        """The next step that is held, with its batches; None after the last."""
        if not self._held:
            return None
        step, sent, found = self._held.popleft()
        num = len(step.micro_batches) - len(sent) - len(found)
        return step, chain(self._sent(sent, found), self._rest(num))

    def _sent(self, sent: list[Callable[[], Batch]], found: Sequence[Batch]) -> Iterator[Batch]:
        """Each batch on the device, while the next one is on its way; none is held here when it was given."""
        for batch in found:
            sent.append(self._begin(batch))
            yield sent.pop(0)()
        while sent:
            yield sent.pop()()

    def _begin(self, batch: Batch) -> Callable[[], Batch]:
        """Send a batch; where there is no memory for it now, who computes from it does, and knows what to do."""
        try:
            return self._send(batch)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return lambda: batch

    def _rest(self, num: int) -> Iterator[Batch]:
        """Those of a step that are too many to be held."""
        for _ in range(num):
            batch = self._get()
            if batch is None:
                raise InterruptedRunError("stopped in the middle of a step, for whose images it waited")
            yield batch

    def _get(self) -> Batch | None:
        with self._wait():
            return self._batches.get(self._stop)


def end_loaders() -> None:
    """Kill this process's loader processes: one that reads from a file system that hangs would not end by itself."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would raise that they died
    for child in multiprocessing.active_children():
        if isinstance(child, _LoaderProcess):
            child.kill()
