"""Processes to look at and to kill: what this process started, as others may test beside it."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from jobs import benchmark


def descendants(root: int | None = None) -> dict[int, str]:
    """Number → command line of what a process (this one) started, and what that started, and so on.

    What has lost its parent, as the workers of a killed raylet have, is not among them.
    """
    root = os.getpid() if root is None else root
    return {pid: command_line(pid) for pid in benchmark.descendants(root) - {root}}


def command_line(process: int) -> str:
    """Empty when there is no such process any more, or only its exit code."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/cmdline").read_text(errors="replace")
    return ""
