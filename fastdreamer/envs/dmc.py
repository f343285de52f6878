"""DeepMind Control (Tassa et al. 2018, arXiv:1801.00690): `dmc/<domain>_<task>`, by default through EnvPool.

Episodes are 1,000 control steps and end by that limit alone, which is not terminal; only `lqr` tasks can also
terminate (state norm under 1e-6). Rewards are in [0, 1] a control step, but for `lqr`.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from fastdreamer.config import BadInput, EnvConfig
from fastdreamer.envs import rendering
from fastdreamer.envs.background import Playback, load
from fastdreamer.envs.base import IMAGE_SIZE, BatchEnv, Spaces, Step, episode_seed, nearest, optional
from fastdreamer.envs.dmc_task import Actions, camera, vector

# EnvPool's dictionaries are per domain; these entries belong to another task of the domain: zeros, or not in its
# observation in dm_control.
_FETCHED = {"ball_state", "target_position"}
_SENSED = {"origin", "rangefinder"}
_FOREIGN: dict[str, set[str]] = {
    **{f"dog_{gait}": _FETCHED for gait in ("run", "stand", "trot", "walk")},
    "finger_spin": {"target_position", "dist_to_target"},
    "fish_upright": {"target"},
    **{f"humanoid_{gait}": {"position"} for gait in ("run", "stand", "walk")},
    "humanoid_run_pure_state": {"joint_angles", "head_height", "extremities", "torso_vertical", "com_velocity"},
    "quadruped_escape": _FETCHED,
    "quadruped_fetch": _SENSED,
    **{f"quadruped_{gait}": _FETCHED | _SENSED for gait in ("run", "walk")},
}


def _caught(observation: dict[str, np.ndarray]) -> np.ndarray:
    """The reward of `ball_in_cup_catch`, float64 (n,), as dm_control 1.0.38 has it: 1 with the ball in the target.

    EnvPool pays within 0.042 m of the target's centre along both axes, as if the ball's radius were not 0.025 m but the
    0.008 m of the cup's walls.
    """
    cup_x, cup_z, ball_x, ball_z = observation["position"].T
    # Heights and half sizes of the task's model, added in MuJoCo's order: equal to the last bit.
    aside, above = cup_x - ball_x, (0.6 + cup_z - 0.05) - (0.2 + ball_z)
    return (np.maximum(np.abs(aside), np.abs(above)) < 0.05 - 0.025).astype(np.float64)


# Tasks for which EnvPool 1.2.5 pays other rewards than dm_control, and what tells the right one.
_REWARDS: dict[str, Callable[[dict[str, np.ndarray]], np.ndarray]] = {"ball_in_cup_catch": _caught}


def tasks() -> list[str]:
    """Every DeepMind Control task that EnvPool has, `<domain>_<task>`, sorted. Imports EnvPool, but no OpenGL."""
    return sorted(_ids("dmc/..."))


def build(name: str, config: EnvConfig, seed: int, count: int, first_index: int, videos: str | None) -> BatchEnv:
    """Environments `first_index` to `first_index + count - 1` of a run of `dmc/<name>`.

    Environment i of the run follows from `seed` and i alone, however the run is sliced. `videos`: what
    `background.prepare` returned.
    Raises BadInput for an unknown name, a missing package, and pixels where OpenGL is missing.
    """
    if config.backend == "dm_control":
        from fastdreamer.envs.dm_control import build as build_dm_control

        return build_dm_control(name, config, seed, count, first_index, videos)
    return EnvPoolDmc(name, config, seed, count, first_index, videos)


def _ids(task: str) -> dict[str, str]:
    """Name -> EnvPool's id: walker_walk -> WalkerWalk-v1."""
    registration = optional("envpool.mujoco.dmc.registration", task)

    def camel(words: str) -> str:
        return "".join(word[:1].upper() + word[1:] for word in words.split("_"))

    return {f"{d}_{t}": f"{camel(d)}{camel(t)}-v1" for d, t, _ in registration.dmc_mujoco_envs}


class EnvPoolDmc:
    """A `BatchEnv` of `count` environments in one EnvPool.

    The facts about EnvPool 1.2.5 that decide how this reads: environment k of a pool is seeded at construction only,
    and with 42 unless told; `frame_skip` would replace the task's physics substeps and drop rewards, so an action is
    repeated by stepping again; the step after an episode's end resets, ignores its action and returns the last
    reward once more; `from_pixels` would hide the vector; nothing but deletion frees a pool; one Python thread only.
    """

    def __init__(
        self, name: str, config: EnvConfig, seed: int, count: int, first_index: int, videos: str | None
    ) -> None:
        task = f"dmc/{name}"
        ids = _ids(task)
        if name not in ids:
            raise BadInput(f"--task {task} is not a DeepMind Control task{nearest(name, ids, 'dmc/')}.")
        self._pixels = config.obs != "vector"
        options: dict[str, Any] = {}
        edits: list[Callable[[str], str]] = []
        if self._pixels:
            rendering.prepare_envpool(config.render == "fast")
            options = {
                "render_mode": "rgb_array",
                "render_width": IMAGE_SIZE,
                "render_height": IMAGE_SIZE,
                "render_camera_id": camera(name),
            }
            edits += [rendering.without_tip] if name == "finger_spin" else []
            edits += [rendering.simplified] if config.render == "fast" else []
        envpool = optional("envpool", task)
        if edits:
            options["base_path"] = envpool.make_spec(ids[name]).config.base_path
        for edit in edits:
            options["base_path"] = rendering.edited_assets(options["base_path"], edit)
        seeds = [episode_seed(seed, first_index + i) for i in range(count)]
        self._pool = envpool.make(ids[name], env_type="gymnasium", num_envs=count, num_threads=1, seed=seeds, **options)
        self._actions = Actions(self._pool.action_space.low, self._pool.action_space.high)
        self._repeat = config.action_repeat
        self._reward = _REWARDS.get(name)
        self._entries = set(self._pool.observation_space.spaces) - _FOREIGN.get(name, set())
        self._all = np.arange(count, dtype=np.int32)
        self._over = np.zeros(count, bool)
        self._videos = None if videos is None else load(videos)
        self._seed, self._first_index = seed, first_index
        self._episode = [0] * count
        self._playing: list[Playback] = []
        shapes = [self._pool.observation_space[entry].shape for entry in self._entries]
        self.spaces = Spaces(
            image=self._pixels,
            vector=0 if config.obs == "pixels" else sum(int(np.prod(shape)) for shape in shapes),
            action=self._pool.action_space.shape[0],
            discrete=False,
        )

    def reset(self, out: Step) -> None:
        observation, _ = self._pool.reset()
        if self._videos is not None:
            self._playing = [self._play(i) for i in range(len(self._all))]
        out.reward[:], out.is_first[:], out.is_last[:], out.is_terminal[:] = 0, True, False, False
        self._write_vector(observation, self._all, out)
        self._write_image(out)

    def step(self, action: np.ndarray, out: Step) -> None:
        self._advance(action, out)
        self._write_image(out)

    def skip(self, action: np.ndarray) -> None:
        self._advance(action, None)

    def close(self) -> None:
        del self._pool

    def _advance(self, action: np.ndarray, out: Step | None) -> None:
        native = self._actions(action)
        first, terminal = self._over, np.zeros_like(self._over)
        self._over = np.zeros_like(first)
        reward = np.zeros(len(first))
        running = self._all
        for _ in range(self._repeat):
            observation, rewards, terminated, truncated, info = self._pool.step(native[running], running)
            rows = info["env_id"]
            if self._reward is not None:
                rewards = self._reward(observation)
            reward[rows] += np.where(first[rows], 0, rewards)
            self._over[rows], terminal[rows] = terminated | truncated, terminated
            if out is not None:
                self._write_vector(observation, rows, out)
            if self._videos is not None:
                self._play_on(rows, first)
            running = self._all[~(first | self._over)]
            if not len(running):
                break
        if out is not None:
            out.reward[:], out.is_first[:], out.is_last[:], out.is_terminal[:] = reward, first, self._over, terminal

    def _play(self, i: int) -> Playback:
        assert self._videos is not None
        return self._videos.play(self._seed, self._first_index + i, self._episode[i])

    def _play_on(self, rows: np.ndarray, first: np.ndarray) -> None:
        for i in rows.tolist():
            if first[i]:
                self._episode[i] += 1
                self._playing[i] = self._play(i)
            else:
                self._playing[i].advance(1)

    def _write_vector(self, observation: dict[str, np.ndarray], rows: np.ndarray, out: Step) -> None:
        if out.vector is not None:
            out.vector[rows] = vector({entry: observation[entry] for entry in self._entries}, len(rows))

    def _write_image(self, out: Step) -> None:
        if out.image is None:
            return
        out.image[:] = self._pool.render(env_ids=self._all).transpose(0, 3, 1, 2)
        for image, playback in zip(out.image, self._playing, strict=False):
            playback.composite(image)
