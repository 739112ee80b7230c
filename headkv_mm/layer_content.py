# SPDX-License-Identifier: Apache-2.0
"""LayerContent: what one layer of a cache holds, dense or ragged; its rows, its bytes and its positions."""

from __future__ import annotations

from copy import copy, deepcopy
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from .compressor import LayerCompressor
from .pieces import Allocation
from .prompt import Reading
from .ragged import RaggedKV
from .text_compressor import TextCompressor

if TYPE_CHECKING:
    from typing_extensions import Self


class LayerContent(CacheLayerMixin):
    """The content of a layer.

    Keys and values [B, G, T, D] are dense in a layer that keeps all and while a prompt is read; else the compressor has
    them.
    """

    def _empty(self) -> None:
        """Hold nothing."""
        self.is_initialized = False
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.compressor: LayerCompressor | None = None
        self.seen = 0
        """Tokens seen, padding included: what transformers asks for."""
        self.padding: Tensor | None = None
        """[B] int32, padding columns of each row; None without padding."""
        self._reading: Reading | None = None
        self._dense_bytes = 0
        self._read_bytes = 0

    @property
    def store(self) -> RaggedKV | None:
        """The ragged storage; None before the prompt, and for layers that keep all."""
        return None if self.compressor is None else self.compressor.store

    @property
    def allocation(self) -> Allocation | None:
        """Budgets and head types; None until they are decided."""
        return None if self.compressor is None else self.compressor.allocation

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Note dtype and device."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def get_seq_length(self) -> int:
        """Tokens seen, kept or not: positions are counted from it."""
        return self.seen

    def _append_dense(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        # Exactly what a stock layer does, also at the first call, so that results are the same bit for bit.
        if self.keys is None or self.values is None:
            self.keys, self.values = keys.new_empty(0), values.new_empty(0)
        self.keys, self.values = torch.cat([self.keys, keys], dim=-2), torch.cat([self.values, values], dim=-2)
        return self.keys, self.values

    def _note_padding(self, visible: Tensor | None) -> None:
        if visible is not None:
            padding = (~visible).sum(-1, dtype=torch.int32)
            self.padding = padding if self.padding is None else self.padding + padding

    # Rows and copies

    def _rows(self) -> int:
        if self.store is not None:
            return self.store.rows
        return 0 if self.keys is None else self.keys.shape[0]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder rows for beam search; `beam_idx` is [B] int64."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self.batch_select_indices(torch.arange(self._rows()).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Take, repeat or reorder rows of everything that is held. `indices` is [B'] int64 or a [B] bool mask."""
        if self._rows() == 0:
            return
        rows = torch.arange(self._rows(), device=indices.device)[indices].to(self.device)
        if self.compressor is not None:
            self.compressor.select_rows(rows)
        for name in ("keys", "values", "padding"):
            tensor = getattr(self, name)
            if tensor is not None:
                setattr(self, name, tensor[rows])

    def crop(self, tokens: int) -> None:
        """Forget the newest tokens: `-n` removes n, a positive number is the length to keep (transformers < 5.15).

        Raises:
            ValueError: once entries were evicted, or for a cut into the prompt.
        """
        remove = -tokens if tokens <= 0 else self.seen - tokens
        if remove <= 0:
            return
        if self.compressor is not None:
            self.compressor.crop(remove)
        elif self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys[..., :-remove, :], self.values[..., :-remove, :]
        self.seen -= remove

    def copy(self, *, evicts: bool) -> Self:
        """An independent layer with the same content; with `evicts=False` nothing ever leaves it."""
        twin = copy(self)
        for name in ("keys", "values", "padding"):
            tensor = getattr(self, name)
            setattr(twin, name, None if tensor is None else tensor.clone())
        if isinstance(self.compressor, TextCompressor):
            twin.compressor = self.compressor.copy(evicts=evicts)
        elif self.compressor is not None:
            twin.compressor = deepcopy(self.compressor)
        return twin

    # What reports ask

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor that this layer holds."""
        tensors: list[Tensor | None] = [self.keys, self.values, self.padding]
        if self.compressor is not None:
            tensors.extend(self.compressor.tensors)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    @property
    def nbytes_peak(self) -> int:
        """The most bytes that this layer held between two forwards since it was reset."""
        chosen = 0 if self.compressor is None else self.compressor.nbytes_peak
        return max(chosen, self.nbytes, self._read_bytes)

    @property
    def nbytes_dense(self) -> int:
        """Bytes of the prompt's dense keys and values, which this layer held while it chose among them."""
        return self._dense_bytes

    @property
    def nbytes_full(self) -> int:
        """Bytes that a stock layer would hold after the same tokens, padding included."""
        if self.store is not None:
            store = self.store
            return 2 * store.rows * store.kv_heads * self.seen * store.keys.shape[-1] * store.keys.element_size()
        return 0 if self.keys is None or self.values is None else self.keys.nbytes + self.values.nbytes

    def kept_positions(self) -> list[list[Tensor]]:
        """Positions kept, a list over rows of lists over KV heads; padding takes no position."""
        if self.store is not None:
            return self.store.kept_positions()
        if self.keys is None:
            return []
        rows, heads = self.keys.shape[:2]
        if self._reading is not None and self._reading.passed is not None:
            return [[row[row >= 0].cpu().long()] * heads for row in self._reading.passed.positions]
        padding = [0] * rows if self.padding is None else self.padding.tolist()
        return [[torch.arange(self.seen - padding[row]) for _ in range(heads)] for row in range(rows)]
