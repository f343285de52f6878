"""The replay gather: one kernel scales images on their way out of the ring, one moves all the small fields."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdreamer_kernels.blocks import after_others, write
from fastdreamer_kernels.gather_sequences.reference import Steps, take
from fastdreamer_kernels.launch import check, check_shapes, launch
from fastdreamer_kernels.machine import cdiv


@triton.jit
def image_kernel(ring_ptr, index_ptr, out_ptr, pixels, CHANNELS: tl.constexpr, BLOCK: tl.constexpr):
    """One program: BLOCK values of one image, in the order in which they are written, (pixels, CHANNELS)."""
    after_others()
    row = tl.program_id(0).to(tl.int64)
    step = tl.load(index_ptr + row)
    value = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = value < pixels * CHANNELS
    size = pixels * CHANNELS
    source = step * size + (value % CHANNELS) * pixels + value // CHANNELS
    image = tl.load(ring_ptr + source, mask=inside, other=0).to(tl.float32)
    # A product with 1 / 255, which a plain division may become, would carry that number's error.
    write(out_ptr, row * size + value, tl.div_rn(image, tl.full([BLOCK], 255.0, tl.float32)) - 0.5, inside)


@triton.jit(do_not_specialize=["rows"])
def fields_kernel(
    index_ptr,
    begins_ptr,
    vector_ptr,
    action_ptr,
    reward_ptr,
    is_first_ptr,
    is_last_ptr,
    is_terminal_ptr,
    vector_out_ptr,
    action_out_ptr,
    reward_out_ptr,
    is_first_out_ptr,
    is_last_out_ptr,
    is_terminal_out_ptr,
    rows,
    length,
    vector_size,
    action_size,
    SHIFT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """ROWS of B*T rows; vectors and actions COLUMNS at a time."""
    after_others()
    row = tl.arange(0, ROWS).to(tl.int64) + tl.program_id(0) * ROWS
    there = row < rows
    step = tl.load(index_ptr + row, mask=there, other=0)
    begins = tl.load(begins_ptr + row, mask=there, other=0) != 0
    for start in range(0, vector_size, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = there[:, None] & (column < vector_size)[None, :]
        vector = tl.load(vector_ptr + step[:, None] * vector_size + column[None, :], mask=inside, other=0.0)
        tl.store(vector_out_ptr + row[:, None] * vector_size + column[None, :], vector, mask=inside)
    acted = there & (begins == 0)
    source = step
    if SHIFT:
        acted = acted & (row % length != 0)
        source = tl.load(index_ptr + row - 1, mask=acted, other=0)
    for start in range(0, action_size, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = there[:, None] & (column < action_size)[None, :]
        action = tl.load(
            action_ptr + source[:, None] * action_size + column[None, :], mask=inside & acted[:, None], other=0.0
        )
        tl.store(action_out_ptr + row[:, None] * action_size + column[None, :], action, mask=inside)
    reward = tl.load(reward_ptr + step, mask=there & (begins == 0), other=0.0)
    tl.store(reward_out_ptr + row, reward, mask=there)
    is_first = (tl.load(is_first_ptr + step, mask=there, other=0) != 0) | begins
    tl.store(is_first_out_ptr + row, is_first, mask=there)
    tl.store(is_last_out_ptr + row, tl.load(is_last_ptr + step, mask=there, other=0), mask=there)
    tl.store(is_terminal_out_ptr + row, tl.load(is_terminal_ptr + step, mask=there, other=0), mask=there)


@torch.library.custom_op("fastdreamer::gather_images", mutates_args=())
def gather_images(ring: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, T, H, W, 3), scaled, of a ring (M, 3, H, W)."""
    channels, height, width = ring.shape[1:]
    out = ring.new_empty(*index.shape, height, width, channels, dtype=dtype)
    launch(
        image_kernel,
        (index.numel(), cdiv(height * width * channels, 2048)),
        *(ring, index, out, height * width),
        num_warps=8,
        CHANNELS=channels,
        BLOCK=2048,
    )
    return out


@gather_images.register_fake
def _(ring: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    channels, height, width = ring.shape[1:]
    return ring.new_empty(*index.shape, height, width, channels, dtype=dtype)


@torch.library.custom_op("fastdreamer::gather_fields", mutates_args=())
def gather_fields(
    index: Tensor,
    begins: Tensor,
    vector: Tensor | None,
    action: Tensor,
    reward: Tensor,
    is_first: Tensor,
    is_last: Tensor,
    is_terminal: Tensor,
    shift: bool,
) -> list[Tensor]:
    """The fields in the order of the arguments; without a vector an empty one stands in its place."""
    fields = [action[:, :0] if vector is None else vector, action, reward, is_first, is_last, is_terminal]
    outs = [field.new_empty(*index.shape, *field.shape[1:]) for field in fields]
    vector_size, action_size = fields[0].shape[1], action.shape[1]
    rows, width = 16, min(64, triton.next_power_of_2(max(vector_size, action_size)))
    launch(
        fields_kernel,
        (cdiv(index.numel(), rows),),
        *(index, begins, *fields, *outs, index.numel(), index.shape[1], vector_size, action_size),
        num_warps=1,
        SHIFT=shift,
        ROWS=rows,
        COLUMNS=width,
    )
    return outs


@gather_fields.register_fake
def _(
    index: Tensor,
    begins: Tensor,
    vector: Tensor | None,
    action: Tensor,
    reward: Tensor,
    is_first: Tensor,
    is_last: Tensor,
    is_terminal: Tensor,
    shift: bool,
) -> list[Tensor]:
    fields = [action[:, :0] if vector is None else vector, action, reward, is_first, is_last, is_terminal]
    return [field.new_empty(*index.shape, *field.shape[1:]) for field in fields]


def gather_sequences(ring: Steps, index: Tensor, begins: Tensor, dtype: torch.dtype, shift: bool) -> Steps:
    """As `reference.gather_sequences`, on CUDA; ring, index and begins contiguous. `index` is not checked.

    Raises ValueError for a tensor that is not contiguous or on another device.
    """
    fields = {name: field for name, field in ring._asdict().items() if field is not None}
    check("gather_sequences", {}, {"index": index, "begins": begins} | fields)
    steps = ring.reward.shape[:1]
    check_shapes(
        "gather_sequences",
        begins=(begins, index.shape),
        **{name: (field, (*steps, *field.shape[1:])) for name, field in fields.items()},
    )
    if index.dtype != torch.int64 or begins.dtype != torch.bool:
        raise TypeError(f"gather_sequences: index is {index.dtype}, begins {begins.dtype}: pass int64 and bool.")
    vector, *rest = gather_fields(index, begins, *ring[1:], shift)
    image = ring.image
    if image is not None:
        image = take(image, index) if dtype == torch.uint8 else gather_images(image, index, dtype).movedim(-1, -3)
    return Steps(image, None if ring.vector is None else vector, *rest)
