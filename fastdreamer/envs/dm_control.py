"""DeepMind Control through dm_control itself: `--backend dm_control`.

dm_control 1.0.38 with MuJoCo 3.6.0 gives the rewards, ends and frames that `dmc` gives with EnvPool 1.2.5; initial
states are drawn otherwise, so the same seed is another episode.
"""

from typing import Any

import numpy as np

from fastdreamer.config import BadInput, EnvConfig
from fastdreamer.envs import rendering
from fastdreamer.envs.background import Backdrop, load
from fastdreamer.envs.base import IMAGE_SIZE, Spaces, nearest, optional
from fastdreamer.envs.dmc_task import EPISODE_STEPS, Actions, camera, vector
from fastdreamer.envs.episodic import EpisodicBatch, Observation

_FREE, _, _SLIDE, _HINGE = range(4)
"""MuJoCo's kinds of joints (`mjtJoint`); the second is a ball."""
_FOLLOWED = {
    "walker": ("rootx",), "cheetah": ("rootx",), "hopper": ("rootx",), "swimmer": ("rootx", "rooty"),
}  # fmt: skip
"""By domain the joints that the camera follows."""


def build(name: str, config: EnvConfig, seed: int, count: int, first_index: int, videos: str | None) -> EpisodicBatch:
    """As `dmc.build`. Raises BadInput for an unknown name, a missing package, and pixels where OpenGL is missing."""
    rendering.prepare_dm_control(config.obs != "vector", config.render == "fast")
    shared = None if videos is None else load(videos)
    return EpisodicBatch(lambda _: DmControl(name, config, shared), seed, count, first_index)


class DmControl:
    """One environment of `dmc/<name>`, as a `SingleEnv`: everything random in an episode follows from its seed.

    But for `lqr`, whose random springs are drawn once: they are the same in every environment.
    """

    def __init__(self, name: str, config: EnvConfig, videos: Backdrop | None) -> None:
        suite = _suite(f"dmc/{name}")
        known = {f"{domain}_{task}": (domain, task) for domain, task in suite.ALL_TASKS}
        if name not in known:
            raise BadInput(f"--task dmc/{name} is not a DeepMind Control task{nearest(name, known, 'dmc/')}.")
        self._domain, task = known[name]
        self._env: Any = suite.load(self._domain, task, task_kwargs={"random": 0})
        self._pixels, self._vector = config.obs != "vector", config.obs != "pixels"
        if self._pixels and config.render == "fast":
            rendering.simplify(self._env.physics.model)
        if self._pixels:
            _start_opengl(self._env.physics)
        bounds, entries = self._env.action_spec(), self._env.observation_spec()
        self._actions = Actions(bounds.minimum, bounds.maximum)
        self._camera, self._repeat = camera(name), config.action_repeat
        self._videos, self._playback = videos, None
        self._steps = 0
        self.spaces = Spaces(
            image=self._pixels,
            vector=sum(int(np.prod(entry.shape)) for entry in entries.values()) if self._vector else 0,
            action=bounds.shape[0],
            discrete=False,
        )

    def reset(self, seed: int) -> Observation:
        self._env.task.random.seed(seed)
        self._steps = 0
        self._playback = None if self._videos is None else self._videos.play(seed)
        self._env.reset()
        return self._observe()

    def step(
        self, action: np.ndarray, render: bool = True
    ) -> tuple[np.ndarray | None, np.ndarray | None, float, bool, bool]:
        native, reward, last, terminal = self._actions(action), 0.0, False, False
        for _ in range(self._repeat):
            timestep = self._env.step(native)
            self._steps += 1
            reward += timestep.reward
            if self._playback is not None:
                self._playback.advance(1)
            # `lqr` has no time limit of its own here, and EnvPool's is everywhere the same.
            last = timestep.last() or self._steps >= EPISODE_STEPS
            if last:
                terminal = timestep.discount == 0
                break
        image, state = self._observe() if render else (None, None)
        return image, state, reward, last, terminal

    def truth(self) -> dict[str, np.ndarray]:
        """What holds in the state that was shown last, float32, for probes of what an agent knows of it.

        `qpos`: positions of joints in metres, hinges as sine and cosine, rotations as the nine entries of their matrix
        (an angle and a quaternion of either sign are the same picture); without what no frame shows, since the camera
        follows: x of walker, cheetah and hopper, x and y of swimmer and of bodies that move freely. `qvel`: velocities
        of all degrees of freedom, per second. `contact`, one for each body, the world first: 1 where a geometry of it
        touches another. Flags and not forces: what MuJoCo holds of contacts belongs to this state, of forces to the
        substep before.
        """
        model, data = self._env.physics.model, self._env.physics.data
        contact = np.zeros(model.nbody, np.float32)
        contact[model.geom_bodyid[data.contact.geom[data.contact.dist <= 0]]] = 1
        qpos = np.concatenate([self._joint(i) for i in range(model.njnt)])
        return {"qpos": qpos.astype(np.float32), "qvel": data.qvel.astype(np.float32), "contact": contact}

    def _joint(self, index: int) -> np.ndarray:
        model, data = self._env.physics.model, self._env.physics.data
        kind, start = model.jnt_type[index], model.jnt_qposadr[index]
        if kind == _SLIDE:
            followed = model.id2name(index, "joint") in _FOLLOWED.get(self._domain, ())
            return data.qpos[start : start + (not followed)]
        if kind == _HINGE:
            return np.array([np.sin(data.qpos[start]), np.cos(data.qpos[start])])
        height = data.qpos[start + 2 : start + 3] if kind == _FREE else ()
        w, x, y, z = data.qpos[start + (3 if kind == _FREE else 0) :][:4]
        return np.array([
            *height, 1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y), 2 * (x * y + w * z),
            1 - 2 * (x * x + z * z), 2 * (y * z - w * x), 2 * (x * z - w * y), 2 * (y * z + w * x),
            1 - 2 * (x * x + y * y),
        ])  # fmt: skip

    def close(self) -> None:
        self._env.close()

    def _observe(self) -> Observation:
        return (
            self._render() if self._pixels else None,
            vector(self._env.task.get_observation(self._env.physics), 1)[0] if self._vector else None,
        )

    def _render(self) -> np.ndarray:
        frame = self._env.physics.render(IMAGE_SIZE, IMAGE_SIZE, camera_id=self._camera)
        image = np.ascontiguousarray(frame.transpose(2, 0, 1))
        if self._playback is not None:
            self._playback.composite(image)
        return image


def _suite(task: str) -> Any:
    try:
        return optional("dm_control.suite", task)
    except (ImportError, AttributeError, RuntimeError) as error:
        # What dm_control and PyOpenGL raise where the OpenGL that MUJOCO_GL names does not start.
        raise rendering.unusable(error) from error


def _start_opengl(physics: Any) -> None:
    try:
        _ = physics.contexts
    except Exception as error:  # of whichever library MUJOCO_GL names; no frame can be had without a context
        raise rendering.unusable(error) from error
