"""`python -m fastdreamer.envs.worker PIPE MEMORY PARENT [LOG]`: a process that steps environments for `Environments`.

Started afresh rather than forked, so that neither torch nor the trainer's main module is ever loaded here, and an
environment's threads and OpenGL contexts stay its own.
"""

import contextlib
import os
import signal
import sys
import sysconfig
import textwrap
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from fastdreamer.config import BadInput
from fastdreamer.envs import build, rendering
from fastdreamer.envs.base import MEND, BatchEnv, NotFinite, Spaces, Step
from fastdreamer.envs.episodic import EpisodicBatch
from fastdreamer.envs.protocol import Built, Failed, Job, Refused, Replay, attach, expand, rows
from fastdreamer.envs.supervisor import supervise


def serve(pipe: Connection, memory: int) -> None:
    """Builds what the first message says and steps it until the trainer closes the pipe or SIGTERM comes."""
    job: Job = _receive(pipe)
    with contextlib.ExitStack() as stack:
        try:
            rendering.prefer(job.gpu)
            batch = build(job)
            stack.callback(batch.close)
            _send(pipe, Built(batch.spaces, isinstance(batch, EpisodicBatch), rendering.renderer()))
            replay: Replay | None = _receive(pipe)
            shown, taken = attach(memory, job.total, batch.spaces)
            out, action = rows(shown, job.slice), taken[job.slice]
            if replay is None:
                batch.reset(out)
                _complete(out, None, job)
            else:
                _replay(batch, replay, out, pipe, job, beat=min(5.0, job.config.timeout / 4))
            _send(pipe, "row")
            while _receive(pipe) == "step":
                batch.step(action, out)
                _complete(out, action, job)
                _send(pipe, "row")
        except BadInput as refusal:
            _ending()
            _send(pipe, Refused(str(refusal), type(refusal)))
        except Exception as error:
            _ending()
            _send(pipe, Failed(_described(error)))
            raise


def _receive(pipe: Connection) -> Any:
    try:
        return pipe.recv()
    except (EOFError, ConnectionResetError):
        _ending()
        raise SystemExit(0) from None  # the trainer has gone


def _send(pipe: Connection, message: Any) -> None:
    try:
        pipe.send(message)
    except (BrokenPipeError, ConnectionResetError):
        _ending()
        raise SystemExit(0) from None


def _described(error: Exception) -> str:
    """An exception's type, text, and the line of it that is the user's, or else where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    libraries = (str(Path(__file__).parents[1]), *(sysconfig.get_path(name) for name in ("stdlib", "purelib")), "<")
    frame = next((frame for frame in reversed(frames) if not frame.filename.startswith(libraries)), frames[-1])
    text = textwrap.shorten(str(error), 300, placeholder=" ...")
    return f"{type(error).__name__}: {text} ({Path(frame.filename).name}:{frame.lineno})"


def _complete(out: Step, action: np.ndarray | None, job: Job) -> None:
    """Adds the `action` that led to rows (None: they are first ones). Raises NotFinite, whatever the environment."""
    out.action[:] = 0 if action is None else action
    out.action[out.is_first] = 0
    for what, shown in (("an observation", out.vector), ("a reward", out.reward)):
        if shown is not None and not np.isfinite(shown).all():
            i = int(np.flatnonzero(~np.isfinite(shown).reshape(len(shown), -1).all(1))[0])
            raise NotFinite(
                f"--task {job.task} shows {what} that is not finite (environment {job.first_index + i}){MEND}"
            )


def _replay(batch: BatchEnv, replay: Replay, out: Step, pipe: Connection, job: Job, beat: float) -> None:
    """Takes past actions without rendering, except the last, whose rows are written."""
    spaces: Spaces = batch.spaces
    begins: dict[int, list[int]] = {}
    for i, start in enumerate(replay.start.tolist()):
        begins.setdefault(start, []).append(i)
    said = time.monotonic()
    length = len(replay.actions)
    for t in range(length + 1):
        if isinstance(batch, EpisodicBatch):
            for i in begins.get(t, []):
                batch.begin(i, int(replay.episode[i]), out)
                out.action[i] = 0
        elif t == 0:
            batch.reset(out)
            _complete(out, None, job)
        if t < length - 1:
            batch.skip(expand(replay.actions[t], spaces))
        elif t == length - 1:
            action = expand(replay.actions[t], spaces)
            batch.step(action, out)
            _complete(out, action, job)
        if time.monotonic() - said > beat:
            said = time.monotonic()
            _send(pipe, "alive")


def _ending() -> None:
    """What closes is not to be broken off: it has the time that the supervisor gives it."""
    signal.signal(signal.SIGTERM, lambda *_: None)


def _terminate(*_: object) -> None:
    _ending()
    raise SystemExit(0)


def main() -> None:
    pipe, memory, parent = (int(argument) for argument in sys.argv[1:4])
    # Ctrl-C is the trainer's to answer: it may want a last checkpoint of these environments.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    supervise(parent, (pipe, memory), Path(sys.argv[4]) if len(sys.argv) > 4 else None)
    signal.signal(signal.SIGTERM, _terminate)
    # A module of the user's lies in the directory the trainer runs in.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    serve(Connection(pipe), memory)


if __name__ == "__main__":
    main()
