"""How many kernels a compiled update launches on an H100, counted without one.

Both halves of an update are traced and compiled as the trainer has them compiled on a GPU, up to the code that Inductor
writes, which is read instead of run. What an operator of ours launches inside is counted as it is called. Needs the CPU
build of PyTorch 2.13, and g++.

A product or a convolution is one launch here, though a library may split it, and what Inductor chooses by timing is not
seen: on a GPU another padding is some launches more or fewer. Sampling, noise, metrics and copies are in neither half.
"""

import argparse
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pretend
import torch
import updates
from fastdreamer_kernels import ops
from fastdreamer_kernels.launch import recording
from fastdreamer_kernels.machine import TARGETS
from pretend import GPU
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException
from torch._inductor import config as inductor
from torch._inductor import ir
from torch._inductor.graph import GraphLowering
from torch._inductor.scheduler import ExternKernelSchedulerNode
from torch._library.custom_ops import OPDEFS
from torch._prims_common import is_non_overlapping_and_dense_or_false
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from fastdreamer.algorithm.agent import Agent
from fastdreamer.config import OBJECTIVES, SIZES, BadInput, Config
from fastdreamer.envs.base import Spaces
from fastdreamer.envs.synthetic import ACTIONS
from fastdreamer.replay import Replay
from fastdreamer.run.workload import Way, configure
from fastdreamer.runtime.graphs import Runtime

KINDS = ("products", "convolutions", "Inductor's", "ours", "others")
Counts = Mapping[str, Mapping[str, int]]
"""Launches by part of an update, and by kind."""
OURS = "fastdreamer"
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm"}
NOTHING = {"empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "detach", "alias", "_unsafe_view"}
"""Operators that only allocate, or name anew; so do all views."""
SORT = 9
"""Launches of CUDA's sort at an update's sizes: a radix sort of segments, and what surrounds it."""
WRITTEN = re.compile(r"^ *triton_\w+\.run\(", re.MULTILINE)
TENSORS, BLOCKS, CHUNK = 64, 320, 65536
"""Of two lists of tensors a launch takes so many at most, and so many blocks, each for a chunk (MultiTensorApply.cuh,
before CUDA 13)."""


class Launches(TorchDispatchMode):
    """Counts what operators launch on a GPU, those of ours by what they call and launch inside."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == OURS:
            with self:
                return OPDEFS[func._schema.name]._init_fn(*args, **(kwargs or {}))
        if func.namespace == "aten":
            # Compositions come whole where gradients are off.
            with self:
                result = func.decompose(*args, **(kwargs or {}))
            if result is not NotImplemented:
                return result
            self.count += launched(func, args)
        return func(*args, **(kwargs or {}))


def launched(func: Any, args: Sequence[Any]) -> int:
    """Launches of one of PyTorch's operators."""
    name = func._schema.name.removeprefix("aten::")
    if func.is_view or name in NOTHING:
        return 0
    if name == "sort":
        return SORT
    if name == "convolution_backward":
        return sum(args[-1])
    if name == "_foreach_copy_":
        return copied(*args[:2])
    return 1


def copied(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> int:
    """Launches of copies from list to list: few where each pair is dense and lies alike, else one for each."""
    dense = all(is_non_overlapping_and_dense_or_false(x) for x in (*targets, *sources))
    if not (dense and all(a.stride() == b.stride() for a, b in zip(targets, sources, strict=True))):
        return len(targets)
    chunks = sum(math.ceil(x.numel() / CHUNK) for x in targets)
    return max(math.ceil(len(targets) / TENSORS), math.ceil(chunks / BLOCKS))


def inside(call: Callable[[], Any], fake: FakeTensorMode) -> int:
    """Launches of whatever `call` does with tensors without memory."""
    with torch.no_grad(), fake, recording(TARGETS["sm_90"]) as kernels, Launches() as others:
        call()
    return len(kernels) + others.count


class Like(NamedTuple):
    """What is known of a tensor while code is written."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, node: Any) -> "Like":
        return cls(tuple(map(int, node.get_size())), tuple(map(int, node.get_stride())), node.get_dtype())

    def make(self) -> Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=GPU)


class Call(NamedTuple):
    """An operator that Inductor's code calls. Without arguments it is one launch, whatever they are."""

    kind: str
    operator: Any
    args: Any = ()
    kwargs: Any = None

    def launches(self, fake: FakeTensorMode) -> int:
        if self.kwargs is None:
            return 1

        def make(x: Any) -> Any:
            return x.make() if isinstance(x, Like) else x

        def call() -> None:
            args, kwargs = (tree_map(make, x, is_leaf=lambda x: isinstance(x, Like)) for x in (self.args, self.kwargs))
            self.operator(*args, **kwargs)

        return inside(call, fake)


def call_of(node: Any) -> Call | None:
    """What the code does for a node that is no kernel of Inductor's; None where that is nothing."""
    if isinstance(node, ir.MultiOutput):
        return None
    name, operator = (node.python_kernel_name or type(node).__name__).split("."), node.op_overload
    kind = "others"
    if OURS in name:
        kind = "ours"
    elif PRODUCTS & set(name):
        kind = "products"
    elif any(part.startswith("convolution") for part in name):
        kind = "convolutions"
    if not isinstance(node, ir.FallbackKernel):
        return Call(kind, operator)
    args, kwargs = node.unflatten_args([Like.of(x) for x in node.inputs], node.constant_args)
    return Call(kind, operator, args, kwargs)


class Stop(Exception):
    """Raised where code would be loaded, which is all that was wanted of it."""


def written(function: Callable[..., Any], *args: Any) -> tuple[str, list[Call]]:
    """The code that Inductor writes for a compiled function, and what it calls beside its own kernels."""
    found: list[tuple[str, list[Call]]] = []

    def instead(graph: GraphLowering) -> Any:
        code = graph.codegen()[0].value
        nodes = [leaf for node in graph.scheduler.nodes for leaf in node.get_nodes()]
        calls = [call_of(node.node) for node in nodes if isinstance(node, ExternKernelSchedulerNode)]
        found.append((code, [call for call in calls if call is not None]))
        raise Stop

    usual = GraphLowering.compile_to_module
    GraphLowering.compile_to_module = instead  # pyright: ignore[reportAttributeAccessIssue]
    # The first two would run something on the GPU.
    options = {"joint_graph_constant_folding": False, "shape_padding": False, "compile_threads": 1}
    try:
        with inductor.patch(options | {"force_disable_caches": True}):
            function(*args)
    except TorchDynamoException:
        if not found:
            raise
    finally:
        GraphLowering.compile_to_module = usual
    (graph,) = found
    return graph


def never(function: Callable[[], Any], generators: Sequence[torch.Generator], stream: Any) -> Any:
    """What a runtime that captures has to be given."""
    raise NotImplementedError("nothing runs, so nothing is captured")


def count(config: Config, actions: str) -> Counts:
    """Launches of an update, in a process that pretends."""
    pretend.install()
    spaces = Spaces(image=True, vector=0, action=ACTIONS[actions], discrete=actions == "discrete")
    runtime = Runtime(GPU, precision="bf16", compile=True, fused=True, record=never, say=lambda _: None)  # pyright: ignore[reportArgumentType]
    operations, optim = runtime.operations(ops.load("fused", GPU)), config.optim
    fake, draws = FakeTensorMode(allow_non_fake_inputs=True), torch.Generator()
    # Drawing weights takes a look at what was drawn, which only "meta" goes without.
    with torch.device("meta"):
        agent = Agent(spaces, config, operations)
    with fake, runtime.autocast():
        agent._apply(lambda x: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=GPU))
        optimizers = agent.make_optimizers(narrow=runtime.narrow)
        # As the trainer has them drawn: pixels that a decoder aims at are not rounded.
        images = torch.float32 if config.model.decoder == "attached" else torch.bfloat16
        replay = Replay(
            spaces, config.env.envs, config.replay.replay_capacity, gather=operations.gather_sequences, images=images,
            device=GPU,
        )  # fmt: skip
        uniform = torch.empty(optim.batch_size, dtype=torch.float64, device=GPU)
        batch = replay.sample(uniform, optim.batch_length)
        noise = tree_map(lambda x: x.to(GPU), agent.draw_update_noise(draws))
        start, _ = agent.learn_model(batch, noise.posterior, noise.extra, optimizers)
    halves = {
        "learn_model": (batch, noise.posterior, noise.extra, optimizers),
        "learn_behavior": (agent.world_model, start, noise.imagination, optimizers),
    }
    compiled: dict[str, Any] = runtime.whole({name: getattr(agent, name) for name in halves})
    counts: dict[str, Counter[str]] = {}
    known: dict[str, int] = {}
    for name, args in halves.items():
        with fake, runtime.autocast():
            code, calls = written(compiled[name].fast, *args)
        counts[name] = Counter({"Inductor's": len(WRITTEN.findall(code))})
        for call in calls:
            if repr(call) not in known:
                known[repr(call)] = call.launches(fake)
            counts[name][call.kind] += known[repr(call)]
    adam = sum(inside(optimizer.apply, fake) for optimizer in optimizers)
    return {**counts, "Adam's steps": {"ours": adam}}


def text(counts: Counts) -> list[str]:
    """One row for each part of an update, and one for all of it."""
    lines = [f"{'part':<18}" + "".join(f"{kind:>14}" for kind in (*KINDS, "all"))]
    sums = Counter[str]()
    for part in counts.values():
        sums.update(part)
    for name, part in (*counts.items(), ("all", sums)):
        cells = [part.get(kind, 0) for kind in KINDS]
        lines.append(f"{name:<18}" + "".join(f"{cell:>14}" for cell in (*cells, sum(cells))))
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    parser = updates.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=tuple(SIZES), default="S")
    parser.add_argument("--objective", choices=sorted(OBJECTIVES), default="mudreamer")
    parser.add_argument("--actions", choices=tuple(ACTIONS), default="continuous")
    parser.add_argument("--horizon", type=updates.at_least(1), default=15, help="imagined steps")
    parser.add_argument(
        "--batch", type=updates.at_least(1), nargs=2, default=(16, 64), metavar=("B", "T"), help="sequences, and steps"
    )
    parser.add_argument("--most", type=updates.at_least(0), help="exit with code 1 where there are more launches")
    parser.add_argument("--json", type=Path, help="all numbers, as JSON")
    args = parser.parse_args(argv)
    if args.json is not None and not args.json.parent.is_dir():
        raise BadInput(f"--json {args.json}: there is no folder {args.json.parent}; make it first.")
    sizes = {"batch_size": args.batch[0], "batch_length": args.batch[1], "horizon": args.horizon}
    config = configure(
        Way("counted", "fused", True, "bf16"), size=args.size, objective=args.objective, device="cuda", **sizes
    )
    config = replace(config, task=f"synthetic/{args.actions}")
    if pretend.active():
        print(json.dumps(count(config, args.actions)))
        return
    counts: Counts = json.loads(pretend.run(__file__, sys.argv[1:] if argv is None else argv).splitlines()[-1])
    total = sum(sum(part.values()) for part in counts.values())
    b, t = args.batch
    print(f"size {args.size}, {args.objective}, {args.actions} actions, B {b}, T {t}, H {args.horizon}, an H100")
    print("\n".join(text(counts)))
    if args.json is not None:
        args.json.write_text(json.dumps({**counts, "total": total}, indent=1) + "\n")
    if args.most is not None and total > args.most:
        sys.exit(f"error: an update launches {total} kernels, {total - args.most} more than --most {args.most}.")


if __name__ == "__main__":
    sys.exit(updates.failing(main))
