"""Small Gymnasium environments for the tests, registered when this module is imported."""

import os
import sys
import time
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces


class Sample(gymnasium.Env):
    """`length` steps to its end. Observations tell the step and the last native action, plus seeded noise."""

    length, terminal = 7, False

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        super().reset(seed=seed)
        self.t, self.taken = 0, np.zeros(2)
        return self.observe(), {}

    def step(self, action):
        self.t, self.taken = self.t + 1, np.resize(np.asarray(action, np.float64), 2)
        over = self.t >= self.length
        return self.observe(), float(self.taken.sum()), over and self.terminal, over and not self.terminal, {}

    def observe(self) -> Any:
        return np.array([self.t, *self.taken, self.np_random.random()], np.float32)


class Vector(Sample):
    """Box vector, Box actions that are not [-1, 1]; ends by its time limit."""

    observation_space = spaces.Box(-np.inf, np.inf, (4,), np.float32)
    action_space = spaces.Box(np.array([-2, 0], np.float32), np.array([2, 10], np.float32))


class Varied(Vector):
    """Episodes of 2 to 8 steps."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        first = super().reset(seed=seed)
        self.length = int(self.np_random.integers(2, 9))
        return first


class Frames(Sample):
    """Box image, Discrete actions from -1 to 1; ends for good."""

    length, terminal = 5, True
    observation_space = spaces.Box(0, 255, (96, 80, 3), np.uint8)
    action_space = spaces.Discrete(3, start=-1)

    def observe(self) -> np.ndarray:
        frame = np.full((96, 80, 3), self.t, np.uint8)
        frame[..., 1] = 100 + self.taken[0]
        frame[..., 2] = self.np_random.integers(256)
        return frame


class Parts(Sample):
    """Dict of an image and two vectors, one of ints."""

    observation_space = spaces.Dict(
        {
            "z": spaces.Box(-1, 1, (2,), np.float64),
            "camera": spaces.Box(0, 255, (1, 32, 32), np.uint8),
            "a": spaces.Box(0, 9, (3,), np.int64),
        }
    )
    action_space = spaces.Discrete(2)

    def observe(self) -> dict[str, np.ndarray]:
        return {"z": np.array([0.25, 0.5]), "camera": np.full((1, 32, 32), 7, np.uint8), "a": np.arange(3)}


class Odd(Sample):
    """A space that is not served."""

    observation_space = spaces.Tuple((spaces.Discrete(2), spaces.Discrete(2)))
    action_space = spaces.Discrete(2)


class Faulty(Vector):
    """Ends or hangs its process at the third step, in the first process that comes to create the file $FAULT."""

    hang = False

    def step(self, action):
        if self.t == 2:
            try:
                os.close(os.open(os.environ["FAULT"], os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                pass
            else:
                if self.hang:
                    time.sleep(1000)
                print("the arm fell off", file=sys.stderr, flush=True)
                os._exit(9)
        return super().step(action)


class Hanging(Faulty):
    hang = True


class Broken(Vector):
    """Fails at each process's first step."""

    def step(self, action):
        raise ValueError("no such joint")


class Stillborn(Vector):
    def __init__(self):
        raise ValueError("the robot is not plugged in")


class Unseeded(Vector):
    """Not to be brought back: its noise follows from no seed."""

    def observe(self) -> np.ndarray:
        return np.array([self.t, *self.taken, float.fromhex(os.urandom(3).hex())], np.float32)


for _kind in (Vector, Varied, Frames, Parts, Odd, Faulty, Hanging, Broken, Stillborn, Unseeded):
    gymnasium.register(f"{_kind.__name__}-v0", entry_point=f"{__name__}:{_kind.__name__}")
