"""Environment processes that crash, hang, fail at start, or lose the trainer."""

import os
import signal
import subprocess
import sys
import time
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from processes import children
from test_envs import SAMPLE, actions, equal, run

from fastdreamer import envs
from fastdreamer.config import BadInput, EnvConfig

CONFIG = EnvConfig(envs=4, workers=2, obs="vector", action_repeat=1)


@pytest.fixture(autouse=True)
def _fault(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(Path(__file__).parents[1] / "samples")
    monkeypatch.setenv("FAULT", str(tmp_path / "fault"))


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")")[-1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def wait_for(condition, seconds: float = 120.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


@pytest.mark.parametrize("fault", ["Faulty", "Hanging"])
def test_a_worker_is_replaced_and_no_other_row_is_lost(fault, caplog):
    with envs.make(SAMPLE + "Vector-v0", replace(CONFIG, workers=1), seed=1) as environments:
        first = deepcopy(environments.recv())
        taken = actions(environments.spaces, 12, 4)
        healthy = [first, *run(environments, taken)]
    # Long enough for a step to have an answer on any machine: what hangs is given up so late, too.
    config = replace(CONFIG, timeout=5.0) if fault == "Hanging" else CONFIG
    with envs.make(f"{SAMPLE}{fault}-v0", config, seed=1) as environments:
        rows = [deepcopy(environments.recv()), *run(environments, taken[:6])]
        assert environments.restarts == 1
        state = environments.state()
        rows += run(environments, taken[6:])
        if fault == "Faulty":
            assert environments.restore(state) == []
            assert environments.restarts == 1
            assert all(map(equal, run(environments, taken[6:]), rows[7:]))
    assert all(map(equal, rows[:3], healthy[:3]))
    struck = rows[3].is_first
    assert struck.tolist() in ([True, True, False, False], [False, False, True, True])
    for row, sound in zip(rows, healthy, strict=True):
        assert np.array_equal(row.vector[~struck], sound.vector[~struck])  # type: ignore[index]
        assert np.array_equal(row.reward[~struck], sound.reward[~struck])
    assert (rows[3].action[struck] == 0).all()
    assert (rows[3].reward[struck] == 0).all()
    assert not rows[3].is_last.any()
    assert not np.array_equal(rows[3].vector[struck], rows[0].vector[struck]), "the seed is new"  # type: ignore[index]
    assert rows[10].is_last[struck].all(), "a whole episode follows"
    told = "the arm fell off" if fault == "Faulty" else "did not answer within 5 seconds"
    assert told in caplog.text


def test_an_environment_that_always_fails_is_refused_and_the_cause_told(tmp_path, caplog):
    config = EnvConfig(envs=1, obs="vector", action_repeat=1)
    with envs.make(f"{SAMPLE}Broken-v0", config, seed=0, logs=tmp_path / "printed") as environments:
        environments.recv()
        with pytest.raises(BadInput) as refusal:
            run(environments, np.zeros((12, 1, 2), np.float32))
    log = tmp_path / "printed" / "0.log"
    line = Path("env_samples.py").read_text().splitlines().index('        raise ValueError("no such joint")') + 1
    failed = f"failed by ValueError: no such joint (env_samples.py:{line})"
    assert str(refusal.value) == (
        f"--task gym/env_samples:Broken-v0: its environment process {failed}, 5 times without a finished episode (what "
        f"it printed is in {log}): mend the environment."
    )
    assert log.read_text().count("Traceback") == 5
    assert [record.message.split(";")[0] for record in caplog.records] == [
        f"an environment process {failed}",
        *["an environment process died in the same way"] * 3,
    ]


def test_idle_and_hanging_workers_end_with_the_trainer():
    script = (
        "import time; from fastdreamer import envs; from fastdreamer.config import EnvConfig\n"
        "config = EnvConfig(envs=2, workers=2, obs='vector', action_repeat=1)\n"
        f"e = envs.make({SAMPLE + 'Hanging-v0'!r}, config, 0)\n"
        "for step in range(3): e.recv(); e.send(e._taken * 0)\n"
        "print(*[g._process.pid for g in e._groups], flush=True); time.sleep(1000)"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as trainer:
        assert trainer.stdout is not None
        pids = [int(pid) for pid in trainer.stdout.readline().split()]
        assert wait_for(Path(os.environ["FAULT"]).exists), "one hangs now"
        assert [gone(pid) for pid in pids] == [False, False]
        trainer.kill()
    assert wait_for(lambda: all(map(gone, pids)))


def test_interrupts_are_left_to_the_trainer_and_close_leaves_nothing_behind():
    script = (
        "import os, signal, warnings; from fastdreamer import envs; from fastdreamer.config import EnvConfig\n"
        f"with envs.make({SAMPLE + 'Vector-v0'!r}, EnvConfig(envs=2, workers=2, obs='vector'), 0) as e:\n"
        "    e.recv()\n"
        "    pids = [g._process.pid for g in e._groups]\n"
        "    for pid in pids: os.kill(pid, signal.SIGINT)\n"
        "    e.send(e._taken * 0); e.recv()\n"
        "    assert e.restarts == 0\n"
        "    assert all(os.getpgid(pid) != os.getpgid(0) for pid in pids)\n"
        "print(*pids)"
    )
    done = subprocess.run([sys.executable, "-X", "dev", "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert all(gone(int(pid)) for pid in done.stdout.split())


def test_a_process_killed_from_outside_is_replaced():
    with envs.make(SAMPLE + "Vector-v0", EnvConfig(envs=1, obs="vector", action_repeat=1), seed=0) as environments:
        environments.recv()
        run(environments, np.zeros((2, 1, 2), np.float32))
        (worker,) = children(environments._groups[0]._process.pid)
        os.kill(worker, signal.SIGKILL)
        assert run(environments, np.zeros((1, 1, 2), np.float32))[0].is_first.all()
        assert environments.restarts == 1
