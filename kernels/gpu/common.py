# SPDX-License-Identifier: Apache-2.0
"""What the Triton launchers share: tile sizes, checks of their arguments, and small device functions.

Programs work on *rows*: row r = b * G + g is the region of (batch row b, KV head g), and query head h of the group sits
at `r * R + h`. `start` is int32, so every kernel widens it before it is multiplied by the head size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

SUPPORTED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""Storage dtypes of these kernels. float64 is for the reference."""

CHUNK = 1024
"""Slots per program of a split decode. Regions up to this bound take one program and no partial results."""

TILE_BYTES = 16384
"""Bytes of one K or V tile. Three pipeline stages of a K and a V tile then fit the smallest shared memory in use."""

STAGES = 3

OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}
"""Compiler options of every launch. Fused multiply-adds by name, because their default differs between releases."""

NEGATIVE = tl.constexpr(-1.0e30)  # finite on purpose: -inf - -inf would be NaN
LOG2E = tl.constexpr(1.4426950408889634)


# ------------------------------------------------------------------------------------------------------------ host side


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, whose bfloat16 arithmetic is wrong."""
    return not isinstance(load_tile, triton.JITFunction)


def padded_head_size(size: int) -> int:
    """Head size rounded up to what a tile and a dot product accept."""
    return max(16, int(triton.next_power_of_2(size)))


def padded_group(group: int) -> int:
    """Query heads per KV head rounded up to the rows of one matrix instruction."""
    return max(16, int(triton.next_power_of_2(group)))


def block_slots(head_size: int, dtype: torch.dtype, *, squares: bool = False) -> int:
    """Slots per tile so that a tile of K holds about `TILE_BYTES`; half of that where squared logits are summed too.

    The sums want registers of their own, and with whole tiles fewer programs fit on a multiprocessor.
    """
    slots = TILE_BYTES // (padded_head_size(head_size) * dtype.itemsize)
    return min(128, max(16, slots)) // (2 if squares and slots >= 32 else 1)


def upcast(query: Tensor, keys: Tensor) -> bool:
    """Whether tiles must be widened to float32 before a dot product."""
    return query.dtype != keys.dtype or (interpreting() and keys.dtype == torch.bfloat16)


def decode_options(query: Tensor, keys: Tensor) -> dict[str, int | bool]:
    """Compiler options of the decode kernels.

    float32 products run on the ordinary cores and keep long chains of sums in registers: with four warps the compiler
    was seen to spill for sm_90, with eight it never did.
    """
    widened = keys.dtype == torch.float32 or upcast(query, keys)
    return {**OPTIONS, "num_warps": 8 if widened else 4}


def programs_per_region(regions: int, slots: int, block: int) -> int:
    """How many programs share a region when no bound of the lengths is known on the host.

    Enough programs to fill a large device, but no more than blocks in the whole storage: a region cannot be longer.
    """
    return max(1, min(32, 1024 // max(regions, 1), int(triton.cdiv(slots, block))))


def check_storage(keys: Tensor, **others: Tensor | None) -> None:
    """Refuse storage that the kernels cannot address.

    Raises:
        TypeError: keys in a dtype outside `SUPPORTED_DTYPES`.
        ValueError: storage in host memory, or a tensor that is not contiguous; kernels write in place, so a copy would
            lose the result.
    """
    if keys.device.type == "cpu" and not interpreting():
        raise ValueError(
            "Triton kernels need tensors on a GPU, got CPU tensors: use the numba or reference backend, or start "
            "Python with TRITON_INTERPRET=1."
        )
    if keys.dtype not in SUPPORTED_DTYPES:
        raise TypeError(
            f"Triton kernels take float32, float16 or bfloat16 storage, got {keys.dtype}; use the reference."
        )
    check_contiguous(keys=keys, **others)


def check_contiguous(**tensors: Tensor | None) -> None:
    """Raise ValueError for a tensor that is not contiguous. None passes."""
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}; pass the storage itself.")


def longest(length: Tensor, max_length: int | None, extra: int = 0) -> int:
    """The bound of the lengths; asks the device only if `max_length` is None."""
    if max_length is not None:
        return max_length
    return int(length.max()) + extra if length.numel() else 0


# ---------------------------------------------------------------------------------------------------------- device side


@triton.jit
def load_tile(pointer, index, ok, D: tl.constexpr, DP: tl.constexpr):
    """Rows `index` (int64, [n]) of a [*, D] tensor as a tile [n, DP]; zeros where `ok` is false and past D."""
    d = tl.arange(0, DP)
    mask = ok[:, None]
    if DP != D:
        mask = mask & (d < D)[None, :]
    return tl.load(pointer + index[:, None] * D + d[None, :], mask=mask, other=0.0)


@triton.jit
def store_tile(pointer, index, ok, tile, D: tl.constexpr, DP: tl.constexpr):
    """The inverse of `load_tile`."""
    d = tl.arange(0, DP)
    mask = ok[:, None]
    if DP != D:
        mask = mask & (d < D)[None, :]
    tl.store(pointer + index[:, None] * D + d[None, :], tile.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def logits_base2(product, scale, softcap, SOFTCAP: tl.constexpr):
    """q.k to logits in units of log 2, so that weights are exp2 of them."""
    logits = product * scale
    if SOFTCAP:
        # tanh from exp of a negative number: never overflows, and the interpreter has no tanh.
        x = logits / softcap
        t = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
        tanh = (1.0 - t) / (1.0 + t)
        logits = softcap * tl.where(x < 0.0, -tanh, tanh)
    return logits * LOG2E


@triton.jit
def dot_keys(q, k, UPCAST: tl.constexpr):
    """Product of q [m, DP] and k [n, DP] transposed, float32 [m, n]."""
    if UPCAST:
        out = tl.dot(q.to(tl.float32), tl.trans(k.to(tl.float32)), input_precision="ieee")
    else:
        out = tl.dot(q, tl.trans(k), input_precision="ieee")
    return out


@triton.jit
def initial_state(sinks, row, G, R: tl.constexpr, RP: tl.constexpr, DP: tl.constexpr):
    """Running maximum [RP], sum [RP] and output [RP, DP] of an online softmax, sink included where there is one."""
    r = tl.arange(0, RP)
    if sinks is None:
        peak = tl.full([RP], NEGATIVE, tl.float32)
        total = tl.zeros([RP], tl.float32)
    else:
        # A sink of -inf means no sink: the floor keeps differences finite, and exp2 of them is zero all the same.
        sink = tl.load(sinks + (row % G) * R + r, mask=r < R, other=0.0).to(tl.float32) * LOG2E
        peak = tl.maximum(sink, NEGATIVE)
        total = tl.exp2(sink - peak)
    return peak, total, tl.zeros([RP, DP], tl.float32)


@triton.jit
def attend(
    q,
    keys,
    values,
    base,
    lo,
    hi,
    peak,
    total,
    acc,
    squares,
    scale,
    softcap,
    D: tl.constexpr,
    DP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SOFTCAP: tl.constexpr,
    UPCAST: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Online softmax of q [RP, DP] over slots `base + lo .. base + hi`; every block holds at least one slot.

    `squares` [N] float32 gets each slot's squared logits before the softcap added, summed over q; None for none. Rows
    of q past the group are zero and add nothing.
    """
    for first in tl.range(lo, hi, BLOCK_N, num_stages=STAGES):
        t = first + tl.arange(0, BLOCK_N)
        ok = t < hi
        k = load_tile(keys, base + t, ok, D, DP)
        v = load_tile(values, base + t, ok, D, DP)
        product = dot_keys(q, k, UPCAST)  # [RP, BLOCK_N]
        if squares is not None:
            # One add per slot, so nothing depends on an order. A load would be fetched ahead and cost registers.
            tl.atomic_add(squares + base + t, tl.sum(product * product, 0) * (scale * scale), ok, sem="relaxed")
        logits = logits_base2(product, scale, softcap, SOFTCAP)
        logits = tl.where(ok[None, :], logits, NEGATIVE)
        new_peak = tl.maximum(peak, tl.max(logits, 1))
        shrink = tl.exp2(peak - new_peak)
        weights = tl.exp2(logits - new_peak[:, None])
        total = total * shrink + tl.sum(weights, 1)
        if UPCAST:
            acc = tl.dot(weights, v.to(tl.float32), acc * shrink[:, None], input_precision="ieee")
        else:
            acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        peak = new_peak
    return peak, total, acc
