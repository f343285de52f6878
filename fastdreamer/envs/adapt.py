"""From Gymnasium spaces to ours: which part of an observation is the image, which the vector, and what an action is.

Serves one environment (a batch of one) and EnvPool's batches alike.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastdreamer.config import BadInput
from fastdreamer.envs.base import IMAGE_SIZE, MEND, Fault, NotFinite, Spaces


class SpaceAdapter:
    """Reads native observations and writes native actions of one task.

    A Box is an image where it is HxWx3, HxWx1, 3xHxW, 1xHxW (uint8, or bounded floats, which are scaled to 0..255) or
    a uint8 HxW; a bounded grid (2-D, not uint8) is an image if `obs` is "pixels" and a vector else; any other Box is a
    vector, but for uint8 of three axes and more: stacked frames, or channels that are no colours. One that holds no
    number is passed over. In a Dict the vectors are concatenated in sorted key order, and one image may stand.
    Images become 64x64: small ones by nearest neighbour, others by area averages; grey is repeated.

    Raises BadInput where `obs` asks for what the observation lacks, or a space is of another kind.
    """

    def __init__(self, observation_space: Any, action_space: Any, obs: str, task: str) -> None:
        images: list[_Part] = []
        vectors: list[_Part] = []
        for key, space in _leaves(observation_space):
            kind = _kind(space, obs)
            if kind == "empty":
                continue
            if kind == "image":
                images.append(_Part(key, space.shape, space.dtype, (0, 255) if _byte(space) else _bounds(space)))
            elif kind == "vector":
                vectors.append(_Part(key, space.shape, space.dtype))
            elif not key or obs != "pixels":
                raise BadInput(
                    f"--task {task} has the observation space {_name(space)}{_at(key)}, and only Box (as image HxWx3, "
                    "HxWx1, 3xHxW, 1xHxW, uint8 HxW, or as vector) and Dict of Box are served: wrap the environment "
                    "so that it gives one of them (gymnasium.wrappers.FlattenObservation gives a vector)."
                )
        if not images and not vectors and obs != "pixels":
            raise BadInput(
                f"--task {task} has the observation space {_name(observation_space)}, which holds no number: wrap the "
                "environment so that it shows something."
            )
        if obs != "vector" and not images:
            raise BadInput(
                f"--obs {obs} needs an image (Box HxWx3, HxWx1, 3xHxW, 1xHxW or uint8 HxW) and --task {task} has none"
                + ("; use --obs vector." if vectors else ": wrap the environment so that it gives one.")
            )
        if obs != "pixels" and not vectors:
            raise BadInput(f"--obs {obs} needs a vector and --task {task} has none; use --obs pixels.")
        if obs != "vector" and len(images) > 1:
            names = ", ".join("/".join(image.key) for image in images)
            raise BadInput(f"--task {task} has several images ({names}): wrap the environment so that it gives one.")
        self._task = task
        self._image = images[0] if obs != "vector" else None
        self._vectors = vectors if obs != "pixels" else []
        self._action = _ActionAdapter(action_space, task)
        self.spaces = Spaces(
            image=self._image is not None,
            vector=sum(int(np.prod(part.shape)) for part in self._vectors),
            action=self._action.size,
            discrete=self._action.discrete,
        )

    def image(self, observation: Any, when: str = "") -> np.ndarray | None:
        """Native batch of n observations -> uint8, broadcastable to (n, 3, 64, 64).

        Raises Fault for one that its space does not allow; the sentence says `when` it was shown.
        """
        if self._image is None:
            return None
        frames = self._read(self._image, observation, when)
        if not _byte(self._image):
            low, high = self._image.bounds or (0, 255)
            frames = np.rint(np.clip((frames - low) / (high - low), 0, 1) * 255)
        frames = frames.astype(np.uint8, copy=False)
        if frames.ndim == 3:
            frames = frames[..., None]
        elif frames.shape[-1] not in (1, 3):
            frames = frames.transpose(0, 2, 3, 1)
        return _resize(frames).transpose(0, 3, 1, 2)

    def vector(self, observation: Any, when: str = "") -> np.ndarray | None:
        """Native batch of n observations -> float32 (n, V). Raises Fault as `image` does."""
        if not self._vectors:
            return None
        parts = [self._read(part, observation, when).astype(np.float32, copy=False) for part in self._vectors]
        vector = np.concatenate([part.reshape(len(part), -1) for part in parts], axis=1)
        if not np.isfinite(vector).all():
            (part, *_) = (one for one, seen in zip(self._vectors, parts, strict=True) if not np.isfinite(seen).all())
            raise self._fault(_not_finite(part), when)
        return vector

    def action(self, action: np.ndarray) -> np.ndarray:
        """float32 (n, A) -> a native batch: int64 (n,), or the Box's dtype (n, *its shape)."""
        return self._action(action)

    def _read(self, part: "_Part", observation: Any, when: str) -> np.ndarray:
        try:
            return part.read(observation)
        except Fault as fault:
            raise self._fault(fault, when) from None

    def _fault(self, fault: Fault, when: str) -> Fault:
        return type(fault)(f"--task {self._task} shows {fault}{when}{MEND}")


@dataclass(frozen=True)
class _Part:
    """A Box that goes into a row: what its space says of it. `bounds` (lowest, highest) are checked where given."""

    key: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: np.dtype
    bounds: tuple[float, float] | None = None

    def read(self, observation: Any) -> np.ndarray:
        """This part of a native batch of n observations, (n, *shape). Raises Fault where its space does not allow it.

        The message is the middle of a sentence. Bytes where the space says bytes cost no look at their values.
        """
        for name in self.key:
            if not isinstance(observation, Mapping) or name not in observation:
                raise Fault(f"an observation without {'/'.join(self.key)}, which its space has")
            observation = observation[name]
        array = np.asarray(observation)
        if array.shape[1:] != self.shape or not array.ndim:
            raise Fault(f"an observation{_at(self.key)} of shape {array.shape[1:]}, and its space says {self.shape}")
        # A space of floats may show whole numbers; one of whole numbers that shows floats means other units.
        if array.dtype.kind not in ("biu" if self.dtype.kind in "biu" else "biuf"):
            raise Fault(f"an observation{_at(self.key)} of type {array.dtype}, and its space says {self.dtype}")
        if self.bounds is not None and not (array.dtype == self.dtype == np.uint8):
            low, high, slack = *self.bounds, 1e-3 * (self.bounds[1] - self.bounds[0])
            least, most = float(array.min()), float(array.max())
            if not np.isfinite([least, most]).all():
                raise _not_finite(self)
            if least < low - slack or most > high + slack:
                raise Fault(
                    f"an observation{_at(self.key)} from {least:.6g} to {most:.6g}, and its space says "
                    f"{low:.6g} to {high:.6g}"
                )
        return array


def _not_finite(part: _Part) -> NotFinite:
    return NotFinite(f"an observation{_at(part.key)} that is not finite")


class _ActionAdapter:
    def __init__(self, space: Any, task: str) -> None:
        name = type(space).__name__
        self.discrete = name == "Discrete"
        if self.discrete:
            self.size, self._start = int(space.n), int(space.start)
        elif _bounded(space):
            self.size = int(np.prod(space.shape))
            self._low, self._span = space.low.astype(np.float64), space.high.astype(np.float64) - space.low
            self._shape, self._dtype = space.shape, space.dtype
        else:
            raise BadInput(
                f"--task {task} has the action space {_name(space)}, and only Discrete and bounded Box of floats are "
                "served: wrap the environment so that it takes one of them."
            )

    def __call__(self, action: np.ndarray) -> np.ndarray:
        if self.discrete:
            return action.argmax(-1) + self._start
        unit = (np.clip(action.astype(np.float64), -1, 1) + 1) / 2
        native = self._low + self._span * unit.reshape(len(action), *self._shape)
        return native.astype(self._dtype)


def _bounded(space: Any) -> bool:
    """Whether it is a Box of floats that are bounded, and of one at least."""
    floats = type(space).__name__ == "Box" and np.issubdtype(space.dtype, np.floating)
    return floats and 0 not in space.shape and bool(np.isfinite([space.low, space.high]).all())


def _leaves(space: Any, key: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    if type(space).__name__ != "Dict":
        return [(key, space)]
    return [leaf for name in sorted(space.spaces) for leaf in _leaves(space.spaces[name], (*key, name))]


def _kind(space: Any, obs: str) -> str | None:
    if type(space).__name__ != "Box":
        return None
    shape, byte = space.shape, _byte(space)
    if 0 in shape:
        return "empty"
    if len(shape) == 2:
        grid = not byte and obs == "pixels" and _bounds(space) is not None
        return "image" if byte or grid else "vector"
    if len(shape) == 3:
        channels = shape[2] in (1, 3) or shape[0] in (1, 3)
        if channels and (byte or _bounds(space) is not None):
            return "image"
    return None if byte and len(shape) > 2 else "vector"


def _bounds(space: Any) -> tuple[float, float] | None:
    low, high = float(np.min(space.low)), float(np.max(space.high))
    # EnvPool writes "unbounded" as the least and the greatest number of the type.
    return (low, high) if high > low and max(abs(low), abs(high)) < 1e9 else None


def _byte(space: Any) -> bool:
    return space.dtype == np.uint8


def _resize(frames: np.ndarray) -> np.ndarray:
    """uint8 (n, H, W, 1 or 3) -> (n, 64, 64, 1 or 3)."""
    _, height, width, channels = frames.shape
    if height == width == IMAGE_SIZE:
        return frames
    if height <= IMAGE_SIZE and width <= IMAGE_SIZE:
        ticks = np.arange(IMAGE_SIZE)
        return frames.take(ticks * height // IMAGE_SIZE, 1).take(ticks * width // IMAGE_SIZE, 2)
    from PIL import Image

    size = (IMAGE_SIZE, IMAGE_SIZE)
    resized = [
        np.asarray(Image.fromarray(frame[..., 0] if channels == 1 else frame).resize(size, Image.Resampling.BOX))
        for frame in frames
    ]
    return np.stack(resized).reshape(len(frames), *size, channels)


def _name(space: Any) -> str:
    text = " ".join(str(space).split())
    return text if len(text) <= 120 else f"{type(space).__name__}{getattr(space, 'shape', '')}"


def _at(key: tuple[str, ...]) -> str:
    return f" at {'/'.join(key)}" if key else ""
