"""Profiles: parts cover an update and change nothing, tables add up, floors agree with counts by hand."""

import importlib.util
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fastdreamer_kernels import cases, ops

from fastdreamer.config import SIZES, Config
from fastdreamer.run import parts as building
from fastdreamer.run.trainer import Trainer
from fastdreamer.run.workload import Way, configure, ready
from fastdreamer.runtime.graphs import Runtime

FOLDER = Path(__file__).parents[2] / "profiling"
sys.path.insert(0, str(FOLDER))
parts, table, roofline, updates = (importlib.import_module(n) for n in ("parts", "table", "roofline", "updates"))


def small(**options: Any) -> Config:
    way = Way("tested", "reference", False, "fp32")
    sizes: dict[str, Any] = {
        "batch_size": 2,
        "batch_length": 4,
        "horizon": 2,
        "envs": 2,
        "replay_capacity": 200,
    } | options
    return configure(way, size="tiny", device="cpu", **sizes)


@pytest.fixture
def trainer() -> Iterator[Trainer]:
    with ready(small()) as made:
        yield made


def weights(trainer: Trainer) -> list[torch.Tensor]:
    moments = [value for each in trainer.parts.optimizers for value in each.state().values()]
    return [x.detach().clone() for x in (*trainer.agent.state_dict().values(), *moments, trainer.carry.action)]


def attributes(trainer: Trainer) -> dict[int, dict[str, Any]]:
    objects = [
        trainer, trainer.parts.batches, trainer.learner, trainer.acting, trainer.replay, *trainer.parts.optimizers,
        *trainer.agent.modules(),
    ]  # fmt: skip
    return {id(each): {k: v for k, v in vars(each).items() if callable(v) or k == "ops"} for each in objects}


def test_marks_change_no_result_and_leave_nothing_behind() -> None:
    found = []
    for marked in (False, True):
        with ready(small()) as trainer:
            step = trainer.envs.recv()
            before = attributes(trainer)
            if marked:
                with parts.marked(trainer, lambda name: name, lambda _: None):
                    assert attributes(trainer) != before
                    for _ in range(2):
                        updates.turn(trainer, step)
            else:
                for _ in range(2):
                    updates.turn(trainer, step)
            assert attributes(trainer) == before
            updates.turn(trainer, step)
            trainer.learner.settle()
            found.append((weights(trainer), trainer.learner.means()))
    (plain, means), (marked, marked_means) = found
    assert all(torch.equal(a, b) for a, b in zip(plain, marked, strict=True))
    assert means == marked_means


@pytest.mark.parametrize("across", [False, True])
def test_one_range_is_open_at_a_time_and_every_part_has_its_own(trainer: Trainer, across: bool) -> None:
    opened, names = [], []

    def enter(name: str) -> str:
        assert not opened
        opened.append(name)
        names.append(name)
        return name

    def leave(name: str) -> None:
        assert opened.pop() == name

    with parts.marked(trainer, enter, leave, across):
        updates.turn(trainer, trainer.envs.recv())
    assert not opened
    learned = ("encode", "observe", "heads", "kl", "imagine", "actor", "critic")
    assert set(names) == {*parts.PARTS, parts.REST, *(name + parts.BACKWARD for name in learned)}
    # The order of an update
    first = {name: names.index(name) for name in names}
    order = ["sample", "encode", "observe", "kl", "imagine", "actor backward", "act"]
    assert sorted(order, key=first.__getitem__) == order


def test_marks_end_with_an_error(trainer: Trainer) -> None:
    before = attributes(trainer)
    with pytest.raises(KeyError), parts.marked(trainer, lambda name: name, lambda _: None):
        raise KeyError
    assert attributes(trainer) == before


def test_each_half_of_a_captured_update_is_one_range(monkeypatch: pytest.MonkeyPatch) -> None:
    def make_runtime(config: Config, device: torch.device) -> Runtime:
        return Runtime(device, record=lambda function, generators, stream: (function(), function))

    monkeypatch.setattr(building, "make_runtime", make_runtime)
    with ready(small()) as trainer:
        names = []
        with parts.marked(trainer, lambda name: names.append(name), lambda _: None):
            updates.turn(trainer, trainer.envs.recv())
    assert {*parts.HALVES, "act", "copy", parts.REST} == set(names)


def test_a_trace_of_an_update(trainer: Trainer, tmp_path: Path) -> None:
    """Hardly an operator of an update belongs to no part, no product or convolution does, and the shares add up."""
    path = tmp_path / "trace.json.gz"
    result = table.trace(trainer, 1, 1, path)
    shares = result.shares()
    assert sum(shares.values()) == pytest.approx(1)
    rows = {row.part: row for row in result.rows}
    unnamed = sum(row.launches for part, row in rows.items() if part.startswith(parts.REST))
    assert unnamed < 0.02 * sum(row.launches for row in result.rows)
    assert all(0 <= row.gap <= row.time for row in result.rows)
    # Operators whose time lies in no range at all would be missing from the table.
    events = table.read(path)
    heavy = {"aten::mm", "aten::addmm", "aten::convolution", "aten::convolution_backward"}
    operators = [event for event in events if event.get("cat") == "cpu_op" and event["name"] in heavy]
    ranges = table.Ranges([e for e in events if e.get("cat") == "user_annotation" and e["name"] in table.NAMES])
    where = [ranges.at(event["tid"], event["ts"]) for event in operators]
    assert {event["name"] for event in operators} == heavy
    assert set(where) <= set(parts.PARTS) | {part + parts.BACKWARD for part in parts.PARTS}
    assert rows["encode"].launches > 4
    assert rows["observe"].launches > 8 * rows["kl"].launches / 4
    assert not result.on_gpu
    text = "\n".join(table.lines(result))
    assert " ms" not in text
    assert "100.0%" in text


def event(category: str, name: str, thread: int, start: float, length: float, **arguments: Any) -> dict[str, Any]:
    return {"cat": category, "name": name, "tid": thread, "ts": start, "dur": length, "args": arguments}


def test_the_table_of_a_gpu() -> None:
    """Kernels belong to the part that launched them, on whichever thread; idle time to the kernel after it."""
    events = [
        event("user_annotation", "encode", 1, 0, 10),
        event("user_annotation", "rest", 1, 10, 90),
        event("user_annotation", "encode backward", 2, 20, 20),
        event("cuda_runtime", "cudaLaunchKernel", 1, 1, 1, correlation=1),
        event("cuda_runtime", "cudaLaunchKernel", 1, 3, 1, correlation=2),
        event("cuda_runtime", "cudaLaunchKernel", 2, 25, 1, correlation=3),
        event("cuda_runtime", "cudaMemcpyAsync", 1, 50, 1, correlation=4),
        event("cuda_runtime", "cudaStreamSynchronize", 1, 52, 30),
        event("kernel", "a", 7, 100, 10, correlation=1),
        event("kernel", "b", 8, 105, 10, correlation=2),
        event("kernel", "c", 7, 125, 20, correlation=3),
        event("gpu_memcpy", "Memcpy DtoH", 7, 150, 2, correlation=4),
    ]
    result = table.summarise(events, 1)
    found = {row.part: (row.time, row.launches, row.gap, row.syncs) for row in result.rows}
    assert result.on_gpu
    assert found == {"encode": (15, 2, 0, 0), "encode backward": (30, 1, 10, 0), "rest": (7, 1, 5, 1)}
    assert result.total == 152 - 100
    assert re.search(r"encode backward +57\.7% +0\.030 +1 +33\.3% +0", "\n".join(table.lines(result)))


@pytest.mark.parametrize("across", [False, True])
def test_a_backward_pass_on_a_thread_of_its_own(across: bool) -> None:
    """As a GPU's: it closes its last range itself, and where ranges cross threads only one is open in the process."""
    seen: list[tuple[str, str, int]] = []

    def enter(name: str) -> str:
        seen.append(("open", name, threading.get_ident()))
        return name

    marks = parts.Parts(enter, lambda name: seen.append(("close", name, threading.get_ident())), across)
    marks.begin()
    weight = torch.ones(3, requires_grad=True)
    with marks.open("encode"):
        loss = (weight * 2).sum()
    with marks.open("optimise"):
        marks.attribute(loss)
        thread = threading.Thread(target=lambda: torch.autograd.grad(loss, weight))
        thread.start()
        thread.join()
    marks.end()
    here, there = threading.get_ident(), thread.ident
    inside = [(way, name, number == there) for way, name, number in seen[seen.index(("open", "optimise", here)) :]]
    own = [("open", "encode backward", True), ("close", "encode backward", True)]
    after = [("close", "optimise", False), ("open", "rest", False), ("close", "rest", False)]
    if across:
        own = [("close", "optimise", True), *own, ("open", "optimise", True)]
    assert inside == [("open", "optimise", False), *own, *after]


@pytest.fixture(scope="module")
def work() -> dict[str, Any]:
    return roofline.count(small(), "fp32")


def test_floors_agree_with_counts_by_hand(work: dict[str, Any]) -> None:
    size, config = SIZES["tiny"], small()
    b, t, h = config.optim.batch_size, config.optim.batch_length, config.behavior.horizon
    actions, latent = 6, size.stoch * size.classes
    features, units, rows = size.deter + latent, size.units, b * t
    prior = (latent + actions) * units + (units + size.deter) * 3 * size.deter + size.deter * units + units * latent
    actor = features * units + units * 2 * actions
    reward, cont = features * units + units * size.bins, features * units + units
    by_hand = 2 * rows * h * (prior + actor + reward + cont)
    assert work["imagine"].flops == {"float32": by_hand}

    # Logits of posterior and prior in, three numbers a row out of which only sums are taken.
    assert work["kl"].read == 2 * 4 * rows * latent
    # Images come as bytes and leave as floats.
    pixels = rows * 3 * 64 * 64
    assert pixels <= work["sample"].read < 1.05 * pixels
    assert 4 * pixels <= work["sample"].written < 1.05 * 4 * pixels
    convolutions = sum(
        2 * rows * (32 >> i) ** 2 * 16 * i_channels * (size.channels << i)
        for i, i_channels in enumerate((3, size.channels, size.channels * 2, size.channels * 4))
    )
    assert work["encode"].flops == {"float32": convolutions}


def test_the_optimisers_floor_is_adams(work: dict[str, Any], trainer: Trainer) -> None:
    """Weights and two moments read and written, gradients and the weights that slow copies follow read."""
    vectors = [optimizer.param.numel() for optimizer in trainer.parts.optimizers]
    slow = sum(optimizer.slow.numel() for optimizer in trainer.parts.optimizers if optimizer.slow is not None)
    total = work["optimise"].read + work["optimise"].written
    # Parameters begin at multiples of 64, and what lies between has no gradient that arrives.
    assert 0.9 * 4 * (7 * sum(vectors) + 2 * slow) < total < 1.1 * 4 * (7 * sum(vectors) + 2 * slow)


def test_precision_halves_what_products_read(work: dict[str, Any]) -> None:
    narrow = roofline.count(small(), "bf16")
    assert narrow["imagine"].flops == {"bfloat16": work["imagine"].flops["float32"]}
    assert narrow["heads"].read < work["heads"].read


def test_floors_are_the_longer_of_two_times() -> None:
    rates = roofline.Rates("one", 100.0, {"float32": 10.0}, "invented")
    work = {"encode": roofline.Work({"float32": 50}, 100, 100), "kl": roofline.Work({}, 300, 0)}
    lines = roofline.compare(work, rates, {"encode": 10.0, "kl": 4.0, "rest": 6.0})
    assert [(line.part, line.floor, line.bound) for line in lines[:2]] == [
        ("encode", 5, "products"),
        ("kl", 3, "bytes"),
    ]
    assert roofline.floor_of(lines) == 8
    text = roofline.text(lines, gpu=False)
    assert re.fullmatch(r"encode +50\.0% +50\.0%  products *", text[1])
    assert re.fullmatch(r"all +100\.0% +40\.0%.*", text[-1])
    assert "ms" not in text[0]
    stored = roofline.as_json({"S": lines}, {"S": work}, rates, False)
    assert "copy" not in stored
    assert all("time" not in entry and "floor" not in entry for entry in stored["sizes"]["S"])


def test_every_operation_can_be_launched() -> None:
    """As `ncu.sh` has it done, but by the references, and on fewer rows: forward, and backward where it learns."""
    operation = importlib.import_module("operation")
    for name in ops.Ops._fields:
        for case in operation.chosen(name, "tiny"):
            call = operation.call_of(case.smaller(), ops.implementation(name, "reference"), "cpu", torch.float32)
            got = call()
            assert name not in cases.LEARNED or len(got) == len(cases.learned(name, case.inputs(torch.float32, "meta")))


def run(name: str, options: Sequence[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a script: of Python in this process, of the shell with its interpreter."""
    if name.endswith(".py"):
        main = importlib.import_module(name.removesuffix(".py")).main if name != "trace.py" else tracing().main
        try:
            code = updates.failing(main, options)
        except SystemExit as done:
            code = int(done.code or 0)
        out, err = capsys.readouterr()
        return code, out, err
    return shell(name, options, PYTHON=sys.executable)


def tracing() -> Any:
    """trace.py, whose name the standard library has taken."""
    spec = importlib.util.spec_from_file_location("profiling_trace", FOLDER / "trace.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def shell(name: str, options: Sequence[str], **variables: str) -> tuple[int, str, str]:
    command = [str(FOLDER / name), *options]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | variables, check=False)
    return done.returncode, done.stdout, done.stderr


def test_published_rates_give_floors_without_a_device(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(updates, "config_of", lambda args, size: small())
    picture, numbers = tmp_path / "roofline.png", tmp_path / "roofline.json"
    options = ["--device-rates", "H100", "--sizes", "tiny", "--output", str(picture), "--json", str(numbers)]
    code, out, err = run("roofline.py", options, capsys)
    assert (code, err) == (0, "")
    assert "published peaks, not measured" in out
    assert picture.stat().st_size > 10_000
    assert '"floor"' in numbers.read_text()


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (("trace.py", "--output", "trace.txt"), r"--output trace\.txt must end in \.json or \.json\.gz\."),
        (("trace.py", "--updates", "0"), r"--updates: 0 is no whole number of at least 1; --help"),
        (("roofline.py", "--sizes", "S,Q"), r"--sizes S,Q: Q is none of tiny, XS, S, M, L, XL\."),
        (("roofline.py", "--json", "missing/x.json"), r"--json missing/x\.json: there is no folder missing; make it"),
        (("updates.py", "--size", "Q"), r"--size: invalid choice: 'Q' \(choose from"),
        (("operation.py", "gru"), r"gru is no operation: name one of gru_gates, .*rssm_observe\."),
        (("nsys.sh", "--size", "Q"), r"--size: invalid choice: 'Q' \(choose from"),
        (("nsys.sh", "--output"), r"--output needs a name"),
        (("ncu.sh",), r"no operation is named"),
        pytest.param(
            ("ncu.sh", "gru"),
            r"gru is no operation: name one of gru_gates, .*rssm_observe\.",
            marks=pytest.mark.thorough,
        ),
        (("ncu.sh", "gru_gates", "--fast"), r"--fast is no option"),
        (("ncu.sh", "gru_gates", "adam_step"), r"adam_step is one operation too many"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_input_is_one_sentence(command: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    name, *options = command
    code, out, err = run(name, options, capsys)
    assert (code, out) == (2, "")
    assert re.fullmatch(f"error: {says}.*\n", err)


@pytest.mark.parametrize("command", [("nsys.sh",), ("ncu.sh", "gru_gates")], ids=["nsys", "ncu"])
def test_what_nsight_lacks_is_named(command: tuple[str, ...], tmp_path: Path) -> None:
    name, *options = command
    for found in ("bash", "dirname", "env"):
        (tmp_path / found).symlink_to(f"/usr/bin/{found}")
    python, tool = tmp_path / "python", tmp_path / name.removesuffix(".sh")
    for stub, text in ((python, "echo cpu"), (tool, "exit 1")):
        stub.write_text(f"#!/bin/bash\n{text}\n")
        stub.chmod(0o755)
    code, _, err = shell(name, options, PYTHON=str(python), PATH=str(tmp_path))
    assert code == 2
    assert re.fullmatch(r"error: there is no CUDA device here.*\n", err)
    tool.unlink()
    code, _, err = shell(name, options, PYTHON=str(python), PATH=str(tmp_path))
    assert code == 2
    assert re.fullmatch(rf"error: {tool.name} is not on PATH: install NVIDIA Nsight .*\n", err)


def test_nsight_is_called_with_what_was_asked_for(tmp_path: Path) -> None:
    """With stand-ins for tool and interpreter: the updates that are profiled are those of the options."""
    for stub, text in (("python", "echo cuda"), ("nsys", 'echo "$@"')):
        (tmp_path / stub).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / stub).chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    options = ["--size", "XS", "--output", "seen", "--updates", "7"]
    code, out, err = shell("nsys.sh", options, PYTHON=str(tmp_path / "python"), PATH=path)
    assert (code, err) == (0, "")
    assert "--capture-range=cudaProfilerApi" in out
    assert "updates.py --size XS --updates 7\n" in out
    assert "seen.nsys-rep" in out


@pytest.mark.parametrize("name", ["trace.py", "roofline.py", "updates.py", "operation.py", "nsys.sh", "ncu.sh"])
def test_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(name, ["--help"], capsys)
    assert code == 0
    assert "--size" in out


@pytest.mark.thorough
def test_a_script_runs_from_the_repository() -> None:
    command = [sys.executable, "profiling/updates.py", "--check"]
    done = subprocess.run(command, cwd=FOLDER.parent, capture_output=True, text=True, check=True)
    assert done.stdout == ("cuda\n" if torch.cuda.is_available() else "cpu\n")


def test_another_head_has_its_own_work(work: dict[str, Any]) -> None:
    base = small()
    other = replace(base, model=replace(base.model, decoder="attached", action_head=False, value_head=False))
    assert roofline.count(other, "fp32")["heads"].flops["float32"] > work["heads"].flops["float32"]
