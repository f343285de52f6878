"""The machinery: staging, metrics read late, generators, and (on a GPU) batches copied ahead."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from fastdreamer_kernels import ops
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastdreamer.algorithm.optim import Optimizer
from fastdreamer.config import BadInput, parse_command
from fastdreamer.envs.base import Spaces, Step
from fastdreamer.run import parts as building
from fastdreamer.runtime import graphs as machinery
from fastdreamer.runtime.acting import Stager
from fastdreamer.runtime.device import choose_device, generator
from fastdreamer.runtime.graphs import Runtime, casts_know_gradients
from fastdreamer.runtime.learner import Batches, Learner, NonFinite, Overlapping, Sequential

CPU = torch.device("cpu")


def test_staged_rows_outlive_the_arrays() -> None:
    step = Step.empty(2, Spaces(image=True, vector=0, action=1, discrete=False))
    rows = Stager(CPU)(step)
    assert set(rows) == {"image", "action", "reward", "is_first", "is_last", "is_terminal"}
    step.reward[:] = 5
    assert not rows["reward"].any()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_staged_rows_are_in_host_memory_too(device: str) -> None:
    step, stage = Step.empty(2, Spaces(image=True, vector=0, action=1, discrete=False)), Stager(torch.device(device))
    step.reward[:] = 5
    rows = stage(step)
    assert stage.staged.keys() == rows.keys()
    for name, field in stage.staged.items():
        assert field.device == CPU
        assert torch.equal(field, torch.from_numpy(getattr(step, name)))


def test_metrics_come_one_update_late_and_average() -> None:
    values = iter([1.0, 3.0, 8.0])
    learner = Learner(Sequential(lambda: {"loss/x": torch.tensor(next(values))}))
    learner.step()
    assert learner.means() == {}
    learner.step()
    learner.step()
    assert learner.means() == {"loss/x": 2.0}
    learner.settle()
    assert learner.means() == {"loss/x": 8.0}
    assert learner.means() == {}


def test_a_checkpoint_keeps_what_was_not_logged_yet() -> None:
    def update() -> Mapping[str, Tensor]:
        return {"loss/x": torch.tensor(2.0)}

    learner, other = Learner(Sequential(update)), Learner(Sequential(update))
    learner.step()
    other.load(learner.state())
    assert (other.updates, other.means()) == (1, {"loss/x": 2.0})


@pytest.mark.parametrize("name", ["loss/x", "grad/x"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_named_with_its_update(name: str, value: float) -> None:
    values = iter([1.0, value, 1.0])
    learner = Learner(Sequential(lambda: {"behavior/y": torch.tensor(float("nan")), name: torch.tensor(next(values))}))
    learner.step()
    learner.step()
    with pytest.raises(NonFinite, match=rf"{name} was (nan|inf) at update 2"):
        learner.step()


def test_the_second_half_of_an_update_reads_copies_of_what_the_first_left() -> None:
    def first() -> tuple[Tensor, Mapping[str, Tensor]]:
        with torch.no_grad():
            model.weight += 1
        return 10 * model.weight, {"loss/x": torch.tensor(1.0)}

    def second(copied: nn.Linear, handed: Tensor) -> Mapping[str, Tensor]:
        with torch.no_grad():
            model.weight += 100
        return {"loss/y": (copied.weight + handed).sum()}

    model = nn.Linear(1, 1)
    nn.init.zeros_(model.weight)
    runtime = Runtime(CPU, record=lambda function, generators, stream: (function(), function))
    issue = Overlapping(runtime, model, first, second, [])
    learner = Learner(issue)
    learner.step()
    learner.settle()
    assert learner.means() == {"loss/x": 1.0, "loss/y": 11.0}
    assert issue.copy.weight.item() == 1
    nn.init.constant_(model.weight, 5)
    learner.load(learner.state())
    assert issue.copy.weight.item() == 5


@pytest.mark.gpu
def test_halves_that_overlap_on_a_gpu_give_the_numbers_of_those_in_order() -> None:
    """Captured and replayed many times over, with a second half that takes longer than a first."""

    def update(model: nn.Linear, steps: int) -> tuple[Callable[[], Any], Callable[..., Any], Tensor]:
        sums = torch.zeros(512, 512, device="cuda")

        def first() -> tuple[Tensor, Mapping[str, Tensor]]:
            with torch.no_grad():
                model.weight.mul_(0.99).add_(0.01)
            return model.weight.detach().cumsum(0), {"loss/x": model.weight.sum()}

        def second(copied: nn.Linear, handed: Tensor) -> Mapping[str, Tensor]:
            found = handed
            for _ in range(steps):
                found = torch.tanh(found @ copied.weight.detach() / 512)
            sums.add_(found)
            return {"loss/y": found.sum()}

        return first, second, sums

    results = []
    for overlapping in (True, False):
        torch.manual_seed(0)
        model = nn.Linear(512, 512, device="cuda")
        runtime = Runtime(torch.device("cuda"), compile=True, say=lambda _: None)
        first, second, sums = update(model, 30)

        def in_order(model: nn.Linear = model, first: Any = first, second: Any = second) -> Mapping[str, Tensor]:
            handed, metrics = first()
            return metrics | second(model, handed)

        issue = Overlapping(runtime, model, first, second, []) if overlapping else Sequential(in_order)
        learner = Learner(issue)
        for _ in range(50):
            learner.step()
        learner.settle()
        results.append((sums.clone(), learner.means()))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


def test_generators_of_one_run_are_independent_and_repeat() -> None:
    draws = {
        (seed, stream): tuple(torch.rand(4, generator=generator(CPU, seed, stream)).tolist())
        for seed in (0, 1)
        for stream in (0, 1, 2)
    }
    assert len(set(draws.values())) == 6
    assert draws[1, 2] == tuple(torch.rand(4, generator=generator(CPU, 1, 2)).tolist())


def test_a_gpu_that_is_not_there_is_refused() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(BadInput, match="--device cpu"):
        choose_device("cuda")
    assert choose_device("auto") == CPU


def test_the_replay_goes_where_there_is_room(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cuda, spaces = torch.device("cuda"), Spaces(image=True, vector=0, action=6, discrete=False)

    def place(free: float, *flags: str) -> torch.device:
        command, _ = parse_command(["--task", "dmc/walker_walk", *flags], cuda=False)
        monkeypatch.setattr(building, "available_memory", lambda _: int(free))
        return building.choose_replay_device(command.config, spaces, cuda)

    # A million steps of pixels are 12.3 GB.
    assert place(24e9) == cuda
    assert place(16e9) == CPU
    assert "does not fit on cuda beside an update (12.3 of 16.0 GB)" in capsys.readouterr().out
    assert place(16e9, "--replay-capacity", "500000") == cuda
    assert place(80e9, "--replay-device", "cpu") == CPU


def test_batches_from_elsewhere_lie_in_the_same_tensors() -> None:
    """As a captured update needs them; each is drawn while the one before is used."""
    drawn: list[Tensor] = []

    def draw() -> dict[str, Tensor]:
        drawn.append(torch.randn(4))
        return {"x": drawn[-1]}

    batches = Batches(draw, torch.device("meta"), CPU)
    places = set()
    for i in range(5):
        batches.advance()
        assert len(drawn) == i + 2
        assert torch.equal(batches()["x"], drawn[i])
        places.add(batches()["x"].data_ptr())
    assert len(places) == 1


class Narrowed(TorchDispatchMode):
    """Counts casts to bfloat16."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.count += func is torch.ops.aten._to_copy.default and kwargs.get("dtype") == torch.bfloat16
        return func(*args, **kwargs)


@pytest.mark.parametrize("compile", [True, False])
def test_a_weight_is_narrowed_once_until_it_changes(compile: bool) -> None:
    """And never used as it was before its optimiser's step; the gradient also comes if it was used without before."""
    if not casts_know_gradients():
        pytest.skip("this PyTorch keeps casts that lack gradients")
    runtime = Runtime(CPU, precision="bf16", compile=compile, say=lambda _: None)
    layer, row = nn.Linear(2, 2, bias=False), torch.ones(1, 2, dtype=torch.bfloat16)
    optimizer = Optimizer(layer.parameters(), runtime.operations(ops.load("reference")), lr=0.5, eps=1e-8, clip=1e3)
    nn.init.ones_(layer.weight)
    with runtime.autocast(), Narrowed() as narrowed:
        with torch.no_grad():
            assert layer(row).tolist() == [[2, 2]]
        for _ in range(3):
            narrowed.count = 0
            loss = (layer(row) + layer(row)).sum()
            assert narrowed.count <= 1
            optimizer.step(loss)
        # Adam's steps are as long as its rate.
        assert layer(row).float().detach() == pytest.approx(2 * (1 - 3 * 0.5), abs=1e-4)


@pytest.mark.parametrize("where", ["an old PyTorch", "a recording", "our kernels"])
def test_casts_are_not_kept(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if where == "an old PyTorch":
        monkeypatch.setattr(machinery, "casts_know_gradients", lambda: False)
    runtime = Runtime(
        CPU,
        precision="bf16",
        fused=where == "our kernels",
        record=(lambda function, generators, stream: (function(), function)) if where == "a recording" else None,
    )
    layer = nn.Linear(2, 2, bias=False)
    with runtime.autocast(), Narrowed() as narrowed:
        for _ in range(3):
            layer(torch.ones(1, 2, dtype=torch.bfloat16))
    assert narrowed.count == 3


@pytest.mark.gpu
def test_batches_copied_ahead_are_those_drawn() -> None:
    cuda, drawn = torch.device("cuda"), []

    def draw() -> dict[str, Tensor]:
        drawn.append(torch.randn(1000))
        return {"x": drawn[-1].pin_memory()}

    batches = Batches(draw, CPU, cuda)
    for i in range(20):
        batches.advance()
        batch = batches()
        assert len(drawn) == i + 2, "the next one is under way"
        np.testing.assert_array_equal(batch["x"].cpu().numpy(), drawn[i].numpy())


@pytest.mark.gpu
@pytest.mark.parametrize("replay_device", ["auto", "cpu"])
@pytest.mark.parametrize("objective", ["mudreamer", "dreamerv3"])
@pytest.mark.parametrize("compile", ["compile", "no-compile"])
def test_trains_on_a_gpu(replay_device: str, objective: str, compile: str, capsys: pytest.CaptureFixture[str]) -> None:
    from fastdreamer.run.parts import build
    from fastdreamer.run.trainer import Trainer

    arguments = f"--preset demo --device cuda --replay-device {replay_device} --prefill 20 --objective {objective}"
    arguments += f" --{compile}"
    command, _ = parse_command(arguments.split(), cuda=True)
    with build(command.config) as parts:
        trainer = Trainer(parts)
        while trainer.learner.updates < 10:
            trainer.iterate()
        trainer.learner.settle()
        assert all(np.isfinite(value) for value in trainer.learner.means().values())
    said = capsys.readouterr().out
    for half in ("world model", "behaviour"):
        assert (f"the {half}'s update is captured as one graph" in said) == (compile == "compile")
    assert ("the decision is captured as one graph" in said) == (compile == "compile")
    assert "could not be" not in said
