"""Where frames are rendered: a process for each backend, started when a test first asks for it."""

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from multiprocessing import get_context
from typing import Any

import pytest


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def render_in() -> Iterator[Callable[..., Any]]:
    """`render_in(backend, function, *args)`: its result there. The two backends' OpenGL must not meet in one process,
    nor is either's wanted in this one."""
    with ExitStack() as stack:
        processes: dict[str, ProcessPoolExecutor] = {}

        def call(backend: str, function: Callable[..., Any], *args: Any) -> Any:
            if backend not in processes:
                processes[backend] = stack.enter_context(ProcessPoolExecutor(1, mp_context=get_context("spawn")))
            return processes[backend].submit(function, *args).result()

        yield call
