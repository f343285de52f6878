"""Natural videos behind the frames of DeepMind Control tasks.

The published protocol (Zhang et al. 2018, arXiv:1811.06032, as MuDreamer uses it): pixels of the rendered frame whose
blue exceeds both green and red are replaced by the pixel of a video; one random video an episode, from a random start
frame, played on at frame rate. The key is published as it is: it also takes blue parts of a body (finger, cartpole).
"""

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from fastdreamer.config import BadInput
from fastdreamer.envs import cache
from fastdreamer.envs.base import IMAGE_SIZE

MAX_VIDEOS = 100
MAX_FRAMES = 1000
"""Frames read of each video: a cache takes at most 100 x 1000 x 12,288 bytes = 1.23 GB, shared by all workers."""

_SUFFIXES = {".avi", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv", ".webm", ".wmv"}
_THREADS = 4  # that decode a video, before anything else runs
_LAYOUT = 1  # part of the cache's name: raise it when what the cache holds changes


def prepare(directory: str, option: str = "--background") -> str:
    """Decodes the videos of a folder once, for all later runs, and returns the path of the cache.

    Takes the first `MAX_VIDEOS` readable files in the order of their names, `MAX_FRAMES` frames of each, resized to
    64x64 without keeping the aspect ratio. The cache belongs to these names, sizes and modification times; old ones
    are not deleted. One video is in memory at a time. An unreadable file is named on stderr and skipped.

    Raises BadInput, naming `option`, where the folder is missing, holds no readable video or PyAV is not installed.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise BadInput(f"{option} {directory}: no such folder; give a folder of video files")
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


class Playback:
    """A video uint8 (T, 3, 64, 64) that goes on with its environment, from its start again after its end."""

    def __init__(self, frames: np.ndarray, position: int) -> None:
        self._frames, self._position = frames, position

    def advance(self, frames: int) -> None:
        """Goes on by as many frames as the environment did."""
        self._position = (self._position + frames) % len(self._frames)

    def composite(self, image: np.ndarray) -> None:
        """Replaces the keyed pixels of `image`, uint8 (3, 64, 64), in place."""
        red, green, blue = image
        keyed = (blue > green) & (blue > red)
        image[:, keyed] = self._frames[self._position][:, keyed]
