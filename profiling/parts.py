"""Names the parts of an update and of a decision while they run, from outside: the algorithm knows nothing of it.

`marked` puts wrappers around one trainer's callables for as long as a profile is taken, and removes them; a trainer
that nobody profiles runs none of this. At any moment exactly one part's range is open on a thread, so parts add up.
"""

# First of all: it says how OpenMP's threads wait, which torch reads when it is loaded.
import fastdreamer  # noqa: F401

# isort: split
import bisect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, autograd

from fastdreamer.algorithm.agent import Agent, Optimizers
from fastdreamer.run.trainer import Trainer

PARTS = ("sample", "encode", "observe", "heads", "kl", "imagine", "actor", "critic", "optimise", "act", "copy")
HALVES = ("model's half", "behavior's half")
"""Of an update that is captured, each one graph: Python does not run inside of them."""
REST, BACKWARD = "rest", " backward"
"""What belongs to no part; and what the name of a part ends with in its backward pass."""

Enter = Callable[[str], Any]
Leave = Callable[[Any], None]
"""`enter(name)` opens a range and gives what `leave` closes it by."""
Objects = tuple[str, ...]


class Parts:
    """Keeps the one open range, and knows by autograd's numbers which part made which node of a graph."""

    def __init__(self, enter: Enter, leave: Leave, across: bool = False):
        """`across`: ranges end on any thread, so one alone is open in the process; else one on each thread."""
        self._enter, self._leave, self._across = enter, leave, across
        self._shown = SimpleNamespace() if across else threading.local()
        self._thread = threading.get_ident()
        self._stack = [(REST, True)]
        # Nodes are numbered as they are made: from `_starts[i]` on they belong to `_names[i]`.
        self._starts: list[int] = []
        self._names: list[str] = []
        self._replaced: list[tuple[Any, str, bool, Any]] = []

    @property
    def current(self) -> str:
        """The part that is open."""
        shown = getattr(self._shown, "range", None)
        return REST if shown is None else shown[0]

    def begin(self) -> None:
        self._forward()

    def end(self) -> None:
        """Closes the open range, and takes every wrapper away."""
        self._show(None)
        for owner, name, own, before in reversed(self._replaced):
            if own:
                setattr(owner, name, before)
            else:
                delattr(owner, name)
        self._replaced = []

    def replace(self, owner: Any, name: str, value: Any) -> None:
        """Sets an attribute of one object until `end`."""
        self._replaced.append((owner, name, name in vars(owner), vars(owner).get(name)))
        setattr(owner, name, value)

    def wrap(self, owner: Any, name: str, part: str, *, around: bool = False, results: Objects = ()) -> None:
        """Gives `owner.name`, where there is one, to a part. The part that is outermost counts, but for one `around`
        others, which has only what they leave. `results`: methods of what is returned that are of the part, too."""
        if getattr(owner, name, None) is not None:
            self.replace(owner, name, self.within(part, getattr(owner, name), around=around, results=results))

    def within(self, part: str, function: Callable[..., Any], *, around: bool = False, results: Objects = ()) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            with self.open(part, around=around):
                result = function(*args, **options)
            for method in results:
                setattr(result, method, self.within(part, getattr(result, method)))
            return result

        return call

    @contextmanager
    def open(self, part: str, *, around: bool = False) -> Iterator[None]:
        if not self._stack[-1][1]:
            yield
            return
        self._stack.append((part, around))
        self._forward()
        try:
            yield
        finally:
            self._stack.pop()
            self._forward()

    def attribute(self, loss: Tensor) -> None:
        """Has every node of a loss's graph open the range of its part before it runs.

        The range stays open until a node of another part runs: sums of gradients belong to the node before them.
        Losses may share nodes.
        """
        todo: list[Any] = [loss.grad_fn]
        while todo:
            node = todo.pop()
            if node is None or self in node.metadata:
                continue
            todo += [following for following, _ in node.next_functions]
            at = bisect.bisect_right(self._starts, node._sequence_nr()) - 1
            name = (self._names[at] if at >= 0 else REST) + BACKWARD
            node.metadata[self] = name
            node.register_prehook(lambda _, name=name: self._backward(name))

    def _forward(self) -> None:
        part = self._stack[-1][0]
        if self.current != part or not self._starts:
            self._starts.append(autograd._get_sequence_nr())  # pyright: ignore[reportPrivateImportUsage]
            self._names.append(part)
        self._show(part)

    def _backward(self, name: str) -> None:
        if not self.current.endswith(BACKWARD):
            autograd.Variable._execution_engine.queue_callback(self._after_backward)
        self._show(name)

    def _after_backward(self) -> None:
        # A GPU's nodes run on a thread of their own, which has nothing else to do.
        back = self._across or threading.get_ident() == self._thread
        self._show(self._stack[-1][0] if back else None)

    def _show(self, name: str | None) -> None:
        shown = getattr(self._shown, "range", None)
        if shown is not None:
            if shown[0] == name:
                return
            self._leave(shown[1])
        self._shown.range = None if name is None else (name, self._enter(name))


def attach(parts: Parts, agent: Agent, optimizers: Optimizers) -> None:
    """Wraps what an update is made of."""
    model, behavior = agent.world_model, agent.behavior
    parts.wrap(agent, "draw_update_noise", "sample")
    # World model; what its loss does beside the parts is of the heads.
    parts.wrap(model, "loss", "heads", around=True)
    parts.wrap(model.encoder, "forward", "encode")
    parts.wrap(model.rssm, "observe", "observe")
    parts.replace(model, "ops", model.ops._replace(kl_balance=parts.within("kl", model.ops.kl_balance)))
    # Behaviour; what its loss does beside the parts is of the actor.
    parts.wrap(behavior, "loss", "actor", around=True)
    parts.wrap(behavior, "imagine", "imagine")
    parts.wrap(behavior, "update_return_scale", "critic")
    for head in (behavior.critic, behavior.slow_critic):
        parts.wrap(head, "forward", "critic")
    scalars = {name: parts.within("critic", getattr(behavior.ops, name)) for name in ("twohot_loss", "twohot_mean")}
    returns = parts.within("critic", behavior.ops.lambda_return)
    parts.replace(behavior, "ops", behavior.ops._replace(**scalars, lambda_return=returns))
    through = behavior.through_actor

    def attributed_through(loss: Tensor, *outputs: Any) -> Tensor:
        parts.attribute(loss)
        return through(loss, *outputs)

    parts.replace(behavior, "through_actor", attributed_through)
    for optimizer in optimizers:
        parts.wrap(optimizer, "apply", "optimise")
        collect = parts.within("optimise", optimizer.collect, around=True)

        def attributed(loss: Tensor, collect: Callable[..., None] = collect, **options: Any) -> None:
            parts.attribute(loss)
            collect(loss, **options)

        parts.replace(optimizer, "collect", attributed)


@contextmanager
def marked(trainer: Trainer, enter: Enter, leave: Leave, across: bool = False) -> Iterator[Parts]:
    """Ranges around the parts of what `trainer` does inside this context; "rest" is open wherever no part is."""
    parts = Parts(enter, leave, across)
    try:
        if trainer.parts.runtime.record is None:
            attach(parts, trainer.agent, trainer.parts.optimizers)
            parts.wrap(trainer.parts.batches, "draw", "sample")
        else:
            for half, name in zip(("_first", "_second"), HALVES, strict=True):
                parts.wrap(trainer.learner._issue, half, name)
        parts.wrap(trainer.learner, "_advance", "copy", around=True)
        parts.wrap(trainer.acting, "_stage", "copy")
        parts.wrap(trainer.acting, "_step", "act")
        parts.wrap(trainer.acting, "actions", "act")
        parts.wrap(trainer.acting, "refresh", "copy")
        parts.wrap(trainer.replay, "add", "copy")
        parts.begin()
        yield parts
    finally:
        parts.end()


def recorded() -> tuple[Enter, Leave]:
    """Ranges that torch.profiler keeps."""

    def enter(name: str) -> Any:
        scope = torch.profiler.record_function(name)
        scope.__enter__()
        return scope

    return enter, lambda scope: scope.__exit__(None, None, None)


def annotated() -> tuple[Enter, Leave, bool]:
    """Ranges that Nsight shows. While a GPU's thread runs a backward pass, the thread that waits for it has none."""
    try:
        import nvtx
    except ImportError:
        return torch.cuda.nvtx.range_start, torch.cuda.nvtx.range_end, True
    return lambda name: nvtx.start_range(name), nvtx.end_range, True
