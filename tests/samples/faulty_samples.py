"""Gymnasium environments that go wrong, each in one way, registered when this module is imported."""

import os
import subprocess
import time
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces


class Healthy(gymnasium.Env):
    """Six steps of four numbers."""

    observation_space: spaces.Space = spaces.Box(-1, 1, (4,), np.float32)
    action_space = spaces.Discrete(3)
    limit, t = 6, 0

    def show(self) -> Any:
        return self.np_random.uniform(-1, 1, 4).astype(np.float32)

    def reward(self) -> float:
        return 1.0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.t = 0
        return self.show(), {}

    def step(self, action: Any) -> Any:
        self.t += 1
        return self.show(), self.reward(), False, self.t >= self.limit, {}


class Shows(Healthy):
    """Shows `late` from step 3 on, and before it what its space allows."""

    def __init__(self, space: spaces.Space, late: Any) -> None:
        self.observation_space, self.late = space, late

    def show(self) -> Any:
        return self.late if self.t >= 3 else self.observation_space.sample()


class Short(Healthy):
    def show(self) -> Any:
        return np.full(1, 0.3, np.float32)


class OldReset(Healthy):
    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        return super().reset(seed=seed)[0]


class OldSeed(Healthy):
    def reset(self) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.show()


class OldStep(Healthy):
    def step(self, action: Any) -> Any:
        return self.show(), 1.0, False, {}


class NeedsArguments(Healthy):
    def __init__(self, arena: int, walls: int = 0) -> None:
        if walls > 9:
            raise TypeError("an argument: so many walls do not fit")
        self.arena = arena

    def reward(self) -> float:
        return float(self.arena)


class Unready(Healthy):
    def __init__(self) -> None:
        print("looking for the robot")
        np.zeros(3).reshape(2)


class Blinks(Healthy):
    """Shows NaN at step 3 of every fourth episode or so, as its seed says."""

    blind = False

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        self.blind = (seed or 0) % 4 == 0
        return super().reset(seed=seed)

    def show(self) -> Any:
        return np.full(4, np.nan if self.blind and self.t == 3 else 0.5, np.float32)


class Endless(Healthy):
    """Episodes without an end."""

    limit = 10**9


class Crashes(Healthy):
    """Fails in the midst of every episode, where $CRASHES is set."""

    def reward(self) -> float:
        if self.t == 4 and os.environ.get("CRASHES"):
            raise ValueError("the gripper lost its block")
        return 1.0


class Hangs(Healthy):
    """Hangs at its ninth step, having made the file $FAULT."""

    steps = 0

    def reward(self) -> float:
        self.steps += 1
        if self.steps == 9:
            open(os.environ["FAULT"], "w").close()
            while True:
                time.sleep(1)
        return 1.0


class Simulator(Healthy):
    """Has a child, which has a child in a session of its own, and a file in $OWNED that says so until it is closed."""

    def __init__(self) -> None:
        command = "setsid sleep 3000 & echo $!; exec sleep 3000"
        self.child = subprocess.Popen(["sh", "-c", command], stdout=subprocess.PIPE, text=True)
        assert self.child.stdout is not None
        self.owned = Path(os.environ["OWNED"], str(self.child.pid))
        self.owned.write_text(self.child.stdout.readline())

    def close(self) -> None:
        self.owned.rename(self.owned.with_suffix(".closed"))


class SlowToClose(Simulator):
    """close() does not come to its end."""

    def close(self) -> None:
        super().close()
        while True:
            time.sleep(1)


class Talks(Healthy):
    """Prints 64 KB a step."""

    def reward(self) -> float:
        print(self.t, "x" * 2**16)
        return 1.0


def register() -> None:
    for kind in list(globals().values()):
        if isinstance(kind, type) and issubclass(kind, Healthy):
            gymnasium.register(f"{kind.__name__}-v0", entry_point=f"{__name__}:{kind.__name__}")


register()
gymnasium.register("LimitedOldStep-v0", entry_point=f"{__name__}:OldStep", max_episode_steps=5)
