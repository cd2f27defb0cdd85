"""cluster.yaml, validated offline with the code that `ray up` runs before it asks the cloud; what
the README says of clusters; machines that come while a job waits for them."""

from __future__ import annotations

import copy
import os
import re
import shlex
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from ray.autoscaler._private.util import prepare_config, validate_config

from jobs.caption import Config, parse_arguments
from stylegan.cluster import choose_pool

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def cluster() -> dict[str, Any]:
    """As written, with Ray's defaults filled in."""
    written = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    prepared: dict[str, Any] = prepare_config(copy.deepcopy(written))
    return prepared


def test_ray_accepts_it(cluster: dict[str, Any]) -> None:
    validate_config(cluster)


def test_ray_would_refuse_a_mistake(cluster: dict[str, Any]) -> None:
    mistaken = copy.deepcopy(cluster)
    mistaken["available_node_types"]["decoder"]["min_worker"] = 1
    with pytest.raises(Exception, match="min_worker"):
        validate_config(mistaken)


def test_every_node_runs_the_ray_that_the_package_requires(cluster: dict[str, Any]) -> None:
    images = [cluster["docker"]["image"]] + [
        node["docker"]["worker_image"]
        for node in cluster["available_node_types"].values()
        if "docker" in node
    ]
    assert len(images) == 2
    assert {versions(image)[1] for image in images} == {"py312"}


def versions(image: str) -> tuple[str, str]:
    """Of Ray and Python in an image of Ray's, the first of them one that the package takes."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = {r.name: r for r in map(Requirement, project["dependencies"])}
    name, _, tag = image.partition(":")
    version, python = tag.split("-")[:2]
    assert name == "rayproject/ray"
    assert requirements["ray"].specifier.contains(version), image
    return version, python


def test_nothing_is_left_to_the_launchers_defaults(cluster: dict[str, Any]) -> None:
    nodes = cluster["available_node_types"]
    commands = cluster["head_setup_commands"] + cluster["worker_setup_commands"]
    commands += nodes["captioner"]["worker_setup_commands"]
    assert commands
    assert not [command for command in commands if "ray-wheels" in command or "anaconda" in command]
    for name, node in nodes.items():
        assert node["node_config"]["ImageId"], name
        assert node["node_config"]["IamInstanceProfile"], name


def test_the_head_stays_and_runs_no_tasks_and_workers_may_go(cluster: dict[str, Any]) -> None:
    nodes = dict(cluster["available_node_types"])
    head = nodes.pop(cluster["head_node_type"])
    assert head["resources"] == {"CPU": 0}
    assert "InstanceMarketOptions" not in head["node_config"]
    for node in nodes.values():
        assert node["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}


def test_the_job_fits_the_smallest_cluster_with_a_captioner_on_every_gpu(
    cluster: dict[str, Any],
) -> None:
    machines = [
        (float(node["resources"]["CPU"]), float(node["resources"].get("GPU", 0)))
        for node in cluster["available_node_types"].values()
        for _ in range(node["min_workers"])
    ]
    gpus = sum(gpus for _, gpus in machines)
    pool = choose_pool(machines, None, None, read_cpus=0.5, write_cpus=0.1, is_local=False)
    assert pool.actors == (gpus, gpus)
    assert pool.gpus == 1
    assert pool.readers >= 8


# --- what the README says -----------------------------------------------------------------------

# of the API ray.io/v1; Kubernetes refuses what it does not know only when asked to
RAY_JOB = {
    "entrypoint", "backoffLimit", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished",
    "rayClusterSpec",
}  # fmt: skip
RAY_CLUSTER = {"rayVersion", "enableInTreeAutoscaling", "headGroupSpec", "workerGroupSpecs"}
WORKER_GROUP = {
    "groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template",
}  # fmt: skip


@pytest.fixture(scope="module")
def section() -> str:
    """The README's section on clusters."""
    return (ROOT / "README.md").read_text().split("\n## On a cluster\n")[1].split("\n## ")[0]


@pytest.fixture(scope="module")
def ray_job(section: str) -> dict[str, Any]:
    """The manifest in it."""
    (block,) = re.findall(r"```yaml\n(.*?)```", section, re.DOTALL)
    manifest: dict[str, Any] = yaml.safe_load(block)
    return manifest


def configuration(command: str) -> Config:
    """Of a command of the job; pytest fails when the job would refuse it."""
    python, flag, module, *arguments = shlex.split(command)
    assert (python, flag, module) == ("python", "-m", "jobs.caption")
    return parse_arguments(arguments)


def test_every_command_of_the_section_is_one_that_the_job_takes(
    section: str, ray_job: dict[str, Any], cluster: dict[str, Any]
) -> None:
    commands = re.findall(r"-- (python -m jobs\.caption [^'\n]+)'", section)
    assert len(commands) == 2
    found = [configuration(command) for command in [*commands, ray_job["spec"]["entrypoint"]]]
    captioner = cluster["available_node_types"]["captioner"]
    for config in found:
        assert config.images and config.output.startswith("s3://") and config.previous == "latest"
        # what it waits for is what the cluster has, and never a CPU in place of a GPU
        assert config.actors == (captioner["min_workers"],) * 2
        assert config.gpus_per_actor == captioner["resources"]["GPU"]
        assert config.wait_for_machines > 0
    assert found[1].keep_runs == found[2].keep_runs == 7
    assert re.search(r"^ *0 2 \* \* \* .*; ray down -y cluster\.yaml$", section, re.MULTILINE)


def test_the_manifest_has_the_fields_and_the_ray_of_its_operator(
    section: str, ray_job: dict[str, Any]
) -> None:
    assert (ray_job["apiVersion"], ray_job["kind"]) == ("ray.io/v1", "RayJob")
    spec, cluster = ray_job["spec"], ray_job["spec"]["rayClusterSpec"]
    assert set(spec) == RAY_JOB and set(cluster) == RAY_CLUSTER
    assert spec["shutdownAfterJobFinishes"] and spec["ttlSecondsAfterFinished"] > 0
    (base,) = re.findall(r"^FROM (\S+)$", section, re.MULTILINE)
    assert versions(base)[0] == cluster["rayVersion"]
    pods = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    images = set()
    for pod in pods:
        (container,) = pod["template"]["spec"]["containers"]
        assert pod["template"]["spec"]["serviceAccountName"] == "stylegan"  # the bucket's keys
        assert container["resources"]["requests"] == container["resources"]["limits"]
        images.add(container["image"])
    assert len(images) == 1
    assert cluster["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0"}


def test_the_job_fits_the_manifest(ray_job: dict[str, Any]) -> None:
    machines = []
    for group in ray_job["spec"]["rayClusterSpec"]["workerGroupSpecs"]:
        assert set(group) == WORKER_GROUP
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        (container,) = group["template"]["spec"]["containers"]
        limits = container["resources"]["limits"]
        machine = float(limits["cpu"]), float(limits.get("nvidia.com/gpu", 0))
        machines += [machine] * group["minReplicas"]
    config = configuration(ray_job["spec"]["entrypoint"])
    pool = choose_pool(
        machines, config.actors, config.gpus_per_actor, read_cpus=0.5, write_cpus=0.1,
        is_local=False,
    )  # fmt: skip
    assert pool.actors == config.actors and pool.gpus == 1 and pool.readers >= 8


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_job_waits_for_machines(shop: Path, tiny_model: Path, tmp_path: Path) -> None:
    """The head offers nothing; a machine comes when the job says that it waits for one."""
    from ray.cluster_utils import Cluster

    cluster: Any = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        line = [
            sys.executable, "-m", "jobs.caption", "--images", str(shop), "--id-column", "sku",
            "--image-column", "photo", "--model", str(tiny_model), "--limit", "20",
            "--output", str(tmp_path / "out"), "--actors", "2", "--wait-for-machines",
        ]  # fmt: skip
        environment = os.environ | {"RAY_ADDRESS": cluster.address}
        refused = subprocess.run(
            [*line, "0"], env=environment, capture_output=True, text=True, timeout=90
        )
        assert refused.returncode == 2 and "the cluster has 0 CPUs" in refused.stderr
        log = tmp_path / "log"
        with log.open("wb") as stream:
            process = subprocess.Popen([*line, "2"], env=environment, stdout=stream, stderr=stream)
        while "waiting for machines" not in log.read_text():
            assert process.poll() is None, log.read_text()
            time.sleep(0.2)
        cluster.add_node(num_cpus=2)  # too few
        cluster.add_node(num_cpus=2)
        assert process.wait(120) == 0, log.read_text()
    finally:
        cluster.shutdown()
    said = log.read_text()
    assert "captioning 20 of 20 images with 2 captioners" in said
    assert list(tmp_path.glob("out/run=*/_SUCCESS"))
