"""What tests share: a tiny model, a local Ray, an S3 endpoint, a catalogue with broken images."""

from __future__ import annotations

import csv
import io
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import boto3
import numpy as np
import pytest
from PIL import Image

# read when Ray is first imported; every Ray that a test starts inherits them
os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # else it writes ~/.ray/auth_token
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a tiny model with random weights."""
    from tiny_model import write_tiny_model

    return write_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """The URI of an empty bucket on an S3 endpoint of its own process, for subprocesses too."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        try:
            for _ in range(300):
                try:
                    with urllib.request.urlopen(environment["AWS_ENDPOINT_URL"], timeout=5):
                        break
                except OSError:
                    time.sleep(0.1)
            boto3.client("s3").create_bucket(Bucket="shop")
            yield "s3://shop"
        finally:
            server.kill()
            server.wait()


@pytest.fixture(scope="module")
def local_ray(s3: str) -> Iterator[None]:
    """A Ray of this process, small, with more CPUs than the machine has cores."""
    import ray

    ray.init(
        address="local", num_cpus=4, object_store_memory=300 << 20, include_dashboard=False,
        log_to_driver=False, logging_level="ERROR",
    )  # fmt: skip
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CSV of 260 products: most with a photograph, some broken, gone, or without one."""
    folder = tmp_path_factory.mktemp("shop")
    random = np.random.default_rng(0)
    with open(folder / "products.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["sku", "photo", "title", "price", "caption", "caption_locked"])
        for number in range(260):
            photo, title, caption, locked = f"{number:03}.jpg", "", "", ""
            buffer = io.BytesIO()
            pixels = random.integers(0, 255, (6, 5, 3), np.uint8)
            Image.fromarray(pixels).resize((40 + number % 7, 50)).save(buffer, "JPEG")
            data = buffer.getvalue()
            if number % 50 == 7:
                data = data[: len(data) // 3]  # truncated
            elif number % 50 == 17:
                data = b"<html>not found</html>"
            elif number % 50 == 27:
                photo = f"gone-{number}.jpg"
            elif number % 50 == 37:
                photo, title = "", "Red cotton dress"
            elif number % 50 == 38:
                photo = ""  # neither image nor title
            elif number % 50 == 47:
                caption, locked = "A person wrote this.", "true"
            if number % 3 == 0 and not title and number % 50 != 38:
                title = f"Men's blue shirt no. {number}"
            if photo and not photo.startswith("gone"):
                (folder / photo).write_bytes(data)
            rows.writerow([f"{number:03}", photo, title, f"{number}.50", caption, locked])
    return folder / "products.csv"


@pytest.fixture(scope="module")
def quiet(
    local_ray: None, shop: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The output of a run that nothing disturbed."""
    from test_caption_job import arguments

    from jobs.caption import main

    output = tmp_path_factory.mktemp("quiet") / "captions"
    assert main(arguments(shop, tiny_model, output)) == 0
    return output
