"""Task by task, EnvPool and dm_control on identical states: rewards where they are not zero, vectors and frames.

EnvPool neither shows nor takes a state. But both backends are MuJoCo 3.6.0 and lay out its arrays alike, so EnvPool's
lie in this process's memory a known way from the action it was last given: there they are read, and written over.
"""

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import numpy as np
import pytest

from fastdreamer.config import EnvConfig
from fastdreamer.envs import dmc
from fastdreamer.envs.base import Step

# fmt: off
PUBLISHED = [
    "acrobot_swingup", "ball_in_cup_catch", "cartpole_balance", "cartpole_balance_sparse", "cartpole_swingup",
    "cartpole_swingup_sparse", "cheetah_run", "finger_spin", "finger_turn_easy", "finger_turn_hard",
    "hopper_hop", "hopper_stand", "pendulum_swingup", "quadruped_run", "quadruped_walk", "reacher_easy",
    "reacher_hard", "walker_run", "walker_stand", "walker_walk",
]
OTHERS = [
    "dog_run", "dog_stand", "dog_trot", "dog_walk", "fish_swim", "fish_upright", "humanoid_run",
    "humanoid_stand", "humanoid_walk", "manipulator_bring_ball", "manipulator_bring_peg", "point_mass_easy",
    "stacker_stack_2", "swimmer_swimmer6", "swimmer_swimmer15",
]
# fmt: on

STEPS = 3
"""Decisions after each pose."""

STATE = ("qpos", "qvel", "act", "qacc_warmstart")
DRAWN = {"geom_pos", "geom_size", "site_pos", "body_pos", "body_quat", "light_pos"}
"""Arrays of a model that tasks draw anew in every episode: where targets are."""
COLOURED = {"finger_spin": {"site_rgba"}}
"""Arrays in which the models differ, and frames must not: a mark that dm_control hides, EnvPool colours."""


def fresh(function: Callable, *args: Any) -> Any:
    """`function(*args)` in a process of its own: the two backends' OpenGL must not meet in one."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def places(pattern: bytes) -> list[int]:
    """Addresses in this process's memory at which `pattern` lies, where MuJoCo may have put it."""
    found = []
    with open("/proc/self/maps") as maps:
        regions = [line.split() for line in maps]
    for span, mode, _, _, _, *name in regions:
        if mode.startswith("rw") and name in ([], ["[heap]"]):
            start, end = (int(address, 16) for address in span.split("-"))
            chunk = peek(start, end - start)
            at = chunk.find(pattern)
            while at >= 0:
                found.append(start + at)
                at = chunk.find(pattern, at + 8)
    return found


def peek(place: int, size: int) -> bytes:
    """What lies at an address; less than `size` where memory ends, nothing where there is none."""
    with open("/proc/self/mem", "rb", 0) as memory:
        try:
            return os.pread(memory.fileno(), size, place)
        except OSError:
            return b""


def address(array: Any) -> int:
    return np.asarray(array).ctypes.data


def live(place: int, like: Any) -> np.ndarray:
    """The array at an address, of the shape and dtype of `like`."""
    like = np.asarray(like)
    return np.frombuffer((ctypes.c_char * like.nbytes).from_address(place), like.dtype).reshape(like.shape)


def arrays_of(model: Any) -> dict[str, np.ndarray]:
    """Every array of a `MjModel`, by its name."""
    values = {name: getattr(model, name) for name in dir(model) if not name.startswith("_")}
    return {name: value for name, value in values.items() if isinstance(value, np.ndarray) and value.size}


class Pair:
    """A task in EnvPool, with its arrays in memory, and in dm_control, which does not render here."""

    def __init__(self, name: str, config: EnvConfig, seed: int = 11) -> None:
        self.rng = np.random.default_rng([seed, *name.encode()])
        self.env: Any = dmc.build(name, config, seed, 1, 0, None)
        self.out = Step.empty(1, self.env.spaces)
        self.env.reset(self.out)
        suite: Any = dmc.build(name, EnvConfig(obs="vector", backend="dm_control"), seed, 1, 0, None)
        self.suite = suite._envs[0]._env
        self.suite.reset()
        self.physics, self.task = self.suite.physics, self.suite.task
        self.act()
        self._find(name)
        step = self.env._pool.step

        def step_and_pay(*args: Any) -> Any:
            result = step(*args)
            self.take(self.state())
            self.expected += float(self.task.get_reward(self.physics))
            return result

        self.env._pool.step = step_and_pay

    def act(self) -> None:
        """Takes a random action in EnvPool. `expected`: what dm_control pays for the states it leads through."""
        action = self.rng.uniform(-1, 1, (1, self.env.spaces.action)).astype(np.float32)
        self.native, self.expected = self.env._actions(action)[0], 0.0
        self.env.step(action, self.out)

    def observation(self) -> np.ndarray:
        """dm_control's vector of the state it has now, float32 (V,)."""
        return dmc.vector(self.task.get_observation(self.physics), 1)[0]

    def _find(self, task: str) -> None:
        """Finds EnvPool's model and state, with which dm_control observes what EnvPool does; takes the model over.

        `drawn`: arrays that the episode has drawn for itself. All others but `COLOURED` are equal in both backends.
        """
        data, arrays = self.physics.data, arrays_of(self.physics.model.ptr)
        base = min(address(array) for array in arrays.values())
        size = max(address(array) + array.nbytes for array in arrays.values()) - base
        inertia = arrays["body_inertia"]
        models = []
        for place in places(inertia.tobytes()):
            start = place - (address(inertia) - base)
            held = peek(start, size) if start != base and start % 64 == 0 else b""
            if len(held) == size:
                theirs = {
                    name: np.frombuffer(held, array.dtype, array.size, address(array) - base).reshape(array.shape)
                    for name, array in arrays.items()
                }
                other = {name: theirs[name] for name in arrays if theirs[name].tobytes() != arrays[name].tobytes()}
                if other.keys() <= DRAWN | COLOURED.get(task, set()):
                    models.append({name: array for name, array in other.items() if name in DRAWN})
        given = places(self.native.tobytes())
        self.act()
        shown, best = self.out.vector[0], (np.inf, {}, 0)  # pyright: ignore[reportOptionalSubscript]
        kept = {name: array.copy() for name, array in arrays.items() if name in DRAWN}
        for place in given:
            start = place - (address(data.ctrl) - address(data.qpos))
            # Where an action lies once and not the next one, there may be anything.
            if start % 64 or peek(place, self.native.nbytes) != self.native.tobytes():
                continue
            for model in models:
                for name, array in kept.items():
                    arrays[name][:] = model.get(name, array)
                state = self._state(start)
                if state is None:
                    continue
                self.take(state)
                # Sensors of forces are those of the step before, and no state's: hence the median.
                with np.errstate(over="ignore"):
                    error = float(np.median(np.abs(self.observation() - shown)))
                best = min(best, (error, model, start), key=lambda entry: entry[0])
        error, self.drawn, self._place = best
        assert error < 1e-5, "EnvPool's state is found"
        for name, array in kept.items():
            arrays[name][:] = self.drawn.get(name, array)

    def _state(self, start: int) -> dict[str, np.ndarray] | None:
        """The arrays of a state whose `qpos` lies at `start`; None where there can be no such thing. Copies."""
        state = {}
        for name in STATE:
            like = np.asarray(getattr(self.physics.data, name))
            place = start + address(like) - address(self.physics.data.qpos)
            held = peek(place, like.nbytes) if like.size else b""
            # What is no state may be anything, and end in MuJoCo's errors.
            if len(held) != like.nbytes or not (np.abs(np.frombuffer(held)) < 1e9).all():
                return None
            state[name] = np.frombuffer(held).reshape(like.shape)
        return state

    def state(self) -> dict[str, np.ndarray]:
        """EnvPool's present state."""
        state = self._state(self._place)
        assert state is not None
        return state

    def take(self, state: dict[str, np.ndarray]) -> None:
        """Puts dm_control into a state, with the action that EnvPool was last given."""
        take(self.physics, state | {"ctrl": self.native})

    def put(self) -> None:
        """Puts EnvPool into the positions and velocities that dm_control has."""
        data = self.physics.data
        for name in ("qpos", "qvel"):
            place = self._place + address(getattr(data, name)) - address(data.qpos)
            live(place, getattr(data, name))[:] = getattr(data, name)


def take(physics: Any, state: dict[str, np.ndarray]) -> None:
    """Puts dm_control into a state, with all that follows from it."""
    physics.data.time = 0
    for name, array in state.items():
        getattr(physics.data, name)[:] = array
    physics.forward()
    physics.data.qacc_warmstart[:] = state["qacc_warmstart"]


def pose(name: str, physics: Any, rng: np.random.Generator) -> None:
    """Changes the state of dm_control to one that may earn a reward."""
    domain, qpos, qvel = name.split("_")[0], physics.data.qpos, physics.data.qvel
    named = physics.named.data
    if domain in ("acrobot", "pendulum"):
        qpos[:] = rng.normal(0, 0.2, len(qpos))
    elif domain == "cartpole":
        qpos[:] = rng.uniform(-0.5, 0.5), rng.normal(0, 0.2)
    elif domain == "cheetah":
        qvel[0] = rng.uniform(-2, 12)
    elif domain == "ball":
        qpos[2:] = qpos[:2] + rng.uniform((-0.05, 0.3), (0.05, 0.4))
        qvel[2:] = qvel[:2]
    elif name == "finger_spin":
        qvel[2] = rng.uniform(-30, 0)
    elif domain == "finger":
        qpos[2], qvel[:] = rng.uniform(-np.pi, np.pi), 0
    elif domain == "hopper":
        qpos[:] = rng.normal(0, 0.05, len(qpos))
        qvel[0] = rng.uniform(0, 4)
    elif domain == "walker":
        qpos[:] = rng.normal(0, 0.05, len(qpos))
        qvel[1] = rng.uniform(0, 9)
    elif domain in ("quadruped", "humanoid", "dog"):
        qpos[:] = physics.model.qpos0
        qpos[3:7] += rng.normal(0, 0.05, 4)
        qpos[3:7] /= np.linalg.norm(qpos[3:7])
        qvel[:2] = rng.uniform(-1, 8, 2)
    elif domain == "reacher":
        qpos[:], qvel[:] = rng.uniform(-np.pi, np.pi, 2), 0
    elif domain == "swimmer":
        qpos[:2] = physics.named.model.geom_pos["target", :2] + rng.uniform(-0.5, 0.5, 2)
    elif domain == "fish":
        qpos[:3] = physics.named.model.geom_pos["target"] + rng.uniform(-0.1, 0.1, 3)
        qpos[3:7] = [1, *rng.normal(0, 0.2, 3)]
        qpos[3:7] /= np.linalg.norm(qpos[3:7])
    elif domain == "point":
        qpos[:] = rng.uniform(-0.05, 0.05, 2)
    elif domain == "manipulator":
        thing = name.split("_")[-1]
        target = named.xpos[f"target_{thing}", ["x", "z"]]
        named.qpos[[f"{thing}_x", f"{thing}_z"]] = target + rng.uniform(-0.05, 0.05, 2)
    elif domain == "stacker":
        named.qpos[["box0_x", "box0_z"]] = named.xpos["target", ["x", "z"]] + rng.uniform(-0.03, 0.03, 2)


@dataclass
class Shown:
    """What EnvPool shows and pays after one decision."""

    state: dict[str, np.ndarray]
    reward: float
    expected: float  # what dm_control pays
    error: float  # of dm_control's vector; 0 where it was not asked
    image: np.ndarray | None


def compare(name: str, config: EnvConfig, poses: int) -> tuple[dict[str, np.ndarray], list[Shown]]:
    """Steps EnvPool on from states that earn rewards and some that do not; `Pair.drawn`, and every decision.

    dm_control takes the same decision from the same state. But for the first after a pose, upon which acts what EnvPool
    had derived from the state before: there dm_control says what it pays for the states that EnvPool came through.
    """
    pair = Pair(name, config)
    shown = []
    for _ in range(poses):
        # The best paid of a few, so that rewards lie between the lowest and the highest.
        start = pair.state()
        candidates = []
        for _ in range(int(pair.rng.choice([1, 16, 256]))):
            pair.take(start)
            pose(name, pair.physics, pair.rng)
            pair.physics.forward()
            candidates.append(
                (pair.task.get_reward(pair.physics), pair.physics.data.qpos.copy(), pair.physics.data.qvel.copy())
            )
        _, pair.physics.data.qpos[:], pair.physics.data.qvel[:] = max(candidates, key=lambda entry: entry[0])
        pair.put()
        for step in range(STEPS):
            before = pair.state()
            pair.act()
            expected, error = pair.expected, 0.0
            if step:
                pair.take(before)
                expected = sum(pair.suite.step(pair.native).reward for _ in range(config.action_repeat))
                difference = pair.observation() - pair.out.vector[0]  # pyright: ignore[reportOptionalSubscript]
                error = float(np.abs(difference).max())
            elif name.startswith("dog"):
                continue  # dogs are paid for what they touch, which follows from no state
            image = None if pair.out.image is None else pair.out.image[0].copy()
            after = pair.state() | {"ctrl": pair.native}
            shown.append(Shown(after, float(pair.out.reward[0]), expected, error, image))
    return pair.drawn, shown


def frames(name: str, drawn: dict[str, np.ndarray], states: list[dict[str, np.ndarray]]) -> np.ndarray:
    """dm_control's frames of these states, uint8 (n, 3, 64, 64)."""
    env: Any = dmc.build(name, EnvConfig(backend="dm_control"), 0, 1, 0, None)
    env.reset(Step.empty(1, env.spaces))
    single = env._envs[0]
    for array, value in drawn.items():
        getattr(single._env.physics.model, array)[:] = value
    images = []
    for state in states:
        take(single._env.physics, state)
        images.append(single._render())
    return np.stack(images)


def compare_all(names: list[str], config: EnvConfig, poses: int) -> list[tuple[dict[str, np.ndarray], list[Shown]]]:
    return [compare(name, config, poses) for name in names]


def assert_equal(name: str, shown: list[Shown]) -> None:
    """Tolerance: a reward's rounding to float32; vectors bit for bit."""
    rewards, expected = (np.array([getattr(step, which) for step in shown]) for which in ("reward", "expected"))
    assert rewards.max() > 0.5, f"{name} was rewarded"
    np.testing.assert_allclose(rewards, expected, rtol=0, atol=3e-7, err_msg=name)
    assert max(step.error for step in shown) == 0, name


TWICE = EnvConfig(obs="vector", action_repeat=2)


def test_rewards_are_dm_controls_where_they_are_paid():
    names = ["ball_in_cup_catch", "finger_turn_easy"]
    for name, (_, shown) in zip(names, fresh(compare_all, names, TWICE, 20), strict=True):
        assert_equal(name, shown)
        assert {0, 2} <= {step.reward for step in shown}


@pytest.mark.thorough
@pytest.mark.parametrize("name", PUBLISHED + OTHERS)
def test_rewards_and_vectors_of_every_task(name):
    assert_equal(name, fresh(compare, name, TWICE, 40)[1])


@pytest.mark.thorough
@pytest.mark.opengl
@pytest.mark.parametrize("name", PUBLISHED + OTHERS)
def test_frames_of_every_task(name):
    """Tolerance: not a pixel differs (MuJoCo 3.6.0 and dm_control 1.0.38)."""
    drawn, shown = fresh(compare, name, EnvConfig(obs="both", action_repeat=2), 4)
    found = np.stack([step.image for step in shown if step.image is not None])
    np.testing.assert_array_equal(found, fresh(frames, name, drawn, [step.state for step in shown]))
    assert found.std() > 10
