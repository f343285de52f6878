"""A dry run: builds everything, makes an update, and says what a run would be and take."""

import importlib

from torch import nn

from fastdreamer.config import Config
from fastdreamer.replay import Replay
from fastdreamer.run import checkpoint
from fastdreamer.run.parts import Parts, build, state_bytes
from fastdreamer.runtime.device import peak_memory, used_memory
from fastdreamer.runtime.graphs import Captured

LOADED_LATER = ("matplotlib.figure", "torch.utils.tensorboard")
"""Libraries that a run loads when it first draws or logs, and a dry run would not."""

ROWS = 8
"""Of each environment, which sequences repeat: drawing frames on a CPU would take longer than all the rest."""


def dry_run(config: Config, *, verbose: bool = False) -> None:
    """Builds everything, makes an update from random actions' rows, and prints parameters, memory and losses.

    The totals come first; `verbose` adds the shape of every parameter, at the end.
    """
    with build(config) as parts:
        agent, learner, replay = parts.agent, parts.learner, parts.replay
        modules = [*agent.world_model.named_children(), *agent.behavior.named_children()]
        sizes = {name: trainable(module) for name, module in modules if trainable(module)}
        print(f"total: {trainable(agent):,} trainable parameters")
        print("of them " + ", ".join(f"{name} {size:,}" for name, size in sizes.items()), flush=True)
        while replay.added < ROWS:
            replay.add(parts.acting(parts.envs.recv()))
            parts.acting.refresh()
            parts.envs.send(parts.random_action().numpy())
        memory = memory_taken(parts)
        shares = ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in memory.items())
        print(f"memory of {parts.device}: {shares}, together {sum(memory.values()) / 1e9:.2f} GB at the most")
        for name, value in learner.means().items():
            print(f"{name}: {value:.4f}")
        for name in sizes if verbose else ():
            print(f"{name}: {sizes[name]:,} parameters")
            for parameter, value in dict(modules)[name].named_parameters():
                print(f"    {parameter} {tuple(value.shape)}")


def memory_taken(parts: Parts) -> dict[str, int]:
    """What a run takes of its device's memory at the most, in bytes: makes an update, and thinks the replay full."""
    device, replay, state = parts.device, parts.replay, state_bytes(parts.agent)
    for library in LOADED_LATER:
        importlib.import_module(library)
    full, lasting = Replay.bytes(parts.envs.spaces, parts.config.replay.replay_capacity), used_memory(device)
    # So many that a capture, which has memory of its own, is among them.
    for _ in range(Captured.WARM + 2 if parts.runtime.record else 1):
        parts.learner.step()
    parts.learner.settle()
    passing = peak_memory(device) - lasting
    taken = {"weights, gradients, optimisers": state}
    if replay.device.type == device.type:
        # Of its pages on a CPU only the filled ones are there yet.
        lasting -= full if device.type == "cuda" else Replay.bytes(parts.envs.spaces, len(replay))
        taken["replay"] = full
    if device.type == "cpu":
        # What an update freed is often kept in pieces, which serve no checkpoint.
        passing += checkpoint.writing_bytes(full)
    # Weights and replay are part of what lasts; gradients and moments are made with the optimisers.
    return taken | {"libraries and the rest": lasting - state, "an update or a checkpoint": passing}


def trainable(module: nn.Module) -> int:
    """Number of parameters that are learned."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)
