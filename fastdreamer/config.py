"""Every option of a run, as frozen dataclasses; presets; the command line. Imports nothing of ours."""

from dataclasses import dataclass, field
from typing import Literal


class BadInput(Exception):
    """The user's input cannot be served. The message is one sentence that names the option and the mend.

    The command line prints it without a traceback and exits with code 2.
    """


@dataclass(frozen=True)
class EnvConfig:
    """How environments are made and stepped."""

    obs: Literal["pixels", "vector", "both"] = "pixels"
    """What the agent sees: 64x64 frames, the state vector, or both."""
    backend: Literal["envpool", "dm_control"] = "envpool"
    """Who simulates `dmc/` tasks."""
    render: Literal["exact", "fast"] = "exact"
    """`fast` renders `dmc/` frames without shadows and multisampling: for machines without a GPU."""
    background: str | None = None
    """Folder of videos played behind `dmc/` frames while training."""
    eval_background: str | None = None
    """Folder of videos played behind `dmc/` frames while evaluating; needed where `background` is given."""
    envs: int = 4
    """Environments stepped in parallel (N)."""
    workers: int = 0
    """Processes that share the environments; 0 chooses by task and processor count."""
    action_repeat: int = 2
    """Frames each action is held for; rewards are summed over them."""
    timeout: float = 60.0
    """Seconds without an answer after which an environment process counts as hung and is restarted."""
