"""OpenGL without a screen: finding it, and the cheaper frames of `--render fast`.

Everything here happens before the library that renders is imported, in the worker process that renders. EnvPool and
dm_control never render in the same process: frames came back corrupted where they did.

`--render fast` gives the MuJoCo models a shadow map of 256 pixels instead of 2048 and no multisampling; nothing else
changes, so rewards and vectors stay the same bit for bit. Measured on the 20 tasks of published pixel results with
Mesa 22.3's software rasteriser, EnvPool 1.2.5, 64x64 frames, 60 random steps, one process of a busy 2-core machine:
frames differ by 0.3 (pendulum_swingup) to 1.2 (finger_turn_easy) grey levels of 255 in the mean, 0.9 over all tasks,
and a frame takes a fifth of the time (median ratio 5; walker_walk 10 to 16 ms instead of 48 to 60). Without any
shadows it takes a tenth, but frames differ by up to 29 grey levels (reacher); reflections cost little.
"""

import ctypes
import functools
import glob
import hashlib
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastdreamer.config import BadInput
from fastdreamer.envs import cache

FAST_FRAMES = (
    "--render fast: small shadow maps and no multisampling; frames differ from published ones by 0.3 "
    "(pendulum_swingup) to 1.2 (finger_turn_easy) of 255 grey levels on average"
)
_INSTALL_EGL = "apt-get install libegl1 libopengl0 libgl1-mesa-dri"
_WITHOUT_OPENGL = "or use --obs vector, which needs no OpenGL"
_SOFTWARE = ("llvmpipe", "softpipe", "swrast", "osmesa")


class _Chosen:
    """What this process renders by."""

    gpu: int | None = None
    renderer: str | None = None


def prefer(gpu: int | None) -> None:
    """Has what is prepared from now on render on the GPU that trains: its CUDA index in the trainer, None for none."""
    _Chosen.gpu, _Chosen.renderer = gpu, None


def renderer() -> str | None:
    """The renderer's name, as OpenGL says it, where this process has prepared to render and it is known."""
    return _Chosen.renderer


def told(renderer: str, gpu: bool) -> str:
    """What a run says of its `renderer` as it starts, with a hint where frames could come from the `gpu` and do not."""
    said = f"frames are rendered by {renderer}"
    if not gpu or not any(name in renderer.lower() for name in _SOFTWARE):
        return said
    return (
        f"{said}: on the processor, slowly, beside a CUDA device; install the OpenGL part of its driver (a container: "
        "NVIDIA_DRIVER_CAPABILITIES=all), or name it by "
        "__EGL_VENDOR_LIBRARY_FILENAMES=/usr/share/glvnd/egl_vendor.d/10_nvidia.json"
    )


def available() -> bool:
    """Whether EnvPool can render here: it is installed and an EGL display starts. Sets and loads nothing."""
    return importlib.util.find_spec("envpool") is not None and _egl_starts(*_envpool_libraries())


def prepare_envpool(fast: bool) -> None:
    """Makes EnvPool's rendering work in this process.

    Raises BadInput where no EGL display starts: EnvPool renders through EGL alone.
    """
    libraries = _envpool_libraries()
    if not _egl_starts(*libraries):
        other = (
            "use --backend dm_control, which can render through the OSMesa that is here, "
            if _loadable("OSMesa")
            else ""
        )
        raise BadInput(
            f"--obs pixels: no EGL display starts, which EnvPool needs to render: {_INSTALL_EGL}, {other}"
            f"{_WITHOUT_OPENGL}"
        )
    _choose_display(*libraries)
    # EnvPool 1.2.5 looks OpenGL up among the process's global symbols and finds only libraries loaded so.
    for library in libraries:
        ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
    _set_threads(fast)


def prepare_dm_control(pixels: bool, fast: bool) -> None:
    """Chooses dm_control's OpenGL by setting MUJOCO_GL, which dm_control reads when it is imported.

    A MUJOCO_GL set by the user stays. Raises BadInput where neither EGL nor OSMesa is here.
    """
    if pixels:
        _set_threads(fast)
    if "MUJOCO_GL" in os.environ:
        return
    if not pixels:
        os.environ["MUJOCO_GL"] = "disable"
        return
    egl = _loadable("EGL")
    if egl is not None and (_loadable("OpenGL") or _loadable("GL")) and _egl_starts(egl):
        os.environ["MUJOCO_GL"] = "egl"
        _choose_display(egl)
    elif _loadable("OSMesa"):
        os.environ["MUJOCO_GL"], _Chosen.renderer = "osmesa", "OSMesa"
    else:
        raise BadInput(
            f"--obs pixels: neither EGL nor OSMesa is here to render with: {_INSTALL_EGL}, {_WITHOUT_OPENGL}"
        )


def unusable(error: Exception) -> BadInput:
    """What to raise where dm_control cannot start the OpenGL that MUJOCO_GL names."""
    return BadInput(
        f"MUJOCO_GL={os.environ.get('MUJOCO_GL')}: dm_control cannot render with it ({error}); unset MUJOCO_GL to have "
        f"EGL or OSMesa found, {_INSTALL_EGL}, {_WITHOUT_OPENGL}"
    )


def edited_assets(base_path: str, edit: Callable[[str], str]) -> str:
    """A copy of EnvPool's DeepMind Control models with their XML edited, to be given to EnvPool as `base_path`.

    `base_path` is EnvPool's own. The copy is kept in the cache directory under a name that follows from its content.
    """
    source = Path(base_path) / "mujoco" / "assets_dmc"
    models = {path.relative_to(source): edit(path.read_text()) for path in sorted(source.rglob("*.xml"))}
    key = hashlib.sha256(repr((str(source), sorted(map(str, source.iterdir())), sorted(models.items()))).encode())

    def write(folder: Path) -> None:
        target = folder / "mujoco" / "assets_dmc"
        target.mkdir(parents=True)
        for path in source.iterdir():
            if path.is_dir() and not any(model.is_relative_to(path.name) for model in models):
                (target / path.name).symlink_to(path.resolve())  # meshes: 18 MB, the same in both
        for name, text in models.items():
            (target / name).parent.mkdir(exist_ok=True)
            (target / name).write_text(text)

    return str(cache.computed_once(f"assets-{key.hexdigest()[:20]}", write))


def simplified(xml: str) -> str:
    """A model of EnvPool's for `--render fast`."""
    return re.sub(r'\bshadowsize="\d+"', 'shadowsize="256" offsamples="0"', xml)


def simplify(model: Any) -> None:
    """Does to dm_control's `physics.model`, before its first frame, what `simplified` does to EnvPool's."""
    model.vis.quality.shadowsize = 256
    model.vis.quality.offsamples = 0


def without_tip(xml: str) -> str:
    """EnvPool's model for `finger_spin`, where dm_control hides the fingertip's mark and EnvPool colours it instead."""
    return re.sub(r'<site name="tip" ', r'\g<0>rgba=".5 .5 .5 0" ', xml)


def _set_threads(fast: bool) -> None:
    # One worker a processor renders already: threads of Mesa's rasteriser only cost hand-overs on such cheap frames.
    if fast:
        os.environ.setdefault("LP_NUM_THREADS", "0")


def _envpool_libraries() -> list[str]:
    """The OpenGL libraries of EnvPool's wheel, in the order in which they need each other; else the system's."""
    spec = importlib.util.find_spec("envpool")
    if spec is None or spec.origin is None:
        raise BadInput("--backend envpool needs EnvPool: pip install 'fastdreamer[envs]'")
    folder = Path(spec.origin).parent.parent / "envpool.libs"
    names = ("libGLdispatch-*", "libOpenGL-*", "libEGL-*")
    bundled = [path for name in names for path in glob.glob(str(folder / name))]
    return bundled or [library for name in ("OpenGL", "EGL") if (library := _loadable(name))]


def _loadable(name: str) -> str | None:
    """File name under which the loader finds a system library, tried as PyOpenGL tries them."""
    for suffix in ("", *(f".{version}" for version in range(9, -1, -1))):
        try:
            ctypes.CDLL(f"lib{name}.so{suffix}")
        except OSError:
            continue
        return f"lib{name}.so{suffix}"
    return None


def _egl_starts(*libraries: str) -> bool:
    """Whether the last of these libraries, libEGL, initialises a display."""
    return _probe(_physical(_Chosen.gpu), *libraries) is not None


def _choose_display(*libraries: str) -> None:
    """Has EnvPool and dm_control, which both read MUJOCO_EGL_DEVICE_ID, take the GPU that trains; notes the renderer.

    A MUJOCO_EGL_DEVICE_ID set by the user stays.
    """
    device, _Chosen.renderer = _probe(_physical(_Chosen.gpu), *libraries) or (None, None)
    if device is not None:
        os.environ.setdefault("MUJOCO_EGL_DEVICE_ID", str(device))


def _physical(gpu: int | None) -> int | None:
    """A CUDA device's number among all of the machine, by which EGL calls it; None where the user gave none."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if gpu is None or visible is None:
        return gpu
    names = visible.split(",")
    return int(names[gpu]) if gpu < len(names) and names[gpu].strip().isdigit() else None


@functools.cache
def _probe(gpu: int | None, *libraries: str) -> tuple[int | None, str | None] | None:
    """EGL's number of CUDA device `gpu` (None where EGL has it not) and the renderer's name (None where it says none).

    None where no display starts. Tried in a process of its own: a broken driver may end the process that tries it, and
    a library once loaded stays.
    """
    if not libraries:
        return None
    command = [sys.executable, "-c", _PROBE, str(-1 if gpu is None else gpu), *libraries]
    try:
        done = subprocess.run(command, capture_output=True, timeout=30, text=True, errors="replace")
    except subprocess.TimeoutExpired:
        return None
    # A driver that fails only as the process ends has rendered.
    device, _, name = done.stdout.partition("\n")
    if not device.lstrip("-").isdigit():
        return None
    return (int(device) if int(device) >= 0 else None), name.strip() or None


# Displays are sought as MuJoCo's users seek them: on the devices, else the default one (EGL_EXT_platform_device). The
# first line printed is the number of the CUDA device's display or -1, and comes where a display starts; the second the
# name of the renderer.
_PROBE = """
import ctypes, os, sys
wanted = int(sys.argv[1])
for library in sys.argv[2:]:
    egl = ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
pointer, integer = ctypes.c_void_p, ctypes.c_int
egl.eglGetProcAddress.restype, egl.eglGetProcAddress.argtypes = pointer, [ctypes.c_char_p]
egl.eglGetDisplay.restype, egl.eglGetDisplay.argtypes = pointer, [pointer]
egl.eglInitialize.argtypes = [pointer, pointer, pointer]
def find(name, result, *arguments):
    address = egl.eglGetProcAddress(name)
    return ctypes.CFUNCTYPE(result, *arguments)(address) if address else None
query = find(b"eglQueryDevicesEXT", integer, integer, pointer, pointer)
get = find(b"eglGetPlatformDisplayEXT", pointer, ctypes.c_uint, pointer, pointer)
attribute = find(b"eglQueryDeviceAttribEXT", integer, pointer, integer, pointer)
displays, number = [], -1
if query and get:
    devices, count = (pointer * 16)(), integer(0)
    query(16, devices, ctypes.addressof(count))
    displays = [get(0x313F, devices[i], None) for i in range(count.value)]
    for i in range(count.value if attribute and wanted >= 0 else 0):
        cuda = ctypes.c_ssize_t(-1)
        if attribute(devices[i], 0x323A, ctypes.addressof(cuda)) and cuda.value == wanted:
            number = i
chosen = int(os.environ.get("MUJOCO_EGL_DEVICE_ID") or number)
if 0 <= chosen < len(displays):
    displays = displays[chosen:chosen + 1]
displays.append(egl.eglGetDisplay(None))
display = next((one for one in displays if one and egl.eglInitialize(one, None, None)), None)
if display is None:
    sys.exit(1)
print(number, flush=True)
egl.eglBindAPI.argtypes = [ctypes.c_uint]
egl.eglChooseConfig.argtypes = [pointer, pointer, pointer, integer, pointer]
egl.eglCreateContext.restype, egl.eglCreateContext.argtypes = pointer, [pointer] * 4
egl.eglMakeCurrent.argtypes = [pointer] * 4
config, count = pointer(), integer(0)
wishes = (integer * 5)(0x3033, 0x0001, 0x3040, 0x0008, 0x3038)
if egl.eglBindAPI(0x30A2) and egl.eglChooseConfig(display, wishes, ctypes.byref(config), 1, ctypes.byref(count)):
    context = egl.eglCreateContext(display, config, None, None) if count.value else None
    if context and egl.eglMakeCurrent(display, None, None, context):
        name = find(b"glGetString", ctypes.c_char_p, ctypes.c_uint)
        print(((name and name(0x1F01)) or b"").decode(errors="replace"), flush=True)
"""
