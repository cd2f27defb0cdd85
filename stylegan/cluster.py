"""The Ray that a job runs on, a private local one or a cluster, and whether it is enough."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.data
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayError, WorkerCrashedError
from ray.util.annotations import RayDeprecationWarning
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

LOCAL_STORE = 1 << 30  # bytes; blocks that wait are bounded, whatever the number of images
MAX_ACTORS_PER_NODE = 8


class ClusterError(RuntimeError):
    """The cluster cannot run the job as it was asked; the message names the flag that mends it."""


@dataclass(frozen=True, slots=True)
class Pool:
    """What a job reserves. actors: least and most; readers: tasks at a time; gpus: of one actor."""

    actors: tuple[int, int]
    readers: int
    gpus: float

    @property
    def cpus(self) -> int:
        """Of one actor. One with a GPU reserves none, so that a node full of readers, to which Ray
        turns when those without a GPU are full, cannot keep it out."""
        return 0 if self.gpus else 1

    @property
    def device(self) -> str:
        """Of torch. STYLEGAN_DEVICE names another than CUDA for what Ray calls a GPU."""
        return os.environ.get("STYLEGAN_DEVICE", "cuda") if self.gpus else "cpu"


def connect() -> None:
    """Joins the cluster of RAY_ADDRESS (set under `ray job submit`), else starts a local Ray.

    Nothing when the process has a Ray already. Ray's own log lines and bars stay in its log files.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if not ray.is_initialized():
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        quiet: Any = {"logging_level": logging.ERROR, "log_to_driver": False}
        if not os.environ.get("RAY_ADDRESS"):
            # More CPUs than cores: what reads and writes reserves little shares beside the actors,
            # and actors that hold every CPU would starve it without a word.
            quiet |= {
                "address": "local",
                "num_cpus": max(4, cores() + 2),
                "object_store_memory": LOCAL_STORE,
                "include_dashboard": False,
            }
            # tasks that the memory monitor kills are tried again for ever by default
            os.environ.setdefault("RAY_task_oom_retries", "20")
        with _held_back_stderr():
            ray.init(**quiet)
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setLevel(logging.CRITICAL + 1)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    # how often a crashed process is started again can be said in no other way
    warnings.filterwarnings(
        "ignore", "`ray_remote_args` is deprecated", category=RayDeprecationWarning
    )


def bound_waiting(num_bytes: int) -> None:
    """Bounds what waits between the stages of the next chain, whatever the number of images."""
    context = ray.data.DataContext.get_current()
    # at least what a small chain needs to flow; half of a local object store at the most
    limit = ray.data.ExecutionResources.for_limits(object_store_memory=max(num_bytes, 256 << 20))
    context.execution_options = ray.data.ExecutionOptions(resource_limits=limit)
    context.target_max_block_size = None  # a block is a unit


@contextlib.contextmanager
def _held_back_stderr() -> Iterator[None]:
    """Keeps back what is written to stderr, by C++ too; shows it when there is an error."""
    sys.stderr.flush()
    original = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        except BaseException:
            held.seek(0)
            os.write(original, held.read())
            raise
        finally:
            os.dup2(original, 2)
            os.close(original)


def cores() -> int:
    """Physical cores that this process may use, the limit of its container included."""
    available = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        siblings = (
            Path(f"/sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list")
            for number in os.sched_getaffinity(0)
        )
        available = len({path.read_text() if path.exists() else path for path in siblings})
    for path, pattern in (
        ("/sys/fs/cgroup/cpu.max", r"(\d+) (\d+)"),
        ("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", r"(\d+)()"),
    ):
        if Path(path).exists() and (match := re.match(pattern, Path(path).read_text())):
            available = min(available, max(1, int(match[1]) // int(match[2] or 100_000)))
    return available


def choose_pool(
    nodes: list[tuple[float, float]], actors: tuple[int, int] | None, gpus: float | None,
    *, read_cpus: float, write_cpus: float, is_local: bool,
) -> Pool:  # fmt: skip
    """The actors and readers that fit on nodes of (CPUs, GPUs) each. Raises ClusterError.

    An actor keeps one CPU busy, and `gpus` of one GPU of its node; by default a whole one where
    there are any. What reads and writes must fit beside the actors, or nothing would ever reach
    them.
    """
    cpus, all_gpus = sum(node[0] for node in nodes), sum(node[1] for node in nodes)
    share = (1.0 if all_gpus else 0.0) if gpus is None else gpus
    if share and not all_gpus:
        raise ClusterError(
            f"--gpus-per-actor is {share:g}, and the cluster has no GPU: leave it out, or add "
            "nodes with GPUs"
        )
    beside = read_cpus + write_cpus
    if share:  # a share is of one GPU: .6 of each of two is free, and takes no second actor
        room = sum(int(min(c, int(g) * int(1 / share))) for c, g in nodes)
    else:
        room = min(sum(int(c) for c, _ in nodes), int(cpus - beside))
    if room < 1:
        raise ClusterError(
            f"the cluster has {cpus:g} CPUs and {all_gpus:g} GPUs; "
            + (
                f"a captioner needs a CPU and {share:g} GPU of one node: start Ray with CPUs on "
                "the nodes with GPUs (ray start --num-cpus), or give --gpus-per-actor 0"
                if share
                else f"one captioner and what reads and writes beside it need {1 + beside:g} CPUs: "
                "start Ray with more (ray start --num-cpus), or leave RAY_ADDRESS out"
            )
        )
    if actors is None:
        usual = [MAX_ACTORS_PER_NODE if not share else int(g) * int(1 / share) for _, g in nodes]
        usual = [min(cores(), MAX_ACTORS_PER_NODE)] if is_local and not share else usual
        actors = (min(room, sum(usual)),) * 2
    actors = (actors[0], min(actors[1], max(room, actors[0])))
    if actors[0] > room:
        raise ClusterError(
            f"--actors asks for {actors[0]}, and {room} fit: {cpus:g} CPUs"
            + (f" and {all_gpus:g} GPUs" if share else "")
            + f" on {len(nodes)} node(s), "
            + (
                f"one CPU and {share:g} GPU of its node each; lower --actors or --gpus-per-actor"
                if share
                else f"{beside:g} CPUs kept to read and write; lower --actors"
            )
        )
    readers = max(1, int((cpus - actors[0] - write_cpus) / read_cpus))
    return Pool(actors, min(readers, cores()) if is_local else readers, share)


def nodes() -> list[tuple[float, float]]:
    """CPUs and GPUs of each living node."""
    resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [(node.get("CPU", 0.0), node.get("GPU", 0.0)) for node in resources]


def check_visible(paths: dict[str, str]) -> None:
    """Raises ClusterError unless every node sees these local paths, flag → path."""
    living = [node for node in ray.nodes() if node["Alive"]]
    if len(living) < 2 or not paths:
        return

    @ray.remote(num_cpus=0)
    def missing(paths: dict[str, str]) -> list[str]:
        return [flag for flag, path in paths.items() if not os.path.exists(path)]

    for node in living:
        here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        unseen = missing.options(scheduling_strategy=here, max_retries=0).remote(paths)
        try:
            flags = ray.get(unseen, timeout=120)
        except RayError:
            if node["NodeID"] in {other["NodeID"] for other in ray.nodes() if other["Alive"]}:
                raise
            continue  # it was lost meanwhile
        for flag in flags:
            raise ClusterError(
                f"{flag} is {paths[flag]}, which node {node['NodeManagerAddress']} does not see: "
                "give an s3:// URI, or a directory that all nodes share"
            )


def explain(error: BaseException) -> str:
    """What went wrong, without Ray's layers: the first cause, and where it was raised."""
    text = re.sub(r"\x1b\[\d+m", "", str(error)).strip()
    if not isinstance(error, RayError):
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = "/".join(Path(frame.filename).parts[-2:])
        return f"{type(error).__name__}: {text} ({where}:{frame.lineno} in {frame.name})"
    first = text.partition("\nThe above exception was the direct cause")[0].rstrip()
    frames = re.findall(r'^ *File "(.+?)", line (\d+), in (\S+)', first, re.MULTILINE)
    if frames:
        lines = first.splitlines()
        last = max(index for index, line in enumerate(lines) if line.startswith("  "))
        path, line, function = frames[-1]
        where = "/".join(Path(path).parts[-2:])
        return " ".join(lines[last + 1 :]).strip() + f" ({where}:{line} in {function})"
    kind = type(error).__name__.partition("(")[0]
    hint = ""
    if isinstance(error, ActorDiedError | ActorUnavailableError | WorkerCrashedError):
        hint = "; a worker process died again and again: is there enough memory?"
    return f"{kind}: {first.splitlines()[0] if first else 'no message'}{hint}"
