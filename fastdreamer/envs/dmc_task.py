"""What both DeepMind Control backends, EnvPool and dm_control, hold a task to."""

import numpy as np

EPISODE_STEPS = 1000
"""Control steps of an episode, in every task and both backends."""
SPARSE = (
    "cartpole_balance_sparse", "cartpole_swingup_sparse", "ball_in_cup_catch", "pendulum_swingup", "reacher_hard",
    "finger_turn_hard", "hopper_hop", "acrobot_swingup",
)  # fmt: skip
"""Tasks that pay rarely: what is learned before the first reward decides."""


def camera(name: str) -> int:
    """The camera of published pixel results: 0, and 2 for quadrupeds. Every task has it."""
    return 2 if name.startswith("quadruped_") else 0


def vector(observation: dict[str, np.ndarray], batch: int) -> np.ndarray:
    """A task's observation dictionary -> float32 (batch, V): its entries in the order of their names."""
    parts = [np.reshape(observation[name], (batch, -1)) for name in sorted(observation)]
    return np.concatenate(parts, axis=1, dtype=np.float32, casting="same_kind")


class Actions:
    """Rescales actions from [-1, 1] to a task's bounds, float64 (A,) each. Unbounded ones (`lqr`) stay as they are."""

    def __init__(self, low: np.ndarray, high: np.ndarray) -> None:
        bounded = high - low < 1e9
        self._centre = np.where(bounded, (low + high) / 2, 0.0)
        self._half = np.where(bounded, (high - low) / 2, 1.0)

    def __call__(self, action: np.ndarray) -> np.ndarray:
        """float (..., A), clipped to [-1, 1] -> float64 (..., A)."""
        return self._centre + self._half * np.clip(action, -1, 1, dtype=np.float64)
