# SPDX-License-Identifier: Apache-2.0
"""The numba kernels against the float64 reference. Triton meets the same checks in its interpreter and in tests/gpu.

Tolerances are those of `triton_cases`: outputs 1e-5 in float32, 3e-3 in float16 and 3e-2 in bfloat16 (a few units in
the last place of numbers around one), weights and logits 2e-5 whatever the storage; what is moved must be exact.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from headkv_mm import kernels
from headkv_mm.kernels import cpu, reference
from headkv_mm.kernels.cpu import decode

from .triton_cases import storage
from .triton_checks import CHECKS, decode_case

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("check", CHECKS)
def test_check(check: str, dtype: torch.dtype) -> None:
    CHECKS[check](cpu, "cpu", dtype)


LENGTHS = {
    "short": [[0, 1, 2], [3, 4, 5]],
    "around 32": [[31, 32, 33], [0, 30, 34]],
    "around 64": [[63, 64, 65], [100, 0, 1]],
    "one giant": [[0, 0, 700], [0, 1, 0]],
}


@pytest.mark.parametrize("size", [16, 32, 64, 80, 128, 256])
@pytest.mark.parametrize("group", [1, 2, 3, 8])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_decode_shapes(lengths: str, group: int, size: int) -> None:
    """Every tail of the loops over slots, heads and head size; append first, then once more without."""
    s = storage(LENGTHS[lengths], size, torch.float32, "cpu", seed=size + group)
    decode_case(cpu, s, group, append=True, mass=True)
    decode_case(cpu, s, group, append=False, softcap=3.0, sinks=True)
    decode_case(cpu, s, group, append=True, softcap=3.0, sinks=True, mass=True, mass_of="squared_logits")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_of_any_size(dtype: torch.dtype) -> None:
    """Logits beyond 1000: one entry takes everything, and nothing overflows."""
    s = storage([[40]], 16, dtype, "cpu")
    begin = int(s.start)
    query = torch.full((1, 1, 16), 30.0, dtype=dtype)
    s.keys[begin + 7] = 8.0
    out = cpu.ragged_decode(query, s.keys, s.values, s.start, s.length, scale=1.0)
    torch.testing.assert_close(out[0, 0], s.values[begin + 7], atol=0, rtol=0)


@pytest.mark.parametrize("where", ["query", "keys", "values"])
def test_nan_in_a_region_is_not_hidden(where: str) -> None:
    s = storage([[9, 9]], 16, torch.float32, "cpu")
    query = s.normal(1, 2, 16)
    target = query[0, :1] if where == "query" else getattr(s, where)[int(s.start[0, 0]) :]
    target[0, 3] = float("nan")
    out = cpu.ragged_decode(query, s.keys, s.values, s.start, s.length, scale=0.25)
    assert out[0, 0].isnan().any()
    assert out[0, 1].isfinite().all()


def test_every_half_is_read_exactly() -> None:
    """One entry has weight one, so the output is the value: all 65536 patterns, subnormals and infinities too."""
    patterns = torch.arange(-32768, 32768, dtype=torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        values = patterns.view(dtype).view(256, 256)
        zeros, one = torch.zeros(256, 256, dtype=dtype), torch.ones(256, 1, dtype=torch.int32)
        start = torch.arange(256, dtype=torch.int32)[:, None]
        out = cpu.ragged_decode(torch.zeros(256, 1, 256), zeros, values, start, one, scale=1.0)
        torch.testing.assert_close(out[:, 0], values.float(), atol=0, rtol=0, equal_nan=True)


def test_inputs_need_not_be_contiguous() -> None:
    """Views as a model makes them: heads transposed, a time axis cut out, another dtype than the cache."""
    s = storage([[9, 4], [3, 0]], 16, torch.float32, "cpu")
    plain = s.copy()
    query, new_keys = s.normal(4, 2, 16).transpose(0, 1), s.normal(2, 2, 32)[..., ::2]
    new_values, positions = s.normal(2, 2, 16, dtype=torch.float64), torch.tensor([70, 99, 71, 99])[::2]
    got = cpu.append_decode(query, new_keys, new_values, positions, *s.tensors(), scale=0.25)
    straight = (query.contiguous(), new_keys.contiguous(), new_values.float(), positions.int())
    expected = cpu.append_decode(*straight, *plain.tensors(), scale=0.25)
    assert torch.equal(got, expected)
    assert torch.equal(s.positions, plain.positions)


@pytest.mark.parametrize(
    "name, error, wrong",
    [
        ("keys", ValueError, lambda t: t[:-1]),
        ("values", TypeError, lambda t: t.half()),
        ("positions", TypeError, lambda t: t.long()),
        ("start", TypeError, lambda t: t.long()),
        ("length", ValueError, lambda t: torch.cat([t, t], 1)[:, ::2]),
        ("mass", ValueError, lambda t: t[1:]),
    ],
)
def test_storage_that_does_not_fit_is_refused(name: str, error: type[Exception], wrong: Any) -> None:
    s = storage([[9, 4]], 16, torch.float32, "cpu")
    setattr(s, name, wrong(getattr(s, name)))
    new = (s.normal(1, 2, 16), s.normal(1, 2, 16), s.integers(0, 9, 1))
    with pytest.raises(error, match=name if name != "keys" else "values"):
        cpu.append_decode(s.normal(1, 2, 16), *new, *s.tensors(), scale=1.0, mass=s.mass)


@pytest.mark.parametrize("backend", [cpu, reference, kernels], ids=["numba", "reference", "dispatch"])
def test_unknown_sums_are_refused(backend: Any) -> None:
    s = storage([[9]], 16, torch.float32, "cpu")
    with pytest.raises(ValueError, match="mass_of must be one of 'attention', 'squared_logits', got 'logits'"):
        backend.ragged_decode(
            s.normal(1, 1, 16), s.keys, s.values, s.start, s.length, scale=1.0, mass=s.mass, mass_of="logits"
        )


def test_warm_up_leaves_compiled_code_on_disk() -> None:
    cpu.warm_up([torch.float32], head_sizes=[64])
    # Past the cache of this process, the one on disk answers.
    again = decode.decode_worker_for.__wrapped__(torch.float32)
    assert again.cache_hits == 1


def test_warm_up_refuses_what_it_cannot_compile() -> None:
    with pytest.raises(TypeError, match=r"float32, float16 or bfloat16, got torch\.float64"):
        cpu.warm_up([torch.float64])
