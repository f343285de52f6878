"""Sequences out of a replay ring, as the world model reads them."""

from typing import NamedTuple

import torch
from torch import Tensor


class Steps(NamedTuple):
    """Steps of environments, in a ring (M, ...) or as sequences (B, T, ...).

    `image` (3, H, W) and `vector` (V) are None where there are none; `action` (A), `reward` (), and the flags
    `is_first`, `is_last`, `is_terminal` ().
    """

    image: Tensor | None
    vector: Tensor | None
    action: Tensor
    reward: Tensor
    is_first: Tensor
    is_last: Tensor
    is_terminal: Tensor


def gather_sequences(ring: Steps, index: Tensor, begins: Tensor, dtype: torch.dtype, shift: bool) -> Steps:
    """Sequences (B, T, ...) of the ring's steps at `index` int64 (B, T), which must lie within it.

    `ring`: images uint8, vectors, actions and rewards float32, flags bool. Where `begins` (bool, (B, T)) a sequence
    starts anew: `is_first` is set, action and reward are zero. A row's action is the one that led to it. The ring may
    keep it there (`shift` false), or with the step it was taken at (`shift`): then row t is given the action of row
    t - 1, and row 0, whose past is not in the sequence, none.

    Images come as `dtype`: as float32 or bfloat16 scaled to [-0.5, 0.5] and (B, T, 3, H, W) channels-last in memory, as
    uint8 untouched. What is taken from a page-locked ring is page-locked, unless it is scaled. Nothing is
    differentiable.
    """
    image = None if ring.image is None else take(ring.image, index)
    if image is not None and dtype != torch.uint8:
        # (B, T, 3, H, W) with strides of (B, T, H, W, 3)
        # Rounded once, at the end.
        wide = torch.promote_types(dtype, torch.float32)
        image = image.movedim(-3, -1).contiguous().movedim(-1, -3).to(wide).div_(255).sub_(0.5).to(dtype)
    action = take(ring.action, index)
    if shift:
        action = torch.cat([torch.zeros_like(action[:, :1]), action[:, :-1]], 1)
    return Steps(
        image=image,
        vector=None if ring.vector is None else take(ring.vector, index),
        action=action.masked_fill(begins.unsqueeze(-1), 0),
        reward=take(ring.reward, index).masked_fill(begins, 0),
        is_first=take(ring.is_first, index) | begins,
        is_last=take(ring.is_last, index),
        is_terminal=take(ring.is_terminal, index),
    )


def take(field: Tensor, index: Tensor) -> Tensor:
    """(B, T, ...) of a field (M, ...) by step numbers (B, T)."""
    shape = index.numel(), *field.shape[1:]
    # A ring in host memory is never part of a traced graph, which could not ask.
    pin = not torch.compiler.is_compiling() and field.is_pinned()
    out = torch.empty(shape, dtype=field.dtype, device=field.device, pin_memory=pin)
    # index_select copies whole steps: on a CPU ten times as fast for images as indexing with brackets.
    return torch.index_select(field, 0, index.flatten(), out=out).unflatten(0, index.shape)
