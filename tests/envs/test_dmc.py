"""DeepMind Control: EnvPool's traps, agreement of the two backends, rendering without a screen."""

import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from typing import Any

import numpy as np
import pytest

from fastdreamer.config import BadInput, EnvConfig
from fastdreamer.envs import dmc, rendering
from fastdreamer.envs.base import Step

VECTOR = EnvConfig(obs="vector")


@pytest.fixture
def no_mujoco_gl(monkeypatch):
    """The user named no OpenGL, and what is chosen for dm_control is undone after the test."""
    monkeypatch.setenv("MUJOCO_GL", "")
    monkeypatch.delenv("MUJOCO_GL")


def make(name: str, config: EnvConfig, seed: int = 0, count: int = 1, first_index: int = 0) -> Any:
    return dmc.build(name, config, seed, count, first_index, None)


def rollout(env: Any, actions: np.ndarray) -> list[Step]:
    """Copies of the rows of `actions` (T, n, A), after that of the reset."""
    rows = []
    for t in range(len(actions) + 1):
        out = Step.empty(actions.shape[1], env.spaces)
        if t == 0:
            env.reset(out)
        else:
            env.step(actions[t - 1], out)
        rows.append(out)
    return rows


def vectors(rows: list[Step]) -> np.ndarray:
    """float32 (T, n, V)."""
    return np.stack([row.vector for row in rows if row.vector is not None])


def random_actions(length: int, count: int, size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (length, count, size)).astype(np.float32)


def assert_rows_equal(a: Step, b: Step) -> None:
    for name in ("image", "vector", "reward", "is_first", "is_last", "is_terminal"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)


# EnvPool's traps, on vectors: no OpenGL.


def test_every_task_of_envpool_has_a_name():
    names = dmc.tasks()
    assert len(names) == len(set(names)) > 50
    assert {"walker_walk", "ball_in_cup_catch", "humanoid_CMU_run", "lqr_lqr_2_1"} <= set(names)


@pytest.mark.usefixtures("no_mujoco_gl")
@pytest.mark.parametrize("backend", ["envpool", "dm_control"])
def test_an_unknown_task_is_refused_with_the_nearest(backend):
    with pytest.raises(BadInput, match=r"dmc/wolker_walk .*dmc/walker_walk"):
        make("wolker_walk", EnvConfig(obs="vector", backend=backend))


def test_action_repeat_steps_as_often_and_sums_every_reward():
    actions = random_actions(250, 2, 1)
    single = rollout(
        make("cartpole_swingup", EnvConfig(obs="vector", action_repeat=1), count=2), np.repeat(actions, 2, 0)
    )
    double = rollout(make("cartpole_swingup", EnvConfig(obs="vector", action_repeat=2), count=2), actions)
    np.testing.assert_array_equal(vectors(double), vectors(single)[::2])
    sums = [single[t].reward.astype(float) + single[t + 1].reward for t in range(1, len(single), 2)]
    np.testing.assert_allclose([row.reward for row in double[1:]], sums, rtol=1e-6)
    assert np.ptp(sums) > 0


def test_an_episode_ends_by_its_limit_and_the_next_one_starts_clean():
    by_repeat = {}
    for repeat, decisions in ((1, 1000), (3, 334)):
        actions = np.zeros((decisions + 2, 1, 1), np.float32)
        config = EnvConfig(obs="vector", action_repeat=repeat)
        by_repeat[repeat] = rows = rollout(make("cartpole_balance", config), actions)
        assert [t for t, row in enumerate(rows) if row.is_last[0]] == [decisions]
        assert [t for t, row in enumerate(rows) if row.is_first[0]] == [0, decisions + 1]
        assert not any(row.is_terminal[0] for row in rows)
        assert rows[decisions + 1].reward[0] == 0
        assert rows[decisions + 2].reward[0] > 0
        assert not np.array_equal(vectors(rows)[0], vectors(rows)[decisions + 1])
        actions[decisions] = 1  # sent for the first row of the next episode, which must ignore it
        for a, b in zip(rows, rollout(make("cartpole_balance", config), actions), strict=True):
            assert_rows_equal(a, b)
    # 1000 = 3 * 333 + 1: the last action is held once, and what comes after belongs to the next episode.
    once, thrice = by_repeat[1], by_repeat[3]
    assert thrice[334].reward[0] == once[1000].reward[0] > 0
    np.testing.assert_allclose(thrice[333].reward, sum(once[t].reward for t in (997, 998, 999)), rtol=1e-6)
    np.testing.assert_array_equal(thrice[335].vector, once[1001].vector)


def test_envpools_stale_reward_is_still_there_to_be_zeroed():
    import envpool

    pool = envpool.make("CartpoleBalance-v1", env_type="gymnasium", num_envs=1, seed=0)
    pool.reset()
    ends = [bool(pool.step(np.zeros((1, 1)))[3][0]) for _ in range(1000)]
    assert ends == [False] * 999 + [True]
    _, reward, _, _, info = pool.step(np.zeros((1, 1)))
    assert info["elapsed_step"][0] == 0
    assert reward[0] > 0


def test_environment_i_follows_from_seed_and_i_however_the_run_is_sliced():
    actions, seed = random_actions(20, 3, 6), 2**31 - 2  # of the three the last one's wraps
    whole = rollout(make("walker_walk", VECTOR, seed, 3), actions)
    parts = [rollout(make("walker_walk", VECTOR, seed, 1, i), actions[:, i : i + 1]) for i in range(3)]
    np.testing.assert_array_equal(vectors(whole), np.concatenate([vectors(part) for part in parts], axis=1))
    for t, row in enumerate(whole):
        np.testing.assert_array_equal(row.reward, np.concatenate([part[t].reward for part in parts]))
    starts = {vectors(rollout(make("walker_walk", VECTOR, seed), actions[:0, :1])).tobytes() for seed in (1, 42)}
    assert len(starts | {start.tobytes() for start in vectors(whole)[0]}) == 5


def test_skipping_gives_the_rows_that_stepping_gives():
    actions = random_actions(507, 2, 1)  # 500 decisions an episode: goes on into the second
    stepped = rollout(make("pendulum_swingup", VECTOR, count=2), actions)
    env = make("pendulum_swingup", VECTOR, count=2)
    out = Step.empty(2, env.spaces)
    env.reset(out)
    for action in actions[:-1]:
        env.skip(action)
    env.step(actions[-1], out)
    assert_rows_equal(out, stepped[-1])


def test_actions_are_rescaled_to_the_tasks_bounds():
    env = make("quadruped_walk", VECTOR)
    space = env._pool.action_space
    assert not np.array_equal(space.high, np.ones(12))
    np.testing.assert_allclose(env._actions(np.full((1, 12), 1.0, np.float32)), space.high[None])
    np.testing.assert_allclose(env._actions(np.full((1, 12), -7.0, np.float32)), space.low[None])
    np.testing.assert_allclose(env._actions(np.zeros((1, 12), np.float32)), (space.high + space.low)[None] / 2)
    unbounded = dmc.Actions(np.array([-1e10]), np.array([1e10]))
    np.testing.assert_array_equal(unbounded(np.array([[0.25]], np.float32)), [[0.25]])


class ScriptedPool:
    """Stands for EnvPool where its tasks give no occasion: environment 0 terminates at its second control step."""

    def __init__(self) -> None:
        self.calls: list[list[int]] = []
        self.rendered = 0
        self.elapsed = {0: 0, 1: 0}
        self.over = {0: False, 1: False}

    def step(self, action: np.ndarray, env_id: np.ndarray) -> tuple[Any, ...]:
        ids = env_id.tolist()[::-1]  # EnvPool promises no order: rows come with their env_id
        self.calls.append(sorted(ids))
        for i in ids:
            self.elapsed[i] = 0 if self.over[i] else self.elapsed[i] + 1
            self.over[i] = i == 0 and self.elapsed[i] == 2
        elapsed = np.array([self.elapsed[i] for i in ids])
        observation = {"position": np.stack([np.full(3, 10 * i + self.elapsed[i]) for i in ids]).astype(float)}
        observation["velocity"] = np.zeros((len(ids), 2))
        reward = np.array([100 * i + 1 for i in ids], np.float32)
        terminated = np.array([self.over[i] for i in ids])
        info = {"env_id": np.array(ids), "elapsed_step": elapsed}
        return observation, reward, terminated, np.zeros(len(ids), bool), info

    def render(self, env_ids: np.ndarray) -> np.ndarray:
        self.rendered += 1
        return np.zeros((len(env_ids), 64, 64, 3), np.uint8)


def test_a_terminated_environment_waits_and_restarts_while_others_go_on():
    env = make("cartpole_balance", EnvConfig(obs="vector", action_repeat=3), count=2)
    env._pool = pool = ScriptedPool()
    action, out = np.zeros((2, 1), np.float32), Step.empty(2, env.spaces)
    env.step(action, out)
    assert pool.calls == [[0, 1], [0, 1], [1]]
    assert out.reward.tolist() == [2, 303]
    assert out.is_last.tolist() == out.is_terminal.tolist() == [True, False]
    assert out.vector is not None
    assert out.vector[:, 0].tolist() == [2, 13]
    env.step(action, out)
    assert pool.calls[3:] == [[0, 1], [1], [1]]
    assert out.reward.tolist() == [0, 303]
    assert out.is_first.tolist() == [True, False]
    assert not out.is_last.any()
    assert not out.is_terminal.any()


def test_a_decision_is_rendered_once_and_a_skipped_one_never():
    env = make("cartpole_balance", EnvConfig(obs="vector", action_repeat=4), count=2)
    env._pool = pool = ScriptedPool()
    out = Step.empty(2, env.spaces)
    env.step(np.zeros((2, 1), np.float32), out)
    assert pool.rendered == 0  # vectors need no frame
    out.image = np.zeros((2, 3, 64, 64), np.uint8)
    env.step(np.zeros((2, 1), np.float32), out)
    assert pool.rendered == 1
    env.skip(np.zeros((2, 1), np.float32))
    assert pool.rendered == 1


# The two backends: vectors here, for they load no OpenGL, and frames in `render_in`.


@pytest.mark.usefixtures("no_mujoco_gl")
@pytest.mark.parametrize(
    "name",
    ["finger_spin", "fish_upright", "humanoid_run", "humanoid_run_pure_state", "quadruped_escape", "quadruped_fetch",
     "quadruped_run",
     # Nothing of another task is in these.
     *(pytest.param(name, marks=pytest.mark.thorough)
       for name in ("fish_swim", "manipulator_bring_ball", "swimmer_swimmer6", "lqr_lqr_2_1"))],
)  # fmt: skip
def test_vectors_have_the_same_entries_in_both_backends(name):
    ours = make(name, VECTOR)
    theirs = make(name, EnvConfig(obs="vector", backend="dm_control"))
    space = ours._pool.observation_space
    shapes = theirs._envs[0]._env.observation_spec()
    assert {entry: space[entry].shape for entry in ours._entries} == {e: shape.shape for e, shape in shapes.items()}
    assert ours.spaces == theirs.spaces


def angles(*differences: float) -> list[float]:
    return [(difference + np.pi) % (2 * np.pi) - np.pi for difference in differences]


def copy_state(name: str, state: dict[str, np.ndarray], physics: Any) -> None:
    """Puts dm_control where EnvPool started: in these tasks the first observation tells the whole state."""
    data = physics.data
    if name == "walker_walk":
        # World angles of the bodies; x and z start at 0 and the joints bend the other way round.
        cosine, sine = state["orientations"].reshape(7, 2).T
        torso, *legs = np.arctan2(sine, cosine)
        parents = (torso, legs[0], legs[1], torso, legs[3], legs[4])
        data.qpos[:] = [0, 0, torso, *angles(*(parent - leg for parent, leg in zip(parents, legs, strict=True)))]
    elif name == "cartpole_swingup":
        x, cosine, sine = state["position"]
        data.qpos[:] = [x, np.arctan2(sine, cosine)]
    else:
        data.qpos[:] = state["position"]
    data.qvel[:] = state["velocity"]
    if name == "reacher_easy":
        physics.forward()
        target = physics.named.data.geom_xpos["finger", :2] + state["to_target"]
        physics.named.model.geom_pos["target", :2] = target


def envpool_rows(name: str, config: EnvConfig, length: int) -> tuple[dict[str, np.ndarray], list[Step]]:
    """With the observation that the episode starts with."""
    env = make(name, config, seed=11)
    start: dict[str, np.ndarray] = {}
    reset = env._pool.reset

    def remember():
        observation, info = reset()
        start.update({entry: value[0].copy() for entry, value in observation.items()})
        return observation, info

    env._pool.reset = remember
    rows = rollout(env, random_actions(length, 1, env.spaces.action))
    return start, rows


def dm_control_rows(name: str, config: EnvConfig, length: int, start: dict[str, np.ndarray]) -> list[Step]:
    """From where EnvPool started."""
    env = make(name, replace(config, backend="dm_control"))
    task = env._envs[0]._env.task
    initialize = task.initialize_episode

    def initialize_as_envpool(physics):
        initialize(physics)
        copy_state(name, start, physics)

    task.initialize_episode = initialize_as_envpool
    return rollout(env, random_actions(length, 1, env.spaces.action))


@pytest.mark.usefixtures("no_mujoco_gl")
@pytest.mark.parametrize(
    ("name", "length"),
    [("cartpole_swingup", 500), ("walker_walk", 60), pytest.param("reacher_easy", 500, marks=pytest.mark.thorough),
     pytest.param("ball_in_cup_catch", 500, marks=pytest.mark.thorough)],
)  # fmt: skip
def test_rewards_vectors_and_ends_agree_over_whole_episodes(name, length):
    """Tolerance: 1e-5 in the vector, 1e-6 in the reward of a decision, ends equal.

    For walker_walk over 60 decisions: its contacts are chaotic, and a last bit of the copied start shows after 125.
    """
    start, ours = envpool_rows(name, VECTOR, length)
    theirs = dm_control_rows(name, VECTOR, length, start)
    for field, tolerance in {"vector": 1e-5, "reward": 1e-6, "is_last": 0, "is_terminal": 0}.items():
        first, second = (np.stack([getattr(row, field) for row in rows]).astype(float) for rows in (ours, theirs))
        np.testing.assert_allclose(first, second, rtol=tolerance, atol=tolerance, err_msg=field)
    assert [bool(row.is_last[0]) for row in theirs] == [False] * length + [length == 500]


@pytest.mark.opengl
@pytest.mark.parametrize("name", ["walker_walk", pytest.param("reacher_easy", marks=pytest.mark.thorough)])
def test_frames_of_both_backends_are_equal_and_fast_ones_differ_as_documented(name, render_in):
    """Tolerance: not a pixel differs, exact or fast, in these tasks (MuJoCo 3.6.0 and dm_control 1.0.38).

    Between exact and fast only frames differ: by 0.3 to 1.2 grey levels in the mean over all published tasks.
    """
    frames: dict[str, np.ndarray] = {}
    rows: dict[str, list[Step]] = {}
    for config in (EnvConfig(obs="both"), EnvConfig(obs="both", render="fast")):
        start, ours = render_in("envpool", envpool_rows, name, config, 3)
        theirs = render_in("dm_control", dm_control_rows, name, config, 3, start)
        frames[config.render], rows[config.render] = np.stack([row.image for row in ours]), ours
        np.testing.assert_array_equal(frames[config.render], np.stack([row.image for row in theirs]), config.render)
        assert frames[config.render].std() > 10
    for exact, fast in zip(rows["exact"], rows["fast"], strict=True):
        np.testing.assert_array_equal(exact.vector, fast.vector)
        np.testing.assert_array_equal(exact.reward, fast.reward)
    assert 0.2 < np.abs(frames["exact"].astype(int) - frames["fast"]).mean() < 2


def quadruped_beside_its_cameras() -> list[float]:
    """A quadruped's mean difference to its cameras 0 and 2."""
    env = make("quadruped_walk", EnvConfig(render="fast"))
    out = Step.empty(1, env.spaces)
    env.reset(out)
    assert out.image is not None
    shown = out.image.astype(int)
    views = [env._pool.render(env_ids=[0], camera_id=camera).transpose(0, 3, 1, 2) for camera in (0, 2)]
    return [float(np.abs(shown - view).mean()) for view in views]


@pytest.mark.opengl
def test_a_quadruped_is_seen_by_its_own_camera(render_in):
    differences = render_in("envpool", quadruped_beside_its_cameras)
    assert differences[0] > 1
    assert differences[1] == 0


@pytest.mark.usefixtures("no_mujoco_gl")
def test_episodes_of_dm_control_follow_from_their_seeds_and_lqr_has_envpools_limit():
    env = make("cartpole_swingup", EnvConfig(obs="vector", backend="dm_control"))._envs[0]
    episodes = []
    for seed in (3, 3, 4):
        rows = [env.reset(seed)[1]]
        rows += [env.step(np.full(1, 0.5, np.float32))[1] for _ in range(5)]
        episodes.append(np.stack(rows))
    np.testing.assert_array_equal(episodes[0], episodes[1])
    assert not np.array_equal(episodes[0], episodes[2])
    config = EnvConfig(obs="vector", backend="dm_control", action_repeat=200)
    lqr = rollout(make("lqr_lqr_2_1", config), np.zeros((5, 1, 1), np.float32))
    assert [bool(row.is_last[0]) for row in lqr] == [False] * 5 + [True]
    assert not any(row.is_terminal[0] for row in lqr)


# Finding OpenGL.


@pytest.fixture
def no_driver(monkeypatch):
    monkeypatch.setenv("__EGL_VENDOR_LIBRARY_DIRS", "/nonexistent")
    rendering._probe.cache_clear()
    yield
    rendering._probe.cache_clear()


@pytest.mark.usefixtures("no_driver")
def test_pixels_without_a_driver_are_refused_naming_the_package_and_vectors_still_work():
    assert not rendering.available()
    with pytest.raises(BadInput, match=r"apt-get install libegl1 .*--obs vector"):
        make("walker_walk", EnvConfig())
    rows = rollout(make("walker_walk", VECTOR), np.zeros((0, 1, 6), np.float32))
    assert vectors(rows)[0, 0, 0] == pytest.approx(1.3)


@pytest.mark.usefixtures("no_driver")
def test_an_opengl_that_the_user_chose_and_that_does_not_start_is_refused(monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "egl")
    with (
        ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool,
        pytest.raises(BadInput, match=r"MUJOCO_GL=egl: dm_control cannot render"),
    ):
        pool.submit(make, "walker_walk", EnvConfig(backend="dm_control")).result()


@pytest.mark.parametrize(
    ("libraries", "starts", "chosen"),
    [
        ({"EGL", "OpenGL"}, True, "egl"),
        ({"EGL", "GL", "OSMesa"}, True, "egl"),
        ({"EGL", "OpenGL", "OSMesa"}, False, "osmesa"),
        ({"EGL", "OSMesa"}, True, "osmesa"),
        ({"OSMesa"}, True, "osmesa"),
        ({"EGL", "OpenGL"}, False, None),
        (set(), True, None),
    ],
)
def test_egl_is_taken_else_osmesa(monkeypatch, no_mujoco_gl, libraries, starts, chosen):
    monkeypatch.setattr(rendering, "_loadable", lambda name: name if name in libraries else None)
    monkeypatch.setattr(rendering, "_egl_starts", lambda *_: starts)
    if chosen is None:
        with pytest.raises(BadInput, match="neither EGL nor OSMesa"):
            rendering.prepare_dm_control(pixels=True, fast=False)
        return
    rendering.prepare_dm_control(pixels=True, fast=False)
    assert os.environ["MUJOCO_GL"] == chosen


def test_a_users_own_mujoco_gl_stays_and_vectors_need_none(monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "glfw")
    rendering.prepare_dm_control(pixels=True, fast=False)
    assert os.environ["MUJOCO_GL"] == "glfw"
    monkeypatch.delenv("MUJOCO_GL")
    rendering.prepare_dm_control(pixels=False, fast=False)
    assert os.environ["MUJOCO_GL"] == "disable"


def test_envpool_says_when_osmesa_could_serve_the_other_backend(monkeypatch):
    monkeypatch.setattr(rendering, "_egl_starts", lambda *_: False)
    monkeypatch.setattr(rendering, "_loadable", lambda name: name)
    with pytest.raises(BadInput, match=r"--backend dm_control.*OSMesa"):
        rendering.prepare_envpool(fast=False)
