"""Gradient steps: a network's parameters in one vector, global-norm clipping, Adam, and slow copies of networks."""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from fastdreamer_kernels.adam_step.collect import collect
from fastdreamer_kernels.ops import Ops
from torch import Tensor, nn

BETA1, BETA2 = 0.9, 0.999
ALIGNMENT = 64
"""Each parameter begins at a multiple of so many elements (256 bytes in float32), as if allocated by itself."""
ROW = 8
"""Rows of narrow matrices begin at multiples of so many elements (16 bytes): as many as products read at once."""


class Optimizer:
    """Adam over some parameters, with their gradient clipped to a global norm, and slow copies that follow them.

    The parameters move into one vector (each keeps its shape and, unless narrow, its strides, and is a view of it from
    then on), so that a step is a few launches however many there are. Gradients are taken with respect to these
    parameters alone, so a loss that passes through other networks (the actor's, through the world model) never reaches
    theirs.

    `slow`: pairs of a slow copy and the parameter it follows; after each step it moves towards it by `rate`.
    `narrow`: those of the parameters that become bfloat16, with their slow copies, as a product reads them: rounded in
    each step from what the vector keeps of them in float32 (Micikevicius et al., "Mixed precision training", 3.1).
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        ops: Ops,
        *,
        lr: float,
        eps: float,
        clip: float,
        slow: Iterable[tuple[nn.Parameter, nn.Parameter]] = (),
        rate: float = 0.0,
        narrow: Iterable[nn.Parameter] = (),
    ):
        pairs, narrowed = list(slow), {id(p) for p in narrow}
        followed = [fast for _, fast in pairs]
        others = [p for p in params if p.requires_grad and not any(p is fast for fast in followed)]
        # The followed ones come first: slow copies lie as the beginning of this vector does.
        self.params, self.copies = followed + others, [copy for copy, _ in pairs]
        self.ops, self.lr, self.eps, self.clip, self.rate = ops, lr, eps, clip, rate
        which = [id(p) in narrowed for p in self.params]
        self.places = arrange(self.params, ROW if any(which) else 1)
        self.param, self.narrow = join(self.params, which, self.places)
        self.slow = self.slow_narrow = None
        if pairs:
            self.slow, self.slow_narrow = join(self.copies, which[: len(pairs)], self.places[: len(pairs)])
        self.grad, self.mean, self.square = (torch.zeros_like(self.param) for _ in range(3))
        self.steps = torch.zeros((), device=self.param.device)

    def collect(self, loss: Tensor) -> None:
        """Takes the gradient of `loss` into `grad`, for `apply` to step by.

        Parameters it does not reach count as having a gradient of zero: those it never reaches stay.
        """
        grads = torch.autograd.grad(loss, self.params, allow_unused=True, materialize_grads=True)
        with torch.no_grad():
            collect(self.grad, list(self.params), list(grads))

    def step(self, loss: Tensor) -> Tensor:
        """One step down `loss`. Returns the gradient's norm before clipping."""
        self.collect(loss)
        return self.apply()

    def apply(self) -> Tensor:
        """Clips and applies the gradient that lies in `grad`, and moves the slow copies. Returns its norm before."""
        return self.ops.adam_step(
            self.param,
            self.grad,
            self.mean,
            self.square,
            self.steps,
            self.slow,
            lr=self.lr,
            beta1=BETA1,
            beta2=BETA2,
            eps=self.eps,
            clip=self.clip,
            rate=self.rate,
            narrow=self.narrow,
            slow_narrow=self.slow_narrow,
        )

    def originals(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Parameters and slow copies, each with what is kept of it in float32 (where it is not narrow, itself)."""
        for params, vector in ((self.params, self.param), (self.copies, self.slow)):
            for param, place in zip(params, self.places, strict=False):
                assert vector is not None
                yield param, place.of(vector)

    def state(self) -> dict[str, Any]:
        """Adam's moments and step count: what a checkpoint keeps, whatever is narrow. Rates stay options."""
        return {"mean": self._packed(self.mean), "square": self._packed(self.square), "steps": self.steps}

    def load(self, state: dict[str, Any]) -> None:
        """Takes over what `state` gave."""
        self.steps.copy_(state["steps"])
        for vector, packed in ((self.mean, state["mean"]), (self.square, state["square"])):
            for place, there in zip(self.places, arrange(self.params, 1), strict=True):
                place.of(vector).copy_(there.of(packed))

    def _packed(self, vector: Tensor) -> Tensor:
        """A vector that lies as this optimiser's do, as it would lie if no parameter were narrow: without wide rows."""
        plain = arrange(self.params, 1)
        if plain == self.places:
            return vector
        packed = vector.new_zeros(size(plain))
        for place, there in zip(self.places, plain, strict=True):
            there.of(packed).copy_(place.of(vector))
        return packed


class Place(NamedTuple):
    """Where a parameter lies in a vector."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    start: int
    end: int

    def of(self, vector: Tensor) -> Tensor:
        return torch.as_strided(vector, self.shape, self.strides, self.start)


def arrange(params: list[nn.Parameter], row: int) -> list[Place]:
    """One parameter after another, with its own strides, but a matrix's rows begin at multiples of `row` elements."""
    places: list[Place] = []
    for param in params:
        start, strides, length = size(places), param.stride(), param.numel()
        if param.ndim == 2:
            rows, columns = param.shape
            strides = (-(-columns // row) * row, 1)
            length = rows * strides[0]
        places.append(Place(tuple(param.shape), strides, start, start + length))
    return places


def size(places: list[Place]) -> int:
    """How long a vector is in which parameters lie so."""
    return -(-places[-1].end // ALIGNMENT) * ALIGNMENT if places else 0


@torch.no_grad()
def join(params: list[nn.Parameter], narrow: list[bool], places: list[Place]) -> tuple[Tensor, Tensor | None]:
    """Moves parameters into one new vector and makes them views of it, gaps between them being zero; those that are
    narrow into views of its copy in bfloat16, which is the second result where there are any."""
    vector = params[0].new_zeros(size(places))
    for param, place in zip(params, places, strict=True):
        place.of(vector).copy_(param)
    copy = vector.bfloat16() if any(narrow) else None
    for param, place, chosen in zip(params, places, narrow, strict=True):
        param.data = place.of(copy if chosen and copy is not None else vector)
    return vector, copy
