"""Processes to look at and to kill: what this process started, as others may test beside it."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def descendants(root: int | None = None) -> dict[int, str]:
    """Number → command line of what a process (this one) started, and what that started, and so on.

    What has lost its parent, as the workers of a killed raylet have, is not among them.
    """
    children: dict[int, list[int]] = {}
    for directory in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = (directory / "stat").read_text().rsplit(")", 1)[1].split()[1]
            children.setdefault(int(parent), []).append(int(directory.name))
    found, left = {}, [os.getpid() if root is None else root]
    while left:
        for child in children.get(left.pop(), []):
            found[child] = command_line(child)
            left.append(child)
    return found


def command_line(process: int) -> str:
    """Empty when there is no such process any more, or only its exit code."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/cmdline").read_text(errors="replace")
    return ""
