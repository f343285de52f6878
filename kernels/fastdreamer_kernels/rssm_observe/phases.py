"""One step of the posterior sequence as phases, five forward and four backward, for whoever calls them.

A phase computes one tile of columns of one product, for all rows of the batch, and what follows from those columns
alone. What it needs of other columns (a norm's sums, a whole row of the next product's input) the phase before has
written: between two phases every program must have finished the one before. `fused.py` has two ways to see to that.

Legend: B rows, U units, D recurrent state, S categoricals of K classes. Pointers are those of the step's own tensors.
A weight is a pointer to a matrix (outputs, inputs), or with RESIDENT the tile of it, loaded once for all steps.
"""

# pyright: reportArgumentType=false, reportOperatorIssue=false, reportIndexIssue=false, reportCallIssue=false
# pyright: reportPossiblyUnboundVariable=false
# Triton's language, which type checkers read as Python.

import triton
import triton.language as tl

from fastdreamer_kernels.blocks import narrow, read, silu, silu_slope, softmax, softmax_backward, sum_rows, tanh, write
from fastdreamer_kernels.gru_gates.fused import gate_gradients
from fastdreamer_kernels.machine import INTERPRETED
from fastdreamer_kernels.sample_onehot.fused import draw

LAYER, BATCH, RUNNING = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
"""The representation network's norm: LayerNorm, BatchNorm by the rows' statistics, BatchNorm by the running ones."""
WIDEN = tl.constexpr(INTERPRETED)
"""The interpreter multiplies no bfloat16."""
NARROWEST = tl.constexpr(128)
"""The narrowest chunk that is read whatever a product's size (see `plan.py`)."""
PARTS = tl.constexpr(32)
"""How many tiles' sums are put together at a time."""


@triton.jit
def meet(counter_ptr, target):
    """Returns when `target` programs have come here, and with what they wrote before to be read.

    The first barrier puts the stores of all threads before the one thread's release, the last keeps all threads' loads
    behind its acquire.
    """
    tl.debug_barrier()
    tl.atomic_add(counter_ptr, 1, sem="release", scope="gpu")
    while tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu") < target:
        pass
    tl.debug_barrier()


# Products


@triton.jit
def inputs(start, CHUNK: tl.constexpr, SPLIT: tl.constexpr):
    """The inputs of a product from `start` on, a share for each warp: (SPLIT, CHUNK / SPLIT)."""
    SHARE: tl.constexpr = CHUNK // SPLIT
    return start + tl.arange(0, SPLIT)[:, None] * SHARE + tl.arange(0, SHARE)[None, :]


@triton.jit
def weight(w, stride, column, there, at, SIZE: tl.constexpr, RESIDENT: tl.constexpr):
    """Inputs `at` of outputs `column` of a weight: (SPLIT, COLUMNS, SHARE)."""
    if RESIDENT:
        return w
    else:
        inside = there[None, :, None]
        # Masks take registers, and sizes that chunks divide need none.
        if SIZE < NARROWEST or (SIZE & (SIZE - 1)) != 0:
            inside = inside & (at < SIZE)[:, None, :]
        return tl.load(w + column[None, :, None] * stride + at[:, None, :], mask=inside, other=0.0)


@triton.jit
def operand(x_ptr, stride, row, rows, at, SIZE: tl.constexpr):
    """Inputs `at` of rows `row` (SPLIT, ROWS, SHARE). Others wrote them, so they come past this processor's cache."""
    inside = (row < rows)[None, :, None]
    if SIZE < NARROWEST or (SIZE & (SIZE - 1)) != 0:
        inside = inside & (at < SIZE)[:, None, :]
    return tl.load(
        x_ptr + row[None, :, None] * stride + at[:, None, :], mask=inside, other=0.0, cache_modifier=".cg"
    )  # fmt: skip


@triton.jit
def activated(x_ptr, row, rows, at, mean, rstd, scale_ptr, shift_ptr, SIZE: tl.constexpr):
    """As `operand`, through LayerNorm and SiLU."""
    x = operand(x_ptr, SIZE, row, rows, at, SIZE).to(tl.float32)
    scale, shift = read(scale_ptr, at, at < SIZE), read(shift_ptr, at, at < SIZE)
    out = silu((x - mean[None, :, None]) * rstd[None, :, None] * scale[:, None, :] + shift[:, None, :])
    return narrow(out, x_ptr.dtype.element_ty)


@triton.jit
def product(total, x, w, PRECISION: tl.constexpr):
    """total + x w^T of each warp's share, (SPLIT, ROWS, COLUMNS): so few columns would leave most warps idle."""
    if x.dtype != w.dtype:
        x = narrow(x, w.dtype)
    if WIDEN:
        return total + tl.dot(x.to(tl.float32), tl.permute(w.to(tl.float32), (0, 2, 1)))
    else:
        return tl.dot(x, tl.permute(w, (0, 2, 1)), total, input_precision=PRECISION)


@triton.jit
def linear(
    x_ptr, x_stride, row, rows, w, w_stride, column, there, SIZE: tl.constexpr, CHUNK: tl.constexpr,
    SPLIT: tl.constexpr, RESIDENT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x (B, SIZE) w (outputs, SIZE)^T for rows `row` and outputs `column`: (ROWS, COLUMNS)."""
    total = tl.zeros([SPLIT, row.shape[0], column.shape[0]], tl.float32)
    for start in range(0, SIZE, CHUNK):
        at = inputs(start, CHUNK, SPLIT)
        x = operand(x_ptr, x_stride, row, rows, at, SIZE)
        total = product(total, x, weight(w, w_stride, column, there, at, SIZE, RESIDENT), PRECISION)
    return tl.sum(total, 0)


@triton.jit
def rounded(x, ptr):
    """float32 values as the tensor at `ptr` would hold them."""
    return narrow(x, ptr.dtype.element_ty).to(tl.float32)


# A norm over columns that several programs hold: each writes its tile's sums, who needs them puts them together.


@triton.jit
def write_sums(parts_ptr, tile, row, rows, one, two):
    """A tile's two numbers for each row: parts (tiles, 2, B)."""
    tl.store(parts_ptr + 2 * tile * rows + row, one, mask=row < rows)
    tl.store(parts_ptr + (2 * tile + 1) * rows + row, two, mask=row < rows)


@triton.jit
def read_sums(parts_ptr, start, row, rows, TILES: tl.constexpr):
    """Both numbers of PARTS tiles from `start` on, (ROWS, PARTS), zero beyond the last; and the tiles."""
    tile = start + tl.arange(0, PARTS)
    inside = (row < rows)[:, None] & (tile < TILES)[None, :]
    at = parts_ptr + 2 * tile[None, :] * rows + row[:, None]
    one = tl.load(at, mask=inside, other=0.0, cache_modifier=".cg")
    return one, tl.load(at + rows, mask=inside, other=0.0, cache_modifier=".cg"), tile


@triton.jit
def statistics(parts_ptr, row, rows, SIZE: tl.constexpr, TIMES: tl.constexpr, COLUMNS: tl.constexpr, EPS: tl.constexpr):
    """Mean and 1 / deviation of rows (ROWS) over TIMES * SIZE columns, from each tile's mean and squares around it."""
    TILES: tl.constexpr = (SIZE + COLUMNS - 1) // COLUMNS
    mean = tl.zeros(row.shape, tl.float32)
    for start in range(0, TILES, PARTS):
        middle, _, tile = read_sums(parts_ptr, start, row, rows, TILES)
        count = TIMES * tl.minimum(SIZE - tile * COLUMNS, COLUMNS)
        mean += tl.sum(middle * count[None, :], 1)
    mean = mean / (TIMES * SIZE)
    squares = tl.zeros(row.shape, tl.float32)
    for start in range(0, TILES, PARTS):
        middle, around, tile = read_sums(parts_ptr, start, row, rows, TILES)
        count = tl.maximum(TIMES * tl.minimum(SIZE - tile * COLUMNS, COLUMNS), 0)
        apart = middle - mean[:, None]
        squares += tl.sum(around + apart * apart * count[None, :], 1)
    return mean, tl.rsqrt(squares / (TIMES * SIZE) + EPS)


@triton.jit
def summed(parts_ptr, row, rows, SIZE: tl.constexpr, COLUMNS: tl.constexpr):
    """The sums of both numbers over all tiles, (ROWS) each."""
    TILES: tl.constexpr = (SIZE + COLUMNS - 1) // COLUMNS
    shift, slope = tl.zeros(row.shape, tl.float32), tl.zeros(row.shape, tl.float32)
    for start in range(0, TILES, PARTS):
        one, two, _ = read_sums(parts_ptr, start, row, rows, TILES)
        shift += tl.sum(one, 1)
        slope += tl.sum(two, 1)
    return shift, slope


@triton.jit
def through_norm(total, shift, slope, rstd, sums, projected):
    """The product of a LayerNorm's input gradient with a weight, from that of its output gradient.

    The norm's backward pass is linear, so what it takes off (means over the row, known only now) can be taken off the
    product: `sums` (COLUMNS) are those of the weight's columns, `projected` (ROWS, COLUMNS) the normal input times it.
    """
    return rstd[:, None] * (total - shift[:, None] * sums[None, :] - slope[:, None] * projected)


@triton.jit
def add_to(ptr, column, there, value):
    """Adds to a tensor of which this program alone changes the columns `column`."""
    tl.store(ptr + column, read(ptr, column, there) + value, mask=there)


@triton.jit
def add_scales(dscales_ptr, column, there, dscaled, normal, SIZE: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """Adds the rows' gradients of a norm's scale and shift, (2, SIZE)."""
    add_to(dscales_ptr, column, there, sum_rows(dscaled * normal, R, C))
    add_to(dscales_ptr + SIZE, column, there, sum_rows(dscaled, R, C))


@triton.jit
def classes_of(tile, S: tl.constexpr, K: tl.constexpr, CATEGORICALS: tl.constexpr, CLASSES: tl.constexpr):
    """The columns of a tile of whole categoricals, each padded to CLASSES, and which of them there are."""
    at = tl.arange(0, CATEGORICALS * CLASSES)
    categorical, label = tile * CATEGORICALS + at // CLASSES, at % CLASSES
    return categorical * K + label, (categorical < S) & (label < K)


@triton.jit
def places_of(
    tile, start, rows, S: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, CATEGORICALS: tl.constexpr,
    CLASSES: tl.constexpr,
):  # fmt: skip
    """The same tile with a row for each categorical: batch row and categorical (ROWS * CATEGORICALS), and offsets in
    (B, S*K) with what is inside (ROWS * CATEGORICALS, CLASSES)."""
    at, label = tl.arange(0, ROWS * CATEGORICALS), tl.arange(0, CLASSES)
    row, categorical = start + at // CATEGORICALS, tile * CATEGORICALS + at % CATEGORICALS
    inside = ((row < rows) & (categorical < S))[:, None] & (label < K)[None, :]
    return row, categorical, (row * S * K + categorical * K)[:, None] + label[None, :], inside


# Forward


@triton.jit
def input_phase(
    tile, z_ptr, w, pre_ptr, parts_ptr,
    B: tl.constexpr, U: tl.constexpr, LATENT: tl.constexpr, WEIGHT_ROW: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, CHUNK: tl.constexpr, SPLIT: tl.constexpr, RESIDENT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """pre (B, U), which holds the actions' part, += z W_z^T; and its sums for the LayerNorm that follows."""
    column = tile * COLUMNS + tl.arange(0, COLUMNS)
    there = column < U
    for start in range(0, B, ROWS):
        row = start + tl.arange(0, ROWS)
        inside, at = (row < B)[:, None] & there[None, :], row[:, None] * U + column[None, :]
        total = linear(
            z_ptr, LATENT, row, B, w, WEIGHT_ROW, column, there, LATENT, CHUNK, SPLIT, RESIDENT, PRECISION
        )  # fmt: skip
        pre = rounded(total + read(pre_ptr, at, inside), pre_ptr)
        write(pre_ptr, at, pre, inside)
        layer_moments(parts_ptr, tile, row, pre, inside, B, U, COLUMNS)


@triton.jit
def layer_moments(parts_ptr, tile, row, pre, inside, B: tl.constexpr, SIZE: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile's mean of each row, and the squares around it."""
    count = tl.minimum(SIZE - tile * COLUMNS, COLUMNS)
    mean = tl.sum(tl.where(inside, pre, 0.0), 1) / count
    centred = tl.where(inside, pre - mean[:, None], 0.0)
    write_sums(parts_ptr, tile, row, B, mean, tl.sum(centred * centred, 1))


@triton.jit
def gates_phase(
    tile, pre_inp_ptr, inp_parts_ptr, scale_ptr, shift_ptr, h_ptr, u_reset, u_cand, u_update, h_reset, h_cand,
    h_update, pre_ptr, parts_ptr,
    B: tl.constexpr, U: tl.constexpr, D: tl.constexpr, EPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    UNITS_CHUNK: tl.constexpr, DETER_CHUNK: tl.constexpr, SPLIT: tl.constexpr, RESIDENT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """pre (B, 3D) = [SiLU(LN(pre_inp)), h] W^T, the same columns of each gate; and their sums."""
    column = tile * COLUMNS + tl.arange(0, COLUMNS)
    there = column < D
    for start in range(0, B, ROWS):
        row = start + tl.arange(0, ROWS)
        mean, rstd = statistics(inp_parts_ptr, row, B, U, 1, COLUMNS, EPS)
        reset = tl.zeros([SPLIT, ROWS, COLUMNS], tl.float32)
        cand = tl.zeros([SPLIT, ROWS, COLUMNS], tl.float32)
        update = tl.zeros([SPLIT, ROWS, COLUMNS], tl.float32)
        for k in range(0, U, UNITS_CHUNK):
            at = inputs(k, UNITS_CHUNK, SPLIT)
            x = activated(pre_inp_ptr, row, B, at, mean, rstd, scale_ptr, shift_ptr, U)
            reset = product(reset, x, weight(u_reset, U + D, column, there, at, U, RESIDENT), PRECISION)
            cand = product(cand, x, weight(u_cand, U + D, column, there, at, U, RESIDENT), PRECISION)
            update = product(update, x, weight(u_update, U + D, column, there, at, U, RESIDENT), PRECISION)
        for k in range(0, D, DETER_CHUNK):
            at = inputs(k, DETER_CHUNK, SPLIT)
            x = operand(h_ptr, D, row, B, at, D)
            reset = product(reset, x, weight(h_reset, U + D, column, there, at, D, RESIDENT), PRECISION)
            cand = product(cand, x, weight(h_cand, U + D, column, there, at, D, RESIDENT), PRECISION)
            update = product(update, x, weight(h_update, U + D, column, there, at, D, RESIDENT), PRECISION)
        inside, at = (row < B)[:, None] & there[None, :], row[:, None] * (3 * D) + column[None, :]
        reset = rounded(tl.sum(reset, 0), pre_ptr)
        cand = rounded(tl.sum(cand, 0), pre_ptr)
        update = rounded(tl.sum(update, 0), pre_ptr)
        write(pre_ptr, at, reset, inside)
        write(pre_ptr, at + D, cand, inside)
        write(pre_ptr, at + 2 * D, update, inside)
        count = 3 * tl.minimum(D - tile * COLUMNS, COLUMNS)
        middle = tl.sum(tl.where(inside, reset + cand + update, 0.0), 1) / count
        reset = tl.where(inside, reset - middle[:, None], 0.0)
        cand = tl.where(inside, cand - middle[:, None], 0.0)
        update = tl.where(inside, update - middle[:, None], 0.0)
        write_sums(parts_ptr, tile, row, B, middle, tl.sum(reset * reset + cand * cand + update * update, 1))


@triton.jit
def normal_slice(pre_ptr, at, inside, mean, rstd):
    return (read(pre_ptr, at, inside) - mean[:, None]) * rstd[:, None]


@triton.jit
def scaled(normal, scale_ptr, shift_ptr, column, there):
    return normal * read(scale_ptr, column, there)[None, :] + read(shift_ptr, column, there)[None, :]


@triton.jit
def state_before(first_ptr, initial_ptr, past_ptr, row, column, there, B: tl.constexpr, D: tl.constexpr):
    """h (ROWS, COLUMNS) that a step starts from: the initial state where the row is a first one, else the last's."""
    fresh = tl.load(first_ptr + row, mask=row < B, other=1) != 0
    inside = ((row < B) & ~fresh)[:, None] & there[None, :]
    past = read(past_ptr, row[:, None] * D + column[None, :], inside)
    return tl.where(fresh[:, None], read(initial_ptr, column, there)[None, :], past)


@triton.jit
def state_phase(
    tile, pre_ptr, parts_ptr, scale_ptr, shift_ptr, first_ptr, initial_ptr, past_ptr, deter_ptr, next_first_ptr,
    next_ptr,
    B: tl.constexpr, D: tl.constexpr, EPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """h_t (B, D), and what the next step takes for it in its products: the initial state where that begins anew."""
    column = tile * COLUMNS + tl.arange(0, COLUMNS)
    there = column < D
    for start in range(0, B, ROWS):
        row = start + tl.arange(0, ROWS)
        mean, rstd = statistics(parts_ptr, row, B, D, 3, COLUMNS, EPS)
        inside, at = (row < B)[:, None] & there[None, :], row[:, None] * (3 * D) + column[None, :]
        reset = scaled(normal_slice(pre_ptr, at, inside, mean, rstd), scale_ptr, shift_ptr, column, there)
        cand = scaled(normal_slice(pre_ptr, at + D, inside, mean, rstd), scale_ptr + D, shift_ptr + D, column, there)
        update = scaled(
            normal_slice(pre_ptr, at + 2 * D, inside, mean, rstd), scale_ptr + 2 * D, shift_ptr + 2 * D, column, there
        )
        h = state_before(first_ptr, initial_ptr, past_ptr, row, column, there, B, D)
        new, taken = tanh(tl.sigmoid(reset) * cand), tl.sigmoid(update - 1.0)
        out = rounded(taken * new + (1.0 - taken) * h, deter_ptr)
        at = row[:, None] * D + column[None, :]
        write(deter_ptr, at, out, inside)
        fresh = tl.load(next_first_ptr + row, mask=row < B, other=1) != 0
        write(next_ptr, at, tl.where(fresh[:, None], read(initial_ptr, column, there)[None, :], out), inside)


@triton.jit
def hidden_phase(
    tile, h_ptr, w, pre_ptr, parts_ptr, scale_ptr, shift_ptr, mean_ptr, var_ptr, q_ptr,
    B: tl.constexpr, U: tl.constexpr, D: tl.constexpr, WEIGHT_ROW: tl.constexpr, NORM: tl.constexpr,
    EPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, SPLIT: tl.constexpr,
    RESIDENT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """pre (B, U), which holds the images' part, += h W_h^T. BatchNorm lies within the tile, so q (B, U) is written."""
    column = tile * COLUMNS + tl.arange(0, COLUMNS)
    there = column < U
    pre = tl.zeros([ROWS, COLUMNS], tl.float32)
    mean, squares = tl.zeros([COLUMNS], tl.float32), tl.zeros([COLUMNS], tl.float32)
    for start in range(0, B, ROWS):
        row = start + tl.arange(0, ROWS)
        inside, at = (row < B)[:, None] & there[None, :], row[:, None] * U + column[None, :]
        total = linear(h_ptr, D, row, B, w, WEIGHT_ROW, column, there, D, CHUNK, SPLIT, RESIDENT, PRECISION)
        pre = rounded(total + read(pre_ptr, at, inside), pre_ptr)
        write(pre_ptr, at, pre, inside)
        if NORM == LAYER:
            layer_moments(parts_ptr, tile, row, pre, inside, B, U, COLUMNS)
        if NORM == BATCH:
            count = tl.minimum(B - start, ROWS)
            middle = sum_rows(tl.where(inside, pre, 0.0), ROWS, COLUMNS) / count
            centred = tl.where(inside, pre - middle[None, :], 0.0)
            # Of the rows so far and these: their squares, and those of the two means around the common one.
            apart, share = middle - mean, count * (1.0 / (start + count))
            squares += sum_rows(centred * centred, ROWS, COLUMNS) + apart * apart * start * share
            mean += apart * share
    if NORM != LAYER:
        if NORM == BATCH:
            var = squares / B
            tl.store(mean_ptr + column, mean, mask=there)
            tl.store(var_ptr + column, var, mask=there)
        else:
            mean, var = read(mean_ptr, column, there), read(var_ptr, column, there)
        scale = tl.rsqrt(var + EPS) * read(scale_ptr, column, there)
        shift = read(shift_ptr, column, there)
        if B > ROWS:
            tl.debug_barrier()
        for start in range(0, B, ROWS):
            row = start + tl.arange(0, ROWS)
            inside, at = (row < B)[:, None] & there[None, :], row[:, None] * U + column[None, :]
            if B > ROWS:
                pre = read(pre_ptr, at, inside)
            write(q_ptr, at, silu((pre - mean[None, :]) * scale[None, :] + shift[None, :]), inside)


@triton.jit
def draw_phase(
    tile, pre_ptr, parts_ptr, scale_ptr, shift_ptr, q_ptr, w, bias_ptr, uniform_ptr, start_ptr, logits_ptr, stoch_ptr,
    next_first_ptr, next_ptr,
    B: tl.constexpr, U: tl.constexpr, S: tl.constexpr, K: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr,
    UNIMIX: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CATEGORICALS: tl.constexpr, CLASSES: tl.constexpr,
    CHUNK: tl.constexpr, SPLIT: tl.constexpr, RESIDENT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """logits (B, S*K) of whole categoricals, z_t drawn from them, and what the next step takes for z_t."""
    column, there = classes_of(tile, S, K, CATEGORICALS, CLASSES)
    for start in range(0, B, ROWS):
        row = start + tl.arange(0, ROWS)
        if NORM == LAYER:
            mean, rstd = statistics(parts_ptr, row, B, U, 1, COLUMNS, EPS)
            shares = tl.zeros([SPLIT, ROWS, CATEGORICALS * CLASSES], tl.float32)
            for k in range(0, U, CHUNK):
                at = inputs(k, CHUNK, SPLIT)
                x = activated(pre_ptr, row, B, at, mean, rstd, scale_ptr, shift_ptr, U)
                shares = product(shares, x, weight(w, U, column, there, at, U, RESIDENT), PRECISION)
            total = tl.sum(shares, 0)
        else:
            total = linear(q_ptr, U, row, B, w, U, column, there, U, CHUNK, SPLIT, RESIDENT, PRECISION)
        logits = rounded(total + read(bias_ptr, column, there)[None, :], logits_ptr)
        inside = (row < B)[:, None] & there[None, :]
        write(logits_ptr, row[:, None] * (S * K) + column[None, :], logits, inside)
        logits = tl.reshape(logits, [ROWS * CATEGORICALS, CLASSES])
        row, categorical, at, inside = places_of(tile, start, B, S, K, ROWS, CATEGORICALS, CLASSES)
        held = (row < B) & (categorical < S)
        z = draw(logits, read(uniform_ptr, row * S + categorical, held), inside, K, UNIMIX)
        write(stoch_ptr, at, z, inside)
        fresh = tl.load(next_first_ptr + row, mask=row < B, other=1) != 0
        begin = read(start_ptr, at - row[:, None] * (S * K), inside)
        write(next_ptr, at, tl.where(fresh[:, None], begin, z), inside)


# Backward, in reverse. What a phase hands on is the gradient of a LayerNorm's output times its scale, and the two sums
# over the row that its backward pass needs; whoever multiplies it by a weight takes them off (`through_norm`).


@triton.jit
def draw_backward_phase(
    tile, dinp_ptr, parts_ptr, rstd_ptr, sums_ptr, projected_ptr, next_first_ptr, w, logits_ptr, dstoch_ptr, dout_ptr,
    dlogits_ptr,
    B: tl.constexpr, U: tl.constexpr, S: tl.constexpr, K: tl.constexpr, UNIMIX: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, CATEGORICALS: tl.constexpr, CLASSES: tl.constexpr, CHUNK: tl.constexpr,
    SPLIT: tl.constexpr, RESIDENT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dlogits (B, S*K): what arrives for them, and through z_t from outside and from the next step's input."""
    column, there = classes_of(tile, S, K, CATEGORICALS, CLASSES)
    for start in range(0, B, ROWS):
        row = start + tl.arange(0, ROWS)
        inside, at = (row < B)[:, None] & there[None, :], row[:, None] * (S * K) + column[None, :]
        total = linear(dinp_ptr, U, row, B, w, U, column, there, U, CHUNK, SPLIT, RESIDENT, PRECISION)
        shift, slope = summed(parts_ptr, row, B, U, COLUMNS)
        dz = through_norm(
            total, shift / U, slope / U, read(rstd_ptr, row, row < B), read(sums_ptr, column, there),
            read(projected_ptr, at, inside),
        )  # fmt: skip
        fresh = tl.load(next_first_ptr + row, mask=row < B, other=1) != 0
        dz = tl.where(fresh[:, None], 0.0, dz) + read(dstoch_ptr, at, inside)
        dz = tl.reshape(dz, [ROWS * CATEGORICALS, CLASSES])
        _, _, at, inside = places_of(tile, start, B, S, K, ROWS, CATEGORICALS, CLASSES)
        probs = softmax(read(logits_ptr, at, inside), inside)
        write(dlogits_ptr, at, softmax_backward(probs, dz, UNIMIX) + read(dout_ptr, at, inside), inside)


@triton.jit
def hidden_backward_phase(
    tile, dlogits_ptr, w, pre_ptr, scale_ptr, shift_ptr, mean_ptr, spread_ptr, dpre_ptr, parts_ptr, dscales_ptr,
    B: tl.constexpr, U: tl.constexpr, LATENT: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, CHUNK: tl.constexpr, SPLIT: tl.constexpr, RESIDENT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dpre (B, U) with BatchNorm; with LayerNorm the scaled gradient of its output, and its sums.

    `mean` and `spread`: BatchNorm's mean and variance (U), LayerNorm's mean and 1 / deviation (B).
    """
    column = tile * COLUMNS + tl.arange(0, COLUMNS)
    there = column < U
    scale, shift = read(scale_ptr, column, there), read(shift_ptr, column, there)
    dscaled = tl.zeros([ROWS, COLUMNS], tl.float32)
    normal = tl.zeros([ROWS, COLUMNS], tl.float32)
    dscale, dshift = tl.zeros([COLUMNS], tl.float32), tl.zeros([COLUMNS], tl.float32)
    if NORM != LAYER:
        mean, rstd = read(mean_ptr, column, there), tl.rsqrt(read(spread_ptr, column, there) + EPS)
    for start in range(0, B, ROWS):
        row = start + tl.arange(0, ROWS)
        inside, at = (row < B)[:, None] & there[None, :], row[:, None] * U + column[None, :]
        total = linear(dlogits_ptr, LATENT, row, B, w, LATENT, column, there, LATENT, CHUNK, SPLIT, RESIDENT, PRECISION
        )  # fmt: skip
        if NORM == LAYER:
            mean, rstd = read(mean_ptr, row, row < B), read(spread_ptr, row, row < B)
            normal = normal_slice(pre_ptr, at, inside, mean, rstd)
        else:
            normal = (read(pre_ptr, at, inside) - mean[None, :]) * rstd[None, :]
        dscaled = tl.where(inside, total * silu_slope(normal * scale[None, :] + shift[None, :]), 0.0)
        dscale += sum_rows(dscaled * normal, ROWS, COLUMNS)
        dshift += sum_rows(dscaled, ROWS, COLUMNS)
        if NORM == LAYER:
            dnormal = dscaled * scale[None, :]
            write(dpre_ptr, at, dnormal, inside)
            write_sums(parts_ptr, tile, row, B, tl.sum(dnormal, 1), tl.sum(dnormal * normal, 1))
        elif B > ROWS:
            write(dpre_ptr, at, dscaled, inside)
    add_to(dscales_ptr, column, there, dscale)
    add_to(dscales_ptr + U, column, there, dshift)
    if NORM != LAYER:
        if B > ROWS:
            tl.debug_barrier()
        for start in range(0, B, ROWS):
            row = start + tl.arange(0, ROWS)
            inside, at = (row < B)[:, None] & there[None, :], row[:, None] * U + column[None, :]
            if B > ROWS:
                dscaled = read(dpre_ptr, at, inside)
                normal = (read(pre_ptr, at, inside) - mean[None, :]) * rstd[None, :]
            if NORM == BATCH:
                dscaled -= (dshift[None, :] + normal * dscale[None, :]) / B
            write(dpre_ptr, at, dscaled * (scale * rstd)[None, :], inside)


@triton.jit
def state_backward_phase(
    tile, dhidden_ptr, parts_ptr, rstd_ptr, sums_ptr, projected_ptr, w, ddeter_ptr, carry_ptr, first_ptr, initial_ptr,
    past_ptr, pre_ptr, gates_mean_ptr, gates_rstd_ptr, scale_ptr, shift_ptr, dgates_ptr, gates_parts_ptr, dscales_ptr,
    B: tl.constexpr, U: tl.constexpr, D: tl.constexpr, NORM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr, SPLIT: tl.constexpr, RESIDENT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The scaled gradients of the normal gates (B, 3D) and their sums; in `carry` (B, D) what h_{t-1} has directly."""
    column = tile * COLUMNS + tl.arange(0, COLUMNS)
    there = column < D
    for start in range(0, B, ROWS):
        row = start + tl.arange(0, ROWS)
        held = row < B
        inside, at = held[:, None] & there[None, :], row[:, None] * D + column[None, :]
        total = linear(dhidden_ptr, U, row, B, w, U, column, there, U, CHUNK, SPLIT, RESIDENT, PRECISION)
        if NORM == LAYER:
            shift, slope = summed(parts_ptr, row, B, U, COLUMNS)
            total = through_norm(
                total, shift / U, slope / U, read(rstd_ptr, row, held), read(sums_ptr, column, there),
                read(projected_ptr, at, inside),
            )  # fmt: skip
        dh = total + read(ddeter_ptr, at, inside) + read(carry_ptr, at, inside)
        h = state_before(first_ptr, initial_ptr, past_ptr, row, column, there, B, D)
        gates_at = row[:, None] * (3 * D) + column[None, :]
        mean, rstd = read(gates_mean_ptr, row, held), read(gates_rstd_ptr, row, held)
        reset = normal_slice(pre_ptr, gates_at, inside, mean, rstd)
        cand = normal_slice(pre_ptr, gates_at + D, inside, mean, rstd)
        update = normal_slice(pre_ptr, gates_at + 2 * D, inside, mean, rstd)
        dreset, dcand, dupdate, dpast = gate_gradients(
            scaled(reset, scale_ptr, shift_ptr, column, there),
            scaled(cand, scale_ptr + D, shift_ptr + D, column, there),
            scaled(update, scale_ptr + 2 * D, shift_ptr + 2 * D, column, there),
            h,
            tl.where(inside, dh, 0.0),
        )
        write(carry_ptr, at, dpast, inside)
        add_scales(dscales_ptr, column, there, dreset, reset, 3 * D, ROWS, COLUMNS)
        add_scales(dscales_ptr + D, column, there, dcand, cand, 3 * D, ROWS, COLUMNS)
        add_scales(dscales_ptr + 2 * D, column, there, dupdate, update, 3 * D, ROWS, COLUMNS)
        dreset *= read(scale_ptr, column, there)[None, :]
        dcand *= read(scale_ptr + D, column, there)[None, :]
        dupdate *= read(scale_ptr + 2 * D, column, there)[None, :]
        write(dgates_ptr, gates_at, dreset, inside)
        write(dgates_ptr, gates_at + D, dcand, inside)
        write(dgates_ptr, gates_at + 2 * D, dupdate, inside)
        write_sums(
            gates_parts_ptr, tile, row, B, tl.sum(dreset + dcand + dupdate, 1),
            tl.sum(dreset * reset + dcand * cand + dupdate * update, 1),
        )  # fmt: skip


@triton.jit
def gates_backward_phase(
    tile, dgates_ptr, parts_ptr, rstd_ptr, sums_ptr, projected_ptr, u_reset, u_cand, u_update, h_reset, h_cand,
    h_update, pre_ptr, mean_ptr, inp_rstd_ptr, scale_ptr, shift_ptr, dinp_ptr, inp_parts_ptr, dscales_ptr, first_ptr,
    carry_ptr, dinitial_ptr,
    B: tl.constexpr, U: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr,
    SPLIT: tl.constexpr, RESIDENT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The scaled gradient of the normal input (B, U) and its sums; and all of dh_{t-1} (B, D) in `carry`.

    What a first row would hand to the step before goes to the initial state instead.
    """
    column = tile * COLUMNS + tl.arange(0, COLUMNS)
    unit, deter = column < U, column < D
    for start in range(0, B, ROWS):
        row = start + tl.arange(0, ROWS)
        held = row < B
        du = tl.zeros([SPLIT, ROWS, COLUMNS], tl.float32)
        dh = tl.zeros([SPLIT, ROWS, COLUMNS], tl.float32)
        for k in range(0, D, CHUNK):
            at = inputs(k, CHUNK, SPLIT)
            x = operand(dgates_ptr, 3 * D, row, B, at, D)
            du = product(du, x, weight(u_reset, D, column, unit, at, D, RESIDENT), PRECISION)
            dh = product(dh, x, weight(h_reset, D, column, deter, at, D, RESIDENT), PRECISION)
            x = operand(dgates_ptr + D, 3 * D, row, B, at, D)
            du = product(du, x, weight(u_cand, D, column, unit, at, D, RESIDENT), PRECISION)
            dh = product(dh, x, weight(h_cand, D, column, deter, at, D, RESIDENT), PRECISION)
            x = operand(dgates_ptr + 2 * D, 3 * D, row, B, at, D)
            du = product(du, x, weight(u_update, D, column, unit, at, D, RESIDENT), PRECISION)
            dh = product(dh, x, weight(h_update, D, column, deter, at, D, RESIDENT), PRECISION)
        du, dh = tl.sum(du, 0), tl.sum(dh, 0)
        shift, slope = summed(parts_ptr, row, B, D, COLUMNS)
        shift, slope, rstd = shift / (3 * D), slope / (3 * D), read(rstd_ptr, row, held)
        inside, at = held[:, None] & unit[None, :], row[:, None] * (U + D) + column[None, :]
        du = through_norm(
            du, shift, slope, rstd, read(sums_ptr, column, unit), read(projected_ptr, at, inside)
        )  # fmt: skip
        kept, carry_at = held[:, None] & deter[None, :], row[:, None] * D + column[None, :]
        dh = through_norm(
            dh, shift, slope, rstd, read(sums_ptr + U, column, deter), read(projected_ptr + U, at, kept)
        ) + read(carry_ptr, carry_at, kept)  # fmt: skip
        fresh = (tl.load(first_ptr + row, mask=held, other=1) != 0)[:, None]
        add_to(dinitial_ptr, column, deter, sum_rows(tl.where(fresh & kept, dh, 0.0), ROWS, COLUMNS))
        write(carry_ptr, carry_at, tl.where(fresh, 0.0, dh), kept)
        at = row[:, None] * U + column[None, :]
        normal = normal_slice(pre_ptr, at, inside, read(mean_ptr, row, held), read(inp_rstd_ptr, row, held))
        dscaled = tl.where(inside, du * silu_slope(scaled(normal, scale_ptr, shift_ptr, column, unit)), 0.0)
        add_scales(dscales_ptr, column, unit, dscaled, normal, U, ROWS, COLUMNS)
        dnormal = dscaled * read(scale_ptr, column, unit)[None, :]
        write(dinp_ptr, at, dnormal, inside)
        if tile * COLUMNS < U:
            write_sums(inp_parts_ptr, tile, row, B, tl.sum(dnormal, 1), tl.sum(dnormal * normal, 1))
