"""The runner of `bench/peers/`, with peers written for the purpose; none of the published ones is needed."""

import importlib
import io
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench.peers import protocol, run
from bench.peers.protocol import Spec, Variant
from fastdreamer.config import BadInput

ROOT = Path(__file__).parents[2]
SPEC = Spec("", "", "", "cpu", "tiny", {}, envs=4, batch_size=2, batch_length=8)
# What its variants take is told, to the clock that its process reads, and not waited for.
FAKE = """
import os, sys, time
from types import SimpleNamespace
from bench.peers import protocol

FILES = ("{name}.py",)
SECONDS = {seconds}


def variants(device):
    return [protocol.Variant("", way) for way in SECONDS]


class Peer:
    parameters, runs = 12, "nothing"

    def __init__(self, spec):
        self.seconds, self.calls, self.clock = SECONDS[spec.way or "as is"], 0, 0.0
        protocol.time = SimpleNamespace(perf_counter=lambda: self.clock)
        print("a peer may print what it likes")

    def update(self):
        self.calls += 1
        if self.seconds == "dies":
            print("gave way", file=sys.stderr)
            os._exit(3)
        if self.seconds == "dies late" and self.calls > 5:
            os._exit(3)
        if self.seconds == "is killed":
            os.kill(os.getpid(), 9)
        if self.seconds == "hangs":
            time.sleep(600)
        self.clock += self.seconds if isinstance(self.seconds, float) else 0.01

    def act(self):
        self.clock += 0.002


def build(spec):
    if SECONDS[spec.way or "as is"] == "misses":
        import a_package_that_is_not_there
    return Peer(spec)
"""
OURS = {"as is": 0.03, "eager fp32": 0.06}


@contextmanager
def fakes(folder: Path, **peers: dict[str, Any]) -> Iterator[None]:
    """Peers of these names, ours among them, whose ways take so many seconds or go so wrong. `folder` is everyone's
    checkout."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(run.GIVEN, "PYTHONPATH", os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]))
        patch.syspath_prepend(str(folder))
        patch.setattr(run, "OURS", "fake_ours")
        patch.setattr(run, "PEERS", {name: f"fake_{name}" for name in peers if name != "ours"})
        for name, seconds in ({"ours": OURS} | peers).items():
            (folder / f"fake_{name}.py").write_text(FAKE.format(name=name, seconds=seconds))
            (folder / f"{name}.py").touch()
        try:
            yield
        finally:
            for name in [name for name in sys.modules if name.startswith("fake_")]:
                del sys.modules[name]


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[str]]:
    """What a comparison stored, and the lines that it printed."""
    folder = tmp_path_factory.mktemp("peers")
    file, printed = folder / "stored.json", io.StringIO()
    peers: dict[str, dict[str, Any]] = {
        "broken": {"one": "dies"}, "large": {"one": "is killed"}, "poor": {"one": "misses"},
        "late": {"one": "dies late"}, "quick": {"slow": 0.2, "fast": 0.09},
    }  # fmt: skip
    arguments = [*(f"{name}={folder}" for name in peers), "--device", "cpu", "--json", str(file), "--rounds", "3"]
    with fakes(folder, **peers), redirect_stdout(printed):
        assert run.main(arguments) == 0
    return json.loads(file.read_text()), printed.getvalue().splitlines()


def ratios(stored: dict[str, Any], group: str) -> dict[str, float]:
    return {
        result["implementation"]: result["ratio"] for result in stored["results"] if result["group"] == group
    }  # fmt: skip


def test_a_ratio_is_the_peers_time_over_ours_and_the_fastest_variant_is_compared(compared: Any) -> None:
    stored, lines = compared
    found = ratios(stored, "update beside peers, size S")
    assert found == {run.COMPILED: 1, run.DREAMERV3: 1, run.EAGER: 2, "quick, fast": 3}
    assert f"quick, slow: 6.67 of the time of {run.COMPILED}, at a first look" in lines
    peer = next(result for result in stored["results"] if result["implementation"] == "quick, fast")
    assert peer["parameters"] == 12
    assert peer["rounds"] == 3
    assert peer["ratio_low"] == peer["ratio"] == peer["ratio_high"]
    assert not any("median_s" in result for result in stored["results"]), "times of a CPU are not stored"
    # 0.09 s of update and 0.002 s of decision, over 0.03 and 0.002: half an update and a sixteenth decision each.
    frame = (0.09 / 2 + 0.002 / 16) / (0.03 / 2 + 0.002 / 16)
    assert ratios(stored, "frame end to end beside peers, size S")["quick, fast"] == pytest.approx(frame, abs=1e-4)


def test_a_peer_that_fails_is_a_line_and_the_others_run(compared: Any) -> None:
    stored, lines = compared
    assert set(ratios(stored, "update beside peers, size S")) == {*run.REFERENCES, "quick, fast"}
    assert "broken, one: its process ended: gave way" in lines
    assert "large, one: its process ended: killed, for want of memory as it seems" in lines
    assert "poor, one: misses something: No module named 'a_package_that_is_not_there'" in lines
    assert sum(line.startswith("late, one: its process ended") for line in lines) == 1


def test_a_peer_without_an_answer_is_given_up(tmp_path: Path) -> None:
    with fakes(tmp_path, stuck={"one": "hangs"}):
        worker = run.Worker("stuck", "fake_stuck", replace(SPEC, way="one"), python=sys.executable, patience=300)
        worker.patience = 0.5
        with pytest.raises(run.Gone, match="no answer in 0 s"):
            worker.ask("update")
        worker.close()
    assert worker.process.poll() is not None


def test_no_answer_where_fastdreamer_does_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with fakes(tmp_path, ours=OURS | {"as is": "misses"}, good={"one": 0.03}):
        assert run.main([f"good={tmp_path}", "--device", "cpu"]) == 1
    assert capsys.readouterr().err.startswith("error: misses something: No module named")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["dreamer9=/tmp"], "there is no peer dreamer9"),
        (["r2dreamer"], "NAME=WHERE"),
        (["r2dreamer=/no/such/folder"], "there is no such folder"),
        (["r2dreamer=EMPTY"], "is no checkout of r2dreamer (it has no dreamer.py)"),
        (["dreamerv3-torch=EMPTY"], "is no checkout of dreamerv3-torch (it has no dreamer.py)"),
        (["jax-dreamerv3=EMPTY"], "is no checkout of jax-dreamerv3"),
        (["torchrl=EMPTY"], "it is used as an installed package"),
        (["torchrl=torchrl", "--python", "torchrl=/no/python"], "--python torchrl=/no/python"),
        (["torchrl=torchrl", "--rounds", "0"], "--rounds"),
    ],
)
def test_bad_input_is_one_sentence(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.main([argument.replace("EMPTY", str(tmp_path)) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert said in error


def test_a_package_that_is_not_installed_is_missing() -> None:
    run.check("torchrl", "torchrl")
    with pytest.raises(protocol.Missing, match="no package a_package_that_is_not_there"):
        protocol.locate("a_package_that_is_not_there")
    with pytest.raises(BadInput):
        run.check("torchrl", "not/a/package")


def test_everyone_has_variants_and_gets_the_same_batch() -> None:
    for adapter in run.PEERS.values():
        for device in ("cpu", "cuda"):
            variants: list[Variant] = __import__(adapter, fromlist=["variants"]).variants(device)
            assert len({variant.name for variant in variants}) == len(variants) > 1
    first, second = protocol.batch(SPEC), protocol.batch(SPEC)
    assert all(np.array_equal(first[name], second[name]) for name in first)
    assert first["image"].shape == (2, 8, 64, 64, 3)
    assert first["action"].shape == (2, 8, 6)
    assert first["is_first"].dtype == bool


def test_ours_is_a_peer_like_the_others() -> None:
    """A real update and decision, at size tiny."""
    threads = torch.get_num_threads()
    peer = importlib.import_module(run.OURS).build(replace(SPEC, model="mudreamer", way="eager fp32"))
    try:
        assert peer.parameters > 10_000
        assert "tiny" in peer.runs
        peer.update()
        peer.act()
    finally:
        peer.stack.close()
        torch.set_num_threads(threads)


@pytest.mark.thorough
def test_ours_runs_in_a_process_of_its_own() -> None:
    spec = replace(SPEC, model="mudreamer", way="eager fp32")
    worker = run.Worker("ours", run.OURS, spec, python=sys.executable, patience=300)
    try:
        assert worker.parameters > 10_000
        assert worker.ask("update") > 0
        assert worker.ask("act", 2) > 0
    finally:
        worker.close()
