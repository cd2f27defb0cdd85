"""The curves of a training as TensorBoard reads them."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class TensorBoard:
    """Writes the rows of a training as TensorBoard's event files, in a folder for each stage.

    A training and its held-out figures have the same tags, so that TensorBoard draws them into one
    diagram. Where a stage goes on from an earlier step than was written, by a resume or a rollback,
    TensorBoard is told to forget what lay beyond. Writes nothing where tensorboardX is missing.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._writers: dict[str, tuple[Any, int]] = {}  # stage → writer, last step
        try:
            from tensorboardX import event_file_writer
        except ImportError as error:
            self._open: Any = None
            logging.getLogger(__name__).warning(
                "no TensorBoard files in %s: %s; pip install tensorboardX", directory, error
            )
        else:
            self._open = event_file_writer.EventsWriter
            self._event = event_file_writer.event_pb2.Event

    def add(self, stage: str, step: int, values: Mapping[str, Any]) -> None:
        """The numbers among the values; others are left out."""
        if self._open is None:
            return
        if stage not in self._writers:
            folder = self._directory / stage.replace(" ", "-")
            folder.mkdir(parents=True, exist_ok=True)
            # a name of its own: the writer's has whole seconds, and would replace another of them
            self._writers[stage] = (self._open(str(folder / "events"), f".{time.time_ns()}"), step)
            self._write(stage, step, {"session_log": {"status": "START"}})
        elif step <= self._writers[stage][1]:
            self._write(stage, step, {"session_log": {"status": "START"}})
        scalars = [
            {"tag": name, "simple_value": value}
            for name, value in values.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        ]
        self._write(stage, step, {"summary": {"value": scalars}})
        writer = self._writers[stage][0]
        writer.flush()
        self._writers[stage] = (writer, step)

    def _write(self, stage: str, step: int, content: dict[str, Any]) -> None:
        event = self._event(wall_time=time.time(), step=step, **content)
        self._writers[stage][0].write_event(event)

    def close(self) -> None:
        for writer, _ in self._writers.values():
            writer.close()
        self._writers.clear()
