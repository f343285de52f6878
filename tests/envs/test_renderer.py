"""Who renders: its name is told, software beside a GPU is warned of, and the GPU that trains is taken."""

import os
from pathlib import Path

import pytest
from runs import SMALL

from fastdreamer import envs, train
from fastdreamer.config import EnvConfig
from fastdreamer.envs import rendering

SAMPLES = Path(__file__).parents[1] / "samples"


@pytest.fixture(autouse=True)
def _unchosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(SAMPLES)
    # Set, then deleted: what the code sets is taken back, too.
    for name in ("MUJOCO_EGL_DEVICE_ID", "CUDA_VISIBLE_DEVICES", "MUJOCO_GL"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(rendering._Chosen, "gpu", None)
    monkeypatch.setattr(rendering._Chosen, "renderer", None)


def test_software_beside_a_gpu_is_warned_of() -> None:
    for name in ("llvmpipe (LLVM 15.0.6, 256 bits)", "OSMesa"):
        assert rendering.told(name, gpu=False) == f"frames are rendered by {name}"
        warned = rendering.told(name, gpu=True)
        assert warned.startswith(f"frames are rendered by {name}: on the processor, slowly, beside a CUDA device")
        assert "__EGL_VENDOR_LIBRARY_FILENAMES=" in warned
    assert rendering.told("NVIDIA H100/PCIe/SSE2", gpu=True) == "frames are rendered by NVIDIA H100/PCIe/SSE2"


@pytest.mark.parametrize(
    ("gpu", "visible", "physical"),
    [(None, None, None), (1, None, 1), (1, "4,6", 6), (0, "4,6", 4), (0, "GPU-8932f937", None), (2, "4,6", None)],
)
def test_the_gpu_is_named_as_the_machine_does(gpu, visible, physical, monkeypatch: pytest.MonkeyPatch) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert rendering._physical(gpu) == physical


def test_the_gpu_that_trains_renders(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def probe(gpu: int | None, *_: str) -> tuple[int | None, str | None]:
        asked.append(gpu)
        return {6: 2}.get(gpu or 0), "NVIDIA H100"

    monkeypatch.setattr(rendering, "_probe", probe)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    rendering.prefer(0)
    rendering._choose_display("libEGL.so")
    assert "MUJOCO_EGL_DEVICE_ID" not in os.environ, "EGL does not have it"
    rendering.prefer(1)
    rendering._choose_display("libEGL.so")
    assert rendering.renderer() == "NVIDIA H100"
    assert os.environ["MUJOCO_EGL_DEVICE_ID"] == "2"
    monkeypatch.setenv("MUJOCO_EGL_DEVICE_ID", "0")
    rendering._choose_display("libEGL.so")
    assert os.environ["MUJOCO_EGL_DEVICE_ID"] == "0", "the user's stays"
    assert set(asked) == {4, 6}


def test_libraries_that_do_not_start_are_no_renderer() -> None:
    assert rendering._probe(None) is None
    assert rendering._probe(0, "libnot-there.so") is None


@pytest.mark.opengl
def test_a_run_tells_its_renderer_once(capsys: pytest.CaptureFixture[str]) -> None:
    task = ["--task", "dmc/cartpole_balance", "--render", "fast", "--envs", "1"]
    assert train.main([*SMALL, *task, "--dry-run"]) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if "rendered by" in line]
    assert len(told) == 1
    assert told[0].startswith("frames are rendered by ")


def test_what_renders_nothing_has_no_renderer() -> None:
    with envs.make("dmc/cartpole_balance", EnvConfig(envs=1, obs="vector"), 0, gpu=0) as environments:
        assert environments.renderer is None
