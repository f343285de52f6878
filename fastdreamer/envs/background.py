"""What moves behind the frames of a task: natural videos, or textures that need no file.

The published protocol (Zhang et al. 2018, arXiv:1811.06032, as MuDreamer uses it): pixels of a DeepMind Control frame
whose blue exceeds both green and red are replaced by the pixel of a video; one random video an episode, from a random
start frame, played on at frame rate. The key is published as it is: it also takes blue parts of a body (finger,
cartpole). Tasks of other families show the background where their frames are black.
"""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Protocol

import numpy as np

from fastdreamer.config import NOISE, BadInput
from fastdreamer.envs import cache
from fastdreamer.envs.base import IMAGE_SIZE, BatchEnv, Spaces, Step
from fastdreamer.envs.episodic import Observation, SingleEnv

MAX_VIDEOS = 100
MAX_FRAMES = 1000
"""Frames read of each video: a cache takes at most 100 x 1000 x 12,288 bytes = 1.23 GB, shared by all workers."""

_SUFFIXES = {".avi", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv", ".webm", ".wmv"}
_THREADS = 4  # that decode a video, before anything else runs
_LAYOUT = 1  # part of the cache's name: raise it when what the cache holds changes
_TEXTURES = {f"{NOISE}: training": 0, f"{NOISE}: evaluation": 1000}  # and the first of the seeds they are drawn from


def prepare(directory: str, option: str = "--background") -> str:
    """What `load` takes, of a folder of videos or of `noise`, whose textures in training and evaluation are others.

    Decodes the videos of a folder once, for all later runs: it is the path of the cache.

    Takes the first `MAX_VIDEOS` readable files in the order of their names, `MAX_FRAMES` frames of each, resized to
    64x64 without keeping the aspect ratio. The cache belongs to these names, sizes and modification times; old ones
    are not deleted. One video is in memory at a time. An unreadable file is named on stderr and skipped.

    Raises BadInput, naming `option`, where the folder is missing, holds no readable video or PyAV is not installed.
    """
    if directory == NOISE:
        return f"{NOISE}: {'evaluation' if option == '--eval-background' else 'training'}"
    folder = Path(directory)
    if not folder.is_dir():
        raise BadInput(f"{option} {directory}: no such folder; give a folder of video files, or {NOISE}")
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in _SUFFIXES and path.is_file())
    if not files:
        raise BadInput(f"{option} {directory}: no video in this folder; put {', '.join(sorted(_SUFFIXES))} files there")
    status = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    key = repr((_LAYOUT, IMAGE_SIZE, MAX_VIDEOS, MAX_FRAMES, status)).encode()
    name = f"videos-{hashlib.sha256(key).hexdigest()[:20]}"
    path = cache.computed_once(name, lambda target: _decode_all(files, target, f"{option} {directory}"))
    for line in json.loads((path / "index.json").read_text())["skipped"]:
        print(f"{option} {directory}: skipped unreadable {line}", file=sys.stderr)
    return str(path)


def _decode_all(files: list[Path], target: Path, where: str) -> None:
    """Writes `frames.npy`, uint8 (F, 3, 64, 64), all videos one after another, and `index.json`."""
    try:
        import av.error
    except ModuleNotFoundError as error:
        raise BadInput(f"{where}: reading videos needs PyAV; pip install 'fastdreamer[video]'") from error
    print(f"{where}: decoding up to {min(len(files), MAX_VIDEOS)} videos, once", file=sys.stderr)
    ends: list[int] = []
    skipped: list[str] = []
    with open(target / "frames.npy", "wb") as out:
        _write_header(out, 0)
        for path in files:
            try:
                decoded = list(islice(_decode(path), MAX_FRAMES))
                if not decoded:
                    raise ValueError("no frame")
            except (av.error.FFmpegError, OSError, ValueError) as error:
                skipped.append(f"{path.name} ({error})")
                continue
            for frame in decoded:
                out.write(frame.tobytes())
            ends.append((ends[-1] if ends else 0) + len(decoded))
            if len(ends) == MAX_VIDEOS:
                break
        if not ends:
            raise BadInput(f"{where}: no readable video in this folder; unreadable: {', '.join(skipped)}")
        out.seek(0)
        _write_header(out, ends[-1])
    (target / "index.json").write_text(json.dumps({"ends": ends, "skipped": skipped}))


def _write_header(out, frames: int) -> None:
    # NumPy pads this header so that the first axis can grow in place.
    header = {"descr": "|u1", "fortran_order": False, "shape": (frames, 3, IMAGE_SIZE, IMAGE_SIZE)}
    np.lib.format.write_array_header_1_0(out, header)


def _decode(path: Path) -> Iterator[np.ndarray]:
    """Frames of a video, uint8 (3, 64, 64). Raises FFmpegError, OSError or ValueError."""
    import av

    with av.open(str(path)) as container:
        if not container.streams.video:
            raise ValueError("no video stream")
        container.streams.video[0].codec_context.thread_count = min(_THREADS, len(os.sched_getaffinity(0)))
        for frame in container.decode(video=0):
            small = frame.reformat(width=IMAGE_SIZE, height=IMAGE_SIZE, format="rgb24", interpolation="AREA")
            yield small.to_ndarray().transpose(2, 0, 1)


def load(prepared: str) -> "Backdrop":
    """The textures or videos that `prepare` returned."""
    return Textures(_TEXTURES[prepared]) if prepared in _TEXTURES else Videos(prepared)


class Backdrop(Protocol):
    """What episodes have behind their frames."""

    def play(self, *key: int) -> "Playback":
        """One episode's, drawn from `key` (each >= 0) alone."""
        ...


class Videos:
    """The decoded videos of a folder, mapped into memory: `cache_path` is what `prepare` returned."""

    def __init__(self, cache_path: str) -> None:
        self._frames = np.load(Path(cache_path) / "frames.npy", mmap_mode="r")
        self._ends = json.loads((Path(cache_path) / "index.json").read_text())["ends"]

    def play(self, *key: int) -> "Playback":
        """One episode's video, drawn with its start frame from `key` (each >= 0) alone."""
        rng = np.random.default_rng(key)
        video = int(rng.integers(len(self._ends)))
        start = self._ends[video - 1] if video else 0
        frames = self._frames[start : self._ends[video]]
        return Playback(frames, int(rng.integers(len(frames))))


class Textures:
    """Coloured textures that close upon themselves and drift: distractors without data.

    `TEXTURES` of them, from the seeds `first_seed` on: white noise, its amplitudes divided by frequency to the power
    1.5 as in natural images, uint8 (3, 64, 64), at most `BRIGHTEST` so that a white foreground stands out.
    """

    TEXTURES = 20
    BRIGHTEST = 200
    SPEEDS = (1.0, 4.0)
    """Least and greatest, in pixels a frame."""

    def __init__(self, first_seed: int) -> None:
        self.textures = np.stack([_texture(first_seed + i, self.BRIGHTEST) for i in range(self.TEXTURES)])

    def play(self, *key: int) -> "Drift":
        """One episode's texture, start, direction and speed, drawn from `key` (each >= 0) alone."""
        rng = np.random.default_rng(key)
        texture = self.textures[rng.integers(len(self.textures))]
        angle, speed = rng.uniform(0, 2 * np.pi), rng.uniform(*self.SPEEDS)
        return Drift(texture, rng.uniform(0, IMAGE_SIZE, 2), speed * np.array([np.sin(angle), np.cos(angle)]))


def _texture(seed: int, brightest: int) -> np.ndarray:
    noise = np.random.default_rng(seed).standard_normal((3, IMAGE_SIZE, IMAGE_SIZE))
    frequency = np.hypot(np.fft.fftfreq(IMAGE_SIZE)[:, None], np.fft.fftfreq(IMAGE_SIZE))
    frequency[0, 0] = np.inf  # no constant part
    shaped = np.fft.ifft2(np.fft.fft2(noise) / frequency**1.5).real
    shaped /= shaped.std((1, 2), keepdims=True)
    return np.rint(np.clip(shaped / 4 + 0.5, 0, 1) * brightest).astype(np.uint8)


Key = Callable[[np.ndarray], np.ndarray]
"""Which pixels of uint8 (3, 64, 64) show what is behind: bool (64, 64)."""


def blue(image: np.ndarray) -> np.ndarray:
    """The published key for DeepMind Control."""
    red, green, blue = image
    return (blue > green) & (blue > red)


def black(image: np.ndarray) -> np.ndarray:
    return (image == 0).all(0)


class Playback:
    """A video uint8 (T, 3, 64, 64) that goes on with its environment, from its start again after its end."""

    def __init__(self, frames: np.ndarray, position: int) -> None:
        self._frames, self._position = frames, position

    @property
    def frame(self) -> np.ndarray:
        """What is behind now, uint8 (3, 64, 64)."""
        return self._frames[self._position]

    def advance(self, frames: int) -> None:
        """Goes on by as many frames as the environment did."""
        self._position = (self._position + frames) % len(self._frames)

    def composite(self, image: np.ndarray, key: Key = blue) -> None:
        """Replaces the keyed pixels of `image`, uint8 (3, 64, 64), in place."""
        keyed = key(image)
        image[:, keyed] = self.frame[:, keyed]


class Drift(Playback):
    """A texture uint8 (3, 64, 64) that moves by `velocity` (rows, columns) pixels a frame and comes in again behind."""

    def __init__(self, texture: np.ndarray, start: np.ndarray, velocity: np.ndarray) -> None:
        self._texture, self._place, self._velocity = texture, start, velocity

    @property
    def frame(self) -> np.ndarray:
        down, right = np.rint(self._place).astype(int)
        return np.roll(self._texture, (down, right), (1, 2))

    def advance(self, frames: int) -> None:
        self._place = (self._place + frames * self._velocity) % IMAGE_SIZE


class Behind:
    """A `BatchEnv` with a backdrop where its frames are black.

    Each episode's follows from the run's seed, the environment's index in the run, and the episode's number.
    """

    def __init__(self, env: BatchEnv, backdrop: Backdrop, seed: int, count: int, first_index: int, repeat: int) -> None:
        self._env, self._backdrop, self._repeat = env, backdrop, repeat
        self._seed, self._first_index = seed, first_index
        self._episode = [0] * count
        self._playing: list[Playback] = []
        self.spaces: Spaces = env.spaces
        self._unseen = Step.empty(count, env.spaces)

    def reset(self, out: Step) -> None:
        self._env.reset(out)
        self._playing = [self._play(i) for i in range(len(self._episode))]
        self._composite(out)

    def step(self, action: np.ndarray, out: Step) -> None:
        self._advance(action, out)
        self._composite(out)

    def skip(self, action: np.ndarray) -> None:
        # Only a row says where an episode begins.
        self._advance(action, self._unseen)

    def close(self) -> None:
        self._env.close()

    def _advance(self, action: np.ndarray, out: Step) -> None:
        self._env.step(action, out)
        for i, first in enumerate(out.is_first.tolist()):
            if first:
                self._episode[i] += 1
                self._playing[i] = self._play(i)
            else:
                self._playing[i].advance(self._repeat)

    def _play(self, i: int) -> Playback:
        return self._backdrop.play(self._seed, self._first_index + i, self._episode[i])

    def _composite(self, out: Step) -> None:
        assert out.image is not None
        for image, playback in zip(out.image, self._playing, strict=True):
            playback.composite(image, black)


class BehindOne:
    """A `SingleEnv` with a backdrop where its frames are black; an episode's follows from its seed."""

    def __init__(self, env: SingleEnv, backdrop: Backdrop, repeat: int) -> None:
        self._env, self._backdrop, self._repeat = env, backdrop, repeat
        self._playback: Playback | None = None

    @property
    def spaces(self) -> Spaces:
        return self._env.spaces

    def reset(self, seed: int) -> Observation:
        image, vector = self._env.reset(seed)
        self._playback = self._backdrop.play(seed)
        return self._composited(image), vector

    def step(
        self, action: np.ndarray, render: bool = True
    ) -> tuple[np.ndarray | None, np.ndarray | None, float, bool, bool]:
        image, vector, reward, last, terminal = self._env.step(action, render)
        assert self._playback is not None
        self._playback.advance(self._repeat)
        return self._composited(image), vector, reward, last, terminal

    def close(self) -> None:
        self._env.close()

    def _composited(self, image: np.ndarray | None) -> np.ndarray | None:
        if image is None:
            return None
        assert self._playback is not None
        # What an adapter gives may be a view that its environment keeps, and grey repeated without memory of its own.
        image = np.array(np.broadcast_to(image, (3, IMAGE_SIZE, IMAGE_SIZE)))
        self._playback.composite(image, black)
        return image
