"""cluster.yaml, validated offline with the code that `ray up` runs before it asks the cloud."""

from __future__ import annotations

import copy
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from ray.autoscaler._private.util import prepare_config, validate_config

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
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = {r.name: r for r in map(Requirement, project["dependencies"])}
    images = [cluster["docker"]["image"]] + [
        node["docker"]["worker_image"]
        for node in cluster["available_node_types"].values()
        if "docker" in node
    ]
    assert len(images) == 2
    pythons = set()
    for image in images:
        name, _, tag = image.partition(":")
        version, python = tag.split("-")[:2]
        assert name == "rayproject/ray"
        assert requirements["ray"].specifier.contains(version), image
        pythons.add(python)
    assert pythons == {"py312"}


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
