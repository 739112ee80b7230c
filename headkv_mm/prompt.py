# SPDX-License-Identifier: Apache-2.0
"""What a layer remembers of a prompt until it is compressed: its queries, and which columns are padding."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .asked import Asked
from .passed import Passed


@dataclass(frozen=True)
class Prompt:
    """The queries of a prompt's last forward, and how the layer asks.

    Attributes:
        query: [B, H, T, D].
        scale, softcap, sinks: see `headkv_mm.kernels.ragged_decode`.
        positions: [B, T] int32 of the queries, -1 for padding, where not all tokens came so far; else None.
    """

    query: Tensor
    scale: float
    softcap: float = 0.0
    sinks: Tensor | None = None
    positions: Tensor | None = None

    def reordered(self, order: Tensor) -> Prompt:
        """The queries in another order of columns, [B, T] int64; only for a prompt of one forward.

        Queries that know their positions stay where they are.
        """
        if self.positions is not None:
            return self
        return replace(self, query=self.query.take_along_dim(order[:, None, :, None], 2))

    def asked(self, tokens: int, padding: Tensor) -> Asked:
        """The queries with their positions.

        Args:
            tokens: columns of the whole prompt; the queries are its last ones.
            padding: [B] int32, padding columns at the left of each row.
        """
        if self.positions is not None:
            return Asked(self.query.transpose(1, 2), self.positions, self.scale, self.softcap, self.sinks)
        count = self.query.shape[2]
        columns = torch.arange(tokens - count, tokens, device=self.query.device)
        positions = (columns - padding[:, None]).clamp(min=-1).to(torch.int32)  # [B, T]
        return Asked(self.query.transpose(1, 2), positions, self.scale, self.softcap, self.sinks)


@dataclass(frozen=True)
class LeftPadded:
    """A prompt whose padding lies at the left.

    Attributes:
        keys, values: [B, G, T, D].
        padding: [B] int32, padding columns of each row.
        prompt: its queries.
        positions: [B, T] int32, -1 for padding, where not all tokens came; None for all.
    """

    keys: Tensor
    values: Tensor
    padding: Tensor
    prompt: Prompt
    positions: Tensor | None

    @classmethod
    def of(cls, keys: Tensor, values: Tensor, visible: Tensor, prompt: Prompt, positions: Tensor | None) -> LeftPadded:
        """Bring padding that lies between or after tokens to the left; `visible` is [B, T] bool, False for padding."""
        padding = (~visible).sum(-1, dtype=torch.int32)
        if not bool(visible[:, -1].all()) or bool((visible[:, 1:] < visible[:, :-1]).any()):
            order = visible.int().argsort(dim=-1, stable=True)  # [B, T]
            keys, values = (x.take_along_dim(order[:, None, :, None], 2) for x in (keys, values))
            prompt = prompt.reordered(order)
            positions = None if positions is None else positions.take_along_dim(order, 1)
        return cls(keys, values, padding, prompt, positions)


@dataclass
class Reading:
    """A prompt that comes in chunks.

    Attributes:
        prompt: the last queries so far.
        visible: [B, T] bool, False for padding; None if there is none so far.
        passed: the positions of all tokens so far, where not all reach this layer; else None.
    """

    prompt: Prompt | None = None
    visible: Tensor | None = None
    passed: Passed | None = None
    _tokens: int = field(default=0, repr=False)

    @property
    def tokens(self) -> int:
        """Columns so far."""
        return self._tokens

    def note(self, chunk: Prompt, visible: Tensor | None, needed: int, passed: Passed | None = None) -> None:
        """Add a chunk; of the queries so far the last `needed` are kept."""
        batch, _, tokens, _ = chunk.query.shape
        if visible is not None or self.visible is not None:
            ones = chunk.query.new_ones(batch, max(tokens, self._tokens), dtype=torch.bool)
            before = ones[:, : self._tokens] if self.visible is None else self.visible
            self.visible = torch.cat([before, ones[:, :tokens] if visible is None else visible], dim=1)
        self._tokens += tokens
        if passed is not None:
            earlier = [] if self.passed is None else [self.passed.positions]
            self.passed = replace(passed, positions=torch.cat([*earlier, passed.positions], 1))
            asked = [] if self.prompt is None or self.prompt.positions is None else [self.prompt.positions]
            chunk = replace(chunk, positions=torch.cat([*asked, passed.positions], 1)[:, -needed:])
        queries = chunk.query if self.prompt is None else torch.cat([self.prompt.query, chunk.query], dim=2)
        # A copy of what is needed: a view would keep the whole chunk alive.
        self.prompt = replace(chunk, query=queries[:, :, -needed:].clone())
