"""Processes as the kernel shows them, for tests of what outlives what."""

import time
from collections.abc import Callable
from pathlib import Path


def _status(pid: int) -> list[str]:
    """State, parent and so on; the name, in brackets before them, may hold anything. Raises OSError."""
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")")[-1].split()


def gone(pid: int) -> bool:
    try:
        return _status(pid)[0] == "Z"
    except OSError:
        return True


def children(parent: int) -> list[int]:
    found = []
    for pid in [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]:
        try:
            if int(_status(pid)[1]) == parent:
                found.append(pid)
        except OSError:
            continue
    return found


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.05)
