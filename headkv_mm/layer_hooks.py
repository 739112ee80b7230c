# SPDX-License-Identifier: Apache-2.0
"""Hooks on a model's decoder layers that let chosen tokens go on, as the cache of the forward says.

The hooks hold no state: they look up the cache that a layer is called with, and do nothing for any other cache. They
stay as long as somebody holds the `LayerHooks` object, so they go with the last cache that needs them.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

from .propagation import Propagation, Selection
from .registry import Pieces
from .schedules import TokenSelective

_CACHE = "past_key_values"
_NEEDED = ("hidden_states", "attention_mask", "position_embeddings", _CACHE)
_FOLLOWED = {"hidden_states", "attention_mask", "position_embeddings", "position_ids", "cache_position"}
_INSTALLED: weakref.WeakKeyDictionary[nn.Module, weakref.ref[LayerHooks]] = weakref.WeakKeyDictionary()


class LayerHooks:
    """The hooks on the layers of one model; use `hooks_on`.

    Args:
        layers: the decoder layers in order.
    """

    def __init__(self, layers: nn.ModuleList) -> None:
        handles = [
            layer.register_forward_pre_hook(partial(_before, index), with_kwargs=True)
            for index, layer in enumerate(layers)
        ]
        handles.append(layers[-1].register_forward_hook(_after_last, with_kwargs=True))
        weakref.finalize(self, _remove, handles)

    def __deepcopy__(self, memo: dict[int, Any]) -> LayerHooks:
        """Itself: a copied cache is for the same model."""
        return self


def propagation_on(
    model_or_config: Any, pieces: Pieces | None, layers: Sequence[Any], *, image: bool
) -> Propagation | None:
    """What lets only some tokens go on to later layers, hooked up to the model; None for methods that do not.

    Args:
        model_or_config: the model.
        pieces: the method's, for the model.
        layers: as the stock cache has them.
        image: is it an image that is written?

    Raises:
        ValueError: if the model cannot be followed.
    """
    if pieces is None or not isinstance(pieces.schedule, TokenSelective):
        return None
    others = sorted({type(layer).__name__ for layer in layers if type(layer) is not DynamicLayer})
    if image:
        raise ValueError(
            "this method chooses among the tokens of a prompt, and an image is written token by token; use it for texts"
        )
    if others:
        raise ValueError(
            f"the model has layers of other kinds ({', '.join(others)}), whose caches need every token, so none can be "
            "left behind; use another method, such as 'snapkv'"
        )
    return Propagation(pieces.schedule, hooks_on(model_or_config))


def hooks_on(model: Any) -> LayerHooks:
    """The hooks on a model's decoder layers; they stay while the result is held.

    Args:
        model: a transformers model.

    Raises:
        ValueError: for a configuration alone, or a model whose layers cannot be followed, with the reason.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(
            "this method changes which tokens the model's layers see, so it needs the model and not only its "
            "configuration: HeadKVCache(model, ...)"
        )
    layers = decoder_layers(model)
    known = _INSTALLED.get(layers)
    hooks = None if known is None else known()
    if hooks is None:
        hooks = LayerHooks(layers)
        _INSTALLED[layers] = weakref.ref(hooks)
    return hooks


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers of a model's text part.

    Raises:
        ValueError: if there are none that can be followed.
    """
    found = next(_layer_lists(model), None)
    if found is None:
        raise ValueError(
            f"{type(model).__name__} has no list of decoder layers that take {', '.join(_NEEDED)}, so its tokens "
            "cannot be followed from layer to layer; use another method, such as 'snapkv'"
        )
    return found


def _layer_lists(model: nn.Module) -> Iterator[nn.ModuleList]:
    config: Any = model.config
    count = config.get_text_config(decoder=True).num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            taken = inspect.signature(module[0].forward).parameters
            if all(name in taken for name in _NEEDED):
                yield module


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()


def _propagation(kwargs: dict[str, Any]) -> Propagation | None:
    return getattr(kwargs.get(_CACHE), "propagation", None)


def _before(index: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Before a layer: what the forward's cache says goes on."""
    propagation = _propagation(kwargs)
    if propagation is None:
        return None
    if layer.training and torch.is_grad_enabled():
        raise RuntimeError("a compressed cache is for inference; call model.eval() and run it under torch.no_grad()")
    if index == propagation.layer:
        propagation.begin()
    selection = propagation.incoming(index)
    if selection is None:
        return None
    unknown = [name for name, value in kwargs.items() if isinstance(value, Tensor) and name not in _FOLLOWED]
    if unknown or len(args) > 1:
        raise ValueError(
            f"{type(layer).__name__} takes {', '.join(unknown) or 'more than its hidden states by position'}, which "
            "cannot be cut down to chosen tokens; use another method, such as 'snapkv'"
        )
    changed = dict(kwargs)
    if index == propagation.layer + 1:  # later ones get what this one gives
        if args:
            args = (selection.take(args[0]),)
        else:
            changed["hidden_states"] = selection.take(kwargs["hidden_states"])
    if propagation.mask is None:  # that of all layers to come
        propagation.mask = kwargs[_CACHE].layers[index].mask_for(selection, kwargs.get("attention_mask"))
    changed["attention_mask"] = propagation.mask
    changed["position_embeddings"] = tuple(_rotations(selection, part) for part in kwargs["position_embeddings"])
    if isinstance(kwargs.get("position_ids"), Tensor):
        changed["position_ids"] = _position_ids(selection, kwargs["position_ids"], kwargs.get("attention_mask"))
    if isinstance(kwargs.get("cache_position"), Tensor):
        changed["cache_position"] = kwargs["cache_position"][-selection.width :]
    return args, changed


def _after_last(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """After the last layer: every token is at its place again, so the last one's logits are where they always are."""
    propagation = _propagation(kwargs)
    if propagation is None or propagation.selection is None:
        return None
    selection = propagation.selection
    propagation.finish()
    if isinstance(output, tuple):
        return selection.put_back(output[0]), *output[1:]
    return selection.put_back(output)


def _rotations(selection: Selection, part: Tensor) -> Tensor:
    """Cosines or sines of the tokens that go on, [B, S, D].

    Raises:
        ValueError: for a shape other than [B, T, D], such as that of several axes of an image.
    """
    if part.dim() != 3:
        raise ValueError(
            f"position embeddings of shape {tuple(part.shape)} cannot be cut down to chosen tokens; use another "
            "method, such as 'snapkv'"
        )
    return selection.take(part)


def _position_ids(selection: Selection, position_ids: Tensor, mask: Tensor | None) -> Tensor | None:
    """[B, S]; none where flash attention may run, which takes gaps for borders between packed texts."""
    if mask is None or mask.dim() == 2 or position_ids.dim() != 2:
        return None
    return selection.take(position_ids[..., None])[..., 0]
