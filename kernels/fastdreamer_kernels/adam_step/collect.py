"""Gradients into the vector that an optimiser steps by."""

import torch
from torch import Tensor


@torch.library.custom_op("fastdreamer::collect", mutates_args={"vector"})
def collect(vector: Tensor, params: list[Tensor], grads: list[Tensor]) -> None:
    """Copies gradients, of any dtype, to where their parameters lie in a vector like the parameters' own.

    One operation to a compiler, which would make a kernel of each copy; a GPU takes a launch or two for those that are
    strided as their parameters.
    """
    places = [torch.as_strided(vector, p.shape, p.stride(), p.storage_offset()) for p in params]
    alike = [place.stride() == grad.stride() for place, grad in zip(places, grads, strict=True)]
    for same in (True, False):
        chosen = [pair for pair, one in zip(zip(places, grads, strict=True), alike, strict=True) if one is same]
        if chosen:
            torch._foreach_copy_([place for place, _ in chosen], [grad for _, grad in chosen])  # pyright: ignore


@collect.register_fake
def _(vector: Tensor, params: list[Tensor], grads: list[Tensor]) -> None:
    del vector, params, grads
