"""The line that says how far a job is."""

from __future__ import annotations

import sys
import threading
import time


class Progress:
    """One line on stderr: live on a terminal, every ten seconds in a log."""

    def __init__(self, total: int, done: int = 0) -> None:
        """total, done: images in all, and those that an earlier session has done."""
        self.total, self.done, self.failed = total, done, 0
        self._before = done
        self._began: float | None = None
        self._is_live = sys.stderr.isatty()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._tick, name="progress", daemon=True)

    def add(self, images: int, failed: int) -> None:
        """Counts a unit that is written."""
        if self._began is None:
            # the rate is that of the work: starting took long, and those first images are not
            # counted either
            self._began, self._before = time.monotonic(), self.done + images
        self.done, self.failed = self.done + images, self.failed + failed
        if self._is_live:
            self._show()

    @property
    def rate(self) -> float | None:
        """Images per second since the first unit was written; None before the second."""
        if self._began is None or self.done <= self._before:
            return None
        return (self.done - self._before) / max(time.monotonic() - self._began, 1e-3)

    def line(self) -> str:
        """Images done and in all, share, rate, failures, time left."""
        text = f"{self.done:,} of {self.total:,} images  {self.done / self.total:.0%}"
        if (rate := self.rate) is not None:
            left = int((self.total - self.done) / rate)
            clock = f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02}"
            text += f"  {rate:,.1f} images/s  {clock} left"
        return f"{text}  {self.failed:,} failed" if self.failed else text

    def _show(self) -> None:
        text, end = (f"\r\x1b[K{self.line()}", "") if self._is_live else (self.line(), "\n")
        print(text, end=end, file=sys.stderr, flush=True)

    def _tick(self) -> None:
        while not self._ended.wait(1 if self._is_live else 10):
            self._show()

    def __enter__(self) -> Progress:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        if self._began is not None:
            self._show()
            if self._is_live:
                print(file=sys.stderr)
