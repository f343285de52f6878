"""What a run is made of: device, operations, environments, agent, replay, learner and acting, built from its options.

Training, evaluation, dry runs, benchmarks and profiles are made of the same parts; whoever moves them is elsewhere.
"""

from dataclasses import dataclass

import numpy as np
import torch
from fastdreamer_kernels import ops
from torch import nn

from fastdreamer import envs
from fastdreamer.algorithm.agent import Agent, Optimizers, Start
from fastdreamer.algorithm.behavior import ImaginationNoise
from fastdreamer.algorithm.world_model import WorldModel
from fastdreamer.config import BadInput, Config
from fastdreamer.envs import rendering
from fastdreamer.envs.base import Spaces
from fastdreamer.replay import Replay, available_memory, describe
from fastdreamer.runtime.acting import Acting
from fastdreamer.runtime.device import CORES, choose_device, cuda_index, fast_bf16, generator, prepare_process
from fastdreamer.runtime.graphs import Runtime
from fastdreamer.runtime.learner import Batches, Learner, Overlapping, Sequential, Update

UPDATE_ROOM = 6 * 10**9
"""Bytes of a GPU that are left to weights and an update's activations when the replay is placed."""
INIT_STREAM, LEARN_STREAM, ACT_STREAM, REPLAY_STREAM, PREFILL_STREAM = range(5)
"""A run's independent streams of randomness."""


def choose_threads(config: Config) -> int:
    """Threads of this process on the CPU: `--threads`, or by itself one at size tiny, whose operations are too small
    to be shared out, and else all cores but one for each environment worker, of which a quarter at the most is left.

    More environment workers than that wait for updates most of the time.
    """
    if config.run.threads:
        return config.run.threads
    left = min(envs.worker_count(config.task, config.env), CORES // 4)
    return 1 if config.size == "tiny" else max(1, CORES - left)


def make_runtime(config: Config, device: torch.device) -> Runtime:
    """How this run's work is done on its device, as its options say. Raises BadInput for what the device cannot do."""
    run = config.run
    threads = choose_threads(config)
    say(f"threads: {threads} of {CORES}{'' if run.threads else ', for size and workers; --threads takes another'}")
    prepare_process(device, threads=threads, keep_memory=run.compile)
    precision = run.precision
    if precision == "auto":
        # A tiny network's time goes into starting operations, not into products.
        paying = device.type == "cuda" or (run.compile and config.size != "tiny")
        # Published Atari scores were made in float32.
        narrow = fast_bf16(device) and paying and config.preset != "atari"
        precision = "bf16" if narrow else "fp32"
    if precision == "bf16" and device.type == "cuda" and not fast_bf16(device):
        raise BadInput("--precision bf16 needs a GPU of compute capability 8.0 or newer: use --precision fp32.")
    fused = (ops.why(device)[0] if run.kernels == "auto" else run.kernels) == "fused"
    return Runtime(device, precision=precision, compile=run.compile, fused=fused, say=say)


def say(message: str) -> None:
    print(message, flush=True)


def load_ops(config: Config, runtime: Runtime) -> ops.Ops:
    """The hot operations as `--kernels` and `--compile` want them. Raises BadInput where they cannot run."""
    try:
        return runtime.operations(ops.load(config.run.kernels, runtime.device))
    except ops.Unavailable as error:
        raise BadInput(f"--kernels {config.run.kernels} cannot run: {error}; use --kernels auto.") from None


def choose_replay_device(config: Config, spaces: Spaces, device: torch.device) -> torch.device:
    """Where the replay lies: as `--replay-device` says, and by itself where there is room for it beside an update."""
    if config.replay.replay_device == "cpu" or device.type == "cpu":
        return torch.device("cpu")
    need, free = Replay.bytes(spaces, config.replay.replay_capacity), available_memory(device)
    if need + UPDATE_ROOM <= free:
        return device
    wanted = f"{need / 1e9:.1f} of {free / 1e9:.1f} GB"
    say(f"the replay does not fit on {device} beside an update ({wanted}) and is kept in host memory")
    return torch.device("cpu")


def build_agent(config: Config, spaces: Spaces, operations: ops.Ops, device: torch.device) -> Agent:
    """An agent with weights drawn from the run's seed. Raises BadInput where it cannot fit into memory."""
    with torch.device("meta"):
        need, free = state_bytes(Agent(spaces, config, operations)), available_memory(device)
    if need > free:
        raise BadInput(
            f"--size {config.size} needs {need / 1e9:.1f} GB for weights, gradients and optimisers and {device} has "
            f"{free / 1e9:.1f} GB free: choose a smaller one."
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(torch.device("cpu"), config.seed, INIT_STREAM).initial_seed())
        return Agent(spaces, config, operations).to(device)


def state_bytes(agent: nn.Module) -> int:
    """Bytes of weights and slow copies, and for each trainable weight of its gradient (as it arrives, and in the
    optimiser's vector) and Adam's two moments."""
    tensors = [*agent.parameters(), *agent.buffers()]
    trainable = [p for p in agent.parameters() if p.requires_grad]
    return sum(t.numel() * t.element_size() for t in tensors) + 4 * sum(p.numel() * 4 for p in trainable)


def make_acting(
    runtime: Runtime,
    agent: Agent,
    count: int,
    noise: torch.Generator,
    *,
    captured: bool = True,
    learned_on: torch.cuda.Stream | None = None,
) -> Acting:
    """The agent's decisions in `count` environments, drawn from `noise`, from their first rows on."""
    return Acting(
        runtime,
        agent,
        lambda agent, rows, carry: agent.act(rows, carry, agent.draw_act_noise(count, noise)),
        agent.initial_carry(count, runtime.device),
        [noise],
        captured=captured,
        learned_on=learned_on,
    )


@dataclass(frozen=True)
class Parts:
    """A run, built and at rest. Use as a context manager, which closes the environments."""

    config: Config
    device: torch.device
    runtime: Runtime
    envs: envs.Environments
    agent: Agent
    optimizers: Optimizers
    replay: Replay
    batches: Batches
    learner: Learner
    acting: Acting
    generators: dict[str, torch.Generator]
    """Of the updates' noise (`learn`), of decisions (`act`), of the sequences drawn (`replay`)."""

    def __enter__(self) -> "Parts":
        return self

    def __exit__(self, *_: object) -> None:
        self.envs.close()

    def random_action(self) -> torch.Tensor:
        """Uniform actions (N, A), drawn afresh for each row of the replay."""
        rows, spaces = self.config.env.envs, self.envs.spaces
        rng = np.random.default_rng([self.config.seed, PREFILL_STREAM, self.replay.added])
        if spaces.discrete:
            return nn.functional.one_hot(
                torch.from_numpy(rng.integers(spaces.action, size=rows)), spaces.action
            ).float()
        return torch.from_numpy(rng.uniform(-1, 1, (rows, spaces.action)).astype(np.float32))


def build(config: Config) -> Parts:
    """Builds a run as its options say. Raises BadInput for what cannot be had here; nothing is left behind then."""
    device = choose_device(config.run.device)
    runtime = make_runtime(config, device)
    gpu = cuda_index(device)
    environments = envs.make(config.task, config.env, config.seed, gpu=gpu)
    try:
        if environments.renderer is not None:
            say(rendering.told(environments.renderer, gpu is not None))
        return _assemble(config, runtime, environments)
    except BaseException:
        environments.close()
        raise


def _assemble(config: Config, runtime: Runtime, environments: envs.Environments) -> Parts:
    device, spaces, optim = runtime.device, environments.spaces, config.optim
    operations = load_ops(config, runtime)
    agent = build_agent(config, spaces, operations, device)
    optimizers = agent.make_optimizers(narrow=runtime.narrow)
    place = choose_replay_device(config, spaces, device)
    # What an encoder would round anyway; a decoder that shapes the latents aims at pixels as they are.
    rounded = runtime.narrow and config.model.decoder != "attached"
    images = torch.uint8 if place != device else torch.bfloat16 if rounded else torch.float32
    replay = make_replay(config, spaces, operations, place, images)
    streams = {"learn": (device, LEARN_STREAM), "act": (device, ACT_STREAM), "replay": (replay.device, REPLAY_STREAM)}
    generators = {name: generator(where, config.seed, stream) for name, (where, stream) in streams.items()}

    def draw() -> dict[str, torch.Tensor]:
        uniform = torch.rand(
            optim.batch_size, dtype=torch.float64, generator=generators["replay"], device=replay.device
        )
        return replay.sample(uniform, optim.batch_length)

    def update_model() -> tuple[tuple[Start, ImaginationNoise], dict[str, torch.Tensor]]:
        batch, noise = batches(), agent.draw_update_noise(generators["learn"])
        with runtime.autocast():
            start, metrics = agent.update_model(batch, noise, optimizers)
        return (start, noise.imagination), metrics

    def update_behavior(model: WorldModel, handed: tuple[Start, ImaginationNoise]) -> dict[str, torch.Tensor]:
        with runtime.autocast():
            return agent.update_behavior(model, *handed, optimizers)

    def update() -> dict[str, torch.Tensor]:
        batch, noise = batches(), agent.draw_update_noise(generators["learn"])
        with runtime.autocast():
            return agent.update(batch, noise, optimizers)

    # Without the optimisers: a compiler would clone the parameters that they change, and copy them back.
    plain = {"learn_model": agent.learn_model, "learn_behavior": agent.learn_behavior}
    for name, fast in runtime.whole(plain).items():
        setattr(agent, name, fast)
    if place == device:
        # Index arithmetic, which would be a kernel for each of its operations.
        for name, fast in runtime.whole({"sample": replay.sample}).items():
            setattr(replay, name, fast)
    batches = Batches(draw, replay.device, device)
    drawn = ("learn",) if batches.ahead else ("learn", "replay")
    issue: Update = Sequential(update)
    # While decisions' weights are copied the world model's next update may be under way.
    acting_agent = agent
    if runtime.record is not None:
        randomness = [generators[name] for name in drawn]
        issue = Overlapping(runtime, agent.world_model, update_model, update_behavior, randomness)
        acting_agent = agent.in_model(issue.copy)
    learner = Learner(issue, advance=batches.advance)
    acting = make_acting(runtime, acting_agent, config.env.envs, generators["act"], learned_on=issue.stream)
    return Parts(config, device, runtime, environments, agent, optimizers, replay, batches, learner, acting, generators)


def make_replay(
    config: Config, spaces: Spaces, operations: ops.Ops, device: torch.device, images: torch.dtype
) -> Replay:
    """The replay on `device`. Batches have `images` as an update wants them, or uint8 where they have a way to go."""
    print(describe(spaces, config.replay.replay_capacity, device), flush=True)
    return Replay(
        spaces,
        config.env.envs,
        config.replay.replay_capacity,
        gather=(ops.load("reference") if images == torch.uint8 else operations).gather_sequences,
        images=images,
        device=device,
    )
