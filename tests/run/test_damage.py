"""Run folders with damaged files: an older good checkpoint is taken, or one sentence says what is wrong."""

import contextlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml
from runs import GYM, SAMPLES, run, state_of

from fastdreamer import evaluate, train
from fastdreamer.config import ADDED, RECORD_FORMAT, BadInput, defaults, load_config, options, read_record
from fastdreamer.envs.base import Spaces
from fastdreamer.replay import Replay
from fastdreamer.report import __main__ as report
from fastdreamer.run import records
from fastdreamer.run.checkpoint import Checkpoints
from fastdreamer.run.lock import held
from fastdreamer.run.logger import Logger

OLDEST_RECORD = """action_head action_repeat actor_gradient backend background batch_length batch_norm batch_norm_eps
    batch_norm_momentum batch_size behavior_clip behavior_eps behavior_lr beta_dyn beta_pred beta_rep checkpoint_every
    compile decoder device ema entropy envs eval_background eval_episodes eval_every frames free_nats gamma horizon
    kernels lam log_every logdir model_clip model_eps model_lr objective obs precision prefill preset render
    replay_capacity replay_device return_decay seed size task teacher_ema timeout train_ratio unimix value_head workers
    """.split()  # noqa: SIM905
"""Options of the first format of a run's record."""
DEEP = "[" * 5000
FILES = {
    "empty": b"",
    "garbage": bytes(range(256)),
    "list": b"[]",
    "number": b"3",
    "deep": DEEP.encode(),
    "tag": b"config: !!timestamp no",
}
ENTRIES: list[Any] = [None, 3, -1, "x", "", [], {}, [{}], 10**400, float("nan"), {"a": {"b": 1}}]


@pytest.fixture(autouse=True)
def _beside_the_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(SAMPLES)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two checkpoints, evaluations and a resume."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(SAMPLES)
        folder = run([*GYM, "--frames", "40", "--eval-every", "24"], tmp_path_factory.mktemp("damage"))
        assert train.main(["--resume", str(folder), "--frames", "60"]) == 0
        return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "run")


def places(value: Any, place: tuple = ()) -> Iterator[tuple]:
    """Every entry of nested dicts and lists."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in entries:
        yield (*place, key)
        yield from places(entry, (*place, key))


def put(value: Any, place: tuple, new: Any) -> Any:
    """The nested value with one entry replaced, or left out where `new` is `put` itself."""
    *above, last = place
    changed = json.loads(json.dumps(value))
    inner = changed
    for key in above:
        inner = inner[key]
    if new is put:
        del inner[last]
    else:
        inner[last] = new
    return changed


def use(folder: Path) -> None:
    """What training, evaluating and reporting read of a run's folder, without their work."""
    with held(folder):
        config = load_config(folder)
        records.is_finished(folder, config)
        spaces = Spaces(image=False, vector=3, action=2, discrete=False)
        replay = Replay(spaces, config.env.envs, config.replay.replay_capacity)
        with contextlib.suppress(BadInput):  # which other tests look at
            Checkpoints(folder).load(replay=replay)
        records.record_resume(folder, asdict(config))
        logger = Logger(folder, total_frames=100, live=False, resume_at_frames=40)
        logger.scalars(44, {"loss/a": 1.0}, updates=3)
        logger.progress(44, 3)
        logger.close()
        records.read_run(folder)


def refused_or_used(folder: Path, name: str) -> str:
    """Uses the folder; gives the sentence of a refusal, which leaves the file as it is."""
    path, before = folder / name, (folder / name).read_bytes() if (folder / name).is_file() else b""
    told = ""
    try:
        use(folder)
    except BadInput as error:
        told = str(error)
    assert "\n" not in told
    assert not told or path.is_dir() or path.read_bytes() == before
    return told


@pytest.mark.parametrize("how", FILES)
def test_each_text_file_damaged_as_a_whole(how: str, folder: Path) -> None:
    (manifest,) = [path / "manifest.json" for path in [Checkpoints(folder).latest()] if path]
    kept = {path: path.read_bytes() for path in (manifest, folder / "config.yaml", folder / records.METRICS)}
    for path, text in kept.items():
        path.write_bytes(FILES[how])
        told = refused_or_used(folder, path.relative_to(folder).name)
        if path.name == "config.yaml":
            assert "config.yaml cannot be read" in told
        path.write_bytes(text)
        path.unlink()
        path.mkdir()
        refused_or_used(folder, str(path.relative_to(folder)))
        path.rmdir()
        path.write_bytes(text)
    assert not refused_or_used(folder, "config.yaml")


@pytest.mark.parametrize("how", FILES)
def test_an_older_checkpoint_is_taken_where_the_manifest_is_damaged(how: str, folder: Path) -> None:
    keeper = Checkpoints(folder)
    newest = keeper.latest()
    assert newest is not None
    (newest / "manifest.json").write_bytes(FILES[how])
    older = Checkpoints(folder).latest()
    assert older is not None
    assert older != newest
    assert Checkpoints(folder).load()["decisions"] < 60


def test_a_file_in_place_of_a_checkpoint(folder: Path) -> None:
    newest = Checkpoints(folder).latest()
    assert newest is not None
    shutil.rmtree(newest)
    newest.write_text("")
    assert train.main(["--resume", str(folder), "--frames", "70"]) == 0
    assert not newest.is_file()
    assert state_of(folder)["decisions"] >= 70


def test_every_entry_of_a_record_is_there_or_named(folder: Path) -> None:
    path = folder / "config.yaml"
    record = yaml.safe_load(path.read_text())
    for place in places(record["config"]):
        name = ".".join(place)
        path.write_text(yaml.safe_dump(put(record, ("config", *place), put)))
        with pytest.raises(BadInput, match=rf"config\.yaml cannot be read .*it lacks {name}\b.*write it as it was"):
            load_config(folder)
        path.write_text(yaml.safe_dump(put(record, ("config", *place), [None])))
        with pytest.raises(BadInput, match=rf"config\.yaml cannot be read .*{name} is \[None\]"):
            load_config(folder)
    for place in places({name: record[name] for name in record if name != "config"}):
        for new in (put, None, 3, [None], {"a": 1}):
            path.write_text(yaml.safe_dump(put(record, place, new)))
            with contextlib.suppress(BadInput):
                read_record(folder)["resumed"].append(1)


def test_records_of_older_versions_go_on_and_of_newer_ones_are_refused(folder: Path) -> None:
    path = folder / "config.yaml"
    record = yaml.safe_load(path.read_text())
    assert record["format"] == RECORD_FORMAT
    everything = options(defaults("demo"))
    assert sorted(everything) == sorted([*OLDEST_RECORD, *ADDED]), "a new option: list it in ADDED"
    assert all(0 < added <= RECORD_FORMAT for added in ADDED.values())
    old = json.loads(json.dumps(record))
    del old["format"], old["resumed"]
    for name in ADDED:
        for section in (old["config"], *(v for v in old["config"].values() if isinstance(v, dict))):
            section.pop(name, None)
    path.write_text(yaml.safe_dump(old))
    assert load_config(folder).run.frames == 60
    assert train.main(["--resume", str(folder), "--frames", "70"]) == 0
    written = yaml.safe_load(path.read_text())
    assert written["format"] == RECORD_FORMAT
    assert written["config"]["run"]["threads"] == 0
    path.write_text(yaml.safe_dump(record | {"format": RECORD_FORMAT + 1}))
    with pytest.raises(BadInput, match="use the version that wrote it"):
        load_config(folder)


def test_a_record_is_written_beside_and_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(records.os, "fsync", full)
        with pytest.raises(BadInput, match=r"No space left on device.*--logdir"):
            records.new_run(tmp_path, "a/b", {})
    assert not list(tmp_path.iterdir())
    config = asdict(defaults("demo"))
    folder = records.new_run(tmp_path, "a/b", config)
    before = (folder / "config.yaml").read_bytes()
    monkeypatch.setattr(records.os, "fsync", full)
    with pytest.raises(BadInput, match="cannot be written"):
        records.record_resume(folder, config)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {"config.yaml": before}


def test_damaged_lines_of_metrics_are_left_out(tmp_path: Path) -> None:
    good = {"frames": 8, "updates": 2, "seconds": 1.0, "loss/a": 1.0}
    lines = [json.dumps(put(good, (name,), new)) for name in good for new in ENTRIES]
    lines += [DEEP, '{"frames": 1e999}', '{"frames": 1' + "0" * 400 + "}", "3", "[]", "null"]
    (tmp_path / records.METRICS).write_text("\n".join([json.dumps(good), *lines, json.dumps(good)]) + "\n")
    logger = Logger(tmp_path, total_frames=100, live=False, resume_at_frames=8)
    logger.progress(8, 2)
    logger.close()
    rows = list(records.read_metrics(tmp_path))
    assert rows[0] == rows[-1] == good
    assert all(row["frames"] <= 8 for row in rows)


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["config", "metrics", "manifest", "files"])
def test_the_commands_on_damaged_folders(kind: str, folder: Path, tmp_path: Path) -> None:
    """Each entry of each text file, and each file as a whole: every command ends with code 0 or 2."""
    config, metrics = folder / "config.yaml", folder / records.METRICS
    newest = Checkpoints(folder).latest()
    assert newest is not None
    cases: list[tuple[Path, bytes | None]] = []
    if kind == "config":
        record = yaml.safe_load(config.read_text())
        for place in places(record):
            cases += [(config, yaml.safe_dump(put(record, place, new)).encode()) for new in (put, None, [], "x")]
    elif kind == "metrics":
        lines = metrics.read_text().splitlines()
        number = next(i for i, line in enumerate(lines) if "loss/model" in line)
        row = json.loads(lines[number])
        for place in places(row):
            for new in (put, None, -1, "nan", 10**400, [1]):
                lines[number] = json.dumps(put(row, place, new))
                cases.append((metrics, "\n".join(lines).encode()))
    elif kind == "manifest":
        text = json.loads((newest / "manifest.json").read_text())
        for place in places(text):
            if place[0] != "shapes" or len(place) < 3:
                bad = [json.dumps(put(text, place, new)).encode() for new in (put, None, -1, {})]
                cases += [(newest / "manifest.json", data) for data in bad]
    else:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            data = path.read_bytes()
            flipped = bytes([data[0] ^ 16, *data[1:]]) if data else b"x"
            cases += [(path, bad) for bad in (None, b"", data[: len(data) // 2], flipped, *FILES.values())]
    work = tmp_path / "work"
    for path, data in cases[:: max(1, len(cases) // 60)]:
        for arguments in (["--resume", str(work), "--frames", "64"], [str(work), "--episodes", "1"], [str(work)]):
            shutil.rmtree(work, ignore_errors=True)
            shutil.copytree(folder, work)
            damaged = work / path.relative_to(folder)
            damaged.unlink()
            if data is not None:
                damaged.write_bytes(data)
            command = train if "--resume" in arguments else evaluate if "--episodes" in arguments else report
            assert command.main(arguments) in (0, 2), (path, data, arguments)
