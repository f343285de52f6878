"""Which side a run waits for, environments or updates, and what to raise."""

from fastdreamer import envs
from fastdreamer.config import Config
from fastdreamer.runtime.device import CORES

SETTLED = 10
"""Updates that are not watched: the first ones compile and capture."""
WATCHED = 50
"""Turns that are watched."""
IDLE = 0.1
"""Of its time a turn may wait for environments without their being the limit."""


class Limit:
    """Says once, early in a run, whether its turns wait for environments; nothing more is watched from then on."""

    def __init__(self, config: Config):
        self._config = config
        self._turns, self._waited, self._time = 0, 0.0, 0.0

    def turn(self, waited: float, time: float, updates: int) -> str | None:
        """Takes in a turn: seconds it waited for rows, seconds it took, updates of the run so far. The line, once."""
        if updates <= SETTLED or self._turns == WATCHED:
            return None
        self._turns, self._waited, self._time = self._turns + 1, self._waited + waited, self._time + time
        return self._line() if self._turns == WATCHED else None

    def _line(self) -> str:
        share, env = self._waited / max(self._time, 1e-9), self._config.env
        if share <= IDLE:
            return f"updates are the limit: environments keep up ({share:.0%} of the time waits for their rows)"
        workers = envs.worker_count(self._config.task, env)
        line = (
            f"environments are the limit: {share:.0%} of the time waits for rows of {env.envs} in {workers} processes"
        )
        mends = []
        if self._config.task.startswith("dmc/") and env.obs != "vector" and env.render == "exact":
            mends.append("--render fast draws coarser frames faster")
        if env.workers and env.workers < min(env.envs, CORES):
            mends.append(f"--workers {min(env.envs, CORES)} shares them out over more processes")
        elif env.envs < CORES:
            mends.append(f"--envs {CORES} steps as many as there are cores")
        return f"{line}; {', '.join(mends)}" if mends else f"{line}, on all cores there are"
