# SPDX-License-Identifier: Apache-2.0
"""Numbers that a method can know of a head when it must decide, each larger for heads that should need more."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from headkv_mm.evaluation.heads.attending import RecordedRow
from headkv_mm.evaluation.heads.pointed import Behind, pointed_attention

TAUS = (0.8, 0.9, 0.95, 0.97)
POINTED = "pointed attention"
SINKS = 4
"""First entries of a text that count as sinks."""
_BEST = 8  # one in so many entries


@dataclass(frozen=True)
class Seen:
    """What a layer's newest queries looked at; the entries that can leave are the last n of `mass`.

    Attributes:
        mass: [G, first + n] attention to everything, mean over the last row's queries and the group.
        own: by number of queries, [G, n] attention with each softmax over the n entries alone: one query, one row, two.
        valued: [G, n] attention to the n entries times the norm of their projected values, mean like `mass`.
        pointed: [G] of `pointed.pointed_attention`.
        first: entries before them.
        row: tokens of a row, or of a text's window.
    """

    mass: Tensor
    own: dict[int, Tensor]
    valued: Tensor
    pointed: Tensor
    first: int
    row: int

    @classmethod
    def at(cls, layer: RecordedRow, *, end: int, row: int, sizes: Tensor, behind: Behind) -> Seen:
        """Look at the queries before `end`.

        Args:
            layer: what was recorded.
            end: entries when the method decides.
            row: queries of a row or window.
            sizes: [G, R, T] norms of the projected values.
            behind: the queries that are asked one by one.
        """
        first, attention = layer.first, layer.attention(end - row, end)  # [G, R, Q, end]
        valued = (attention.mean(2)[..., first:] * sizes[..., first:end]).mean(1)
        own = {count: layer.own_mass(end - count, end) for count in (1, row, 2 * row)}
        return cls(attention.mean((1, 2)), own, valued, pointed_attention(layer, end, behind), first, row)

    @property
    def entries(self) -> Tensor:
        """[G, n] attention to the entries that can leave."""
        return self.mass[:, self.first :]

    @property
    def kept(self) -> Tensor:
        """[G, 1] attention to what always stays."""
        return self.mass[:, : self.first].sum(-1, keepdim=True)


def backward_tokens(attention: Tensor, tau: float, kept: Tensor | float = 0.0) -> Tensor:
    """Newest entries that hold a share `tau` (arXiv 2605.20600, head grouping).

    Args:
        attention: [G, n], newest last.
        tau: share of the attention and of `kept` together.
        kept: [G, 1] attention that is held without any entry.

    Returns:
        [G] float32, 0 where `kept` is enough.
    """
    held = attention.double().flip(-1).cumsum(-1) + kept
    wanted = tau * held[:, -1:]
    return ((held < wanted).sum(-1) + (torch.as_tensor(kept) < wanted).expand_as(wanted)[:, 0].long()).float()


def best_entries(attention: Tensor, tau: float, kept: Tensor | float = 0.0) -> Tensor:
    """The same with the best entries in place of the newest."""
    return backward_tokens(attention.sort(dim=-1).values, tau, kept)


def statistics(seen: Seen) -> dict[str, Tensor]:
    """Every statistic of a layer's heads, [G] float32 by name; larger says that a head needs more."""
    row, entries, kept, own = seen.row, seen.entries, seen.kept, seen.own[seen.row]
    found: dict[str, Tensor] = {}
    for name, queries in (("1 query", 1), ("1 row", row), ("2 rows", 2 * row)):
        for tau in TAUS:
            found[f"backward tokens, tau {tau:g}, {name}"] = backward_tokens(seen.own[queries], tau)
    if seen.first:
        for tau in TAUS:
            found[f"backward tokens, tau {tau:g}, 1 row, condition held"] = backward_tokens(entries, tau, kept)
    for tau in TAUS:
        found[f"best entries, tau {tau:g}, 1 row"] = best_entries(entries, tau, kept)
    best = entries.sort(dim=-1, descending=True).values
    found[f"attention outside the best 1/{_BEST} of the entries"] = best[:, entries.shape[-1] // _BEST :].sum(-1)
    found["entropy (as effective entries)"] = torch.special.entr(own).sum(-1).exp()
    if seen.first:
        found["attention outside the condition"] = 1 - kept[:, 0]
    else:
        found[f"attention outside the first {SINKS} entries"] = 1 - entries[:, :SINKS].sum(-1)
    ages = torch.arange(own.shape[-1] - 1, -1, -1, device=own.device, dtype=own.dtype)
    found["mean distance"] = (own * ages).sum(-1)
    found["attention beyond the last row"] = own[:, :-row].sum(-1)
    found[POINTED] = seen.pointed
    found["attention times size of the projected value"] = seen.valued.sum(-1)
    return {name: values.float() for name, values in found.items()}


def early_need(found: dict[str, Tensor], tau: float = 0.95) -> Tensor:
    """Of `statistics`: the best entries that hold a share of the attention when a method decides."""
    return found[f"best entries, tau {tau:g}, 1 row"]
