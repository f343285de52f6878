"""Environments: what tasks show and take, EnvPool's traps, independence of workers, and exact continuation."""

import sys
from copy import deepcopy
from dataclasses import fields, replace
from pathlib import Path

import env_samples
import numpy as np
import pytest
from gymnasium import spaces

from fastdreamer import envs
from fastdreamer.config import BadInput, EnvConfig
from fastdreamer.envs import atari, envpool, gym
from fastdreamer.envs.adapt import SpaceAdapter
from fastdreamer.envs.base import BatchEnv, Spaces, Step, nearest, optional
from fastdreamer.envs.envpool import EnvPoolBatch
from fastdreamer.envs.episodic import episode_seed
from fastdreamer.envs.journal import Journal

SAMPLE = "gym/env_samples:"


@pytest.fixture(autouse=True)
def _beside_the_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[1] / "samples")


def equal(a: Step, b: Step) -> bool:
    return all(np.array_equal(getattr(a, f.name), getattr(b, f.name)) for f in fields(Step))


def actions(spaces: Spaces, steps: int, n: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if spaces.discrete:
        return np.eye(spaces.action, dtype=np.float32)[rng.integers(spaces.action, size=(steps, n))]
    return rng.uniform(-1, 1, (steps, n, spaces.action)).astype(np.float32)


def play(batch: BatchEnv, taken: np.ndarray) -> list[Step]:
    """The rows of a batch in this process: the first ones, and those that each action led to."""
    out = Step.empty(taken.shape[1], batch.spaces)
    batch.reset(out)
    rows = [deepcopy(out)]
    for action in taken:
        batch.step(action, out)
        rows.append(deepcopy(out))
    return rows


def run(environments: envs.Environments, taken: np.ndarray) -> list[Step]:
    """The rows that each action led to."""
    rows = []
    for action in taken:
        environments.send(action)
        rows.append(deepcopy(environments.recv()))
    return rows


class TestEnvPool:
    def test_catch_shows_its_grid_and_ends_for_good(self):
        batch = envpool.build("Catch-v0", EnvConfig(action_repeat=1), seed=0, count=4, first_index=0)
        assert batch.spaces == Spaces(image=True, vector=0, action=3, discrete=True)
        rows = play(batch, actions(batch.spaces, 20, 4))
        grid = envpool.build("Catch-v0", EnvConfig(obs="vector", action_repeat=1), seed=0, count=4, first_index=0)
        assert grid.spaces == Spaces(image=False, vector=50, action=3, discrete=True)
        for t, (row, flat) in enumerate(zip(rows, play(grid, actions(grid.spaces, 20, 4)), strict=True)):
            assert row.image is not None
            assert flat.vector is not None
            ball_and_paddle = flat.vector.reshape(4, 10, 5)
            tall, wide = np.arange(64) * 10 // 64, np.arange(64) * 5 // 64
            assert np.array_equal(row.image[:, 2], 255 * ball_and_paddle[:, tall][:, :, wide])
            assert (row.image[:, 0] == row.image[:, 1]).all()
            # Nine steps, then the row that ignores its action.
            assert (row.is_first == (t % 10 == 0)).all()
            assert (row.is_last == (t % 10 == 9)).all()
            assert (row.is_terminal == row.is_last).all()
            assert (np.abs(row.reward) == row.is_last).all()

    def test_time_limit_is_no_terminal(self):
        batch = envpool.build("Pendulum-v1", EnvConfig(obs="vector", action_repeat=1), 0, 2, 0)
        rows = play(batch, actions(batch.spaces, 201, 2))
        assert [t for t, row in enumerate(rows) if row.is_last.any()] == [200]
        assert not any(row.is_terminal.any() for row in rows)
        assert rows[201].is_first.all()

    def test_failure_is_terminal(self):
        batch = envpool.build("CartPole-v1", EnvConfig(obs="vector", action_repeat=1), 0, 2, 0)
        rows = play(batch, actions(batch.spaces, 100, 2))
        assert any(row.is_last.any() for row in rows)
        assert all(np.array_equal(row.is_last, row.is_terminal) for row in rows)

    def test_no_reward_is_left_over_from_the_episode_before(self):
        batch = envpool.build("CartpoleBalance-v1", EnvConfig(obs="vector", action_repeat=1), 0, 1, 0)
        rows = play(batch, actions(batch.spaces, 1001, 1))
        assert rows[1000].is_last.all()
        assert rows[1000].reward > 0
        assert rows[1001].is_first.all()
        assert rows[1001].reward == 0

    def test_action_repeat_sums_rewards_and_stops_at_the_end(self):
        taken = np.repeat(actions(Spaces(True, 0, 3, True), 5, 3), 2, axis=0)[:9]
        once = play(envpool.build("Catch-v0", EnvConfig(action_repeat=1), 0, 3, 0), taken)
        twice = play(envpool.build("Catch-v0", EnvConfig(action_repeat=2), 0, 3, 0), taken[::2])
        for decision in range(1, 6):
            assert np.array_equal(twice[decision].image, once[min(2 * decision, 9)].image)  # type: ignore[arg-type]
        assert twice[5].is_terminal.all()
        assert np.array_equal(twice[5].reward, once[9].reward)
        pole = envpool.build("CartPole-v1", EnvConfig(obs="vector", action_repeat=3), 0, 1, 0)
        assert play(pole, actions(pole.spaces, 1, 1))[1].reward == 3

    def test_each_environment_has_its_own_seed(self):
        config = EnvConfig(action_repeat=1)
        taken = actions(Spaces(True, 0, 3, True), 30, 6)
        together = play(envpool.build("Catch-v0", config, seed=7, count=6, first_index=0), taken)
        apart = play(envpool.build("Catch-v0", config, seed=7, count=4, first_index=2), taken[:, 2:])
        unlike = play(envpool.build("Catch-v0", config, seed=42, count=6, first_index=0), taken)
        for whole, part in zip(together, apart, strict=True):
            assert np.array_equal(whole.image[2:], part.image)  # type: ignore[index]
        assert not all(map(equal, together, unlike))

    def test_continuous_actions_are_rescaled(self):
        batch = envpool.build("QuadrupedWalk-v1", EnvConfig(obs="vector"), 0, 1, 0)
        native = batch._adapter.action(np.array([[-1.0] * 12, [0.0] * 12, [1.0] * 12], np.float32))
        assert native[:, 1] == pytest.approx([-1, 0.05, 1.1])
        assert native[:, 2] == pytest.approx([-0.8, 0, 0.8])

    def test_unknown_name(self):
        with pytest.raises(BadInput, match=r"envpool/Catch-v9 .*nearest are .*envpool/Catch-v0"):
            envpool.build("Catch-v9", EnvConfig(), 0, 1, 0)

    def test_several_players_are_refused(self):
        with pytest.raises(BadInput, match="2 players"):
            envpool.build("IntersectionMultiAgent-v0", EnvConfig(obs="vector"), 0, 1, 0)


class TestAtari:
    def test_pong_follows_the_protocol(self):
        batch = atari.build("pong", EnvConfig(action_repeat=4), seed=0, count=1, first_index=0)
        assert batch.spaces == Spaces(image=True, vector=0, action=6, discrete=True)
        config = batch._pool.spec.config
        for name, value in {"frame_skip": 4, "noop_max": 30, "use_fire_reset": False, "episodic_life": False,
                            "reward_clip": False, "repeat_action_probability": 0.0, "full_action_space": False,
                            "max_episode_steps": 27_000}.items():  # fmt: skip
            assert getattr(config, name) == value, name
        rows = play(batch, actions(batch.spaces, 150, 1))
        assert rows[0].is_first.all()
        frame = rows[60].image
        assert frame is not None
        assert (frame[0, 0] != frame[0, 1]).any(), "grey"
        assert sum(float(row.reward[0]) for row in rows) < 0, "a random player loses points"

    def test_frame_limit_is_no_terminal(self):
        options = {"stack_num": 1, "gray_scale": False, "max_episode_steps": 5}
        batch = EnvPoolBatch("Pong-v5", "atari/pong", obs="pixels", repeat=1, seed=0, count=1, **options)
        rows = play(batch, actions(batch.spaces, 6, 1))
        assert [bool(row.is_last[0]) for row in rows] == [False] * 5 + [True, False]
        assert not any(row.is_terminal.any() for row in rows)

    def test_every_game_exists(self):
        assert len(set(atari.GAMES)) == 26
        known = set(envpool.ids())
        assert all("".join(map(str.capitalize, game.split("_"))) + "-v5" in known for game in atari.GAMES)

    def test_refusals(self):
        with pytest.raises(BadInput, match=r"atari/pnog .*nearest are .*atari/pong"):
            atari.build("pnog", EnvConfig(), 0, 1, 0)
        with pytest.raises(BadInput, match="use --obs pixels"):
            atari.build("pong", EnvConfig(obs="vector"), 0, 1, 0)


def box(low: float, high: float, shape: tuple[int, ...], kind: type = np.float32) -> spaces.Box:
    return spaces.Box(low, high, shape, kind)  # type: ignore[arg-type]


class TestSpaces:
    two = spaces.Discrete(2)

    @pytest.mark.parametrize("shape", [(64, 64), (64, 64, 1), (64, 64, 3), (1, 64, 64), (3, 64, 64)])
    def test_layouts_of_images(self, shape):
        adapter = SpaceAdapter(box(0, 255, shape, np.uint8), self.two, "pixels", "gym/X")
        frame = np.random.default_rng(0).integers(256, size=shape, dtype=np.uint8)
        shown = np.broadcast_to(adapter.image(frame[None]), (1, 3, 64, 64))[0]  # type: ignore[arg-type]
        planes = frame if shape[0] == 3 else frame.transpose(2, 0, 1) if shape[-1] == 3 else [frame.reshape(64, 64)] * 3
        assert np.array_equal(shown, planes)

    def test_large_images_are_averaged_and_small_ones_repeated(self):
        large = SpaceAdapter(box(0, 255, (128, 192), np.uint8), self.two, "pixels", "gym/X")
        frame = np.random.default_rng(0).integers(256, size=(128, 192), dtype=np.uint8)
        shown = large.image(frame[None])
        means = frame.reshape(64, 2, 64, 3).mean((1, 3))
        assert np.abs(shown[0, 0] - means).max() <= 1  # type: ignore[index]
        small = SpaceAdapter(box(-1, 1, (2, 4)), self.two, "pixels", "gym/X")
        corners = small.image(np.array([[[-1, 1, 0, -1], [1, 1, 1, 1]]]))
        assert corners is not None
        assert corners[0, 0, [0, 31, 0, 0, 32], [0, 15, 16, 32, 0]].tolist() == [0, 0, 255, 128, 255]

    def test_vectors_are_flattened_in_key_order(self):
        space = spaces.Dict({"b": box(-np.inf, np.inf, (2, 2)), "a": box(0, 9, (), np.int64)})  # type: ignore[arg-type]
        adapter = SpaceAdapter(space, self.two, "vector", "gym/X")
        assert adapter.spaces == Spaces(image=False, vector=5, action=2, discrete=True)
        vector = adapter.vector({"b": np.array([[[1, 2], [3, 4]]]), "a": np.array([9])})
        assert vector.tolist() == [[9, 1, 2, 3, 4]]  # type: ignore[union-attr]
        assert vector.dtype == np.float32  # type: ignore[union-attr]

    def test_actions(self):
        seen = box(0, 1, (2,))
        moved = SpaceAdapter(seen, spaces.Discrete(3, start=5), "vector", "gym/X")
        assert moved.action(np.eye(3, dtype=np.float32)).tolist() == [5, 6, 7]
        unlike = spaces.Box(np.array([[0, -2]], np.float32), np.array([[4, 2]], np.float32))
        scaled = SpaceAdapter(seen, unlike, "vector", "gym/X")
        assert scaled.spaces.action == 2
        assert scaled.action(np.array([[-1, 0], [0.5, 9]], np.float32)).tolist() == [[[0, 0]], [[3, 2]]]

    @pytest.mark.parametrize(
        ("observation", "action", "obs", "message"),
        [
            (box(0, 1, (3,)), two, "pixels", "use --obs vector"),
            (box(0, 1, (3,)), two, "both", "use --obs vector"),
            (box(0, 255, (64, 64, 3), np.uint8), two, "vector", "use --obs pixels"),
            (box(0, 255, (64, 64, 4), np.uint8), two, "pixels", r"Box\(0, 255, \(64, 64, 4\), uint8\).*wrap"),
            (spaces.Tuple((two, two)), two, "pixels", "Tuple.*wrap"),
            (spaces.Dict({"x": box(0, 1, (3,)), "y": two}), two, "vector", r"Discrete\(2\) at y"),
            (spaces.Dict({k: box(0, 255, (9, 9), np.uint8) for k in "xy"}), two, "pixels", r"images \(x, y\)"),
            (box(0, 1, (3,)), spaces.MultiDiscrete([2, 2]), "vector", "action space MultiDiscrete.*wrap"),
            (box(0, 1, (3,)), box(-np.inf, np.inf, (1,)), "vector", "bounded Box"),
        ],
    )
    def test_refusals_name_the_space_and_the_mend(self, observation, action, obs, message):
        with pytest.raises(BadInput, match=message):
            SpaceAdapter(observation, action, obs, "gym/X")


class TestGym:
    def test_vector(self):
        batch = gym.build("env_samples:Vector-v0", EnvConfig(obs="vector", action_repeat=1), 0, 2, 0)
        assert batch.spaces == Spaces(image=False, vector=4, action=2, discrete=False)
        rows = play(batch, np.broadcast_to(np.array([-1, 0], np.float32), (9, 2, 2)))
        assert [row.vector[0, 0] for row in rows] == [0, 1, 2, 3, 4, 5, 6, 7, 0, 1]  # type: ignore[index]
        assert rows[3].vector[1, 1:3].tolist() == [-2, 5]  # type: ignore[index]
        assert [float(row.reward[0]) for row in rows] == [0, *[3] * 7, 0, 3]
        assert rows[7].is_last.all()
        assert not rows[7].is_terminal.any()
        assert rows[8].is_first.all()
        noise = {float(row.vector[i, 3]) for row in rows for i in range(2)}  # type: ignore[index]
        assert len(noise) == 20, "environments and episodes have seeds of their own"

    def test_image_and_action_repeat(self):
        batch = gym.build("env_samples:Frames-v0", EnvConfig(action_repeat=2), 0, 1, 0)
        assert batch.spaces == Spaces(image=True, vector=0, action=3, discrete=True)
        rows = play(batch, np.eye(3, dtype=np.float32)[[[2], [0], [1], [1]]])
        assert [row.image[0, :2, 9, 9].tolist() for row in rows] == [[0, 100], [2, 101], [4, 99], [5, 100], [0, 100]]  # type: ignore[index]
        assert [float(row.reward[0]) for row in rows] == [0, 4, -4, 0, 0]
        assert rows[3].is_terminal.all()

    def test_parts(self):
        batch = gym.build("env_samples:Parts-v0", EnvConfig(obs="both", action_repeat=1), 0, 1, 0)
        assert batch.spaces == Spaces(image=True, vector=5, action=2, discrete=True)
        (row,) = play(batch, np.zeros((0, 1, 2), np.float32))
        assert (row.image == 7).all()
        assert row.vector.tolist() == [[0, 1, 2, 0.25, 0.5]]  # type: ignore[union-attr]

    def test_refusals(self):
        with pytest.raises(BadInput, match=r"not registered.*nearest are gym/CartPole-v1"):
            gym.build("CartPol-v1", EnvConfig(), 0, 1, 0)
        with pytest.raises(BadInput, match=r"gym/env_samples:Vectr-v0.*nearest are gym/env_samples:Vector-v0"):
            gym.build("env_samples:Vectr-v0", EnvConfig(obs="vector"), 0, 1, 0)
        with pytest.raises(BadInput, match="no module not_there"):
            gym.build("not_there:Vector-v0", EnvConfig(), 0, 1, 0)


class TestNames:
    def test_nearest(self):
        assert nearest("Pnog", ["ping", "pong", "walker"], "a/") == ": nearest are a/pong, a/ping"
        assert nearest("zzz", ["ping"], "a/") == ""

    def test_tasks_of_every_family(self):
        names = envs.tasks()
        assert names == sorted(set(names))
        assert {"dmc/walker_walk", "atari/ms_pacman", "envpool/Catch-v0", "gym/CartPole-v1"} <= set(names)

    def test_unknown_family(self):
        with pytest.raises(BadInput, match=r"nearest are .*dmc/walker_walk"):
            envs.make("dm/walker_walk", EnvConfig(), 0)

    def test_unusable_seed(self):
        with pytest.raises(BadInput, match="--seed is -1"):
            envs.make("atari/pong", EnvConfig(), -1)

    def test_missing_extra(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "envpool", None)
        with pytest.raises(BadInput, match=r"atari/pong needs envpool: pip install 'fastdreamer\[envs\]'"):
            optional("envpool", "atari/pong")
        assert not any(name.startswith("envpool/") for name in envs.tasks())


class TestWorkers:
    @pytest.mark.parametrize(
        ("task", "config"),
        [(SAMPLE + "Vector-v0", EnvConfig(envs=3, obs="vector", action_repeat=1)),
         pytest.param("envpool/Catch-v0", EnvConfig(envs=5, action_repeat=1), marks=pytest.mark.thorough)],
    )  # fmt: skip
    def test_rows_do_not_depend_on_the_number_of_workers(self, task, config):
        runs = []
        for workers in (1, 2):
            with envs.make(task, replace(config, workers=workers), seed=11) as environments:
                first = deepcopy(environments.recv())
                taken = actions(environments.spaces, 25, config.envs)
                runs.append([first, *run(environments, taken)])
        for t, (one, two) in enumerate(zip(*runs, strict=True)):
            assert equal(one, two)
            led = np.zeros_like(one.action) if t == 0 else np.where(one.is_first[:, None], 0, taken[t - 1])
            assert np.array_equal(one.action, led)
        assert runs[0][0].is_first.all()

    def test_use_out_of_order_is_refused(self):
        with envs.make(SAMPLE + "Vector-v0", EnvConfig(envs=1, obs="vector"), seed=0) as environments:
            with pytest.raises(RuntimeError, match="follows recv"):
                environments.send(np.zeros((1, 2), np.float32))
            environments.recv()
            with pytest.raises(RuntimeError, match="follows send"):
                environments.recv()
            for wrong in (np.zeros((1, 3), np.float32), np.full((1, 2), np.nan, np.float32)):
                with pytest.raises(ValueError, match="actions must be"):
                    environments.send(wrong)

    def test_refusal_in_a_worker_arrives_as_it_is(self):
        with pytest.raises(BadInput, match=r"gym/env_samples:Odd-v0 has the observation space Tuple"):
            envs.make(SAMPLE + "Odd-v0", EnvConfig(envs=1), 0)


class TestContinuation:
    @pytest.mark.parametrize(
        ("task", "config", "steps", "under_way"),
        [("envpool/Catch-v0", EnvConfig(envs=3, action_repeat=1), 14, True),
         (SAMPLE + "Frames-v0", EnvConfig(envs=2, action_repeat=1, workers=1), 11, True),
         pytest.param("atari/pong", EnvConfig(envs=1, action_repeat=4), 60, False, marks=pytest.mark.thorough)],
    )  # fmt: skip
    def test_goes_on_bit_for_bit(self, task, config, steps, under_way):
        with envs.make(task, config, seed=5) as environments:
            environments.recv()
            taken = actions(environments.spaces, steps + 15, config.envs)
            run(environments, taken[:steps])
            if under_way:
                environments.send(taken[steps])
            state = environments.state()
            expected = [deepcopy(environments.recv())] if under_way else []
            expected += run(environments, taken[steps + under_way :])
        with envs.make(task, config, seed=5) as again:
            assert again.restore(state) == []
            found = [deepcopy(again.recv())] if under_way else []
            found += run(again, taken[steps + under_way :])
        assert len(found) == len(expected)
        assert all(map(equal, found, expected))

    def test_goes_on_with_the_workers_there_were_and_more_than_once(self):
        config = EnvConfig(envs=3, obs="vector", action_repeat=1, workers=1)
        with envs.make(SAMPLE + "Varied-v0", config, seed=5) as environments:
            environments.recv()
            taken = actions(environments.spaces, 38, 3)
            run(environments, taken[:23])
            state = environments.state()
            expected = run(environments, taken[23:])
        with envs.make(SAMPLE + "Varied-v0", replace(config, workers=2), seed=5) as again:
            assert again.restore(state) == []
            assert all(map(equal, run(again, taken[23:27]), expected))
            assert again.restore(again.state()) == []
            assert all(map(equal, run(again, taken[27:]), expected[4:]))

    def test_before_the_first_row_and_of_these_environments_alone(self):
        config = EnvConfig(envs=2, obs="vector", action_repeat=1, workers=1)
        with envs.make(SAMPLE + "Vector-v0", config, seed=5) as environments:
            state = environments.state()
            with pytest.raises(BadInput, match="resume with the same --envs"):
                environments.restore(state | {"episode": np.zeros(3, np.int64)})
            first = deepcopy(environments.recv())
        with envs.make(SAMPLE + "Vector-v0", config, seed=5) as again:
            assert again.restore(state) == []
            assert equal(again.recv(), first)

    def test_what_cannot_be_brought_back_starts_anew(self):
        config = EnvConfig(envs=2, obs="vector", action_repeat=1, workers=1)
        with envs.make(SAMPLE + "Unseeded-v0", config, seed=0) as environments:
            environments.recv()
            taken = actions(environments.spaces, 6, 2)
            run(environments, taken[:3])
            state = environments.state()
            assert environments.restore(state) == [0, 1]
            assert environments.restarts == 0
            again = environments.state()
            (row, later) = run(environments, taken[3:5])
            assert row.is_first.all()
            assert (row.action == 0).all()
            assert (row.reward == 0).all()
            assert not later.is_first.any()
            # Not begun is no reason not to come back.
            assert environments.restore(again) == []
            assert run(environments, taken[3:4])[0].is_first.all()

    def test_episodes_have_seeds_of_their_own(self):
        seeds = {episode_seed(s, i, e) for s in range(5) for i in range(5) for e in range(5)}
        assert len(seeds) == 125
        assert 0 <= min(seeds) <= max(seeds) < 2**31


class TestJournal:
    spaces = Spaces(image=False, vector=1, action=3, discrete=True)

    def fill(self, journal: Journal, firsts: list[list[bool]]) -> np.ndarray:
        index = np.random.default_rng(0).integers(3, size=(len(firsts), len(firsts[0])))
        for row, first in zip(np.eye(3, dtype=np.float32)[index], firsts, strict=True):
            journal.append(row, np.array(first))
        return index

    def test_keeps_all_actions_in_a_byte_each(self):
        journal = Journal(2, self.spaces, episodic=False)
        index = self.fill(journal, [[t % 10 == 0, False] for t in range(500)])
        past = journal.replay()
        assert past.actions.dtype == np.uint8
        assert np.array_equal(past.actions, index)
        assert past.start.tolist() == past.episode.tolist() == [0, 0]

    def test_keeps_current_episodes_alone(self):
        journal = Journal(2, self.spaces, episodic=True)
        index = self.fill(journal, [[t % 40 == 0, t % 90 == 0] for t in range(1000)])
        past = journal.replay()
        assert past.episode.tolist() == [25, 12]
        assert past.start.tolist() == [961 - 961, 991 - 961]
        assert np.array_equal(past.actions, index[961:])

    def test_is_bounded(self):
        forever = Journal(1, self.spaces, episodic=False, limit=1024)
        self.fill(forever, [[False]] * 900)
        assert forever.restorable
        self.fill(forever, [[False]] * 5000)
        assert not forever.restorable
        assert forever._actions.nbytes <= 1024

    def test_recovers_with_the_next_episode(self):
        journal = Journal(1, self.spaces, episodic=True, limit=1000)
        self.fill(journal, [[False]] * 2000)
        assert not journal.restorable
        index = self.fill(journal, [[True], *[[False]] * 70])
        assert journal.restorable
        past = journal.replay()
        assert past.episode.tolist() == [1]
        assert np.array_equal(past.actions, index[1:])

    def test_goes_on_after_loading(self):
        one, other = (Journal(1, self.spaces, episodic=True) for _ in range(2))
        self.fill(one, [[t == 30] for t in range(100)])
        other.load(one.replay())
        for journal in (one, other):
            self.fill(journal, [[False]] * 50)
        assert np.array_equal(one.replay().actions, other.replay().actions)
        assert one.replay().start == other.replay().start == 0


def test_samples_are_what_they_claim():
    env = env_samples.Frames()
    observation, _ = env.reset(seed=0)
    assert env.observation_space.contains(observation)
