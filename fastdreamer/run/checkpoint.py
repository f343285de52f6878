"""Checkpoints of a run: written beside and renamed, checked when read, and as large as what is new since the last."""

import contextlib
import errno
import json
import os
import pickle
import re
import shutil
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import torch

from fastdreamer.config import BadInput
from fastdreamer.replay import Replay

FORMAT = 3
READ = (2, FORMAT)
"""Formats that can be gone on from: those of format 2 lack what a turn that was cut short leaves."""
CHUNK_BYTES = 32 << 20
"""Size of a file of replay rows before compression. What is left over is written anew with every checkpoint."""

_SCRATCH = ".unfinished-"
_NUMPY = "__numpy__"
_NAME = re.compile(r"\d{12,}(-\d+)?")


class _Damaged(BadInput):
    """A checkpoint that cannot be read as what it was written."""

    def __init__(self, file: Path, why: object) -> None:
        super().__init__(
            f"{file} is damaged ({' '.join(str(why).split())}): restore it; without it the checkpoint before is taken."
        )


def writing_bytes(replay: int) -> int:
    """Memory that saving takes beside what is saved, in bytes: a few chunks of rows of a replay of so many bytes, those
    written before them, and what they are compressed into."""
    return 3 * min(replay, _threads() * CHUNK_BYTES)


def _threads() -> int:
    return min(8, len(os.sched_getaffinity(0)))


def check_room(folder: Path, state: Mapping[str, Any], replay: Replay) -> None:
    """Raises BadInput where not even `state`, of which nothing can be compressed, fits on the disk of `folder`, and
    prints a line where the full replay beside it might not."""
    there = next(each for each in (folder.absolute(), *folder.absolute().parents) if each.exists())
    free, least = shutil.disk_usage(there).free, sum(value.nbytes for value in _arrays(state).values())
    most = least + replay.slots * _row_bytes(replay)
    if free < least:
        raise BadInput(
            f"A checkpoint takes at least {least / 1e9:.2f} GB and {there} has {free / 1e9:.2f} GB free: make space, "
            "name a folder on another disk by --logdir, or choose a smaller --size."
        )
    if free < most:
        print(
            f"disk: a checkpoint with a full replay takes up to {most / 1e9:.1f} GB (less as far as its rows compress) "
            f"and {there} has {free / 1e9:.1f} GB free",
            flush=True,
        )


class _Chunks:
    """Files of a replay's older rows in `folder`, which several checkpoints may share: they are never changed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # Those that hold rows of this very run: those of a checkpoint it did not go on from may hold other rows.
        self.known: list[dict[str, int]] = []

    def stop(self, replay: Replay) -> int:
        """Number of the first row of `replay` that no file holds."""
        stored = self._stored(replay)
        return _stop(stored[-1]) if stored else replay.oldest

    def prune(self, named: Iterable[Mapping[str, int]]) -> None:
        """Deletes the files that are not among those."""
        names = {_chunk_name(chunk) for chunk in named}
        for path in self.folder.glob("*.npz"):
            if path.name not in names:
                path.unlink()

    def _stored(self, replay: Replay) -> list[dict[str, int]]:
        """The files that already hold rows of `replay`, oldest first and without a gap."""
        chunks = [chunk for chunk in self.known if _stop(chunk) > replay.oldest]
        whole = all(_size(self.folder / _chunk_name(chunk)) == chunk["bytes"] for chunk in chunks)
        return chunks if whole else []

    def write(self, replay: Replay) -> None:
        """Writes the rows that are new, all but the newest, which do not fill a file."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.known = self._stored(replay)
        each = max(1, CHUNK_BYTES // _row_bytes(replay))
        starts = range(self.stop(replay), replay.added - each + 1, each)
        threads = _threads()
        # Frames of natural video deflate at some 30 MB/s a thread, and the run waits. Rows are read in this thread,
        # whose CUDA stream wrote them, and only a few chunks of them at a time.
        with ThreadPoolExecutor(threads) as pool:
            for i in range(0, len(starts), threads):
                parts = [(start, replay.rows(start, start + each)) for start in starts[i : i + threads]]
                self.known = [*self.known, *pool.map(self._write_one, *zip(*parts, strict=True))]
        _sync(self.folder)

    def _write_one(self, first: int, rows: Mapping[str, np.ndarray]) -> dict[str, int]:
        scratch = self.folder / f"{_SCRATCH}{first}"
        written = _write(scratch, lambda file: _save_rows(rows, file))
        chunk = {"first": first, "rows": len(rows["reward"]), **written}
        os.replace(scratch, self.folder / _chunk_name(chunk))
        return chunk

    def load(self, tail: Path, manifest: dict[str, Any], replay: Replay) -> None:
        """Fills `replay` with the rows of a checkpoint, the newest of which are in the file `tail`. Raises _Damaged."""
        added = manifest["replay"]["added"]
        oldest = position = max(0, added - replay.slots)
        parts = [(self.folder / _chunk_name(chunk), chunk) for chunk in manifest["replay"]["chunks"]]
        for file, entry in [*parts, (tail, manifest["files"]["tail.npz"])]:
            rows = _read_rows(file, entry)
            first = entry.get("first", position)
            begin = max(0, oldest - first)  # the ring dropped these after the file was written
            rows = {name: array[begin:] for name, array in rows.items()}
            for name, field in replay.fields.items():
                array = rows.get(name)
                if array is None or array.shape != (len(rows["reward"]), *field.shape[1:]):
                    raise _Damaged(file, f"no {name} of the shape that its manifest states")
            if first + begin != position:
                raise _Damaged(file, f"it begins with row {first + begin} instead of {position}")
            replay.load_rows(position, rows)
            position += len(rows["reward"])
        if position != added:
            raise _Damaged(tail, f"it ends with row {position} instead of {added}")
        replay.restore(added)
        self.known = manifest["replay"]["chunks"]


class Checkpoints:
    """The checkpoints of the run in folder `run`, of which the newest `keep` stay.

        run/checkpoints/<step>/state.pt       everything but the replay
                               tail.npz       the newest rows of the replay
                               manifest.json  sizes, CRC-32 and shapes of it all
        run/replay/<first row>-<last row>-<crc>.npz   older rows, shared by all checkpoints that hold them

    A checkpoint is written under another name, synced and renamed, so a process killed at any moment, or a full
    disk, leaves the one before untouched; what was left half-written goes with the next `save`. Files of older rows
    never change: a save writes the rows that are new and deletes the files that no kept checkpoint names any more.
    Reading never unpickles code. One object follows one run and its one Replay.
    """

    def __init__(self, run: Path, keep: int = 2) -> None:
        self.folder, self.keep, self._chunks = run / "checkpoints", keep, _Chunks(run / "replay")
        self._damaged: set[Path] = set()

    def save(self, step: int, state: Mapping[str, Any], replay: Replay | None) -> Path:
        """Writes a checkpoint and returns its folder.

        `state`: dicts (keys str or int), lists and tuples of tensors, numpy arrays, int, float, str, bool and None;
        anything else raises TypeError with its place. Raises BadInput where the folder cannot be written or the disk
        is full; the checkpoints before are as they were, and `save` can be called again.
        """
        encoded = _encode(state, "state")
        need = sum(value.nbytes for value in _arrays(state).values())
        if replay is not None:
            need += (replay.added - self._chunks.stop(replay)) * _row_bytes(replay)
        try:
            return self._save(step, encoded, shapes(state), replay)
        except OSError as error:
            with contextlib.suppress(OSError):
                self._clean()
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise BadInput(
                    f"The checkpoint of step {step} in {self.folder} needs up to {need:,} bytes and there is no room "
                    f"({error.strerror}): free some, or copy the run to another disk and name its folder with --resume."
                ) from error
            raise BadInput(
                f"The checkpoint of step {step} cannot be written in {self.folder} ({error}): make the folder "
                "writable, or copy the run elsewhere and name its folder with --resume."
            ) from error

    def _save(self, step: int, encoded: Any, found: Mapping[str, tuple], replay: Replay | None) -> Path:
        self._clean()
        self.folder.mkdir(parents=True, exist_ok=True)
        scratch = self.folder / f"{_SCRATCH}{step:012d}"
        scratch.mkdir()
        manifest: dict[str, Any] = {
            "format": FORMAT,
            "step": step,
            "serial": 1 + max((serial for serial, _ in self._readable()), default=0),
            "shapes": found,
            "files": {"state.pt": _write(scratch / "state.pt", lambda file: _save_state(encoded, file))},
            "replay": None,
        }
        if replay is not None:
            self._chunks.write(replay)
            rows = replay.rows(self._chunks.stop(replay), replay.added)
            manifest["files"]["tail.npz"] = _write(scratch / "tail.npz", lambda file: _save_rows(rows, file))
            manifest["replay"] = {"added": replay.added, "chunks": self._chunks.known, "fields": _fields(replay)}
        manifest["crc32"] = _manifest_crc(manifest)
        _write(scratch / "manifest.json", lambda file: file.write(json.dumps(manifest, indent=1).encode()))
        _sync(scratch)
        path = self.folder / f"{step:012d}"
        if path.exists():  # a run that went on from an older checkpoint comes to the same step again
            path = self.folder / f"{step:012d}-{manifest['serial']}"
        os.replace(scratch, path)
        _sync(self.folder)
        self._prune()
        return path

    def _prune(self) -> None:
        """Deletes the checkpoints beyond `keep`, damaged ones first, and the files of rows that none of them names."""
        kept = [path for _, path in self._readable() if path not in self._damaged][-self.keep :]
        for path in self._folders():
            if path not in kept:
                # Renamed first: a checkpoint half deleted would pass for a damaged one.
                scratch = self.folder / f"{_SCRATCH}{path.name}"
                os.replace(path, scratch)
                _remove(scratch)
        manifests = [_read_manifest(path) for path in kept]
        self._chunks.prune(chunk for m in manifests if m["replay"] is not None for chunk in m["replay"]["chunks"])
        self._damaged.clear()

    def _clean(self) -> None:
        """Deletes what an interrupted save left behind."""
        for path in [*self.folder.glob(f"{_SCRATCH}*"), *self._chunks.folder.glob(f"{_SCRATCH}*")]:
            with contextlib.suppress(OSError):
                _remove(path)

    def _folders(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("*") if _NAME.fullmatch(path.name))

    def _readable(self) -> list[tuple[int, Path]]:
        """Serial number and folder of each checkpoint whose manifest can be read, oldest first."""
        found = []
        for path in self._folders():
            try:
                found.append((_read_manifest(path)["serial"], path))
            except _Damaged as error:
                if path not in self._damaged:
                    print(f"Passing over a checkpoint: {error}", file=sys.stderr)
                    self._damaged.add(path)
        return sorted(found)

    def latest(self) -> Path | None:
        """Folder of the checkpoint written last whose manifest can be read; its other files are not looked at."""
        return next((path for _, path in reversed(self._readable())), None)

    def load(
        self, path: Path | None = None, replay: Replay | None = None, expected: Mapping[str, tuple] | None = None
    ) -> dict[str, Any]:
        """Returns the state saved in the folder `path`, and fills `replay` where one is given.

        Without a path takes the checkpoint written last; where that one is damaged says so on stderr and takes the
        one before. Tensors come back on the CPU. `expected` goes to `check_shapes` before anything large is read.
        Raises BadInput where there is no checkpoint, none that can be read, or one of other shapes.
        """
        if path is not None:
            return self._load(path, replay, expected)
        error: BadInput | None = None
        for _, candidate in reversed(self._readable()):
            try:
                return self._load(candidate, replay, expected)
            except _Damaged as damage:
                print(f"Passing over a checkpoint: {damage}", file=sys.stderr)
                self._damaged.add(candidate)
                error = error or damage
        if self._damaged:
            raise BadInput(
                f"No checkpoint in {self.folder} can be read: restore the folder, or start a run without --resume."
            ) from error
        raise BadInput(f"There is no checkpoint in {self.folder}: name a run that has saved one.")

    def _load(self, path: Path, replay: Replay | None, expected: Mapping[str, tuple] | None) -> dict[str, Any]:
        manifest = _read_manifest(path)
        if manifest["format"] not in READ:
            raise BadInput(
                f"{path} has format {manifest['format']} and this version reads {' and '.join(map(str, READ))}: "
                "use its own version."
            )
        if expected is not None:
            check_shapes(expected, {name: tuple(shape) for name, shape in manifest["shapes"].items()})
        if replay is not None:
            if manifest["replay"] is None:
                raise BadInput(f"{path} holds no replay to go on with: start a run anew.")
            here, there = _fields(replay), manifest["replay"]["fields"]
            check_shapes(*({f"replay.{name}": tuple(x) for name, x in each.items()} for each in (here, there)))
        file = path / "state.pt"
        _check_file(file, manifest["files"]["state.pt"])
        try:
            state = _decode(torch.load(file, map_location="cpu", weights_only=True))
        except pickle.UnpicklingError as error:
            raise _Damaged(file, "it holds more than plain data, which could be code") from error
        except (OSError, RuntimeError, ValueError, KeyError, EOFError) as error:
            raise _Damaged(file, type(error).__name__) from error
        if replay is not None:
            self._chunks.load(path / "tail.npz", manifest, replay)
        return state


def shapes(state: Any) -> dict[str, tuple]:
    """Shape of every tensor and numpy array in nested dicts, lists and tuples, by dotted name."""
    return {name: tuple(value.shape) for name, value in _arrays(state).items()}


def check_shapes(expected: Mapping[str, tuple], found: Mapping[str, tuple]) -> None:
    """Raises BadInput that names the first entry in which a checkpoint (`found`) differs, both shapes and the mend.

    What would change a shape cannot change in a resumed run: only an edited record, or another environment, gets here.
    Compares under the top-level names of `expected`; what `found` has under other ones is not looked at.
    """
    roots = {name.split(".")[0] for name in expected}
    for name in [*expected, *(name for name in found if name.split(".")[0] in roots and name not in expected)]:
        if expected.get(name) != found.get(name):
            there, here = (str(each[name]) if name in each else "missing" for each in (found, expected))
            raise BadInput(
                f"The checkpoint is of another shape, {name} being {there} in it and {here} here: the run's "
                "config.yaml or its environment has changed since; make them as they were, or start a run anew."
            )


def _arrays(state: Any, name: str = "") -> dict[str, torch.Tensor | np.ndarray]:
    if isinstance(state, torch.Tensor | np.ndarray):
        return {name: state}
    entries = (
        state.items() if isinstance(state, Mapping) else enumerate(state) if isinstance(state, list | tuple) else ()
    )
    found = {}
    for key, value in entries:
        found.update(_arrays(value, f"{name}.{key}" if name else str(key)))
    return found


def _encode(value: Any, name: str) -> Any:
    """The same in types that torch.load reads with weights_only: plain containers, and arrays as marked tensors."""
    if isinstance(value, Mapping):
        if any(type(key) not in (str, int) or key == _NUMPY for key in value):
            raise TypeError(f"{name} has a key that is neither str nor int, which a checkpoint does not hold")
        return {key: _encode(entry, f"{name}.{key}") for key, entry in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_encode(entry, f"{name}.{i}") for i, entry in enumerate(value))
    if isinstance(value, torch.Tensor):
        return value.detach()
    if isinstance(value, np.ndarray):
        return {_NUMPY: torch.from_numpy(np.array(value, order="C"))}
    # Exact types: a numpy scalar passes for a float, and is refused when it is read.
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise TypeError(f"{name} is a {type(value).__name__}, which a checkpoint does not hold")


def _decode(value: Any) -> Any:
    if isinstance(value, dict):
        if value.keys() == {_NUMPY}:
            return value[_NUMPY].numpy()
        return {key: _decode(entry) for key, entry in value.items()}
    return type(value)(map(_decode, value)) if isinstance(value, list | tuple) else value


def _save_state(encoded: Any, file: BinaryIO) -> None:
    try:
        torch.save(encoded, file)
    except RuntimeError as error:
        # torch complains of its own archive where the file could not be written.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def _save_rows(rows: Mapping[str, np.ndarray], file: BinaryIO) -> None:
    """Writes the .npz that np.savez_compressed would, at the level that takes less than half of the time."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, array in rows.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(cast(BinaryIO, member), array, allow_pickle=False)


def _read_rows(path: Path, entry: Mapping[str, int]) -> dict[str, np.ndarray]:
    _check_file(path, entry)
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise _Damaged(path, error) from error


def _write(path: Path, write: Callable[[BinaryIO], object]) -> dict[str, int]:
    """Writes a file through to the disk: its size in bytes and its CRC-32."""
    with path.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "crc32": _crc(path)}


def _crc(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            crc = zlib.crc32(block, crc)
    return crc


def _check_file(path: Path, entry: Mapping[str, int]) -> None:
    try:
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise _Damaged(path, f"{size} bytes instead of {entry['bytes']}")
        if _crc(path) != entry["crc32"]:
            raise _Damaged(path, "its checksum differs")
    except OSError as error:
        raise _Damaged(path, error.strerror) from error


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / "manifest.json"
    try:
        manifest = json.loads(file.read_bytes())
        if not isinstance(manifest, dict):
            raise ValueError("it is no JSON object")
        crc = manifest.pop("crc32")
    except (OSError, ValueError, KeyError, RecursionError) as error:
        raise _Damaged(file, error) from error
    if crc != _manifest_crc(manifest):
        raise _Damaged(file, "its checksum differs")
    return manifest


def _manifest_crc(manifest: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(manifest, sort_keys=True).encode())


def _fields(replay: Replay) -> dict[str, list[int]]:
    return {name: list(field.shape) for name, field in replay.fields.items()}


def _row_bytes(replay: Replay) -> int:
    return sum(field[0].nbytes for field in replay.fields.values())


def _chunk_name(chunk: Mapping[str, int]) -> str:
    return f"{chunk['first']:012d}-{_stop(chunk) - 1:012d}-{chunk['crc32']:08x}.npz"


def _stop(chunk: Mapping[str, int]) -> int:
    return chunk["first"] + chunk["rows"]


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else -1


def _sync(folder: Path) -> None:
    """A rename or a new file is on the disk only once its folder is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
