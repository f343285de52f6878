"""What an environment shows is held against its space before it enters a row."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faulty_samples import Shows
from gymnasium import spaces
from runs import SMALL

from fastdreamer import envs, train
from fastdreamer.config import BadInput, EnvConfig
from fastdreamer.envs.adapt import SpaceAdapter
from fastdreamer.envs.base import Fault, NotFinite, Spaces
from fastdreamer.envs.gym import GymEnv


@pytest.fixture(autouse=True)
def _beside_the_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[1] / "samples")


VECTOR = spaces.Box(-1, 1, (4,), np.float32)
BYTES = spaces.Box(0, 255, (8, 8, 3), np.uint8)
UNIT = spaces.Box(0, 1, (8, 8, 3), np.float32)
DICT = spaces.Dict({"robot": spaces.Dict({"camera": BYTES}), "a": VECTOR, "b": VECTOR})
SOUND = {"robot": {"camera": np.zeros((8, 8, 3), np.uint8)}, "a": np.zeros(4), "b": np.zeros(4)}


def play(space: spaces.Space, late: Any, obs: str) -> Any:
    """What the fourth row shows of an environment that shows `late` there."""
    env = GymEnv(Shows(space, late), "gym/Shows-v0", EnvConfig(obs=obs, action_repeat=1), 5)  # pyright: ignore
    env.reset(0)
    action = np.eye(3, dtype=np.float32)[0]
    return [env.step(action)[:2] for _ in range(3)][-1]


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize(
    ("space", "late", "obs", "kind", "told"),
    [
        (VECTOR, np.full(1, 0.3, np.float32), "vector", Fault, r"of shape \(1,\), and its space says \(4,\)"),
        (VECTOR, np.zeros(7), "vector", Fault, r"of shape \(7,\), and its space says \(4,\)"),
        (VECTOR, 0.5, "vector", Fault, r"of shape \(\), and its space says \(4,\)"),
        (VECTOR, np.array(list("four")), "vector", Fault, r"of type <U1, and its space says float32"),
        (VECTOR, np.array([0, np.nan, 0, 0]), "vector", NotFinite, "that is not finite"),
        (VECTOR, np.array([0, 1e300, 0, 0]), "vector", NotFinite, "that is not finite"),
        (BYTES, np.full((8, 8, 3), 0.9, np.float32), "pixels", Fault, "of type float32, and its space says uint8"),
        (BYTES, np.full((8, 8, 3), 300), "pixels", Fault, "from 300 to 300, and its space says 0 to 255"),
        (BYTES, np.zeros((3, 8, 8), np.uint8), "pixels", Fault, r"shape \(3, 8, 8\), and its space says \(8, 8, 3\)"),
        (UNIT, np.full((8, 8, 3), 200, np.uint8), "pixels", Fault, "from 200 to 200, and its space says 0 to 1"),
        (UNIT, np.full((8, 8, 3), -0.5), "pixels", Fault, "from -0.5 to -0.5, and its space says 0 to 1"),
        (UNIT, np.full((8, 8, 3), np.nan), "pixels", NotFinite, "that is not finite"),
        (DICT, {**SOUND, "b": np.zeros(3)}, "vector", Fault, r"at b of shape \(3,\)"),
        (DICT, {**SOUND, "b": np.full(4, np.inf)}, "vector", NotFinite, "at b that is not finite"),
        (DICT, {**SOUND, "robot": {"camera": np.ones(2)}}, "both", Fault, r"at robot/camera of shape \(2,\)"),
        (DICT, {**SOUND, "robot": {}}, "both", Fault, "without robot/camera, which its space has"),
        (DICT, np.zeros(4), "vector", Fault, "without a, which its space has"),
    ],
)  # fmt: skip
def test_an_observation_unlike_its_space_is_refused(space, late, obs, kind, told):
    where = r".* \(environment 5, step 3 of an episode\): mend"
    with pytest.raises(kind, match=f"--task gym/Shows-v0 shows an observation.*{told}{where}"):
        play(space, late, obs)


@pytest.mark.parametrize(
    ("space", "late", "obs", "shown"),
    [
        (VECTOR, [0, 1, 2, 3], "vector", [0, 1, 2, 3]),  # bounds of vectors are often but a wish
        (spaces.Box(0, 9, (2,), np.int64), np.array([3, 4], np.int32), "vector", [3, 4]),
        (BYTES, np.full((8, 8, 3), 7, np.int64), "pixels", 7),
        (UNIT, np.full((8, 8, 3), 1.0005), "pixels", 255),
        (UNIT, np.ones((8, 8, 3), bool), "pixels", 255),
        # What enters no row is not looked at.
        (DICT, {**SOUND, "robot": None}, "vector", 0),
    ],
)
def test_what_means_the_same_is_taken(space, late, obs, shown):
    image, vector = play(space, late, obs)
    assert (np.asarray(vector if obs == "vector" else image) == shown).all()


def test_a_reward_that_is_not_finite_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Shows, "reward", lambda self: np.nan if self.t == 2 else 1.0)
    with pytest.raises(NotFinite, match=r"a reward that is nan \(environment 5, step 2 of an episode\)"):
        play(VECTOR, np.zeros(4), "vector")


def test_a_refusal_under_way_ends_a_run_with_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*SMALL, "--task", "gym/faulty_samples:Short-v0", "--obs", "vector", "--envs", "1"]
    assert train.main([*arguments, "--logdir", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert r"--task gym/faulty_samples:Short-v0 shows an observation of shape (1,)" in error


def test_a_worker_looks_at_what_any_environment_shows() -> None:
    from fastdreamer.envs import worker
    from fastdreamer.envs.base import Spaces, Step
    from fastdreamer.envs.protocol import Job

    rows = Step.empty(3, Spaces(image=False, vector=2, action=1, discrete=False))
    job = Job("dmc/X", EnvConfig(), 0, count=3, first_index=4, total=9, videos=None)
    worker._complete(rows, np.ones((3, 1), np.float32), job)
    assert rows.action.tolist() == [[1], [1], [1]]
    rows.reward[1] = np.inf
    with pytest.raises(NotFinite, match=r"--task dmc/X shows a reward that is not finite \(environment 5\)"):
        worker._complete(rows, None, job)
    assert rows.vector is not None
    rows.vector[2, 0] = np.nan
    with pytest.raises(NotFinite, match=r"shows an observation that is not finite \(environment 6\)"):
        worker._complete(rows, None, job)


@pytest.mark.thorough
def test_envpool_shows_what_its_spaces_say() -> None:
    for task, obs in [("Catch-v0", "both"), ("CartPole-v1", "vector"), ("Pong-v5", "pixels")]:
        config = EnvConfig(envs=2, obs="vector" if obs == "both" else obs, action_repeat=1)  # pyright: ignore
        with envs.make(f"envpool/{task}", config, 0) as environments:
            environments.recv()


def space_of(space: spaces.Space, obs: str) -> Spaces:
    return SpaceAdapter(space, spaces.Discrete(2), obs, "gym/X").spaces


def test_what_holds_no_number_is_refused() -> None:
    empty = spaces.Box(-1, 1, (0,), np.float32)
    with pytest.raises(BadInput, match=r"Box\(.*\(0,\), float32\), which holds no number"):
        space_of(empty, "vector")
    with pytest.raises(BadInput, match="--obs pixels needs an image"):
        space_of(empty, "pixels")
    with pytest.raises(BadInput, match=r"has the action space Box\(.*\(0,\)"):
        SpaceAdapter(VECTOR, empty, "vector", "gym/X")
    # Beside others it is nothing.
    both = spaces.Dict({"a": empty, "b": VECTOR})
    adapter = SpaceAdapter(both, spaces.Discrete(2), "vector", "gym/X")
    assert adapter.spaces.vector == 4
    assert adapter.vector({"a": np.zeros((1, 0)), "b": np.ones((1, 4))}).tolist() == [[1] * 4]  # pyright: ignore


@pytest.mark.parametrize("bound", [1, np.inf])
def test_a_grid_of_three_axes_is_a_vector(bound: float) -> None:
    grid = spaces.Box(-bound, bound, (5, 6, 4), np.float32)
    assert space_of(grid, "vector").vector == 120
    with pytest.raises(BadInput, match="use --obs vector"):
        space_of(grid, "pixels")
    shown = SpaceAdapter(grid, spaces.Discrete(2), "vector", "gym/X").vector(np.arange(120).reshape(1, 5, 6, 4))
    assert shown is not None
    assert shown.tolist() == [[*range(120)]]


@pytest.mark.parametrize("obs", ["pixels", "vector"])
def test_bytes_that_are_no_picture_are_refused_with_the_mend(obs: str) -> None:
    with pytest.raises(BadInput, match=r"\(10, 10, 4\), uint8\).* wrap .*gymnasium\.wrappers\.FlattenObservation"):
        space_of(spaces.Box(0, 255, (10, 10, 4), np.uint8), obs)
