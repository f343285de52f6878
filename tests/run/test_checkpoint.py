"""Checkpoints: bit for bit what was saved, whatever happens to the process, the disk and the files."""

import errno
import json
import os
import pickle
import random
import resource
import shutil
import subprocess
import sys
import textwrap
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastdreamer.config import BadInput
from fastdreamer.envs.base import Spaces
from fastdreamer.replay import Replay
from fastdreamer.run import checkpoint as module
from fastdreamer.run.checkpoint import Checkpoints, check_shapes, shapes

SPACES = Spaces(image=False, vector=3, action=2, discrete=False)
ENVS = 2
ROW_BYTES = Replay.bytes(SPACES, ENVS)


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_BYTES", 8 * ROW_BYTES)


def make_replay(added: int = 0, capacity: int = 50 * ENVS, spaces: Spaces = SPACES) -> Replay:
    replay = Replay(spaces, ENVS, capacity)
    for row in range(added):
        add(replay, row)
    return replay


def add(replay: Replay, row: int, salt: int = 0) -> None:
    generator = torch.Generator().manual_seed(1000 * salt + row)
    flags = {key: torch.rand(ENVS, generator=generator) < 0.5 for key in ("is_first", "is_last", "is_terminal")}
    floats = {
        name: torch.randn(replay.fields[name].shape[1:], generator=generator) for name in ("vector", "action", "reward")
    }
    replay.add({**floats, **flags})


def state_of(step: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(step)
    return {"step": step, "agent": {"w": torch.randn(100, generator=generator)}, "generator": generator.get_state()}


def assert_same(found: Any, wanted: Any) -> None:
    assert type(found) is type(wanted)
    if isinstance(wanted, dict):
        assert list(found) == list(wanted)
        for key in wanted:
            assert_same(found[key], wanted[key])
    elif isinstance(wanted, list | tuple):
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            assert_same(one, other)
    elif isinstance(wanted, torch.Tensor):
        assert found.dtype == wanted.dtype
        assert found.shape == wanted.shape
        bits = [each.contiguous().view(-1).view(torch.uint8) for each in (found, wanted)]
        assert torch.equal(*bits)
    elif isinstance(wanted, np.ndarray):
        assert found.dtype == wanted.dtype
        assert found.shape == wanted.shape
        assert found.tobytes() == wanted.tobytes()
    else:
        assert repr(found) == repr(wanted)  # nan, and the sign of zero


def assert_same_replay(found: Replay, wanted: Replay) -> None:
    assert (found.added, found.total) == (wanted.added, wanted.total)
    assert_same(found.rows(found.oldest, found.added), wanted.rows(wanted.oldest, wanted.added))
    uniform = torch.linspace(0, 0.999, 40, dtype=torch.float64)
    assert_same(found.sample(uniform, 7), wanted.sample(uniform, 7))


def files(run: Path) -> set[str]:
    return {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}


def chunk_files(run: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in sorted((run / "replay").iterdir())}


def test_a_state_comes_back_bit_for_bit(tmp_path: Path):
    network = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1))
    optimizer = torch.optim.Adam(network.parameters(), lr=torch.tensor(1e-3))
    for _ in range(2):
        network(torch.randn(5, 3)).sum().backward()
        optimizer.step()
    numpy_generator = np.random.default_rng(3)
    mersenne = np.random.RandomState(4).get_state(legacy=False)
    state = {
        "network": dict(network.state_dict()),
        "optimizer": optimizer.state_dict(),
        "torch": torch.Generator().get_state(),
        "numpy": numpy_generator.bit_generator.state,
        "mersenne": mersenne,
        "plain": [1, -(2**200), 0.1, -0.0, float("nan"), float("inf"), True, None, "naïve", (), {}, {3: (1, [2])}],
        "tensors": [torch.tensor(value, dtype=dtype) for value in ([1.0], [2.5, float("nan")])
                    for dtype in (torch.float64, torch.bfloat16, torch.float16)],
        "empty": torch.zeros(0, 3, dtype=torch.uint8),
        "strided": torch.arange(6).view(2, 3).t(),
        "arrays": [np.array([[1.5], [-0.0]], np.float32), np.array(7, np.uint16), np.zeros((0, 2), bool)],
        "reversed": np.arange(6)[::-2],
    }  # fmt: skip
    wanted = pickle.loads(pickle.dumps(state))
    path = Checkpoints(tmp_path).save(7, state, None)
    assert path == tmp_path / "checkpoints" / "000000000007"
    found = Checkpoints(tmp_path).load()
    assert_same(found, wanted)
    found["arrays"][0][0] = 2  # writable, as it was
    network.load_state_dict(found["network"])
    optimizer.load_state_dict(found["optimizer"])
    restored = np.random.default_rng()
    restored.bit_generator.state = found["numpy"]
    assert restored.random() == numpy_generator.random()


@pytest.mark.parametrize("value", [np.float64(1.0), {1, 2}, object(), {"a": {2.5: 1}}, {"__numpy__": 1}])
def test_what_could_not_be_read_back_is_refused_when_saved(tmp_path: Path, value: Any):
    with pytest.raises(TypeError, match=r"state\.env\.0"):
        Checkpoints(tmp_path).save(1, {"env": [value]}, None)
    assert not files(tmp_path)


@pytest.mark.parametrize("added", [0, 1, 7, 8, 9, 49, 50, 51, 57, 58, 59, 130])
def test_a_replay_comes_back_bit_for_bit(tmp_path: Path, added: int):
    replay, twin = make_replay(added), make_replay(3)
    Checkpoints(tmp_path).save(1, state_of(1), replay)
    assert_same(Checkpoints(tmp_path).load(replay=twin), state_of(1))
    if added:
        assert_same_replay(twin, replay)
    assert twin.added == added


def test_rows_are_written_once_and_deleted_when_no_checkpoint_holds_them(tmp_path: Path):
    replay, keeper = make_replay(), Checkpoints(tmp_path)
    written: dict[str, int] = {}
    for step in range(1, 30):
        for _ in range(7):
            add(replay, replay.added)
        keeper.save(step, state_of(step), replay)
        now = chunk_files(tmp_path)
        assert all(written[name] == stamp for name, stamp in now.items() if name in written), "a chunk was rewritten"
        written |= now
        # Each file holds rows that one of the two kept checkpoints still has.
        assert all(int(name[13:25]) >= max(0, replay.added - 7 - replay.slots) for name in now)
        assert len(list(keeper.folder.iterdir())) == min(step, 2)
        twin = make_replay()
        assert_same(Checkpoints(tmp_path).load(replay=twin), state_of(step))
        assert_same_replay(twin, replay)
    assert len(written) == replay.added // 8
    assert sum(int(name[13:25]) - int(name[:12]) + 1 for name in written) == replay.added // 8 * 8


def test_a_resumed_run_goes_on_with_the_files_there_are(tmp_path: Path):
    replay = make_replay(40)
    Checkpoints(tmp_path).save(1, state_of(1), replay)
    before = chunk_files(tmp_path)
    keeper, twin = Checkpoints(tmp_path), make_replay()
    keeper.load(replay=twin)
    for row in range(40, 60):
        add(replay, row)
        add(twin, row)
    keeper.save(2, state_of(2), twin)
    after = chunk_files(tmp_path)
    assert {name: after[name] for name in before} == before
    assert len(after) == 60 // 8
    again = make_replay()
    Checkpoints(tmp_path).load(replay=again)
    assert_same_replay(again, replay)


def test_a_ring_that_went_round_between_two_saves(tmp_path: Path):
    replay, keeper = make_replay(20), Checkpoints(tmp_path)
    keeper.save(1, state_of(1), replay)
    for row in range(20, 170):
        add(replay, row)
    keeper.save(2, state_of(2), replay)
    twin = make_replay()
    Checkpoints(tmp_path).load(replay=twin)
    assert_same_replay(twin, replay)


def test_a_run_that_went_on_from_an_older_checkpoint(tmp_path: Path):
    """Its rows differ from those of the same numbers that it left behind, and it comes to the same steps again."""
    replay, keeper = make_replay(20), Checkpoints(tmp_path)
    first = keeper.save(10, state_of(10), replay)
    for row in range(20, 40):
        add(replay, row)
    keeper.save(20, state_of(20), replay)
    fork, other = Checkpoints(tmp_path), make_replay()
    fork.load(first, other)
    for row in range(20, 40):
        add(other, row, salt=1)
    for step in (20, 15):
        fork.save(step, state_of(step + 500), other)
        twin = make_replay()
        assert_same(Checkpoints(tmp_path).load(replay=twin), state_of(step + 500))
        assert_same_replay(twin, other)
    assert len(list(fork.folder.iterdir())) == 2


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif how == "flipped":
        data[len(data) // 2] ^= 16
        path.write_bytes(data)
    elif how == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()


@pytest.mark.parametrize("how", ["truncated", "flipped", "empty", "missing"])
@pytest.mark.parametrize("name", ["state.pt", "tail.npz", "manifest.json"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, how: str, name: str, capsys: pytest.CaptureFixture[str]):
    replay, keeper = make_replay(20), Checkpoints(tmp_path)
    keeper.save(1, state_of(1), replay)
    wanted = make_replay(20)
    add(replay, 20)
    path = keeper.save(2, state_of(2), replay)
    damage(path / name, how)
    with pytest.raises(BadInput, match=rf"000000000002/{name} is damaged .*: restore it") as refusal:
        Checkpoints(tmp_path).load(path, make_replay())
    assert "\n" not in str(refusal.value)
    resumed, twin = Checkpoints(tmp_path), make_replay()
    assert_same(resumed.load(replay=twin), state_of(1))
    assert_same_replay(twin, wanted)
    assert f"000000000002/{name} is damaged" in capsys.readouterr().err
    # Going on keeps the good one, and drops the damaged.
    add(twin, 20)
    saved = resumed.save(2, state_of(2), twin)
    assert set(resumed.folder.iterdir()) == {resumed.folder / "000000000001", saved}
    assert resumed.latest() == saved
    # The damaged one's name is free again, and means a good one now.
    assert resumed.save(2, state_of(3), twin) == path
    assert_same(Checkpoints(tmp_path).load(), state_of(3))


@pytest.mark.parametrize("how", ["truncated", "flipped", "missing"])
def test_a_damaged_file_of_rows(tmp_path: Path, how: str):
    keeper = Checkpoints(tmp_path)
    keeper.save(1, state_of(1), make_replay(20))
    chunk = next((tmp_path / "replay").iterdir())
    damage(chunk, how)
    with pytest.raises(BadInput, match=r"No checkpoint in .* can be read") as refusal:
        Checkpoints(tmp_path).load(replay=make_replay())
    assert chunk.name in str(refusal.value.__cause__)
    assert_same(Checkpoints(tmp_path).load(), state_of(1))  # evaluation needs no replay


def test_a_file_of_rows_that_went_missing_is_written_again(tmp_path: Path):
    replay, keeper = make_replay(30), Checkpoints(tmp_path)
    keeper.save(1, state_of(1), replay)
    next((tmp_path / "replay").iterdir()).unlink()
    keeper.save(2, state_of(2), replay)
    twin = make_replay()
    Checkpoints(tmp_path).load(replay=twin)
    assert_same_replay(twin, replay)


def test_no_checkpoint_at_all(tmp_path: Path):
    assert Checkpoints(tmp_path).latest() is None
    with pytest.raises(BadInput, match="There is no checkpoint in"):
        Checkpoints(tmp_path).load()


class Payload:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def reseal(path: Path, name: str) -> None:
    """Makes the manifest agree with a changed file, as who plants one would."""
    manifest = json.loads((path / "manifest.json").read_text())
    data = (path / name).read_bytes()
    manifest["files"][name] = {"bytes": len(data), "crc32": zlib.crc32(data)}
    del manifest["crc32"]
    manifest["crc32"] = zlib.crc32(json.dumps(manifest, sort_keys=True).encode())
    (path / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("kind", ["pickle", "torch", "numpy"])
def test_code_in_place_of_data_is_refused_and_not_run(tmp_path: Path, kind: str):
    mark = tmp_path / "ran"
    path = Checkpoints(tmp_path).save(1, state_of(1), make_replay(3))
    name = "tail.npz" if kind == "numpy" else "state.pt"
    with (path / name).open("wb") as file:
        if kind == "pickle":
            pickle.dump(Payload(mark), file, protocol=2)
        elif kind == "torch":
            torch.save({"agent": Payload(mark)}, file)
        else:
            np.savez(file, reward=np.array([Payload(mark)], dtype=object))
    reseal(path, name)
    with pytest.raises(BadInput, match=rf"{name} is damaged"):
        Checkpoints(tmp_path).load(path, make_replay())
    assert not mark.exists()
    pickle.loads(pickle.dumps(Payload(mark)))
    assert mark.exists(), "the payload is one that works"


def test_another_format_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    Checkpoints(tmp_path).save(1, state_of(1), None)
    written = module.FORMAT
    monkeypatch.setattr(module, "READ", (written + 1,))
    with pytest.raises(BadInput, match=f"has format {written} and this version reads {written + 1}"):
        Checkpoints(tmp_path).load()


def test_another_shape_is_named_before_anything_is_read(tmp_path: Path):
    path = Checkpoints(tmp_path).save(1, {"agent": {"a": torch.zeros(2), "w": torch.zeros(3, 4)}, "n": 1}, None)
    (path / "state.pt").unlink()
    expected = {"agent": {"a": torch.zeros(2), "w": np.zeros((3, 5))}}
    with pytest.raises(BadInput, match=r"agent\.w being \(3, 4\) in it and \(3, 5\) here: .*config\.yaml"):
        Checkpoints(tmp_path).load(expected=shapes(expected))


def test_check_shapes_looks_under_the_same_roots_alone():
    found = shapes({"agent": [torch.zeros(2), np.zeros(())], "other": torch.zeros(1)})
    assert found == {"agent.0": (2,), "agent.1": (), "other": (1,)}
    check_shapes({"agent.0": (2,), "agent.1": ()}, found)
    with pytest.raises(BadInput, match=r"agent\.1 being \(\) in it and missing here: "):
        check_shapes({"agent.0": (2,)}, found)
    with pytest.raises(BadInput, match=r"agent\.2 being missing in it and \(9,\) here"):
        check_shapes({"agent.0": (2,), "agent.1": (), "agent.2": (9,)}, found)


def test_another_ring_is_named(tmp_path: Path):
    Checkpoints(tmp_path).save(1, state_of(1), make_replay(5))
    with pytest.raises(
        BadInput, match=r"replay\.vector being \(50, 2, 3\) in it and \(60, 2, 3\) here: .*config\.yaml"
    ):
        Checkpoints(tmp_path).load(replay=make_replay(capacity=60 * ENVS))
    Checkpoints(tmp_path).save(2, state_of(2), None)
    with pytest.raises(BadInput, match="000000000002 holds no replay"):
        Checkpoints(tmp_path).load(replay=make_replay())


@pytest.mark.parametrize(
    ("large", "rows", "limit"),
    [(100_000, 0, 50_000), (1, 8, 8_000), (1, 3, 8_000)],
    ids=["state", "chunk", "tail"],
)
def test_a_full_disk_leaves_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, large: int, rows: int, limit: int
):
    """A real limit on the size of files, met by one of the three kinds at a time."""
    wide = Spaces(image=False, vector=200, action=2, discrete=False)
    monkeypatch.setattr(module, "CHUNK_BYTES", 8 * Replay.bytes(wide, ENVS))
    replay, keeper = make_replay(20, spaces=wide), Checkpoints(tmp_path)
    keeper.save(1, {"step": 1}, replay)
    before = files(tmp_path)
    for row in range(20, 20 + rows):
        add(replay, row)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(BadInput, match=r"needs up to .* no room") as refusal:
            keeper.save(2, {"step": 2, "large": torch.zeros(large)}, replay)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(keeper.folder) in str(refusal.value)
    assert files(tmp_path) == before
    twin = make_replay(spaces=wide)
    assert Checkpoints(tmp_path).load(replay=twin) == {"step": 1}
    assert twin.added == 20
    keeper.save(3, {"step": 3}, replay)
    assert Checkpoints(tmp_path).load(replay=twin) == {"step": 3}
    assert_same_replay(twin, replay)


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        (errno.ENOSPC, r"needs up to [\d,]+ bytes and there is no room \(No space"),
        (errno.EDQUOT, "there is no room"),
        (errno.EACCES, r"cannot be written in .*--resume"),
        (errno.EROFS, r"cannot be written in .*--resume"),
    ],
)
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_write_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, sentence: str, call: str
):
    replay, keeper = make_replay(20), Checkpoints(tmp_path)
    keeper.save(1, state_of(1), replay)

    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(BadInput, match=sentence):
            keeper.save(2, state_of(2), replay)
    assert_same(Checkpoints(tmp_path).load(), state_of(1))
    keeper.save(2, state_of(2), replay)
    assert_same(Checkpoints(tmp_path).load(), state_of(2))


def test_a_file_where_the_run_should_be(tmp_path: Path):
    (tmp_path / "run").write_text("")
    with pytest.raises(BadInput, match=r"cannot be written in .*run/checkpoints"):
        Checkpoints(tmp_path / "run").save(1, state_of(1), None)


class Killed(BaseException):
    pass


def test_death_at_every_call_that_changes_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """From the k-th change on, none is made: what a process killed there leaves behind."""
    replay = make_replay(60)
    for name in ("start", "now"):
        keeper = Checkpoints(tmp_path / name)
        for step in (1, 2):
            keeper.save(step, state_of(step), make_replay(30 * step))
    for row in range(60, 90):
        add(replay, row)
    deaths, survived = 0, set()
    while True:
        run = tmp_path / f"run{deaths}"
        shutil.copytree(tmp_path / "start", run)
        keeper = Checkpoints(run)
        left = deaths
        with monkeypatch.context() as patch:

            def mortal(call: Any) -> Any:
                def either(*args: Any, **kwargs: Any) -> Any:
                    nonlocal left
                    left -= 1
                    if left < 0:
                        raise Killed
                    return call(*args, **kwargs)

                return either

            for name in ("replace", "fsync", "unlink", "rmdir", "mkdir"):
                patch.setattr(os, name, mortal(getattr(os, name)))
            try:
                keeper.save(3, state_of(3), replay)
                break
            except Killed:
                pass
        twin = make_replay()
        state = Checkpoints(run).load(replay=twin)
        assert_same(state, state_of(state["step"]))
        assert twin.added == 30 * state["step"]
        assert_same_replay(twin, make_replay(30 * state["step"]))
        survived.add(state["step"])
        Checkpoints(run).save(4, state_of(4), replay)
        assert not [name for name in files(run) if ".unfinished" in name]
        deaths += 1
    assert deaths > 15
    assert survived == {2, 3}


LOOP = """
    import sys
    from pathlib import Path
    from fastdreamer.run import checkpoint
    from test_checkpoint import ROW_BYTES, add, make_replay, state_of

    checkpoint.CHUNK_BYTES = 8 * ROW_BYTES
    run, replay = Path(sys.argv[1]), make_replay()
    keeper = checkpoint.Checkpoints(run)
    step = keeper.load(replay=replay)["step"] if keeper.latest() else 0
    while True:
        for _ in range(9):
            add(replay, replay.added)
        step += 1
        keeper.save(step, state_of(step), replay)
        print(step, flush=True)
"""


@pytest.mark.parametrize("kills", [1, pytest.param(5, marks=pytest.mark.thorough)])
def test_kill_9_at_random_moments(tmp_path: Path, kills: int):
    run, generator, here = tmp_path / "run", random.Random(0), Path(__file__).parent
    twin, last = make_replay(), 0
    for _ in range(kills):
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(LOOP), str(run)],
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(here), os.environ.get("PYTHONPATH", "")])},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        assert process.stdout.readline() == f"{last + 1}\n"
        time.sleep(0.4 * generator.random())
        process.kill()
        told = [int(line) for line in process.communicate()[0].split()]
        twin = make_replay()
        state = Checkpoints(run).load(replay=twin)
        last = state["step"]
        assert last >= max(told, default=1)  # what was said to be saved is there
        assert_same(state, state_of(last))
        assert_same_replay(twin, make_replay(9 * last))
    keeper = Checkpoints(run)
    keeper.load(replay=twin)
    keeper.save(last + 1, state_of(last + 1), twin)
    assert not [name for name in files(run) if ".unfinished" in name]
