"""A dry run: builds everything, makes an update, and says what a run would be and take."""

import importlib

from torch import nn

from fastdreamer.config import Config
from fastdreamer.replay import Replay
from fastdreamer.run import checkpoint
from fastdreamer.run.trainer import Trainer, state_bytes
from fastdreamer.runtime.device import peak_memory, used_memory
from fastdreamer.runtime.graphs import Captured

LOADED_LATER = ("matplotlib.figure", "torch.utils.tensorboard")
"""Libraries that a run loads when it first draws or logs, and a dry run would not."""


def dry_run(config: Config) -> None:
    """Builds everything, makes an update from random actions' rows, and prints parameters, memory and losses."""
    with Trainer(config, None) as trainer:
        agent = trainer.agent
        for name, module in [*agent.world_model.named_children(), *agent.behavior.named_children()]:
            print_module(name, module)
        total = sum(p.numel() for p in agent.parameters() if p.requires_grad)
        print(f"total: {total:,} trainable parameters")
        while trainer.replay.added < config.optim.batch_length:
            trainer.replay.add(trainer.acting(trainer.envs.recv()))
            trainer.acting.refresh()
            trainer.envs.send(trainer._random_action().numpy())
        parts = memory_parts(trainer)
        print(
            f"memory of {trainer.device}: " + ", ".join(f"{k} {size / 1e9:.2f} GB" for k, size in parts.items()), end=""
        )
        print(f", together {sum(parts.values()) / 1e9:.2f} GB at the most")
        for name, value in trainer.learner.means().items():
            print(f"{name}: {value:.4f}")


def memory_parts(trainer: Trainer) -> dict[str, int]:
    """What a run takes of its device's memory at the most, in bytes: makes an update, and thinks the replay full."""
    device, replay, state = trainer.device, trainer.replay, state_bytes(trainer.agent)
    for library in LOADED_LATER:
        importlib.import_module(library)
    full, lasting = Replay.bytes(trainer.envs.spaces, trainer.config.replay.replay_capacity), used_memory(device)
    # So many that a capture, which has memory of its own, is among them.
    for _ in range(Captured.WARM + 2 if trainer.runtime.record else 1):
        trainer.learner.step()
    trainer.learner.settle()
    passing = peak_memory(device) - lasting
    parts = {"weights, gradients, optimisers": state}
    if replay.device.type == device.type:
        # Of its pages on a CPU only the filled ones are there yet.
        lasting -= full if device.type == "cuda" else Replay.bytes(trainer.envs.spaces, len(replay))
        parts["replay"] = full
    if device.type == "cpu":
        # Memory that an update freed serves a checkpoint next, but not where it was kept in pieces.
        writing = checkpoint.writing_bytes(full)
        passing = passing + writing if trainer.runtime.compile else max(passing, writing)
    # Weights and replay are part of what lasts; gradients and moments are made with the optimisers.
    return parts | {"libraries and the rest": lasting - state, "an update or a checkpoint": passing}


def print_module(name: str, module: nn.Module) -> None:
    """One line for the module, one for each of its parameters."""
    trainable = sum(p.numel() for p in module.parameters() if p.requires_grad)
    if trainable:
        print(f"{name}: {trainable:,} parameters")
        for parameter, value in module.named_parameters():
            print(f"    {parameter} {tuple(value.shape)}")
