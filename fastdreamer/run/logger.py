"""What is written and shown while a run trains: metrics, TensorBoard, progress."""

import json
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, SupportsFloat

import numpy as np

from fastdreamer.config import BadInput
from fastdreamer.run.pictures import encode_gif
from fastdreamer.run.records import METRICS, RECENT_EPISODES, resume_command, rewind

PLAIN_INTERVAL = 10.0  # seconds between progress lines where the output is no terminal
LIVE_INTERVAL = 0.25  # seconds between redraws of the live display
SAMPLE_INTERVAL = 0.5  # seconds between the samples that speeds are taken from
SAMPLES = 60
TENSORBOARD_FLUSH = 5.0  # seconds
RGB = 3  # TensorBoard's code for it


class Logger:
    """Writes a run's metrics and shows its progress. Cheap enough to call at every environment step.

    Every method raises BadInput where the disk is full or the folder has become unwritable. Everything that belongs to
    `frames` F should be written before the checkpoint at F is: a resume keeps the lines up to the checkpoint's frames.
    """

    def __init__(
        self,
        run: Path,
        *,
        total_frames: int,
        live: bool | None = None,
        resume_at_frames: int | None = None,
        resume_at_updates: float = math.inf,
    ) -> None:
        """`total_frames`: what the run is to reach. `live`: draw a display; None does where stdout is a terminal.

        `resume_at_frames`, `resume_at_updates`: of the checkpoint that the run goes on from; later lines are dropped,
        so that nothing is recorded twice. None starts anew.
        """
        self.run = run
        self._progress = _Progress(total_frames, resume_at_frames or 0)
        self._failed = False
        seconds = 0.0
        try:
            if resume_at_frames is not None:
                for row in rewind(run, resume_at_frames, resume_at_updates):
                    seconds = row.get("seconds", seconds)
                    self._progress.remember(row)
            self._metrics = open(run / METRICS, "a", buffering=1, encoding="utf-8")  # noqa: SIM115 - closed by close()
        except OSError as error:
            raise self._unwritable(error) from None
        self._start = time.monotonic() - seconds
        self._redraw_at = 0.0
        live = sys.stdout.isatty() if live is None else live
        self._display: _Display = _PlainDisplay()
        if live:
            try:
                self._display = _LiveDisplay()
            except ImportError:
                self.message("rich is not installed: progress comes as plain lines (pip install rich).")
        self._board: _TensorBoard | None = None
        try:
            self._board = _TensorBoard(run, resume_at_frames)
        except ImportError:
            self.message(f"tensorboard is not installed: scalars go to {METRICS} alone (pip install tensorboard).")
        except OSError as error:
            raise self._unwritable(error) from None

    def scalars(self, frames: int, values: Mapping[str, SupportsFloat], updates: int | None = None) -> None:
        """Records `values` by tag, such as `loss/reward`, at `frames` and after `updates`.

        With `updates` the recent speeds are recorded too, as `speed/frames` and `speed/updates` a second.
        """
        row: dict[str, float] = {"frames": frames}
        numbers = {tag: float(value) for tag, value in values.items()}
        if updates is not None:
            row["updates"] = updates
            if (speeds := self._progress.speeds()) is not None:
                numbers["speed/frames"], numbers["speed/updates"] = speeds
        row["seconds"] = round(time.monotonic() - self._start, 3)
        self._write({**row, **numbers})
        self._progress.remember(numbers)
        if self._board is not None:
            self._guard(self._board.scalars, frames, numbers)

    def episode(self, frames: int, return_: float, length: int) -> None:
        """Records a training episode that ended at `frames`: its return, and its length in decisions."""
        self.scalars(frames, {"episode/return": return_, "episode/length": length})

    def video(self, tag: str, frames: int, array: np.ndarray) -> None:
        """Shows uint8 (T, H, W, 3) as an animation in TensorBoard (an image summary); without TensorBoard, nothing."""
        if self._board is not None:
            self._guard(self._board.video, tag, frames, array)

    def progress(self, frames: int, updates: int) -> None:
        """Tells how far the run is; redraws the display when it is time."""
        now = time.monotonic()
        self._progress.move(now, frames, updates)
        if now >= self._redraw_at:
            self._redraw_at = now + self._display.interval
            self._display.draw(self._progress.state())

    def message(self, text: str) -> None:
        """Prints a line, above the display where there is one; after `close` too, as the last."""
        self._display.print(text)

    def close(self) -> None:
        """Shows where the run ended and closes the files. Calling it again does nothing."""
        if self._metrics.closed:
            return
        self._display.draw(self._progress.state())
        self._display.close()
        try:
            if self._board is not None:
                self._board.close()
            self._metrics.close()
        except OSError as error:
            # What is buffered cannot be written either, and the first failure has been told.
            if not self._failed:
                raise self._unwritable(error) from None

    def _write(self, row: Mapping[str, float]) -> None:
        finite = {tag: value if math.isfinite(value) else str(value) for tag, value in row.items()}
        self._guard(self._metrics.write, json.dumps(finite, allow_nan=False) + "\n")

    def _guard(self, write: Callable[..., object], *arguments: object) -> None:
        try:
            write(*arguments)
        except OSError as error:
            self._failed = True
            raise self._unwritable(error) from None

    def _unwritable(self, error: OSError) -> BadInput:
        return BadInput(
            f"The logs in {self.run} cannot be written ({error.strerror}): make space or the folder writable, "
            f"then go on with: {resume_command(self.run)}"
        )


class _Progress:
    """How far a run is, how fast it goes and what it has achieved, as a display shows it."""

    def __init__(self, total_frames: int, frames: int) -> None:
        self._total, self._frames, self._updates = total_frames, frames, 0
        self._samples: deque[tuple[float, int, int]] = deque(maxlen=SAMPLES)
        self._recent: deque[float] = deque(maxlen=RECENT_EPISODES)
        self._best = self._best_evaluation = -math.inf
        self._evaluation: float | None = None

    def move(self, now: float, frames: int, updates: int) -> None:
        self._frames, self._updates = frames, updates
        if updates and self._samples and not self._samples[0][2]:
            # Before the first update was due frames took no time worth mentioning.
            self._samples.clear()
        if not self._samples or now - self._samples[-1][0] >= SAMPLE_INTERVAL:
            self._samples.append((now, frames, updates))

    def remember(self, values: Mapping[str, float]) -> None:
        """Takes up what was recorded: updates made before, returns, evaluations."""
        self._updates = int(values.get("updates", self._updates))
        if "episode/return" in values:
            self._recent.append(values["episode/return"])
            self._best = max(self._best, self._recent[-1])
        if "eval/return_mean" in values:
            self._evaluation = values["eval/return_mean"]
            self._best_evaluation = max(self._best_evaluation, self._evaluation)

    def speeds(self) -> tuple[float, float] | None:
        """Frames and updates a second over the samples kept: at most SAMPLES * SAMPLE_INTERVAL seconds of progress."""
        if len(self._samples) < 2:
            return None
        (t0, frames0, updates0), (t1, frames1, updates1) = self._samples[0], self._samples[-1]
        return (frames1 - frames0) / (t1 - t0), (updates1 - updates0) / (t1 - t0)

    def state(self) -> "_State":
        speeds = self.speeds()
        left = max(self._total - self._frames, 0)
        return _State(
            done=min(self._frames / self._total, 1.0),
            frames=f"{self._frames:,} / {self._total:,} frames",
            updates=f"{self._updates:,} updates",
            returns=self._describe_returns(),
            speed=f"{speeds[1]:,.1f} updates/s, {speeds[0]:,.0f} frames/s" if speeds else "",
            left=f"{_clock(left / speeds[0])} left" if speeds and speeds[0] > 0 and self._updates and left else "",
        )

    def _describe_returns(self) -> str:
        parts = []
        if self._recent:
            mean = sum(self._recent) / len(self._recent)
            parts.append(
                f"return last {self._recent[-1]:.4g}, mean of {len(self._recent)} {mean:.4g}, best {self._best:.4g}"
            )
        if self._evaluation is not None:
            parts.append(f"evaluation {self._evaluation:.4g}, best {self._best_evaluation:.4g}")
        return "; ".join(parts) or "no episode has ended yet"


def _clock(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"


@dataclass(frozen=True)
class _State:
    """What a display shows, as text; `done` is the finished share of the run."""

    done: float
    frames: str
    updates: str
    returns: str
    speed: str
    left: str


class _Display(Protocol):
    interval: float

    def draw(self, state: _State) -> None: ...
    def print(self, text: str) -> None: ...
    def close(self) -> None: ...


class _PlainDisplay:
    interval = PLAIN_INTERVAL

    def draw(self, state: _State) -> None:
        parts = (f"{state.frames} ({state.done:.0%})", state.updates, state.returns, state.speed, state.left)
        self.print(" | ".join(part for part in parts if part))

    def print(self, text: str) -> None:
        print(text, flush=True)

    def close(self) -> None:
        pass


class _LiveDisplay:
    interval = LIVE_INTERVAL

    def __init__(self) -> None:
        from rich.live import Live

        # Redrawn by progress(): a refreshing thread would take turns from the learner's Python thread.
        self._live = Live(auto_refresh=False)
        self._live.start()

    def draw(self, state: _State) -> None:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        head = Table.grid(padding=(0, 2))
        head.add_row(
            ProgressBar(total=1.0, completed=state.done, width=30), f"{state.done:.0%}", state.frames, Text(state.left)
        )
        foot = "   ".join(part for part in (state.updates, state.speed) if part)
        self._live.update(Group(head, Text(state.returns, style="bold"), Text(foot, style="dim")), refresh=True)

    def print(self, text: str) -> None:
        self._live.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        self._live.stop()


class _TensorBoard:
    """A TensorBoard event file, written in place by the calling thread so that a full disk is noticed there."""

    def __init__(self, run: Path, resume_at_frames: int | None) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        # Generated modules: type checkers do not see what they define.
        events: Any = event_pb2
        summaries: Any = summary_pb2
        self._event, self._session, self._summary = events.Event, events.SessionLog, summaries.Summary
        self._file: BinaryIO = open(  # noqa: SIM115 - closed by close()
            run / f"events.out.tfevents.{time.time_ns()}", "wb"
        )
        self._writer = RecordWriter(self._file)
        self._flush_at = 0.0
        self._add(file_version="brain.Event:2")
        if resume_at_frames is not None:
            # TensorBoard then forgets what earlier files of the run say about later steps.
            self._add(step=resume_at_frames + 1, session_log=self._session(status=self._session.START))

    def scalars(self, frames: int, values: Mapping[str, float]) -> None:
        points = [self._summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._add(step=frames, summary=self._summary(value=points))

    def video(self, tag: str, frames: int, array: np.ndarray) -> None:
        _, height, width, _ = array.shape
        gif = encode_gif(array)
        image = self._summary.Image(height=height, width=width, colorspace=RGB, encoded_image_string=gif)
        self._add(step=frames, summary=self._summary(value=[self._summary.Value(tag=tag, image=image)]))

    def close(self) -> None:
        self._file.close()

    def _add(self, **event: Any) -> None:
        self._writer.write(self._event(wall_time=time.time(), **event).SerializeToString())
        if time.monotonic() >= self._flush_at:
            self._file.flush()
            self._flush_at = time.monotonic() + TENSORBOARD_FLUSH
