"""What the kernels' tests share: memory that shows what was not written, and an interpreter that is twice as fast."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch


@pytest.fixture
def _nan_filled() -> Iterator[None]:
    """Memory that nothing has written holds NaN: what a kernel leaves out, or reads before it is there, is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def once(patch: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Triton's language made fit for the interpreter once in a launch, where Triton does so again in every call of a
    device function: half of the interpreter's time."""
    done: set[int] = set()

    def patched(function: Any) -> Any:
        module = id(function.__globals__)
        if module in done:
            return None
        scope = patch(function)
        if not done and scope is not None:
            # The kernel itself: the end of its launch takes everything back.
            restore = scope.restore
            scope.restore = lambda: (done.clear(), restore())
        done.add(module)
        return scope

    return patched


with contextlib.suppress(ImportError):
    from triton.runtime import interpreter

    interpreter._patch_lang = once(interpreter._patch_lang)
