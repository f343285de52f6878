"""A user's own Gymnasium environment: `gym/<Id>`, or `gym/<module>:<Id>` where importing `module` registers it."""

import contextlib
import importlib
import math
import os
import traceback
from typing import Any

import numpy as np

from fastdreamer.config import BadInput, EnvConfig, constructor_arguments
from fastdreamer.envs.adapt import SpaceAdapter
from fastdreamer.envs.background import BehindOne, load
from fastdreamer.envs.base import MEND, Fault, NotFinite, Spaces, nearest, optional
from fastdreamer.envs.episodic import EpisodicBatch, Observation, SingleEnv


def ids() -> list[str]:
    """Every Id that Gymnasium knows before a module of the user's registers others."""
    return sorted(optional("gymnasium", "gym/...").envs.registration.registry)


def build(
    name: str, config: EnvConfig, seed: int, count: int, first_index: int, videos: str | None = None
) -> EpisodicBatch:
    """`count` environments `gym/<name>`; `videos`: what `background.prepare` returned.

    Raises BadInput for an unknown module or Id and an unsupported space.
    """
    task, arguments = f"gym/{name}", constructor_arguments(config.env_args)
    gymnasium = optional("gymnasium", task)
    module, _, identity = name.rpartition(":")
    if module:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module}.".startswith(f"{error.name}."):
                raise
            raise BadInput(
                f"--task {task}: there is no module {error.name} in the current directory or among the installed "
                "packages; run where it lies, or install it."
            ) from None

    backdrop = None if videos is None else load(videos)

    def make(index: int) -> SingleEnv:
        try:
            env = gymnasium.make(identity, disable_env_checker=True, **arguments)
        except (gymnasium.error.UnregisteredEnv, gymnasium.error.DeprecatedEnv):
            known = list(gymnasium.envs.registration.registry)
            raise BadInput(
                f"--task {task} is not registered with Gymnasium (write gym/<module>:<Id> to import the module that "
                f"registers it){nearest(identity, known, 'gym/' + (module and module + ':'))}."
            ) from None
        except gymnasium.error.DependencyNotInstalled as error:
            raise BadInput(f"--task {task} needs a package that is not installed: {error}") from None
        except gymnasium.error.Error as error:
            raise BadInput(f"--task {task} cannot be made by Gymnasium ({error}): mend the name.") from None
        except TypeError as error:
            # Gymnasium raises another one from it.
            cause = error.__cause__ if isinstance(error.__cause__, TypeError) else error
            if "argument" not in str(cause) or not _raised_outside(cause):
                raise cause from None
            given = f"with --env-args {config.env_args}" if arguments else "without arguments"
            raise BadInput(
                f"--task {task} cannot be made {given} ({cause}): give its constructor's by --env-args '{{\"name\": "
                "value, ...}'."
            ) from None
        with contextlib.ExitStack() as stack:
            stack.callback(env.close)
            served = GymEnv(env, task, config, index)
            stack.pop_all()
        return served if backdrop is None else BehindOne(served, backdrop, config.action_repeat)

    return EpisodicBatch(make, seed, count, first_index)


class GymEnv:
    """A Gymnasium environment as a `SingleEnv`: each action is held for `action_repeat` frames, rewards are summed."""

    def __init__(self, env: Any, task: str, config: EnvConfig, index: int) -> None:
        self._env, self._repeat, self._task, self._index = env, config.action_repeat, task, index
        self._steps = 0  # of this episode
        self._adapter = SpaceAdapter(env.observation_space, env.action_space, config.obs, task)

    @property
    def spaces(self) -> Spaces:
        return self._adapter.spaces

    def reset(self, seed: int) -> Observation:
        self._steps = 0
        try:
            answer = self._env.reset(seed=seed)
        except TypeError as error:
            if "unexpected keyword argument" in str(error) and _raised_outside(error):
                raise self._old_api(f"its reset() takes no seed ({error})") from None
            raise
        if not (isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[1], dict)):
            raise self._old_api(f"its reset() returns {_shape(answer)} and not (observation, info)")
        return self._observe(answer[0])

    def step(
        self, action: np.ndarray, render: bool = True
    ) -> tuple[np.ndarray | None, np.ndarray | None, float, bool, bool]:
        native = self._adapter.action(action[None])[0]
        observation, total, terminated, truncated = None, 0.0, False, False
        for _ in range(self._repeat):
            observation, reward, terminated, truncated = self._step(native)
            total += float(reward)
            self._steps += 1
            if terminated or truncated:
                break
        if not math.isfinite(total):
            raise NotFinite(f"--task {self._task} gives a reward that is {total}{self._when}{MEND}")
        image, vector = self._observe(observation) if render else (None, None)
        return image, vector, total, bool(terminated or truncated), bool(terminated)

    def close(self) -> None:
        self._env.close()

    @property
    def _when(self) -> str:
        return f" (environment {self._index}, step {self._steps} of an episode)"

    def _step(self, native: Any) -> tuple[Any, Any, Any, Any]:
        try:
            answer = self._env.step(native)
        except ValueError as error:
            # A wrapper of Gymnasium's takes the answer apart, too.
            if "values to unpack" in str(error) and _raised_outside(error):
                raise self._old_api(f"its step() returns another number of values ({error})") from None
            raise
        if not (isinstance(answer, tuple) and len(answer) == 5):
            raise self._old_api(f"its step() returns {_shape(answer)}")
        return answer[:4]

    def _old_api(self, sign: str) -> Fault:
        return Fault(
            f"--task {self._task} does not speak Gymnasium's API, maybe Gym's old one: {sign}; have reset(seed=..., "
            "options=...) return (observation, info) and step() (observation, reward, terminated, truncated, info), or "
            "wrap it (shimmy has wrappers)."
        )

    def _observe(self, observation: Any) -> Observation:
        batch = _batch_of_one(observation)
        image, vector = self._adapter.image(batch, self._when), self._adapter.vector(batch, self._when)
        return None if image is None else image[0], None if vector is None else vector[0]


def _raised_outside(error: Exception) -> bool:
    """Whether an exception arose as Gymnasium or this module called the environment, and not in its own code."""
    file = traceback.extract_tb(error.__traceback__)[-1].filename
    return file == __file__ or f"{os.sep}gymnasium{os.sep}" in file


def _shape(answer: Any) -> str:
    return f"{len(answer)} values" if isinstance(answer, tuple) else f"a {type(answer).__name__}"


def _batch_of_one(observation: Any) -> Any:
    if isinstance(observation, dict):
        return {key: _batch_of_one(value) for key, value in observation.items()}
    return np.asarray(observation)[None]
