"""What every test file shares: where OpenGL is missing, tests marked `opengl` are skipped and say so."""

import os
from collections.abc import Sequence

import pytest
import torch

# Networks this small gain nothing from a second thread, and threads that wait for each other on cores that are busy
# with environments cost many times the work itself.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"


def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("opengl")]
    if marked:
        from fastdreamer.envs import rendering

        if not rendering.available():
            skip = pytest.mark.skip(
                reason="no OpenGL platform library here (apt-get install libegl1 libgl1-mesa-dri libopengl0)"
            )
            for item in marked:
                item.add_marker(skip)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device here"))
