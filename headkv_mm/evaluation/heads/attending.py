# SPDX-License-Identifier: Apache-2.0
"""Attention of a few queries of one recorded row, as the kernels see it; never a whole map."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from headkv_mm.evaluation.text.recording import Call, Recording, RecordingLayer

MOST_QUERIES = 64
"""Read together; their attention to everything is held at once, for one layer."""


@dataclass(frozen=True)
class RecordedRow:
    """One row of a recorded call, without its padding.

    Attributes:
        query: [G, R, T, D] float32.
        keys, values: [G, T, D] float32.
        scale, softcap, sinks: of the call; sinks are [G, R] or None.
        first: entries before the first one that can ever leave.
    """

    query: Tensor
    keys: Tensor
    values: Tensor
    scale: float
    softcap: float
    sinks: Tensor | None
    first: int

    @classmethod
    def of(cls, call: Call, row: int, visible: Tensor, first: int) -> RecordedRow:
        """Row `row` of a call; `visible` is [T] bool, False for padding."""
        groups = call.keys.shape[1]
        query = call.query[row][:, visible].float().unflatten(0, (groups, -1))
        keys, values = (tensor[row][:, visible].float() for tensor in (call.keys, call.values))
        sinks = None if call.sinks is None else call.sinks.float().unflatten(0, (groups, -1))
        return cls(query, keys, values, call.scale, call.softcap, sinks, first)

    def logits(self, begin: int, end: int) -> Tensor:
        """Logits of queries `begin` to `end - 1` over entries 0 to `end - 1`, [G, R, Q, end]; -inf for later ones."""
        logits = self.query[:, :, begin:end] @ self.keys[:, None, :end].transpose(-1, -2) * self.scale
        if self.softcap:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        columns = torch.arange(end, device=logits.device)
        return logits.masked_fill(columns > columns[begin:, None], float("-inf"))

    def attention(self, begin: int, end: int) -> Tensor:
        """Attention of queries `begin` to `end - 1` to everything, [G, R, Q, end] float32."""
        logits = self.logits(begin, end)
        if self.sinks is None:
            return logits.softmax(-1)
        sinks = self.sinks[:, :, None, None].expand(*logits.shape[:-1], 1)
        return torch.cat([logits, sinks], -1).softmax(-1)[..., :-1]

    def mass(self, begin: int, end: int) -> Tensor:
        """Attention of queries `begin` to `end - 1` to everything, mean over queries and group, [G, end] float32."""
        total = self.keys.new_zeros(self.keys.shape[0], end)
        for start in range(begin, end, MOST_QUERIES):
            stop = min(start + MOST_QUERIES, end)
            total[:, :stop] += self.attention(start, stop).sum((1, 2))
        return total / ((end - begin) * self.query.shape[1])

    def own_mass(self, begin: int, end: int) -> Tensor:
        """The same, each softmax over the entries from `first` on alone, [G, end - first]."""
        total = self.keys.new_zeros(self.keys.shape[0], end - self.first)
        for start in range(begin, end, MOST_QUERIES):
            stop = min(start + MOST_QUERIES, end)
            # From the logits: a head that looks at the first entries alone leaves less than float32 holds for the rest.
            total[:, : stop - self.first] += self.logits(start, stop)[..., self.first :].softmax(-1).sum((1, 2))
        return total / ((end - begin) * self.query.shape[1])


def recorded_calls(recording: Recording) -> list[Call]:
    """What the full-attention layers were called with.

    Raises:
        ValueError: if the model's attention did not come by, or its layers differ in their heads.
    """
    layers = [layer for layer in recording.layers if isinstance(layer, RecordingLayer)]
    calls = [layer.call for layer in layers if layer.call is not None]
    if not calls or len(calls) < len(layers):
        raise ValueError(
            "this model's attention cannot be watched: it has no full-attention layer, or does not go through "
            "transformers' attention interface"
        )
    if len({(call.query.shape[1], call.keys.shape[1]) for call in calls}) > 1:
        raise ValueError("the layers of this model differ in their number of heads; their needs cannot be compared")
    return calls
