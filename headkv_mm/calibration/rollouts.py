# SPDX-License-Identifier: Apache-2.0
"""Roll-outs: one text, read once, compressed in many ways; how well does the model go on each time?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from headkv_mm.allocators import RiskGate
from headkv_mm.allocators.risk_gate import attention_entropy
from headkv_mm.cache import HeadKVCache
from headkv_mm.calibration.continued_texts import ContinuedText
from headkv_mm.pieces import Allocation, Observed
from headkv_mm.registry import Pieces, get_method
from headkv_mm.scorers import ValueWeighted

_CANNOT = "this model's attention does not go through transformers' attention interface, so it cannot be compressed"


@dataclass(frozen=True)
class Outcome:
    """What a roll-out came to.

    Attributes:
        loss: mean over the tokens that count, in nats.
        held: entries kept of the prompt, over all layers and heads.
    """

    loss: float
    held: int


@dataclass(frozen=True)
class _NotingGate(RiskGate):
    """A gate that also writes down every layer's entropy."""

    entropies: dict[int, float] = field(default_factory=dict)

    def allocate(self, observed: Observed, scores: Tensor) -> Allocation:
        self.entropies[observed.plan.place.index] = float(attention_entropy(observed, self.window))
        return super().allocate(observed, scores)


class ReadText:
    """A text that was read with a certain budget, before anything of it is given up.

    Args:
        model: a causal language model of transformers.
        text: the text.
        budget: share of what is read that is kept.
        window: see `RiskGate`.
    """

    def __init__(self, model: Any, text: ContinuedText, budget: float, window: int) -> None:
        self._model, self._text, self._window = model, text, window
        self._cache = HeadKVCache(model, "compilerkv", budget=budget, tables="identity", window=window)
        self.layers = len(self._cache.compressed_layers)
        for layer in self._cache.compressed_layers:
            layer.begin_reading()
        model(_row(model, text.read), past_key_values=self._cache, use_cache=True, logits_to_keep=1)

    def identity(self) -> tuple[Outcome, list[float]]:
        """With identity tables; and every layer's normalised entropy."""
        gate = _NotingGate(window=self._window, tables="identity")
        outcome = self._go_on(replace(_pieces(self._window), allocator=gate))
        return outcome, [gate.entropies[layer] for layer in range(self.layers)]

    def outcome(self, head_weights: Sequence[Sequence[float]], thresholds: Sequence[float]) -> Outcome:
        """With weights [L][G], and one threshold for every layer whatever its entropy."""
        gate = RiskGate(window=self._window, gate=tuple(((one, one),) for one in thresholds))
        return self.with_gate(head_weights, gate)

    def with_gate(self, head_weights: Sequence[Sequence[float]], gate: RiskGate) -> Outcome:
        """With weights [L][G] and a whole gate."""
        weights = tuple(map(tuple, head_weights))
        scorer = ValueWeighted(window=self._window, head_weights=weights)
        return self._go_on(replace(_pieces(self._window), scorer=scorer, allocator=gate))

    def _go_on(self, pieces: Pieces) -> Outcome:
        cache = self._cache.copy()
        for layer in cache.compressed_layers:
            layer.pieces = pieces
            layer.end_reading()
        stores = [layer.store for layer in cache.compressed_layers]
        if any(store is None for store in stores):
            raise ValueError(_CANNOT)
        held = sum(int(store.length.sum()) for store in stores if store is not None)
        ids = _row(self._model, self._text.following)
        logits = self._model(ids, past_key_values=cache, use_cache=True).logits
        return Outcome(_loss(logits[0], self._text), held)

    @property
    def kv_heads(self) -> int:
        """KV heads of a layer.

        Raises:
            ValueError: if the layers differ, or the attention cannot be compressed.
        """
        found = {layer.keys.shape[1] for layer in self._cache.compressed_layers if layer.keys is not None}
        if not found:
            raise ValueError(_CANNOT)
        if len(found) > 1:
            raise ValueError("the layers of this model differ in their number of KV heads; no tables describe that")
        return int(found.pop())


def full_run(model: Any, text: ContinuedText, window: int) -> tuple[float, float]:
    """The loss with the full cache, and the perplexity of the last `window` tokens of what is read."""
    ids = _row(model, (*text.read, *text.following))
    count = min(window, len(text.read) - 1)
    kept = len(text.following) + count + 1
    logits = model(ids, use_cache=False, logits_to_keep=kept).logits[0, -kept:]  # [kept, V]
    asked = cross_entropy(logits[:count].float(), ids[0, -kept + 1 : -len(text.following)])
    return _loss(logits[count + 1 :], text), float(asked.exp())


def _loss(logits: Tensor, text: ContinuedText) -> float:
    """Mean over what counts; logits [F, V] are those after each following token."""
    counted = torch.tensor(text.counted[1:], device=logits.device)
    targets = torch.tensor(text.following[1:], device=logits.device)
    return float(cross_entropy(logits[:-1][counted].float(), targets[counted]))


def _row(model: Any, ids: Sequence[int]) -> Tensor:
    return torch.tensor([list(ids)], device=model.device)


def _pieces(window: int) -> Pieces:
    method = get_method("compilerkv").with_options({"tables": "identity", "window": window}).text
    if method is None:
        raise RuntimeError("compilerkv serves texts")
    return method
