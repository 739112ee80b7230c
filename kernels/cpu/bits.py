# SPDX-License-Identifier: Apache-2.0
"""Scalar operations that numba has no words for: half precision reads, bit casts, a fast exp.

numpy has no bfloat16 and numba computes in no half type, so 16-bit tensors travel as integers: uint16 holds bfloat16
bits, int16 holds float16 bits. `widen` turns any of them into float32, inside vectorised loops.
"""

from __future__ import annotations

from typing import Any

import llvmlite.binding  # type: ignore[import-untyped]
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .jit import exact_jit

_I32 = ir.IntType(32)
_F16, _F32 = ir.HalfType(), ir.FloatType()

# Without F16C, LLVM turns the conversion into a library call that numba does not link.
_HAS_F16C = bool(llvmlite.binding.get_host_cpu_features().get("f16c", False))


def _bfloat16_to_float32(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    return builder.bitcast(builder.shl(builder.zext(args[0], _I32), ir.Constant(_I32, 16)), _F32)


def _float16_to_float32(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    if _HAS_F16C:
        return builder.fpext(builder.bitcast(args[0], _F16), _F32)
    bits = builder.zext(args[0], _I32)
    sign = builder.shl(builder.and_(bits, ir.Constant(_I32, 0x8000)), ir.Constant(_I32, 16))
    magnitude = builder.shl(builder.and_(bits, ir.Constant(_I32, 0x7FFF)), ir.Constant(_I32, 13))
    # The exponent bias differs by 112; the multiplication also normalises subnormals, exactly.
    scaled = builder.fmul(builder.bitcast(magnitude, _F32), ir.Constant(_F32, 2.0**112))
    special = builder.or_(magnitude, ir.Constant(_I32, 0x7F800000))  # infinity and NaN
    is_special = builder.icmp_unsigned(">=", magnitude, ir.Constant(_I32, 0x0F800000))
    finite_or_not = builder.select(is_special, special, builder.bitcast(scaled, _I32))
    return builder.bitcast(builder.or_(finite_or_not, sign), _F32)


def _identity(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    return args[0]


@intrinsic
def widen(typing_context: Any, value: Any) -> Any:
    """float32 value of a stored number: float32, bfloat16 bits (uint16) or float16 bits (int16)."""
    codegen = {types.float32: _identity, types.uint16: _bfloat16_to_float32, types.int16: _float16_to_float32}
    if value not in codegen:
        return None
    return types.float32(value), codegen[value]


@intrinsic
def _float_bits(typing_context: Any, value: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], _I32)

    return types.int32(types.float32), codegen


@intrinsic
def _float_from_bits(typing_context: Any, bits: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], _F32)

    return types.float32(types.int32), codegen


@intrinsic
def _float_of_int(typing_context: Any, number: Any) -> Any:
    """float32 of an integer that fits int32. numba computes in int64, which has no such vector instruction."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.sitofp(builder.trunc(args[0], _I32), _F32)

    return types.float32(types.int64), codegen


def _mirrored(builder: Any, bits: Any) -> Any:
    """Flip the magnitude of negative numbers; its own inverse."""
    sign = builder.ashr(bits, ir.Constant(_I32, 31))
    return builder.xor(bits, builder.and_(sign, ir.Constant(_I32, 0x7FFFFFFF)))


@intrinsic
def as_ordered(typing_context: Any, value: Any) -> Any:
    """int32 in the order of the floats, for a maximum that uses vector registers. NaN lies beyond the infinities."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _mirrored(builder, builder.bitcast(args[0], _I32))

    return types.int32(types.float32), codegen


@intrinsic
def from_ordered(typing_context: Any, number: Any) -> Any:
    """The float that `as_ordered` made the number of."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(_mirrored(builder, args[0]), _F32)

    return types.float32(types.int32), codegen


_LOG2_E = np.float32(1.4426950408889634)
_LN2_HIGH = np.float32(0.693359375)
_LN2_LOW = np.float32(-2.12194440e-4)
_ROUND = np.float32(12582912.0)  # 1.5 * 2**23: adding it rounds to an integer, in the low bits
_ROUND_BITS = np.int32(0x4B400000)
_LOWEST = np.float32(-87.0)
_C2, _C3, _C4 = np.float32(0.5), np.float32(1.6666665459e-1), np.float32(4.1665795894e-2)
_C5, _C6, _C7 = np.float32(8.3334519073e-3), np.float32(1.3981999507e-3), np.float32(1.9875691500e-4)
_ONE, _ZERO = np.float32(1.0), np.float32(0.0)


@exact_jit
def exp_of_nonpositive(x: Any) -> Any:
    """exp(x) of a float32 x <= 0, to 2e-7 relative; 0 below -87; NaN stays NaN.

    Cephes' polynomial, without branches or library calls, so that loops over it use vector registers.
    """
    clipped = _LOWEST if x < _LOWEST else x
    # The exponent comes from the bits: a float to int conversion of NaN would be undefined.
    exponent = _float_bits(clipped * _LOG2_E + _ROUND) - _ROUND_BITS
    whole = _float_of_int(exponent)
    y = clipped - whole * _LN2_HIGH - whole * _LN2_LOW
    p = ((((_C7 * y + _C6) * y + _C5) * y + _C4) * y + _C3) * y + _C2
    scale = _float_from_bits(np.int32((exponent + np.int32(127)) << np.int32(23)))
    return _ZERO if x < _LOWEST else (p * y * y + y + _ONE) * scale
