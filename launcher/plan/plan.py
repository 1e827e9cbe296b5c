"""From a recipe and the facts of a machine to a plan: frozen, pure, printable. What it prints is what runs."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from launcher.plan import place as places
from launcher.plan import profile as profiles
from launcher.plan.launch_plan import LaunchPlan
from launcher.recipe import load as recipes
from launcher.system import allocator

if TYPE_CHECKING:
    from launcher.plan.profile import Profile
    from launcher.plan.request import Request
    from launcher.plan.topology import Topology
    from launcher.recipe.schema import Recipe


def make_plan(
    recipe: Recipe,
    topology: Topology,
    request: Request,
    profile: Profile | None = None,
    post_profile: Profile | None = None,
) -> LaunchPlan:
    """Decide where and how a recipe runs. Pure: reads no file and starts nothing.

    Args:
        recipe: checked.
        topology: the facts of this machine.
        request: the rest of the command line.
        profile: of the cluster, where the recipe names one.
        post_profile: of the job that makes the exports, where the recipe names one.

    Raises:
        UsageError: the machine has not what is asked for; says what would work instead.
    """
    launch = recipe.launch
    backend = places.choose_backend(recipe, topology, request)
    if backend == "slurm":
        place = places.as_job(recipe, topology, request, profile or profiles.Profile(), post_profile)
    else:
        place = places.here(recipe, topology, request)
    said = place.said_threads if launch.threads == "auto" else launch.threads
    threads = place.threads if launch.threads == "auto" else launch.threads
    plan = LaunchPlan(
        run_id=request.run_id,
        name=recipe.name,
        run_dir=place.run_dir,
        backend=backend,
        device=place.device,
        nodes=launch.max_nodes,
        min_nodes=launch.min_nodes,
        spares=launch.spares,
        procs_per_node=place.procs,
        threads_per_proc=threads,
        export_threads=said or None,
        max_restarts=0 if backend == "local" else launch.max_restarts,
        preflight=launch.preflight,
        hang_timeout_s=recipe.train.hang_timeout_s,
        node_rank=request.node_rank,
        rdzv_endpoint=place.endpoint,
        debug=request.debug,
        tune=request.tune,
        detach=request.detach,
        keep_freed_memory=launch.keep_freed_memory and place.device == "cpu" and backend != "local",
        command=place.command if backend != "local" else (),
        profile=place.profile,
        post_job=bool(place.post_script),
        script=place.script,
        post_script=place.post_script,
        recipe=recipes.to_dict(recipe),
    )
    return replace(plan, env=environment(plan))


def environment(plan: LaunchPlan) -> dict[str, str]:
    """What the supervisor and its workers need in theirs."""
    # A store of their own for the workers of each attempt: in the agent's they find the addresses of the one before,
    # and a restart hangs (seen with torch 2.14).
    env = {"OMP_NUM_THREADS": str(plan.threads_per_proc), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    if plan.device == "cpu":
        env["CUDA_VISIBLE_DEVICES"] = ""
    else:
        env["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # counting GPUs must not start CUDA in a process that forks
    if plan.nodes == 1:
        env["GLOO_SOCKET_IFNAME"] = "lo"
    if plan.min_nodes or plan.spares:
        env["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # else a lost node fills the terminals of the others with C++ stacks
    return env | (allocator.HUGE_PAGES if plan.keep_freed_memory else {})
