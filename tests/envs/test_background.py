"""Video backgrounds: decoding once, what is refused, and what stands behind the frames of both backends."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastdreamer.config import BadInput, EnvConfig
from fastdreamer.envs import background, dmc
from fastdreamer.envs.background import Playback, Videos
from fastdreamer.envs.base import Spaces, Step
from fastdreamer.envs.episodic import episode_seed

SEED, FIRST_INDEX = 5, 1


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write_video(path: Path, frames: int, red: int, size: tuple[int, int] = (96, 80)) -> None:
    """Frame t is one grey-free colour: (red, 4 t, 40)."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.bit_rate = 4_000_000
        for t in range(frames):
            picture = np.broadcast_to(np.array([red, 4 * t, 40], np.uint8), (size[1], size[0], 3))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")))
        container.mux(stream.encode())


@pytest.fixture
def folder(tmp_path):
    videos = tmp_path / "videos"
    videos.mkdir()
    write_video(videos / "b.mp4", 12, red=200)
    write_video(videos / "a.avi", 7, red=100)
    return videos


def frames_of(cache: str) -> np.ndarray:
    return np.load(Path(cache) / "frames.npy", mmap_mode="r")


def test_videos_are_decoded_in_order_of_names_at_64_pixels(folder):
    frames = frames_of(background.prepare(str(folder)))
    assert frames.shape == (7 + 12, 3, 64, 64)
    assert frames.dtype == np.uint8
    expected = np.array([[100, 4 * t, 40] for t in range(7)] + [[200, 4 * t, 40] for t in range(12)])
    # A lossy codec in YUV: a few grey levels of error, but order and channels are plain.
    assert np.abs(frames.mean((2, 3)) - expected).max() < 12


def test_a_folder_is_decoded_once_and_again_when_it_changes(folder, monkeypatch):
    first = background.prepare(str(folder))
    with monkeypatch.context() as patch:
        patch.setattr(background, "_decode", None)
        assert background.prepare(str(folder)) == first
    write_video(folder / "c.mp4", 3, red=50)
    second = background.prepare(str(folder))
    assert second != first
    assert len(frames_of(second)) == 7 + 12 + 3
    assert {path.name for path in Path(first).parent.iterdir()} == {Path(first).name, Path(second).name}


def test_at_most_so_many_videos_and_frames(folder, monkeypatch):
    monkeypatch.setattr(background, "MAX_FRAMES", 5)
    assert len(frames_of(background.prepare(str(folder)))) == 5 + 5
    monkeypatch.setattr(background, "MAX_VIDEOS", 1)
    assert len(frames_of(background.prepare(str(folder)))) == 5


def test_an_unreadable_file_is_named_and_skipped_each_time(folder, capsys):
    (folder / "0-broken.mp4").write_bytes(b"not a video")
    (folder / "notes.txt").write_text("not looked at")
    for _ in range(2):
        assert len(frames_of(background.prepare(str(folder), "--eval-background"))) == 7 + 12
        message = capsys.readouterr().err
        assert "--eval-background" in message
        assert "0-broken.mp4" in message
        assert "notes.txt" not in message


def test_a_folder_without_a_readable_video_is_refused(tmp_path):
    with pytest.raises(BadInput, match=r"--background .*missing: no such folder"):
        background.prepare(str(tmp_path / "missing"))
    with pytest.raises(BadInput, match=r"--eval-background .*: no video in this folder"):
        background.prepare(str(tmp_path), "--eval-background")
    (tmp_path / "broken.mkv").write_bytes(b"")
    with pytest.raises(BadInput, match=r"no readable video.*broken\.mkv"):
        background.prepare(str(tmp_path))
    assert not list((tmp_path / "cache" / "fastdreamer").iterdir())


def test_without_pyav_the_extra_is_named(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(BadInput, match=r"pip install 'fastdreamer\[video\]'"):
        background.prepare(str(folder))


def test_an_unwritable_cache_is_refused_in_a_sentence(folder, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(BadInput, match="set XDG_CACHE_HOME to a writable folder"):
        background.prepare(str(folder))


def test_the_key_takes_pixels_whose_blue_exceeds_green_and_red():
    frames = np.full((2, 3, 64, 64), 9, np.uint8)
    image = np.zeros((3, 64, 64), np.uint8)
    image[:, 0, 0] = (10, 20, 30)
    image[:, 0, 1] = (30, 20, 30)
    image[:, 0, 2] = (10, 30, 30)
    image[:, 0, 3] = (0, 0, 1)
    expected = image.copy()
    expected[:, 0, [0, 3]] = 9
    Playback(frames, 0).composite(image)
    np.testing.assert_array_equal(image, expected)


def test_a_video_goes_on_by_the_frames_played_and_wraps():
    frames = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((1, 3, 64, 64), np.uint8)
    playback, seen = Playback(frames, 3), []
    for _ in range(4):
        image = np.zeros((3, 64, 64), np.uint8)
        image[2] = 255
        playback.composite(image)
        seen.append(image[0, 0, 0])
        playback.advance(2)
    assert seen == [3, 0, 2, 4]


def test_episodes_draw_their_video_and_start_from_seed_environment_and_number(folder):
    videos = Videos(background.prepare(str(folder)))

    def first_frame(*key: int) -> bytes:
        image = np.zeros((3, 64, 64), np.uint8)
        image[2] = 255
        videos.play(*key).composite(image)
        return image.tobytes()

    assert first_frame(1, 2, 3) == first_frame(1, 2, 3)
    for drawn in ([first_frame(s, 0, 0) for s in range(40)], [first_frame(0, i, 0) for i in range(40)]):
        assert len(set(drawn)) > 12  # of 19 frames: both videos, many starts
    assert len({first_frame(0, 0, episode) for episode in range(40)}) > 12


FRAME = np.random.default_rng(0).integers(0, 200, (64, 64, 3), np.uint8)
FRAME[:60, :, 2] = 255


def paint(env: Any) -> None:
    """`FRAME` stands for what OpenGL would draw."""
    if isinstance(env, dmc.EnvPoolDmc):
        env._pool.render = lambda env_ids: np.stack([FRAME] * len(env_ids))
        return
    for single in env._envs:
        single._pixels, single._env.physics.render = True, lambda *_, **__: FRAME


def rows(
    backend: Any, n: int, videos: str | None, skipped: int, painted: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images (T, n, 3, 64, 64), rewards and is_first (T, n): two episodes of three decisions, 400 frames each."""
    config = EnvConfig(obs="vector" if painted else "pixels", backend=backend, render="fast", action_repeat=400)
    env = dmc.build("cartpole_swingup", config, SEED, n, FIRST_INDEX, videos)
    if painted:
        paint(env)
    spaces = Spaces(image=True, vector=0, action=1, discrete=False)
    taken = [Step.empty(n, spaces)]
    env.reset(taken[0])
    for t in range(5):
        action = np.full((n, 1), 0.1 * t, np.float32)
        if t < skipped:
            env.skip(action)
            continue
        taken.append(Step.empty(n, spaces))
        env.step(action, taken[-1])
    images = [row.image for row in taken if row.image is not None]
    return np.stack(images), np.stack([row.reward for row in taken]), np.stack([row.is_first for row in taken])


@pytest.mark.parametrize(
    "painted", [True, pytest.param(False, marks=[pytest.mark.opengl, pytest.mark.thorough])], ids=["painted", "drawn"]
)
@pytest.mark.parametrize("backend", ["envpool", "dm_control"])
def test_frames_of_an_environment_with_a_video_behind_them(folder, backend, painted, render_in, monkeypatch):
    cache = background.prepare(str(folder))
    n = 2 if backend == "envpool" else 1  # several of dm_control are as many single ones

    def taken(n: int, videos: str | None, skipped: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if not painted:
            return render_in(backend, rows, backend, n, videos, skipped, painted)
        monkeypatch.setenv("MUJOCO_GL", "disable")
        return rows(backend, n, videos, skipped, painted)

    plain, rewards, first = taken(n, None, 0)
    shown, shown_rewards, _ = taken(n, cache, 0)
    resumed, _, _ = taken(1, cache, 4)
    np.testing.assert_array_equal(rewards, shown_rewards)
    assert first.tolist() == [[row in (0, 4)] * n for row in range(6)]
    videos, expected = Videos(cache), plain.copy()
    for i in range(n):
        for episode, begin, played in ((0, 0, [0, 400, 800, 1000]), (1, 4, [0, 400])):
            for t, frame in enumerate(played):
                index = FIRST_INDEX + i
                key = (SEED, index, episode) if backend == "envpool" else (episode_seed(SEED, index, episode),)
                playback = videos.play(*key)
                playback.advance(frame)
                playback.composite(expected[begin + t, i])
    np.testing.assert_array_equal(shown, expected)
    assert (shown != plain).any(2).mean() > 0.8  # most of either frame is blue
    np.testing.assert_array_equal(resumed[-1], shown[-1, :1])
