# SPDX-License-Identifier: Apache-2.0
"""The pipeline arguments `kv_compression`, `kv_budget` and `kv_options`, and how a call overrides the pipeline's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headkv_mm.compression import Compression

OFF = "none"


@dataclass(frozen=True)
class KVArguments:
    """What a user said about the KV cache, in one place.

    Attributes:
        compression: a method's name, a dict with "method" and options, a `Compression`, or None if not given. An
            explicit `kv_compression=None` is the full cache, as everywhere in the library, and stands here as "none".
        budget: a share (also as text, "1/6"), entries per KV head, or bytes as text; None if not given.
        options: options of the method.
    """

    compression: str | Mapping[str, Any] | Compression | None = None
    budget: float | int | str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.options, Mapping):
            raise TypeError(f"kv_options must be a dict of options, got {type(self.options).__name__}")

    @classmethod
    def of(cls, parameters: Mapping[str, Any]) -> KVArguments:
        """Pick `kv_compression`, `kv_budget` and `kv_options` out of a call's arguments."""
        compression = parameters.get("kv_compression")
        if compression is None and "kv_compression" in parameters:
            compression = OFF
        return cls(compression, parameters.get("kv_budget"), parameters.get("kv_options") or {})

    @property
    def given(self) -> bool:
        """Whether the user said anything."""
        return self.compression is not None or self.budget is not None or bool(self.options)

    def overridden_by(self, call: KVArguments) -> KVArguments:
        """These arguments with those of one call on top.

        A call that names a compression starts from that one: options of another method are dropped, and the
        pipeline's budget stays unless the call brings its own. A call without a compression changes only the budget
        and the options it names.
        """
        if call.compression is None:
            budget = self.budget if call.budget is None else call.budget
            return KVArguments(self.compression, budget, {**self.options, **call.options})
        budget = call.budget
        if budget is None and isinstance(call.compression, str) and call.compression != OFF:
            budget = self.budget  # a dict or a Compression brings its own
        inherited = self.options if call.compression == self.compression else {}
        return KVArguments(call.compression, budget, {**inherited, **call.options})

    def resolve(self) -> Compression:
        """The compression to run with.

        Raises:
            ValueError: for an unknown method or option, a budget out of range, or a budget or options without a
                compression they could belong to.
        """
        from headkv_mm.budgets import parse_budget
        from headkv_mm.compression import Compression

        if self.compression is None and self.given:
            what = "kv_budget" if self.budget is not None else "kv_options"
            raise ValueError(f'{what} has no effect without kv_compression: add kv_compression="headkv"')
        budget = parse_budget(self.budget) if isinstance(self.budget, str) else self.budget
        return Compression.parse(self.compression, budget=budget, **self.options)
