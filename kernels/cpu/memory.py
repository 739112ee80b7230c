# SPDX-License-Identifier: Apache-2.0
"""Arrays over addresses, and a shared counter: how compiled loops reach the memory of torch tensors.

A decode step makes one call per layer, and turning ten tensors into numpy arrays costs more than attention over a short
cache. So a call passes one block of numbers (`job.py`) with addresses in it, and the loops build their arrays there.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.extending import intrinsic

from .jit import jit


@intrinsic
def _pointer(typing_context: Any, address: Any, element: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(element)(types.int64, element), codegen


@jit
def matrix(address: int, rows: int, columns: int, element: Any) -> Any:
    """The array [rows, columns] at an address; `element` is any value of its type."""
    return numba.carray(_pointer(address, element), (rows, columns))


@jit
def cube(address: int, planes: int, rows: int, columns: int, element: Any) -> Any:
    """The array [planes, rows, columns] at an address."""
    return numba.carray(_pointer(address, element), (planes, rows, columns))


@jit
def vector(address: int, count: int, element: Any) -> Any:
    """The array [count] at an address, or [0] at address 0: an optional argument that was not given."""
    return numba.carray(_pointer(address, element), (count if address != 0 else 0,))


@jit
def int32s(address: int, count: int) -> Any:
    """`vector` of int32."""
    return vector(address, count, np.int32(0))


@jit
def float32s(address: int, count: int) -> Any:
    """`vector` of float32."""
    return vector(address, count, np.float32(0))


@intrinsic
def fetch_and_add_one(typing_context: Any, counter: Any) -> Any:
    """Add one to `counter[0]` (int64 array), atomically, and return what it held.

    Who reads a count also sees what other threads wrote before they counted.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, args[0])
        return builder.atomic_rmw("add", array.data, ir.Constant(ir.IntType(64), 1), "acq_rel")

    if not (isinstance(counter, types.Array) and counter.dtype == types.int64):
        return None
    return types.int64(counter), codegen


@intrinsic
def call_worker(typing_context: Any, function: Any, address: Any) -> Any:
    """Call the C function at an address, `void f(intptr_t)`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        integer = ir.IntType(64)
        pointer = ir.FunctionType(ir.VoidType(), [integer]).as_pointer()
        builder.call(builder.inttoptr(args[0], pointer), [args[1]])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen
