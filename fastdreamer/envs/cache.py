"""Folders computed once and kept for later runs, in the user's cache directory."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from fastdreamer.config import BadInput


def directory() -> Path:
    """`$XDG_CACHE_HOME/fastdreamer`, by default `~/.cache/fastdreamer`. Anything in it may be deleted between runs."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(root) / "fastdreamer"


def computed_once(name: str, compute: Callable[[Path], None]) -> Path:
    """The folder `name` of the cache directory, filled by `compute(folder)` where it is not there yet.

    It is filled beside and renamed, so it is whole or absent, also where several processes fill it at once.
    Raises BadInput where the cache directory cannot be written.
    """
    target = directory() / name
    if target.is_dir():
        return target
    beside: str | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent)
        compute(Path(beside))
        try:
            os.rename(beside, target)
        except OSError:
            if not target.is_dir():  # else: another process was first, with the same content
                raise
    except OSError as error:
        raise BadInput(
            f"cannot write {target} ({error.strerror or error}): set XDG_CACHE_HOME to a writable folder with room"
        ) from error
    finally:
        if beside is not None:
            shutil.rmtree(beside, ignore_errors=True)
    return target
