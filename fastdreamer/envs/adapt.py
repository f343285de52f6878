"""From Gymnasium spaces to ours: which part of an observation is the image, which the vector, and what an action is.

Serves one environment (a batch of one) and EnvPool's batches alike.
"""

from typing import Any

import numpy as np

from fastdreamer.config import BadInput
from fastdreamer.envs.base import IMAGE_SIZE, Spaces


class SpaceAdapter:
    """Reads native observations and writes native actions of one task.

    A Box is an image where it is HxWx3, HxWx1, 3xHxW, 1xHxW (uint8, or bounded floats, which are scaled to 0..255) or
    a uint8 HxW; a bounded grid (2-D, not uint8) is an image if `obs` is "pixels" and a vector else; any other Box of
    ints or floats is a vector. In a Dict the vectors are concatenated in sorted key order, and one image may stand.
    Images become 64x64: small ones by nearest neighbour, others by area averages; grey is repeated.

    Raises BadInput where `obs` asks for what the observation lacks, or a space is of another kind.
    """

    def __init__(self, observation_space: Any, action_space: Any, obs: str, task: str) -> None:
        images: list[tuple[str, ...]] = []
        vectors: dict[tuple[str, ...], int] = {}
        self._bounds: tuple[float, float] | None = None
        for key, space in _leaves(observation_space):
            kind = _kind(space, obs)
            if kind == "image":
                images.append(key)
                self._bounds = None if space.dtype == np.uint8 else _bounds(space)
            elif kind == "vector":
                vectors[key] = int(np.prod(space.shape))
            elif not key or obs != "pixels":
                raise BadInput(
                    f"--task {task} has the observation space {_name(space)}{_at(key)}, and only Box (as image HxWx3, "
                    "HxWx1, 3xHxW, 1xHxW, uint8 HxW, or as vector) and Dict of Box are served: wrap the environment "
                    "so that it gives one of them."
                )
        if obs != "vector" and not images:
            raise BadInput(
                f"--obs {obs} needs an image (Box HxWx3, HxWx1, 3xHxW, 1xHxW or uint8 HxW) and --task {task} has none"
                + ("; use --obs vector." if vectors else ": wrap the environment so that it gives one.")
            )
        if obs != "pixels" and not vectors:
            raise BadInput(f"--obs {obs} needs a vector and --task {task} has none; use --obs pixels.")
        if obs != "vector" and len(images) > 1:
            names = ", ".join("/".join(key) for key in images)
            raise BadInput(f"--task {task} has several images ({names}): wrap the environment so that it gives one.")
        self._image = images[0] if obs != "vector" else None
        self._vectors = sorted(vectors) if obs != "pixels" else []
        self._action = _ActionAdapter(action_space, task)
        self.spaces = Spaces(
            image=self._image is not None,
            vector=sum(vectors[key] for key in self._vectors),
            action=self._action.size,
            discrete=self._action.discrete,
        )

    def image(self, observation: Any) -> np.ndarray | None:
        """Native batch of n observations -> uint8, broadcastable to (n, 3, 64, 64)."""
        if self._image is None:
            return None
        frames = np.asarray(_pick(observation, self._image))
        if self._bounds is not None:
            low, high = self._bounds
            frames = np.rint(np.clip((frames - low) / (high - low), 0, 1) * 255).astype(np.uint8)
        if frames.ndim == 3:
            frames = frames[..., None]
        elif frames.shape[-1] not in (1, 3):
            frames = frames.transpose(0, 2, 3, 1)
        return _resize(frames).transpose(0, 3, 1, 2)

    def vector(self, observation: Any) -> np.ndarray | None:
        """Native batch of n observations -> float32 (n, V)."""
        if not self._vectors:
            return None
        parts = [np.asarray(_pick(observation, key), np.float32) for key in self._vectors]
        return np.concatenate([part.reshape(len(part), -1) for part in parts], axis=1)

    def action(self, action: np.ndarray) -> np.ndarray:
        """float32 (n, A) -> a native batch: int64 (n,), or the Box's dtype (n, *its shape)."""
        return self._action(action)


class _ActionAdapter:
    def __init__(self, space: Any, task: str) -> None:
        name = type(space).__name__
        self.discrete = name == "Discrete"
        if self.discrete:
            self.size, self._start = int(space.n), int(space.start)
        elif name == "Box" and np.issubdtype(space.dtype, np.floating) and np.isfinite([space.low, space.high]).all():
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


def _leaves(space: Any, key: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    if type(space).__name__ != "Dict":
        return [(key, space)]
    return [leaf for name in sorted(space.spaces) for leaf in _leaves(space.spaces[name], (*key, name))]


def _kind(space: Any, obs: str) -> str | None:
    if type(space).__name__ != "Box":
        return None
    shape, byte = space.shape, space.dtype == np.uint8
    if len(shape) == 2:
        grid = not byte and obs == "pixels" and _bounds(space) is not None
        return "image" if byte or grid else "vector"
    if len(shape) == 3:
        channels = shape[2] in (1, 3) or shape[0] in (1, 3)
        return "image" if channels and (byte or _bounds(space) is not None) else None
    return None if byte and len(shape) > 3 else "vector"


def _bounds(space: Any) -> tuple[float, float] | None:
    low, high = float(np.min(space.low)), float(np.max(space.high))
    # EnvPool writes "unbounded" as the least and the greatest number of the type.
    return (low, high) if high > low and max(abs(low), abs(high)) < 1e9 else None


def _pick(observation: Any, key: tuple[str, ...]) -> Any:
    for name in key:
        observation = observation[name]
    return observation


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
