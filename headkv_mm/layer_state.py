# SPDX-License-Identifier: Apache-2.0
"""LayerState: the content of a text's layer as named tensors and numbers, to save it and to make it again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .compressor import LayerCompressor
from .decided import Decided
from .layer_plan import text_layer_plan
from .model_pool import ModelPool
from .ragged import RaggedKV
from .registry import Pieces
from .text_compressor import TextCompressor
from .text_plan import TextPlan

if TYPE_CHECKING:
    from .layer import HeadKVLayer

_STORED = ("keys", "values", "positions", "start", "length", "capacity")
_BESIDE = ("mass", "credit")
_ON_HOST = ("row_slots", "max_length", "ordered")
_NUMBERS = ("row_seen", "row_entries", "decoded", "evicts", "appended", "made_for", "tight")


@dataclass(frozen=True)
class LayerState:
    """Everything that one layer holds.

    Attributes:
        tensors: by name.
        numbers: JSON types.
    """

    tensors: dict[str, Tensor]
    numbers: dict[str, Any]


def layer_state(layer: HeadKVLayer) -> LayerState:
    """The content of a text's layer."""
    compressor = layer.compressor
    held = _compressor_state(compressor) if isinstance(compressor, TextCompressor) else LayerState({}, {})
    dense = {"dense.keys": layer.keys, "dense.values": layer.values, "padding": layer.padding}
    tensors = {name: tensor for name, tensor in dense.items() if tensor is not None}
    tensors |= {f"held.{name}": tensor for name, tensor in held.tensors.items()}
    budget = layer.plan.budget if isinstance(layer.plan, TextPlan) else None
    return LayerState(tensors, {"seen": layer.seen, "budget": budget, "compressor": held.numbers or None})


def restore_layer(layer: HeadKVLayer, state: LayerState) -> None:
    """Let an empty layer take over the content that `state` holds.

    Raises:
        ValueError: if something is missing in it.
    """
    tensors, numbers = state.tensors, state.numbers
    try:
        layer.seen, layer.padding = numbers["seen"], tensors.get("padding")
        layer.keys, layer.values = tensors.get("dense.keys"), tensors.get("dense.values")
        held = {name.removeprefix("held."): t for name, t in tensors.items() if name.startswith("held.")}
        some = tensors["dense.keys"] if "dense.keys" in tensors else held["keys"]
        layer.lazy_initialization(some, some)
        if layer.pieces is not None and numbers["budget"] is not None:
            layer.set_plan(text_layer_plan(layer.pieces, numbers["budget"], layer.place))
        if numbers["compressor"] is not None and layer.pieces is not None and isinstance(layer.plan, TextPlan):
            content = LayerState(held, numbers["compressor"])
            layer.compressor = _restored(layer.pieces, layer.plan, content, layer.pool)
            layer.follow(layer.propagation)
    except (KeyError, TypeError) as error:
        raise ValueError(f"the saved cache lacks a part of a layer ({error}); read the document again") from error


def _compressor_state(layer: TextCompressor) -> LayerState:
    """Everything that is held, but for single queries that a method may have kept since the last decision."""
    store = layer.store
    tensors = {name: getattr(store, name) for name in _STORED}
    tensors["seen"] = layer.seen
    tensors |= {name: tensor for name in _BESIDE if (tensor := getattr(store, name)) is not None}
    numbers: dict[str, Any] = {name: getattr(layer, name) for name in _NUMBERS}
    numbers |= {name: getattr(store, name) for name in _ON_HOST}
    numbers["decided"] = [None if row is None else row.numbers for row in layer.decided]
    query_sum = layer.observer.query_sum
    if query_sum is not None:
        tensors["observed"], numbers["observed_queries"] = query_sum, layer.observer.counts
    for index, row in enumerate(layer.decided):
        if row is not None:
            tensors |= {f"decided.{index}.{name}": tensor for name, tensor in row.tensors.items()}
    return LayerState(tensors, numbers)


def _restored(pieces: Pieces, plan: TextPlan, state: LayerState, pool: ModelPool) -> TextCompressor:
    """A compressor with the content that `state` holds.

    Raises:
        KeyError: if something is missing in it.
    """
    tensors, numbers = state.tensors, state.numbers
    new = object.__new__(TextCompressor)
    LayerCompressor.__init__(new, pieces, plan, tensors["start"].shape[1], pool)
    new.fresh, new.noted, new.propagation = [], None, None
    for name in _NUMBERS:
        setattr(new, name, numbers[name])
    new.seen = tensors["seen"]
    new.store = RaggedKV(
        **{name: tensors[name] for name in _STORED},
        row_slots=numbers["row_slots"],
        max_length=numbers["max_length"],
        ordered=numbers["ordered"],
        **{name: tensors[name] for name in _BESIDE if name in tensors},
    )
    if "observed" in tensors:
        new.observer.take_up(tensors["observed"], numbers["observed_queries"])
    new.decided = [row and _decided(tensors, index, row) for index, row in enumerate(numbers["decided"])]
    new.take_up()
    return new


def _decided(tensors: Mapping[str, Tensor], row: int, numbers: Mapping[str, Any]) -> Decided:
    prefix = f"decided.{row}."
    own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    return Decided.restored(own, numbers)
