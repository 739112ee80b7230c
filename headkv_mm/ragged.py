# SPDX-License-Identifier: Apache-2.0
"""RaggedKV: one layer's keys and values, with a length of its own for every row and KV head.

B rows, G KV heads, D head size, N slots (the sum of all capacities). Row after row, and inside a row head after head,
every (row, head) owns one contiguous region. A region is always packed: its first `length` slots are filled, in any
order, since attention over rotated keys does not depend on order; `positions` gives the order to whoever needs it.

Lengths live on the device and are never read back here. What the host must know to size an allocation (slots per row,
an upper bound of the lengths) is kept as plain integers next to the tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from . import kernels


@dataclass
class RaggedKV:
    """The storage of one layer.

    Attributes:
        keys, values: [N, D], model dtype, one slot per entry.
        positions: [N] int32, position of the entry counted from the first real token of its row; -1 = empty.
        start: [B, G] int32, first slot of each region.
        length: [B, G] int32, filled slots.
        capacity: [B, G] int32, slots of each region.
        row_slots: slots of each row, known on the host.
        max_length: an upper bound of `length`, known on the host.
        mass: [N] float32, attention received since it was last cleared, or what else the scorer lets be added up; None
            where no scorer wants it.
        credit: [N] float32, what a selector remembers of every entry, 0 for what came since; or None.
        ordered: the entries of every region lie in position order; known on the host.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    start: Tensor
    length: Tensor
    capacity: Tensor
    row_slots: list[int]
    max_length: int
    mass: Tensor | None = None
    credit: Tensor | None = None
    ordered: bool = True

    @classmethod
    def over(
        cls,
        keys: Tensor,
        values: Tensor,
        padding: Tensor,
        *,
        positions: Tensor | None = None,
        with_mass: bool = False,
    ) -> RaggedKV:
        """A storage that looks at dense tensors, without a copy where they are contiguous.

        Args:
            keys, values: [B, G, T, D].
            padding: [B] int32, columns at the left of each row that hold no token.
            positions: [B, T] int32, ascending, -1 for padding; None: every token that is no padding, one by one.
            with_mass: allocate `mass`.
        """
        batch, heads, tokens, head_dim = keys.shape
        region = torch.arange(batch * heads, dtype=torch.int32, device=keys.device).view(batch, heads) * tokens
        pads = padding[:, None]  # [B, 1]
        if positions is None:
            columns = torch.arange(tokens, dtype=torch.int32, device=keys.device) - pads  # [B, T]
            positions = columns.clamp(min=-1)
        positions = positions[:, None].expand(batch, heads, tokens)
        return cls(
            keys=keys.reshape(-1, head_dim),
            values=values.reshape(-1, head_dim),
            positions=positions.reshape(-1).contiguous(),
            start=region + pads,
            length=(tokens - pads).expand(batch, heads).contiguous(),
            capacity=(tokens - pads).expand(batch, heads).contiguous(),
            row_slots=[heads * tokens] * batch,
            max_length=tokens,
            mass=torch.zeros(batch * heads * tokens, device=keys.device) if with_mass else None,
        )

    @classmethod
    def empty(
        cls,
        capacity: Tensor,
        row_slots: Sequence[int],
        head_dim: int,
        *,
        dtype: torch.dtype,
        max_length: int = 0,
        with_mass: bool = False,
    ) -> RaggedKV:
        """Allocate empty regions.

        Args:
            capacity: [B, G] int32, on the device of the storage.
            row_slots: the sum of each row of `capacity`, so that nothing has to be read from the device.
            head_dim: D.
            dtype: of keys and values.
            max_length: bound of the lengths.
            with_mass: allocate `mass`.
        """
        device, slots = capacity.device, sum(row_slots)
        start = capacity.flatten().cumsum(0).view_as(capacity) - capacity
        return cls(
            keys=torch.empty(slots, head_dim, dtype=dtype, device=device),
            values=torch.empty(slots, head_dim, dtype=dtype, device=device),
            positions=torch.full((slots,), -1, dtype=torch.int32, device=device),
            start=start.to(torch.int32),
            length=torch.zeros_like(capacity),
            capacity=capacity,
            row_slots=list(row_slots),
            max_length=max_length,
            mass=torch.zeros(slots, dtype=torch.float32, device=device) if with_mass else None,
        )

    @property
    def rows(self) -> int:
        return self.start.shape[0]

    @property
    def kv_heads(self) -> int:
        return self.start.shape[1]

    @property
    def tensors(self) -> list[Tensor]:
        """Every tensor that is held."""
        held = [self.keys, self.values, self.positions, self.start, self.length, self.capacity]
        return [*held, *(tensor for tensor in (self.mass, self.credit) if tensor is not None)]

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor that is held."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def evict(self, victims: Tensor) -> None:
        """Remove the slots where `victims` [N] bool is True, in place. `max_length` stays a bound."""
        if self.credit is not None:
            # The same moves once more: as the kernel is, it carries one number beside keys and values.
            credit = self.credit[:, None]
            kernels.fill_holes(victims, credit, credit, self.positions.clone(), self.start, self.length.clone())
        kernels.fill_holes(victims, self.keys, self.values, self.positions, self.start, self.length, self.mass)
        if self.credit is not None:
            self.credit.masked_fill_(~self.filled(), 0.0)
        self.ordered = False

    def filled(self) -> Tensor:
        """[N] bool, True for slots that hold an entry."""
        return self.positions >= 0

    def row_of_slots(self) -> Tensor:
        """[N] int64, the row that each slot belongs to."""
        device = self.start.device
        slots = torch.tensor(self.row_slots, device=device)
        return torch.repeat_interleave(torch.arange(self.rows, device=device), slots, output_size=sum(self.row_slots))

    def slots_in_order(self) -> tuple[Tensor, Tensor]:
        """The slots of every region in position order [B, G, M] int64, and which of them hold an entry.

        M is the host's bound of the lengths, so nothing is read from the device.
        """
        offset = torch.arange(self.max_length, device=self.start.device)
        filled = offset < self.length[..., None]  # [B, G, M]
        slots = torch.where(filled, self.start[..., None] + offset, 0).long()
        if not self.ordered:
            last = torch.iinfo(torch.int32).max
            order = torch.where(filled, self.positions[slots], last).argsort(dim=-1)
            slots = slots.gather(-1, order)  # the filled ones stay in front
        return slots, filled

    def regroup(
        self,
        capacity: Tensor,
        row_slots: Sequence[int],
        *,
        max_length: int,
        rows: Tensor | None = None,
        keep: Tensor | None = None,
    ) -> RaggedKV:
        """Move what is kept into regions of other capacities (grouping, growth) or rows (beams, batch changes).

        Args:
            capacity: [B', G] int32.
            row_slots: row sums of `capacity`.
            max_length: bound of the new lengths.
            rows: [B'] int64, the old row that each new one takes; None for the same rows.
            keep: [N] bool, None for everything.

        Returns:
            A new storage; this one is left as it is.
        """
        if rows is None:
            rows = torch.arange(self.rows, device=self.start.device)
        new = RaggedKV.empty(
            capacity,
            row_slots,
            self.keys.shape[-1],
            dtype=self.keys.dtype,
            max_length=max_length,
            with_mass=self.mass is not None,
        )
        kernels.gather_regions(
            rows,
            keep,
            self.keys,
            self.values,
            self.positions,
            self.start,
            self.length,
            new.keys,
            new.values,
            new.positions,
            new.start,
            new.length,
            self.mass,
            new.mass,
        )
        if self.credit is not None:
            new.credit = torch.zeros(sum(row_slots), dtype=torch.float32, device=self.credit.device)
            old, moved = self.credit[:, None], new.credit[:, None]
            places = (new.positions.clone(), new.start, new.length.clone())
            kernels.gather_regions(rows, keep, old, old, self.positions, self.start, self.length, moved, moved, *places)
        new.ordered = self.ordered
        return new

    def copy(self) -> RaggedKV:
        """The same storage with tensors of its own."""
        tensors = {
            field.name: value.clone()
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, row_slots=list(self.row_slots), **tensors)  # type: ignore[arg-type]

    def select_rows(self, rows: Tensor) -> RaggedKV:
        """The storage with rows taken, repeated or reordered. `rows` is [B'] int64."""
        rows = rows.to(self.start.device)
        row_slots = [self.row_slots[row] for row in rows.tolist()]
        return self.regroup(self.capacity[rows], row_slots, max_length=self.max_length, rows=rows)

    def append_chunk(
        self,
        keys: Tensor,
        values: Tensor,
        visible: Tensor,
        first_position: Tensor,
        *,
        positions: Tensor | None = None,
    ) -> None:
        """Write several tokens at once; pads are dropped. The regions must have room.

        Args:
            keys, values: [B, G, T, D].
            visible: [B, T] bool, False for padding.
            first_position: [B] int32, position of the first visible token of each row.
            positions: [B, T] int32, ascending, where visible tokens do not follow each other one by one.
        """
        offset = visible.cumsum(-1) - 1  # [B, T], order among the visible tokens of the row
        slots = (self.start + self.length)[:, :, None] + offset[:, None, :]  # [B, G, T]
        written = visible[:, None, :].expand_as(slots)
        slots = slots[written].long()
        self.keys[slots] = keys[written].to(self.keys.dtype)
        self.values[slots] = values[written].to(self.values.dtype)
        if positions is None:
            positions = (first_position[:, None] + offset).to(torch.int32)  # [B, T]
        self.positions[slots] = positions[:, None, :].expand_as(written)[written]
        if self.mass is not None:
            self.mass[slots] = 0.0
        self.length += visible.sum(-1, dtype=torch.int32)[:, None]
        self.max_length += keys.shape[2]

    def padded(self) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values [B, G, M, D] and positions [B, G, M] of every region, padded to the longest; -1 = padding.

        A transient copy for attention with many queries; nothing holds on to it.
        """
        longest = int(self.length.max())
        offset = torch.arange(longest, device=self.start.device)
        filled = offset < self.length[..., None]  # [B, G, M]
        slots = torch.where(filled, self.start[..., None] + offset, 0).long()
        positions = torch.where(filled, self.positions[slots], -1)
        # Unfilled slots of the storage are uninitialised memory; zeros keep NaN out of 0 * value.
        keys = torch.where(filled[..., None], self.keys[slots], 0)
        values = torch.where(filled[..., None], self.values[slots], 0)
        return keys, values, positions

    def kept_positions(self) -> list[list[Tensor]]:
        """Sorted int64 positions kept by every row and head (a list over rows of lists over heads)."""
        starts, lengths, positions = self.start.tolist(), self.length.tolist(), self.positions.cpu().long()
        return [
            [positions[s : s + n].sort().values for s, n in zip(row_starts, row_lengths, strict=True)]
            for row_starts, row_lengths in zip(starts, lengths, strict=True)
        ]
