from __future__ import annotations

import logging
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stylegan.tensorboard import TensorBoard


def events_of(folder: Path) -> Iterator[Any]:
    """The events in a folder's files: length, its checksum, event, its checksum, and so on."""
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    checksum = pytest.importorskip("tensorboardX.record_writer").masked_crc32c
    for file in sorted(folder.glob("events.out.tfevents.*")):
        data = file.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            body = data[12 : 12 + length]
            assert struct.unpack("<I", data[12 + length : 16 + length]) == (checksum(body),)
            yield event_pb2.Event.FromString(body)
            data = data[16 + length :]


def scalars(folder: Path) -> list[tuple[int, str, float]]:
    return [
        (event.step, value.tag, round(value.simple_value, 4))
        for event in events_of(folder)
        for value in event.summary.value
    ]


def test_tensorboard_reads_what_was_reported(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path / "board")
    no_numbers = {"why": "text", "flag": True, "none": None}
    board.add("adversarial", 10, {"kl": 0.1, "d_real/dry": 2, **no_numbers})
    board.add("adversarial held-out", 10, {"auc": 0.7})
    board.add("adversarial", 20, {"kl": 0.2})
    board.close()
    board.close()
    first = [(10, "kl", 0.1), (10, "d_real/dry", 2.0), (20, "kl", 0.2)]
    assert scalars(tmp_path / "board" / "adversarial") == first
    assert scalars(tmp_path / "board" / "adversarial-held-out") == [(10, "auc", 0.7)]

    # a resumed training writes beside it, and says from which step on the older is void
    again = TensorBoard(tmp_path / "board")
    again.add("adversarial", 20, {"kl": 0.3})
    again.add("adversarial", 30, {"kl": 0.4})
    again.add("adversarial", 25, {"kl": 0.5})  # a rollback
    again.close()
    files = list((tmp_path / "board" / "adversarial").iterdir())
    assert len(files) == 2
    events = list(events_of(tmp_path / "board" / "adversarial"))
    starts = [event.step for event in events if event.HasField("session_log")]
    assert starts == [10, 20, 25]
    kept = scalars(tmp_path / "board" / "adversarial")
    assert kept == [*first, (20, "kl", 0.3), (30, "kl", 0.4), (25, "kl", 0.5)]


def test_without_tensorboardx_there_is_a_line_in_the_log_and_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with caplog.at_level(logging.WARNING, logger="stylegan.tensorboard"):
        board = TensorBoard(tmp_path / "board")
        for step in (1, 2):
            board.add("backbone", step, {"loss": 1.0})
        board.close()
    assert len(caplog.records) == 1
    assert "pip install tensorboardX" in caplog.text
    assert not (tmp_path / "board").exists()
