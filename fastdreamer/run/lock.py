"""One process at a time works on a run's folder."""

import fcntl
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fastdreamer.config import BadInput

LOCK = "lock"


class InUse(BadInput):
    """Another process holds the folder."""


@contextmanager
def held(run: Path) -> Iterator[None]:
    """Holds the run's folder for this process, whose id and host the file `lock` then names.

    The system lets go of it when the process ends, however it ends. Raises InUse where another process holds it, and
    BadInput where the folder cannot be written.
    """
    try:
        file = open(run / LOCK, "a+b")  # noqa: SIM115 - closed below
    except OSError as error:
        raise BadInput(
            f"{run / LOCK} cannot be written ({error.strerror}): make the folder writable and free some space."
        ) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = " ".join(file.read(200).decode(errors="replace").split()) or "another process"
            raise InUse(
                f"{run} is in use by {holder}: wait for its end or stop it first, or start a run of its own."
            ) from None
        except OSError:
            # A file system without locks: nothing can be known of other processes.
            pass
        with suppress(OSError):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()}\n".encode())
            file.flush()
        yield
