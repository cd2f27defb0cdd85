"""Patience: what is tried again and what is not, through a proxy that fails on purpose."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from botocore.exceptions import ClientError
from faulty_proxy import KINDS, FaultyProxy
from test_nightly import BASE, Shop, finish, names, plan, read_back, spoken, statuses

from stylegan import publish, storage
from stylegan import run as runs
from stylegan.catalog import fetch_image, stamp_images
from stylegan.lock import Lock, LockError
from stylegan.storage import explain, patiently, resolve_filesystem


@pytest.fixture
def proxy(s3: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """Between everything and the S3 endpoint, for subprocesses too."""
    endpoint = storage.endpoint()
    assert endpoint is not None
    with FaultyProxy(endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield proxy


# --- what may pass ------------------------------------------------------------------------------


def answered(status: int, code: str) -> ClientError:
    return ClientError(
        {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}, "PutObject"
    )


@pytest.mark.parametrize(
    ("error", "may_pass"),
    [
        (OSError("AWS Error SLOW_DOWN during PutObject operation"), True),
        (OSError("AWS Error NETWORK_CONNECTION during GetObject operation: curlCode: 7"), True),
        (OSError("AWS Error UNKNOWN (HTTP status 502) during PutObject operation"), True),
        (OSError("AWS Error UNKNOWN (HTTP status 400) during PutObject operation"), False),
        (OSError("AWS Error ACCESS_DENIED during GetObject operation"), False),
        (OSError("AWS Error NO_SUCH_BUCKET during GetObject operation"), False),
        (OSError("Couldn't deserialize thrift: TProtocolException: Invalid data"), False),
        (FileNotFoundError(2, "x"), False), (PermissionError(13, "x"), False),
        (OSError(116, "stale"), True), (OSError(28, "no space"), False),
        (TimeoutError("slow"), True), (ValueError("x"), False), (KeyError("x"), False),
        (answered(503, "SlowDown"), True), (answered(500, "InternalError"), True),
        (answered(403, "AccessDenied"), False), (answered(404, "NoSuchBucket"), False),
    ],
)  # fmt: skip
def test_what_may_pass(error: Exception, may_pass: bool) -> None:
    assert explain(error)[1] is may_pass


class Flaky:
    """Fails so many times, then answers."""

    def __init__(self, failures: int, error: Exception) -> None:
        self.failures, self.error, self.calls = failures, error, 0

    def __call__(self) -> str:
        self.calls += 1
        if self.calls <= self.failures:
            raise self.error
        return "done"


BUSY = OSError("AWS Error SLOW_DOWN during GetObject operation")


def test_an_outage_is_waited_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "PATIENCE_S", 3.0)
    pauses: list[float] = []
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda s: (pauses.append(s), sleep(s / 4)))
    denied = Flaky(9, OSError("AWS Error ACCESS_DENIED during GetObject operation"))
    with pytest.raises(OSError, match="DENIED"):
        patiently("s3://a/x", denied)
    assert denied.calls == 1 and not pauses
    assert patiently("s3://a/x", Flaky(5, BUSY)) == "done"
    assert len(pauses) == 5 and len(set(pauses)) == 5 and pauses[4] > pauses[0]

    began = time.monotonic()
    with pytest.raises(OSError, match="SLOW_DOWN"):
        patiently("s3://a/x", Flaky(99, BUSY))
    assert time.monotonic() - began > 3
    more = Flaky(99, BUSY)
    with pytest.raises(OSError, match="SLOW_DOWN"):
        patiently("s3://a/y", more)
    assert more.calls == storage.TRIES
    # another storage has not failed yet; and this one answers again
    assert patiently("s3://b/x", Flaky(5, BUSY)) == "done"
    assert patiently("s3://a/x", Flaky(2, BUSY)) == "done"
    assert patiently("s3://a/x", Flaky(5, BUSY)) == "done"


def test_a_file_that_fails_alone_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = Flaky(99, BUSY)

    def act() -> str:
        patiently("s3://c/other", lambda: "done")
        return alone()

    monkeypatch.setattr(time, "sleep", lambda _: None)
    with pytest.raises(OSError, match="SLOW_DOWN"):
        patiently("s3://c/x", act)
    assert alone.calls == storage.TRIES


# --- through the proxy --------------------------------------------------------------------------


def three_nights(shop: Shop, scratch: Path, proxy: FaultyProxy) -> None:
    """Everything that is done with storage."""
    output = f"{shop.place}/captions"
    first = plan(shop, output, scratch=scratch)
    finish(first, output)
    shop.photograph("0001", b"another photo")
    shop.photograph("0002", b"broken")
    second = plan(shop, output, scratch=scratch)
    assert sorted(finish(second, output)) == ["0001", "0002"]
    third = plan(shop, output, scratch=scratch)
    assert third.changes and third.changes["carried_over"] == 39
    finish(third, output)
    assert publish.prune(output, 2, runs.lock_name) == [first.uri.rpartition("/")[2]]
    publish.roll_back(output, second.run_id)
    assert publish.read_latest(output) == second.uri.rpartition("/")[2]
    proxy.every = False  # this reads without patience
    assert spoken(third) == shop.captions()
    found = statuses(third)
    assert found.pop("0002") == "failed" and set(found.values()) == {"carried_over"}
    left = {"latest"} | {run.uri.rpartition("/")[2] for run in (second, third)}
    assert names(output) == left


@pytest.mark.timeout(900)
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["any", *KINDS])
def test_every_request_may_fail(
    s3: str, tmp_path: Path, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Once each; the libraries' own patience is little or none, to see ours."""
    monkeypatch.setattr(storage, "SDK_ATTEMPTS", 3 if kind == "any" else 1)
    monkeypatch.setattr(storage, "PAUSE_S", 0.01)
    shop = Shop(f"{s3}/{tmp_path.name}", 40)  # its photographs are the test's own
    proxy.every, proxy.kinds = True, KINDS if kind == "any" else (kind,)
    three_nights(shop, tmp_path, proxy)
    assert {"GetObject", "PutObject", "HeadObject", "DeleteObject", "ListObjects"} <= {
        operation for operation, _ in proxy.failed
    }


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_outage_in_the_middle(s3: str, tmp_path: Path, proxy: FaultyProxy) -> None:
    place = f"{s3}/{tmp_path.name}"
    uris = [f"{place}/img/{number:04}.jpg" for number in range(40)]
    shop = Shop(place, 40)
    run = plan(shop, f"{place}/captions", scratch=tmp_path)
    proxy.fall_silent(6)
    finish(run, f"{place}/captions")
    assert spoken(run) == shop.captions(BASE)
    proxy.fall_silent(2)
    assert None not in stamp_images(uris)
    proxy.fall_silent(2)
    assert fetch_image(uris[0]).data == shop.images["0000"]
    assert read_back(run).num_rows == 160


def test_a_lock_whose_answers_are_lost_is_held_once(
    s3: str, tmp_path: Path, proxy: FaultyProxy
) -> None:
    place = resolve_filesystem(f"{s3}/{tmp_path.name}/_LOCK")
    proxy.every, proxy.kinds = True, ("lost",)
    with Lock.acquire(*place) as lock:
        lock.check(now=True)
        with pytest.raises(LockError, match="works on this run"):
            Lock.acquire(*place)
        lock.check(now=True)
    assert place[0].get_file_info(place[1]).type.name == "NotFound"
    assert ("PutObject", "lost") in proxy.failed
