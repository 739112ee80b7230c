# SPDX-License-Identifier: Apache-2.0
"""Output projections of a model's attention layers: how long a value is once its head has written it to the output."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .ragged import RaggedKV
from .scorers.regions import blocks, entries, region_slots

_NAMES = ("o_proj", "out_proj", "c_proj", "dense")
_BLOCK = 1024


class OutputProjections:
    """The projections of the compressed layers. A layer's Gram matrices are made when they are first asked for.

    A projected value v W of a head has the squared norm `v (W W^T) v^T`: one [D, D] matrix per query head instead of
    vectors of the model's width.

    Args:
        model: a transformers model.

    Raises:
        ValueError: for a configuration alone, or a model whose projections cannot be read.
    """

    def __init__(self, model: Any) -> None:
        from transformers.cache_utils import DynamicCache, DynamicLayer

        if not isinstance(model, nn.Module):
            raise ValueError(
                "this method needs the output projections of the model, and a configuration has none: "
                "HeadKVCache(model, ...)"
            )
        config: Any = model.config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]
        found = dict(_projections(model, config))
        kinds = DynamicCache(config=config).layers
        wanted = [index for index, layer in enumerate(kinds) if type(layer) is DynamicLayer]
        if any(index not in found for index in wanted):
            raise ValueError(
                f"{type(model).__name__} has no output projection ({', '.join(_NAMES)}) in each of its attention "
                "layers that can be read; use another method, such as 'adakv'"
            )
        self._layers = [found[index] for index in wanted]
        self._grams: list[Tensor | None] = [None] * len(wanted)

    def grams(self, layer: int, head_dim: int) -> Tensor:
        """W W^T of every query head that this process has, [H, D, D] float32.

        Args:
            layer: counted among the compressed ones.
            head_dim: D.

        Raises:
            ValueError: if the weight is not there as plain numbers: offloaded or quantized.
        """
        gram = self._grams[layer]
        if gram is None:
            weight = _weight(self._layers[layer]).unflatten(0, (-1, head_dim))  # [H, D, hidden]
            gram = self._grams[layer] = torch.stack([head.float() @ head.float().T for head in weight])
        return gram

    def made(self, layer: int) -> Tensor | None:
        """The Gram matrices of a layer if they were made."""
        return self._grams[layer]

    def norms(self, store: RaggedKV, layer: int) -> Tensor:
        """Norms of the projected values of every slot, [N, R] float32, one for each query head of the group.

        Zero where there is no entry.
        """
        slots, filled = region_slots(store)  # [B, G, M]
        grams = self.grams(layer, store.values.shape[-1]).to(slots.device).unflatten(0, (store.kv_heads, -1))
        group, count = grams.shape[1], store.positions.shape[0]
        norms = torch.zeros(count + 1, group, device=slots.device)
        for block in blocks(slots.shape[-1], _BLOCK):
            own, held = slots[..., block], filled[..., block]
            values = entries(store.values, own, held, torch.float32)  # [B, G, m, D]
            squares = [((values @ grams[:, r]) * values).sum(-1) for r in range(group)]
            place = torch.where(held, own, count)  # the last row takes what is empty
            norms[place] = torch.stack(squares, dim=-1).clamp(min=0).sqrt()
        return norms[:-1]


def _projections(model: nn.Module, config: Any) -> Iterator[tuple[int, nn.Module]]:
    """Output projections with the index of their layer; those of image encoders have none, or another width."""
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    for module in model.modules():
        index = getattr(module, "layer_idx", None)
        if not isinstance(index, int):
            continue
        for name in _NAMES:
            projection: Any = getattr(module, name, None)
            if hasattr(projection, "weight"):
                if width in tuple(projection.weight.shape):
                    yield index, projection
                break


def _weight(projection: nn.Module) -> Tensor:
    """The weight as [H * D, hidden], of the heads that this process has."""
    sharded: Any = projection.weight
    weight: Tensor = sharded.to_local() if hasattr(sharded, "to_local") else sharded.data
    if weight.device.type == "meta" or not weight.is_floating_point() or weight.dim() != 2:
        raise ValueError(
            "the model's output projections are offloaded or quantized, so the norms of projected values are not "
            "known; use another method, such as 'adakv'"
        )
    # torch's Linear has [out, in]; GPT-2's Conv1D has it the other way round.
    return weight.T if isinstance(projection, nn.Linear) else weight
