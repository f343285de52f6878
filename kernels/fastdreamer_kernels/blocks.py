"""Blocks of rows in a program's registers: where they lie in memory, reading, writing, shared arithmetic in fp32."""

# pyright: reportArgumentType=false, reportOperatorIssue=false, reportIndexIssue=false, reportCallIssue=false
# Triton's language, which type checkers read as Python.

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fastdreamer_kernels.machine import EARLY, INTERPRETED

CUTS = tl.constexpr(INTERPRETED)
WAITS = tl.constexpr(EARLY)


@triton.jit
def after_others():
    """Where every kernel begins. A kernel that was started early goes on when all that the one before it wrote is there
    to be read; the one behind it may be started, and waits in turn."""
    if WAITS:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def place(start, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Of a block of a (rows, columns) matrix from row `start` on: row numbers (64 bits), column numbers, offsets, and
    which of them lie inside."""
    row = tl.arange(0, ROWS).to(tl.int64) + start
    column = tl.arange(0, COLUMNS)
    at = row[:, None] * columns + column[None, :]
    return row, column, at, (row < rows)[:, None] & (column < columns)[None, :]


@triton.jit
def read(ptr, at, inside):
    """fp32 values, zero outside."""
    return tl.load(ptr + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """fp32 values in another dtype, rounded to the nearest. The interpreter by itself would cut them off."""
    if CUTS and tl.bfloat16 == DTYPE:
        bits = x.to(tl.int32, bitcast=True)
        nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
        x = tl.where(x == x, nearest, x)
    return x.to(DTYPE)


@triton.jit
def write(ptr, at, value, inside):
    """Stores in the dtype of the tensor."""
    tl.store(ptr + at, narrow(value, ptr.dtype.element_ty), mask=inside)


@triton.jit
def sum_rows(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The sum over the rows of x (ROWS, COLUMNS), in two levels: the interpreter adds row to row, and long sums lose
    digits so."""
    if ROWS > 32:
        x = tl.sum(tl.reshape(x, [32, ROWS // 32, COLUMNS]), 0)
    return tl.sum(x, 0)


@triton.jit
def normalise(x, inside, columns, EPS: tl.constexpr):
    """Rows of x (ROWS, COLUMNS) less their mean and over their deviation, zero outside; and 1 / deviation (ROWS)."""
    mean = tl.sum(x, 1) / columns
    centred = tl.where(inside, x - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / columns + EPS)
    return centred * rstd[:, None], rstd


@triton.jit
def silu(z):
    return z * tl.sigmoid(z)


@triton.jit
def silu_slope(z):
    """The derivative of `silu` at z."""
    gate = tl.sigmoid(z)
    return gate * (1.0 + z * (1.0 - gate))


@triton.jit
def tanh(x):
    """Triton has none of its own, and CUDA's library is not to be had in the interpreter."""
    ebb = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - ebb) / (1.0 + ebb)
    # Near zero 1 - exp(-2|x|) loses digits: there the odd series, whose next term is below rounding.
    square = x * x
    series = 1.0 + square * (-1.0 / 3 + square * (2.0 / 15 + square * (-17.0 / 315 + square * (62.0 / 2835))))
    return tl.where(tl.abs(x) < 0.25, x * series, tl.where(x < 0, -far, far))


@triton.jit
def expm1(x):
    """exp(x) - 1, to the last digits near zero too, where the difference would lose them."""
    series = x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6 * (1 + x / 7))))))
    return tl.where(tl.abs(x) < 0.25, series, tl.exp(x) - 1.0)


@triton.jit
def softmax(logits, inside):
    """Of each row of logits (ROWS, COLUMNS); zero outside, but NaN in rows that lie wholly outside, as in rows of
    negative infinity."""
    peak = tl.max(tl.where(inside, logits, float("-inf")), 1)
    weights = tl.where(inside, tl.exp(logits - peak[:, None]), 0.0)
    return weights / tl.sum(weights, 1)[:, None]


@triton.jit
def unimix(probs, inside, classes, UNIMIX: tl.constexpr):
    """Probabilities with the fraction UNIMIX of a uniform over `classes` mixed in; zero outside."""
    return tl.where(inside, (1.0 - UNIMIX) * probs + UNIMIX / classes, 0.0)


@triton.jit
def softmax_backward(probs, dprobs, UNIMIX: tl.constexpr):
    """The gradient of a row's logits from that of its unimixed probabilities; `probs` is the plain softmax."""
    return (1.0 - UNIMIX) * probs * (dprobs - tl.sum(probs * dprobs, 1)[:, None])
