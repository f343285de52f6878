"""Copies of a module that keep up with it by few launches."""

import copy
from typing import Any, Generic, TypeVar

import torch
from fastdreamer_kernels.ops import Ops
from torch import Tensor, nn

Kind = TypeVar("Kind", bound=nn.Module)


class Snapshot(Generic[Kind]):
    """A copy of a module (`module`), brought up to the original by `refresh`.

    The parameters that one optimiser steps lie in one vector, and lie so in the copy, too. What fills little
    of a vector (its numbers are not what is used of most parameters) is copied by itself.
    """

    def __init__(self, module: Kind):
        # What was compiled of it, and what it is made of, is the original's.
        values = [value for each in module.modules() for value in vars(each).values()]
        memo: dict[int, Any] = {id(value): value for value in values if callable(value) or isinstance(value, Ops)}
        self.module = copy.deepcopy(module, memo)
        pieces: dict[tuple[int, torch.dtype], list[tuple[Tensor, Tensor]]] = {}
        owned, own = ((*each.parameters(), *each.buffers()) for each in (module, self.module))
        for theirs, mine in zip(owned, own, strict=True):
            pieces.setdefault((theirs.untyped_storage().data_ptr(), theirs.dtype), []).append((mine, theirs.detach()))
        self._pairs: dict[torch.dtype, list[tuple[Tensor, Tensor]]] = {}
        for (_, dtype), piece in pieces.items():
            length = piece[0][1].untyped_storage().nbytes() // dtype.itemsize
            pairs = self._pairs.setdefault(dtype, [])
            if 2 * sum(theirs.numel() for _, theirs in piece) >= length:
                flat = torch.as_strided(piece[0][1], (length,), (1,), 0)
                fresh = flat.clone()
                pairs.append((fresh, flat))
                for mine, theirs in piece:
                    mine.data = torch.as_strided(fresh, theirs.shape, theirs.stride(), theirs.storage_offset())
            else:
                for mine, theirs in piece:
                    mine.data = theirs.clone()
                    pairs.append((mine.data, theirs))

    def refresh(self, *more: tuple[Tensor, Tensor]) -> None:
        """Copies the original's memory, and of `more` pairs the second into the first: a launch or two a dtype."""
        pairs = {dtype: list(pieces) for dtype, pieces in self._pairs.items()}
        for mine, theirs in more:
            pairs.setdefault(mine.dtype, []).append((mine, theirs))
        with torch.no_grad():
            for each in pairs.values():
                mine, theirs = zip(*each, strict=True)
                torch._foreach_copy_(mine, theirs)  # pyright: ignore
