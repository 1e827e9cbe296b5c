"""``batch.size: auto``: each rank measures before it touches its device, then all agree on their shares of the samples.

What was found is kept in the run directory (``tuning.json``), for a run that goes on with the same devices, and in a
cache for other runs of the same kind.
"""

from __future__ import annotations

import functools
import itertools
import json
import socket
import time
from dataclasses import asdict, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from launcher.engine import data, numerics
from launcher.engine.numerics import Preference
from launcher.engine.schedule import Batching
from launcher.engine.setup import full_world_size
from launcher.engine.tuning import cache as tuning_cache
from launcher.engine.tuning.batch_search import BatchSearch, NothingFitsError
from launcher.engine.tuning.batch_shares import RankBatch, deal
from launcher.engine.tuning.budget import Budget, Spending
from launcher.engine.tuning.child import TooSlowError
from launcher.engine.tuning.peers import Introduction, PeerEndedError, Peers, measurer
from launcher.engine.tuning.rank_probes import RankProbes
from launcher.errors import TrainingError, UsageError
from launcher.runs.run_dir import node_name
from launcher.system import loader_room
from launcher.system.files import write_json_atomic

if TYPE_CHECKING:
    from collections.abc import Callable

    from launcher.engine.device import Device
    from launcher.engine.distributed import Ranks
    from launcher.engine.setup import DataSets
    from launcher.engine.tuning.probe import Probe
    from launcher.engine.tuning.rank_probes import DeviceFacts
    from launcher.recipe.schema import BatchConfig, Recipe
    from launcher.runs.run_dir import RunDir
    from launcher.system.memory import FreeMemory

AGREE_TIMEOUT_S = 1800
"""Ranks wait this long for the rank whose probes take longest."""
MARGIN = 0.05
"""Fraction of the memory that is left free: headroom for fragmentation, which grows over hours of training."""
MIN_STEPS_PER_EPOCH = 10
"""Steps of an epoch, at least, however fast larger batches are: a model learns nothing in a few steps."""
SPLIT_S = 6.0
"""Seconds that measuring a split of the cores takes, about."""
LOADER_BYTES = 64 << 20
"""Bytes of a loader process, without its batches."""
NCCL_BYTES = 512 << 20
"""Bytes of NCCL's channels to other ranks, which a probe does not have."""
CHECKPOINT_COPIES = 4
"""Copies of a checkpoint on the host: one being written, one waiting, the best, and the files' buffers."""
CURE = "lower data.image_size, freeze layers (model.freeze), take a smaller model.arch, or give each worker more memory"


class StoppedError(Exception):
    """The run was asked to stop before it had begun to train."""


def tune_rank(
    run: RunDir,
    recipe: Recipe,
    ranks: Ranks,
    device: Device,
    data_sets: DataSets,
    *,
    fresh: bool,
    stop: Callable[[], bool],
    say: Callable[[str], None],
) -> dict[str, Any]:
    """This rank's result for the others: the batch size that is best for it, or why there is none.

    Leaves this process as it was: all is tried in children.

    Args:
        run: of which recipe.
        recipe: that recipe.
        ranks: who this is.
        device: not touched yet.
        data_sets: of the run.
        fresh: measure, whatever is known.
        stop: whether this rank was asked to stop.
        say: takes a line for the user.

    Returns:
        JSON: rank, host, device, total_bytes, free_bytes, budget_bytes, limit, batch_size, max_size, images_per_s,
        needed_bytes, attempts, compared, num_probes, workers, threads, loading, seconds, and from: ``run``, ``alike``
        (another rank in the run), ``cache``, ``probes`` or ``peer``; or ``{"stopped": true}``; or ``{error, kind}``, of
        kind usage or training.
    """

    def heed_stop() -> None:
        if stop():
            raise StoppedError

    who = {"rank": ranks.rank, "host": socket.gethostname()}
    probes = RankProbes(run, recipe, ranks, device, data_sets, heed_stop=heed_stop, say=say)
    peers = Peers(ranks, heed_stop)
    try:
        facts = probes.facts()
        everyone = peers.exchange(_introduce(facts, ranks, device))
        probes.numerics = numerics.common([one.preference for one in everyone])
        facts = replace(facts, precision=probes.numerics.precision, channels_last=probes.numerics.channels_last)
        who |= {"device": facts.name, "total_bytes": facts.total_bytes}
        report = None if fresh else _kept(run, who, ranks)
        if report is None and (other := measurer(everyone, ranks.rank)) != ranks.rank:
            report = peers.hear(other) | {"from": "peer"}
        report = report or _find(probes, facts, recipe, _all_of(run, ranks), device, data_sets, fresh=fresh)
    except StoppedError:
        report = {"stopped": True}
    except PeerEndedError as ended:
        report = ended.report | {"from": "peer"}
    except NothingFitsError as error:
        report = {"error": f"{error} ({facts.free.limit}); {CURE}", "kind": "usage"}
    except (TrainingError, TooSlowError) as error:
        report = {"error": str(error), "kind": "training"}
    peers.tell(report)
    return report | who


def _all_of(run: RunDir, ranks: Ranks) -> Ranks:
    """This rank among all that a run may have, which shrinks and grows: a step's samples are for them."""
    return replace(ranks, world_size=max(ranks.world_size, full_world_size(run)))


def _introduce(facts: DeviceFacts, ranks: Ranks, device: Device) -> Introduction:
    preference = Preference(
        rank=ranks.rank,
        host=node_name(),
        device=facts.name,
        precision=facts.precision,
        channels_last=facts.channels_last,
    )
    return Introduction(
        preference=preference,
        node_rank=ranks.node_rank,
        total_bytes=facts.total_bytes,
        free_bytes=facts.free.num_bytes,
        cores=data.num_rank_cores(ranks),
        own_device=device.is_cuda,
    )


def _find(
    probes: RankProbes,
    facts: DeviceFacts,
    recipe: Recipe,
    ranks: Ranks,
    device: Device,
    data_sets: DataSets,
    *,
    fresh: bool,
) -> dict[str, Any]:
    """By the cache, or by probes."""
    most = _max_size(recipe, ranks, device, data_sets)
    key = tuning_cache.key(recipe, facts, data_sets, ranks, most)
    loading = tuning_cache.loading_key(recipe, data_sets)
    budget = None if fresh else Budget.of(recipe, ranks, data_sets)
    cached = None if budget is None else tuning_cache.read(key, budget_bytes(facts.free))
    if cached and budget and budget.is_served_by(cached):
        if cached.get("loading") != loading:  # an earlier version's has none
            can_wait = budget.allows(images_per_s=cached["images_per_s"], spent_s=0, next_s=SPLIT_S)
            split = probes.split if can_wait else probes.unmeasured_split
            cached |= split(cached["batch_size"], cached["images_per_s"])
        return cached | {"loading": loading, "from": "cache"}
    needed = functools.partial(needed_bytes, recipe=recipe, ranks=ranks, device=device, data_sets=data_sets)
    probes.budget = budget
    report = _measure(probes, recipe, needed=needed, free=facts.free, most=most) | {"loading": loading}
    tuning_cache.write(key, report)
    return report | {"from": "probes"}


def _measure(
    probes: RankProbes, recipe: Recipe, *, needed: Callable[[Probe], int], free: FreeMemory, most: int
) -> dict[str, Any]:
    """Find the batch size within ``free`` memory and ``most`` images that the recipe's objective asks for."""
    start, memory = time.monotonic(), budget_bytes(free)
    spending = Spending(probes.budget, objective=recipe.batch.objective)
    found = BatchSearch(
        probes.measure,
        compare=probes.compare,
        needed=needed,
        budget_bytes=memory,
        objective=recipe.batch.objective,
        max_size=most,
        spending=spending,
    ).run()
    assert found.chosen.probe  # noqa: S101  it ran
    can_wait = spending.allows_more(found.chosen.probe.images_per_s)
    split = probes.split if can_wait else probes.unmeasured_split
    shared = split(found.chosen.batch_size, found.chosen.probe.images_per_s)
    if spending.stopped_at is not None:
        probes.say(spending.told(found.chosen.batch_size))
    known = {"free_bytes": free.num_bytes, "budget_bytes": memory, "limit": free.limit}
    known |= {"cut_for_s": spending.stopped_at}
    return known | found.describe() | shared | {"seconds": round(time.monotonic() - start, 2)}


def agree(run: RunDir, recipe: Recipe, ranks: Ranks, own: dict[str, Any], say: Callable[[str], None]) -> Batching:
    """Exchange what the ranks found and decide, the same on every rank; rank 0 keeps it in the run.

    Args:
        run: of the recipe.
        recipe: what is trained.
        ranks: who this is.
        own: what :func:`tune_rank` gave.
        say: takes a line for the user, on rank 0.

    Raises:
        UsageError: on some rank nothing fits.
        TrainingError: some rank could not measure.
        StoppedError: some rank was asked to stop.
    """
    # a long timeout, because any rank may come late
    group: Any = dist.new_group(backend="gloo", timeout=timedelta(seconds=AGREE_TIMEOUT_S))
    found: list[Any] = [None] * ranks.world_size
    dist.all_gather_object(found, own, group=group)
    errors = [one for one in found if "error" in one and one.get("from") != "peer"]
    if errors:
        text = "; ".join(f"rank {one['rank']} on {one['host']}: {one['error']}" for one in errors[:3])
        text += f"; and {len(errors) - 3} other ranks" if len(errors) > 3 else ""  # noqa: PLR2004
        raise (UsageError if errors[0]["kind"] == "usage" else TrainingError)(text)
    if any("stopped" in one for one in found):
        raise StoppedError
    kept = _read(run)
    if kept and all(one["from"] == "run" for one in found):
        return kept
    full_size = full_world_size(run)
    batching = _deal(found, recipe.batch, kept if full_size else None, full_size)
    if ranks.rank == 0 and not (full_size and kept):  # else what the run began with stays, for when all nodes are back
        scaled = recipe.optim.lr_batch_size or recipe.batch.global_size
        hint = "" if scaled else f"; optim.lr={recipe.optim.lr:g} is not scaled to it (optim.lr_batch_size)"
        say(f"batch sizes {_brief(batching.batch_sizes)}, global batch {batching.global_batch_size}{hint}")
        write_json_atomic(run.tuning, {"version": 1, "batching": asdict(batching), "ranks": found}, durable=True)
        run.append_event(
            "tuned",
            batch_sizes=list(batching.batch_sizes),
            shares=list(batching.shares),
            global_batch_size=batching.global_batch_size,
        )
    dist.barrier(group=group)
    return batching


def _deal(found: list[Any], config: BatchConfig, kept: Batching | None, full_size: int) -> Batching:
    """By what the ranks found; a run that shrinks and grows keeps the global batch that it began with.

    Where it began with less than all of its ranks, that is as many samples as all of them would take.
    """
    measured = [RankBatch(**{name: one[name] for name in RankBatch.__dataclass_fields__}) for one in found]
    global_size = kept.global_batch_size if kept else config.global_size
    batching = deal(measured, global_size=global_size, accumulate=config.accumulate)
    if global_size is not None or not full_size:
        return batching
    return replace(batching, global_batch_size=batching.global_batch_size * full_size // len(found))


def _brief(sizes: tuple[int, ...]) -> str:
    """``64 x 8`` for eight of them."""
    return ", ".join(f"{size} x {len(list(same))}" for size, same in itertools.groupby(sizes))


def budget_bytes(free: FreeMemory) -> int:
    """How much of the free memory training may use."""
    return int(free.num_bytes * (1 - MARGIN))


def needed_bytes(measured: Probe, *, recipe: Recipe, ranks: Ranks, device: Device, data_sets: DataSets) -> int:
    """Memory that training needs on the device; ``measured`` is the part that a probe sees."""
    if device.is_cuda:
        return measured.memory_bytes + (NCCL_BYTES if ranks.world_size > 1 else 0)
    workers = data.num_loader_workers(recipe.data, ranks)
    sample = data_sets.preprocessing.bytes_of_sample
    # Batches: those ahead, the next step's, the one in use, the one that is made.
    loaded = data.num_ahead(workers) * workers + 3
    checkpoints = CHECKPOINT_COPIES * measured.state_bytes if ranks.rank == 0 else 0
    loading = workers * LOADER_BYTES + loaded * measured.batch_size * sample
    return measured.memory_bytes + loading + checkpoints


def _max_size(recipe: Recipe, ranks: Ranks, device: Device, data_sets: DataSets) -> int:
    """The step that the recipe asks for is the most a rank can have of it; else an epoch is to have some steps.

    A GPU can hold larger batches than its host can load. (On a CPU what loading takes is a part of what is needed.)
    """
    most = recipe.batch.global_size or len(data_sets.train) // (ranks.world_size * MIN_STEPS_PER_EPOCH)
    if device.is_cuda:
        room = loader_room.for_loading(ranks.local_world_size)
        most = min(most, loader_room.most_samples(data_sets.preprocessing.bytes_of_sample, room))
    return max(1, min(most, len(data_sets.train)))


def _kept(run: RunDir, known: dict[str, Any], ranks: Ranks) -> dict[str, Any] | None:
    """What this rank found in an earlier attempt of the run, if it has such a device again among as many ranks.

    In a run that shrinks and grows the ranks change: there it is what any rank found on such a device.
    """
    try:
        found = json.loads(run.tuning.read_text(encoding="utf-8"))["ranks"]
    except FileNotFoundError:
        return None
    alike = [one for one in found if all(one[name] == known[name] for name in ("device", "total_bytes"))]
    if len(found) == ranks.world_size and found[ranks.rank] in alike:
        own: dict[str, Any] = found[ranks.rank]
        return own | {"from": "run"}
    return alike[0] | {"from": "alike"} if alike and run.read_plan().is_elastic else None


def _read(run: RunDir) -> Batching | None:
    """What the ranks have agreed on in an earlier attempt; None: nothing yet."""
    try:
        kept = json.loads(run.tuning.read_text(encoding="utf-8"))["batching"]
    except FileNotFoundError:
        return None
    return Batching(
        batch_sizes=tuple(kept["batch_sizes"]),
        shares=tuple(kept["shares"]),
        global_batch_size=kept["global_batch_size"],
    )
