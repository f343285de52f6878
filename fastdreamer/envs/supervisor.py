"""The process around an environment worker: keeps what it prints, and sees to it that nothing of it outlives the run.

An environment may start processes, print without end, hang in C, or be killed; and so may the trainer. The supervisor
loads nothing, so it can do none of this. It hears of the trainer's end from the kernel.
"""

import contextlib
import ctypes
import os
import resource
import select
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

CLOSING = 5.0
"""Seconds that a worker has to close its environments when it is told to end, before it is killed."""

LOG_BYTES = 2**20
"""Of what a worker prints, so much is kept at the most; the oldest goes first."""

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_HEAD = b"=== environment process "


def supervise(parent: int, inherited: Sequence[int], log: Path | None) -> None:
    """Returns in a new process, the worker, which is told to end by SIGTERM. This one stays until that has ended.

    `parent`: the trainer, whose end the worker does not outlast, nor does anything that the worker has started.
    `inherited`: file descriptors that are the worker's. The trainer ends both processes by closing this one's standard
    input; a path on it, followed by a zero byte, is where the `log` goes from now on. Until there is one, it goes to
    standard output.
    """
    libc = ctypes.CDLL(None)
    # Whatever descends from the worker becomes this process's child when its own parent ends.
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        os._exit(1)
    woken, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    printed, output = os.pipe2(os.O_CLOEXEC)
    signal.set_wakeup_fd(wake)
    for number in (signal.SIGCHLD, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    worker = os.fork()
    if worker == 0:
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((nothing, 0), (output, 1), (output, 2)):
            os.dup2(source, target)
        for end in (woken, wake, printed, output, nothing):
            os.close(end)
        sys.stdout.reconfigure(line_buffering=True)  # pyright: ignore[reportAttributeAccessIssue]
        return
    for end in (*inherited, output):
        os.close(end)
    os._exit(_exit_as(_watch(worker, printed, woken, _Log(log))))


def last_words(path: Path) -> list[str]:
    """The end of what the newest process printed into a log, as lines that are not empty. Raises OSError."""
    with open(path, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 2**16))
        _, head, text = file.read().rpartition(_HEAD)
    lines = text.decode(errors="replace").splitlines()[1 if head else 0 :]
    return [line.rstrip() for line in lines if line.strip()]


def _watch(worker: int, printed: int, woken: int, log: "_Log") -> int:
    """Keeps what comes until the worker has ended, ends all that it has left behind, and returns its status."""
    os.set_blocking(printed, False)
    sources, deadline = [0, printed, woken], float("inf")
    while True:
        ended, status = os.waitpid(-1, os.WNOHANG)
        if ended == worker:
            break
        if ended:
            continue
        left = None if deadline == float("inf") else max(0.0, deadline - time.monotonic())
        ready, _, _ = select.select(sources, [], [], left)
        if printed in ready:
            log.write(_read(printed))
        ending = woken in ready and signal.SIGTERM in _read(woken)
        if 0 in ready:
            message = os.read(0, 2**16)
            if message:
                log.move(Path(os.fsdecode(message.split(b"\0")[-2])))
            else:
                sources.remove(0)
                ending = True
        if ending and left is None:
            deadline = time.monotonic() + CLOSING
            os.kill(worker, signal.SIGTERM)
        elif time.monotonic() >= deadline:
            os.kill(worker, signal.SIGKILL)
            deadline = time.monotonic() + CLOSING
    with contextlib.suppress(ChildProcessError):
        while True:
            for child in _children():
                with contextlib.suppress(OSError):
                    os.kill(child, signal.SIGKILL)
            os.waitpid(-1, 0)
    while data := _read(printed):
        log.write(data)
    return status


def _children() -> list[int]:
    """Processes whose parent this one is."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{entry}/stat") as file:
                # The name, in brackets, may hold anything.
                if int(file.read().rpartition(")")[2].split()[1]) == os.getpid():
                    found.append(int(entry))
    return found


def _read(source: int) -> bytes:
    """What a pipe holds, 64 KiB at the most; nothing where it is empty."""
    try:
        return os.read(source, 2**16)
    except BlockingIOError:
        return b""


def _exit_as(status: int) -> int:
    """The worker's exit code; where a signal ended it, ends by the same one."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if number != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    return os.waitstatus_to_exitcode(status)


class _Log:
    """What a worker prints, in standard output until there is a path; a file is made when there is something in it."""

    def __init__(self, path: Path | None) -> None:
        self._path, self._file = path, 1
        self._head = _HEAD + f"{os.getpid()}, {time.strftime('%Y-%m-%d %H:%M:%S')} ===\n".encode()

    def write(self, data: bytes) -> None:
        # A disk that is full costs what was printed, not the run.
        with contextlib.suppress(OSError):
            if not data:
                return
            if self._path is not None and self._file == 1:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
            data, self._head = self._head + data, b""
            size = os.fstat(self._file).st_size
            if size + len(data) > LOG_BYTES:
                kept = os.pread(self._file, LOG_BYTES // 2, max(0, size - LOG_BYTES // 2))
                os.ftruncate(self._file, 0)
                os.write(self._file, kept[kept.find(b"\n") + 1 :])
            os.write(self._file, data)

    def move(self, path: Path) -> None:
        """From now on into `path`, with what there is."""
        with contextlib.suppress(OSError):
            source, size = self._file, os.fstat(self._file).st_size
            before = os.pread(source, LOG_BYTES // 2, max(0, size - LOG_BYTES // 2))
            self._path, self._file = path, 1
            self.write(before)
            if source == 1:
                os.ftruncate(1, 0)
