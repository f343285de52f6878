"""What every test file shares: where OpenGL or a GPU is missing, tests that need it are skipped and say so."""

import os
from collections.abc import Sequence

import pytest
import torch

# Kernels run in Triton's interpreter where nothing can run them compiled. Triton reads this when a kernel is defined.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

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
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device here"))
        if item.get_closest_marker("interpreter") and torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="kernels run compiled here"))
