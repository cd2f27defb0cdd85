"""Faults, really injected, on several nodes: raylets on this machine, jobs as processes.

Each run ends as one that nothing disturbed, or stops with a reason and goes on with the same
command.
"""

from __future__ import annotations

import collections
import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from process_tree import command_line, descendants
from ray.cluster_utils import Cluster
from test_caption_job import ROOT, arguments, captions, number_of_parts, wait_for

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(400),  # on idle cores a minute each
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context"),
]

CAPTIONER = "ray::MapWorker(Map(CaptionUnit))"
READER = "ray::Map(read_images)"
CHAOS_S = float(os.environ.get("CHAOS_SECONDS", "20"))
FAULTS = {"worker": 3, "actor": 3, "decoder": 3, "node": 2, "driver": 1}  # with their weights
CHAOS_SEED = int(os.environ.get("CHAOS_SEED", time.time_ns() % 10_000))


@pytest.fixture
def nodes() -> Iterator[Cluster]:
    """A head that runs no tasks, as in cluster.yaml; tests add nodes and remove them hard."""
    ports = []
    for _ in range(2):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            ports.append(probe.getsockname()[1])
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 0, "object_store_memory": 80 << 20, "include_dashboard": True,
            "dashboard_port": ports[0], "dashboard_agent_listen_port": ports[1],
            # a lost node is noticed in seconds, not in half a minute
            "_system_config": {
                "health_check_initial_delay_ms": 1000, "health_check_period_ms": 1000,
                "health_check_failure_threshold": 4,
            },
        },
    )  # fmt: skip
    yield cluster
    cluster.shutdown()


def add(nodes: Cluster, cpus: int, gpus: int = 0) -> Any:
    return nodes.add_node(num_cpus=cpus, num_gpus=gpus, object_store_memory=80 << 20)


def processes(text: str, node: Any = None) -> list[int]:
    """Numbers of the processes with this in their command line, of a node's workers only."""
    started = descendants(node and node.all_processes["raylet"][0].process.pid)
    # without its agents, which a raylet does not survive
    return [pid for pid, line in started.items() if text in line and "Agent" not in line]


def start(nodes: Cluster, line: list[str], **environment: str) -> subprocess.Popen[str]:
    """The job on the cluster, slowly, so that there is a middle to disturb."""
    return subprocess.Popen(
        [sys.executable, "-m", "jobs.caption", *line, "--batch-size", "4"], cwd=ROOT,
        env=os.environ | {"RAY_ADDRESS": nodes.address} | environment,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def wait_for_parts(job: subprocess.Popen[str], output: Path, count: int) -> None:
    """Until so many are written; fails with what the job says when it ends or takes too long."""
    try:
        wait_for(lambda: number_of_parts(output) >= count or job.poll() is not None, 0.02)
        assert job.poll() is None
    except AssertionError:
        job.kill()
        pytest.fail(f"{number_of_parts(output)} parts, and the job says {job.communicate()}")


def finish(job: subprocess.Popen[str]) -> str:
    """What a job that has to succeed says."""
    said = job.communicate(timeout=200)[1]
    assert job.returncode == 0, said
    return said


def test_a_submitted_job_outlives_a_node(
    quiet: Path, shop: Path, tiny_model: Path, tmp_path: Path, nodes: Cluster
) -> None:
    workers = [add(nodes, 2) for _ in range(3)]
    for package in ("jobs", "stylegan"):
        shutil.copytree(ROOT / package, tmp_path / "code" / package)
    job = subprocess.Popen(
        [
            Path(sys.executable).with_name("ray"), "job", "submit",
            "--address", f"http://{nodes.webui_url}", "--working-dir", ".", "--",
            sys.executable, "-m", "jobs.caption",
            *arguments(shop, tiny_model, tmp_path / "out", "--actors", "2", "--batch-size", "4"),
        ],
        cwd=tmp_path / "code", stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    wait_for_parts(job, tmp_path / "out", 2)
    nodes.remove_node(next(n for n in workers if processes(CAPTIONER, n)), allow_graceful=False)
    assert number_of_parts(tmp_path / "out") < len(list(tmp_path.glob("out/run=*/_plan/unit-*")))
    said = job.communicate(timeout=200)[0]
    assert job.returncode == 0, said
    assert captions(tmp_path / "out") == captions(quiet)


def test_the_node_of_the_only_captioner_is_lost_after_its_decoders(
    quiet: Path, shop: Path, tiny_model: Path, tmp_path: Path, nodes: Cluster
) -> None:
    workers = [add(nodes, 2) for _ in range(2)]
    job = start(nodes, arguments(shop, tiny_model, tmp_path, "--actors", "1"))
    wait_for(lambda: processes(f"-P\0{ROOT}/stylegan/images.py") or job.poll() is not None)
    for decoder in processes(f"-P\0{ROOT}/stylegan/images.py"):
        os.kill(decoder, signal.SIGKILL)
    wait_for_parts(job, tmp_path, 2)
    [holder] = [node for node in workers if processes(CAPTIONER, node)]
    nodes.remove_node(holder, allow_graceful=False)
    finish(job)
    assert captions(tmp_path) == captions(quiet)


@pytest.mark.skipif(torch.cuda.is_available(), reason="nodes only claim to have a GPU here")
def test_captioners_are_on_gpu_nodes_and_wait_for_a_new_one(
    quiet: Path, shop: Path, tiny_model: Path, tmp_path: Path, nodes: Cluster
) -> None:
    decoding, captioning = add(nodes, 3), add(nodes, 1, gpus=1)
    line = arguments(shop, tiny_model, tmp_path)
    job = start(nodes, line)
    said = job.communicate(timeout=100)[1]
    assert job.returncode == 1
    assert "has a GPU for Ray, and torch" in said and "give --gpus-per-actor 0" in said, said
    assert "the same command goes on" in said and "Traceback" not in said, said

    job, seen = start(nodes, line, STYLEGAN_DEVICE="cpu"), collections.Counter[str]()
    while number_of_parts(tmp_path) < 3 and job.poll() is None:
        seen["reader"] += len(processes(READER, decoding))
        seen["reader on a GPU node"] += len(processes(READER, captioning))
        seen["captioner without a GPU"] += len(processes(CAPTIONER, decoding))
        seen["captioner"] += len(processes(CAPTIONER, captioning))
        time.sleep(0.01)
    assert set(+seen) == {"reader", "captioner"}, seen
    lost = processes(CAPTIONER, captioning)
    nodes.remove_node(captioning, allow_graceful=False)
    wait_for(lambda: not any(map(command_line, lost)))
    add(nodes, 1, gpus=1)
    finish(job)
    assert captions(tmp_path) == captions(quiet)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 8 MB, where the test may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", disk]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system may be mounted here")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


def test_a_full_disk_stops_the_job_until_there_is_room(
    quiet: Path, shop: Path, tiny_model: Path, small_disk: Path, nodes: Cluster
) -> None:
    add(nodes, 2)
    output, filler = small_disk / "captions", small_disk / "filler"
    line = arguments(shop, tiny_model, output)
    job = start(nodes, line)
    wait_for_parts(job, output, 2)
    with pytest.raises(OSError, match="No space left"), open(filler, "wb", buffering=0) as file:
        while True:
            file.write(bytes(512))
    said = job.communicate(timeout=200)[1]
    assert job.returncode == 1
    assert "No space left on device" in said and "the same command goes on" in said, said
    assert "Traceback" not in said
    filler.unlink()
    finish(start(nodes, line))
    assert captions(output) == captions(quiet)


class Chaos:
    """Kills at random what works for a job: every process that is killed is a real one."""

    def __init__(self, nodes: Cluster, seed: int) -> None:
        self.nodes, self.random = nodes, random.Random(seed)
        self.counts: collections.Counter[str] = collections.Counter()
        self.workers = [add(nodes, 2) for _ in range(3)]

    def strike(self, job: subprocess.Popen[str]) -> None:
        """One fault; nothing where there is no such process now."""
        # the driver seldom: after that it takes a while until there is something to kill again
        [fault] = self.random.choices(*zip(*FAULTS.items(), strict=True))
        if fault == "driver":
            job.kill()
        elif fault == "node":
            lost = self.workers.pop(self.random.randrange(len(self.workers)))
            self.nodes.remove_node(lost, allow_graceful=False)
            self.workers.append(add(self.nodes, 2))
        else:
            actors = [pid for node in self.workers for pid in processes(CAPTIONER, node)]
            others = [pid for node in self.workers for pid in processes("ray::", node)]
            victims = {
                "worker": sorted(set(others) - set(actors)),
                "actor": actors,
                "decoder": processes(f"-P\0{ROOT}/stylegan/images.py"),
            }[fault]
            if not victims:
                return
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.random.choice(victims), signal.SIGKILL)
        self.counts[fault] += 1


@pytest.mark.timeout(CHAOS_S + 300)
def test_chaos_ends_as_quiet(
    quiet: Path, shop: Path, tiny_model: Path, tmp_path: Path, nodes: Cluster
) -> None:
    """CHAOS_SECONDS (20) of faults, drawn from CHAOS_SEED (the clock); then the run has peace."""
    print(f"CHAOS_SEED={CHAOS_SEED}")
    chaos = Chaos(nodes, CHAOS_SEED)
    deadline = time.monotonic() + CHAOS_S
    while time.monotonic() < deadline:
        chaos.counts["runs"] += 1
        output = tmp_path / str(chaos.counts["runs"])
        line = arguments(shop, tiny_model, output, "--actors", "2")
        code: int | None = None
        while code != 0:
            job = start(nodes, line)
            chaos.counts["commands"] += 1
            while job.poll() is None:
                pause = chaos.random.uniform(1, 8)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    job.wait(min(pause, max(0.1, deadline - time.monotonic())))
                    break
                if time.monotonic() > deadline:
                    job.wait(200)
                else:
                    chaos.strike(job)
            said, code = job.communicate()[1], job.returncode
            print(chaos.counts, code, said[-400:])
            assert code in (0, 1, -signal.SIGKILL), said
            assert code != 1 or "the same command" in said, said
        assert captions(output) == captions(quiet)
