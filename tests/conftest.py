"""What every test file shares: where OpenGL is missing, tests marked `opengl` are skipped and say so."""

from collections.abc import Sequence

import pytest
import torch


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
