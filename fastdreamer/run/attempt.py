"""A run that a repeated command begins, goes on with, or finds done: what `--run FOLDER` keeps in the folder.

`attempts.jsonl` has a line for each attempt. `alive.json` says every few seconds which process works on the run and how
far it is: one that is older than a minute belongs to a process that is gone. `done.json` is written after the last
evaluation. A launcher need look at nothing else.
"""

import contextlib
import ctypes
import json
import os
import platform
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from fastdreamer.config import BadInput
from fastdreamer.run import lock
from fastdreamer.run.records import METRICS, PRINTED, read_metrics, write_whole

DONE, ALIVE, ATTEMPTS = "done.json", "alive.json", "attempts.jsonl"
WAIT = 60.0
"""Seconds that a command waits for the folder: a process that was told to stop saves first."""
BUSY = os.EX_TEMPFAIL
"""Exit code where it is held for longer."""
BEAT = 10.0
"""Seconds between two signs of life."""
OWN = {lock.LOCK, DONE, ALIVE, ATTEMPTS}
MADE = (METRICS, PRINTED, "checkpoints", "replay", "config.yaml", "events.*", "*.unfinished")
"""What an attempt leaves that came to no checkpoint."""
PR_SET_PDEATHSIG = 1


@contextmanager
def held(run: Path, frames: int) -> Iterator[Literal["done", "resume", "begin"]]:
    """Holds a run's folder, which is made where it is missing, and says what is left to be done to come to `frames`.

    Waits for up to WAIT seconds where another process holds it, then ends the process with exit code BUSY. Raises
    BadInput where the folder cannot be written, or is no run's.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
        names = [each.name for each in run.iterdir() if each.suffix != ".log"]
        strange = [name for name in names if name not in OWN and not name.startswith(".")]
    except OSError as error:
        raise BadInput(f"--run {run} cannot be made ({error.strerror}): name a folder that can be written.") from None
    if strange and not (run / "config.yaml").exists():
        raise BadInput(f"--run {run} holds other things ({sorted(strange)[0]}): name a run's folder, or a new one.")
    with contextlib.ExitStack() as stack:
        _wait(run, stack)
        # Looked for again now: who held the folder may have finished the run.
        if is_done(run, frames):
            yield "done"
            return
        (run / DONE).unlink(missing_ok=True)
        if any(run.glob("checkpoints/*/manifest.json")):
            yield "resume"
        else:
            _clear(run)
            yield "begin"


def _wait(run: Path, stack: contextlib.ExitStack) -> None:
    until, said = time.monotonic() + WAIT, False
    while True:
        try:
            stack.enter_context(lock.held(run))
            return
        except lock.InUse as error:
            if time.monotonic() > until:
                print(f"error: {error}", file=sys.stderr)
                raise SystemExit(BUSY) from None
            if not said:
                print(f"waiting for {run}, which another process holds", file=sys.stderr, flush=True)
                said = True
        time.sleep(0.2)


def is_done(run: Path, frames: int) -> bool:
    """Whether `done.json` says that the run has come to so many frames."""
    try:
        found = json.loads((run / DONE).read_text())
        return found["frames"] >= frames
    except (OSError, ValueError, TypeError, KeyError):
        return False


def _clear(run: Path) -> None:
    for pattern in MADE:
        for path in run.glob(pattern):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def finish(run: Path) -> None:
    """Writes `done.json` from what the run recorded. Raises BadInput where it cannot be written."""
    last: dict[str, Any] = {}
    for row in read_metrics(run):
        last |= {name: row[name] for name in ("frames", "updates", "seconds") if name in row}
    with contextlib.suppress(OSError, ValueError):
        evaluated = json.loads((run / "evaluation.json").read_text())
        last |= {name: evaluated[name] for name in ("return_mean", "return_std", "returns") if name in evaluated}
    last["attempts"] = _attempts(run)
    try:
        write_whole(run / DONE, (json.dumps(last) + "\n").encode())
    except OSError as error:
        raise BadInput(
            f"{run / DONE} cannot be written ({error.strerror}): make space and repeat the command."
        ) from None


def _attempts(run: Path) -> int:
    try:
        return sum(1 for line in (run / ATTEMPTS).read_text().splitlines() if line)
    except OSError:
        return 0


class Alive:
    """Says that this attempt is under way: a line in `attempts.jsonl`, and `alive.json` anew every BEAT seconds.

    From a thread of its own, for compiling or evaluating may take minutes. Where the disk is full it keeps quiet: the
    run itself says so.
    """

    def __init__(self, run: Path):
        self.run, self.attempt = run, _attempts(run) + 1
        self.progress: Callable[[], tuple[int, int]] = lambda: (0, 0)
        """Gives frames and updates so far."""
        self._over = threading.Event()
        self._last: tuple[float, int] | None = None
        self._thread = threading.Thread(target=self._beat, name="alive", daemon=True)

    def __enter__(self) -> "Alive":
        line = {"attempt": self.attempt, "began": time.strftime("%Y-%m-%dT%H:%M:%S%z")} | self._who()
        with contextlib.suppress(OSError), open(self.run / ATTEMPTS, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._write("ended")

    def _beat(self) -> None:
        while True:
            self._write("running")
            if self._over.wait(BEAT):
                return

    def _write(self, state: str) -> None:
        frames, updates = self.progress()
        now = time.monotonic()
        before, self._last = self._last, (now, updates)
        speed = 0.0 if before is None or now == before[0] else max(0, updates - before[1]) / (now - before[0])
        told = {"state": state, "attempt": self.attempt, "time": time.time(), "frames": frames, "updates": updates}
        with contextlib.suppress(OSError):
            found = told | {"updates_per_second": round(speed, 3)} | self._who()
            write_whole(self.run / ALIVE, (json.dumps(found) + "\n").encode())

    @staticmethod
    def _who() -> dict[str, Any]:
        return {"host": platform.node(), "pid": os.getpid()}


def die_with(parent: int) -> None:
    """From now on this process gets a SIGTERM, on which it saves, when its parent dies: the process `parent`, as it was
    when this one began. Raises BadInput where the system has no such thing.

    The system sends it when the *thread* that started this process ends: start it from one that outlives it.
    """
    if sys.platform != "linux":
        raise BadInput("--die-with-parent needs Linux: leave it out.")
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM) != 0:
        raise BadInput(f"--die-with-parent is refused here ({os.strerror(ctypes.get_errno())}): leave it out.")
    if os.getppid() != parent:
        raise SystemExit(128 + signal.SIGTERM)
