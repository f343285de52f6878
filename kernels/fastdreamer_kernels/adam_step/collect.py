"""Gradients into the vector that an optimiser steps by."""

import torch
from torch import Tensor


@torch.library.custom_op("fastdreamer::collect", mutates_args={"vector"})
def collect(vector: Tensor, params: list[Tensor], grads: list[Tensor]) -> None:
    """Copies gradients, of any dtype, to where their parameters lie in a vector like the parameters' own.

    One operation to a compiler, which would make a kernel of each copy; a GPU takes a launch or two for those of a
    dtype that are strided as their parameters.
    """
    places = [torch.as_strided(vector, p.shape, p.stride(), p.storage_offset()) for p in params]
    groups: dict[tuple[bool, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
    for place, grad in zip(places, grads, strict=True):
        targets, sources = groups.setdefault((place.stride() == grad.stride(), grad.dtype), ([], []))
        targets.append(place)
        sources.append(grad)
    for targets, sources in groups.values():
        torch._foreach_copy_(targets, sources)  # pyright: ignore


@collect.register_fake
def _(vector: Tensor, params: list[Tensor], grads: list[Tensor]) -> None:
    del vector, params, grads
