# SPDX-License-Identifier: Apache-2.0
"""HeadKVCache: a transformers cache that keeps, head by head, what its budget allows."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import copy, deepcopy
from typing import Any, Literal

from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.configuration_utils import PreTrainedConfig

from .attention import implementation_over
from .budgets import Budget
from .compression import Compression
from .image_grid import ImageGrid
from .known import Known, with_known
from .layer import HeadKVLayer
from .layer_hooks import propagation_on
from .memory import CacheReport
from .model_pool import ModelPool
from .plan import LayerPlace
from .propagation import Propagation
from .tensor_parallel import HeadShard


class HeadKVCache(Cache):
    """A compressed cache for `model.generate(past_key_values=...)` or a loop of one's own. One batch, one cache.

    Full-attention layers are compressed; sliding, linear and other layers stay as transformers makes them. All state is
    in the cache. The model's attention implementation is set to "headkv" (over the one it had), which computes exactly
    what it did before for every other cache.

    Args:
        model_or_config: the model, or its configuration.
        compression: a method name, a dict, a `Compression`, or None for the stock behaviour.
        budget: replaces the compression's budget.
        image_grid: where the image lies; by default what the configuration states. Without one it is a text's cache.
        kind: "text" for a model that also draws (Janus) when it is to write text; None: an image if there is a grid.
        known: what the method's pieces know of the model already, as a saved cache holds it; see `headkv_mm.known`.
        options: options of the method.

    Raises:
        ValueError: for an unknown method, option or budget; a budget too small for the image; a model whose attention
            cannot be compressed; or a method that does not serve images, or texts.
    """

    def __init__(
        self,
        model_or_config: Any,
        compression: Any = "headkv",
        *,
        budget: Budget | None = None,
        image_grid: ImageGrid | None = None,
        kind: Literal["image", "text"] | None = None,
        known: Known | None = None,
        **options: Any,
    ) -> None:
        config = model_or_config if isinstance(model_or_config, PreTrainedConfig) else model_or_config.config
        text_config = config.get_text_config(decoder=True)
        self.compression = Compression.parse(compression, budget=budget, **options)
        self.image_grid = _grid(kind, image_grid, config)
        self.extra: dict[str, Any] = {}
        """Whatever the owner wants to keep with the cache, as JSON types; see `save`."""
        check_supported(text_config)
        try:
            pieces = self.compression.pieces("text" if self.image_grid is None else "image")
        except ValueError as error:
            if self.image_grid is None and "image" in self.compression.resolve().kinds:
                raise ValueError(
                    f"{error}. {type(config).__name__} states no image grid; for an image pass "
                    "image_grid=ImageGrid(height, width)"
                ) from None
            raise
        if pieces is not None:
            pieces = (with_known(pieces, known) if known else pieces).for_model(model_or_config)
        shard = HeadShard.of(model_or_config)
        layers = DynamicCache(config=text_config).layers
        compressed = [type(layer) is DynamicLayer for layer in layers]
        if not any(compressed):
            raise ValueError(
                f"{type(text_config).__name__} has no full-attention layer, so there is nothing to compress; "
                "use the stock cache"
            )
        if text_config._attn_implementation is not None:
            text_config._attn_implementation = implementation_over(text_config._attn_implementation)
        super().__init__(
            layers=[
                HeadKVLayer(
                    pieces,
                    self.compression.budget,
                    self.image_grid,
                    LayerPlace(sum(compressed[:index]), sum(compressed), shard),
                )
                if compressed[index]
                else layer
                for index, layer in enumerate(layers)
            ]
        )
        self.propagation = propagation_on(model_or_config, pieces, layers, image=self.image_grid is not None)
        """Which tokens of a forward go on after one of its layers; None where all do, as with most methods."""
        self._share()

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Inside, every forward is a chunk of one prompt: all of it is held, and compressed once on exit.

            with cache.reading():
                for chunk in ids.split(1024, dim=1):
                    model(chunk, past_key_values=cache)

        Without it every chunk is compressed before the next one comes, which needs less memory and knows less. If an
        error leaves the block, the cache is reset.

        Raises:
            ValueError: if the cache holds tokens already.
        """
        for layer in self.compressed_layers:
            layer.begin_reading()
        try:
            yield
        except BaseException:
            self.reset()
            raise
        for layer in self.compressed_layers:
            layer.end_reading()

    def copy(self, *, evict: bool = True) -> HeadKVCache:
        """An independent cache with the same content.

        Args:
            evict: False: nothing ever leaves the copy; it grows by what is appended. So a question can be asked on a
                document without changing what is kept of it.
        """
        twin = copy(self)
        twin.extra = dict(self.extra)
        twin.layers = [
            layer.copy(evicts=evict) if isinstance(layer, HeadKVLayer) else deepcopy(layer) for layer in self.layers
        ]
        if self.propagation is not None:
            twin.propagation = Propagation(self.propagation.schedule, self.propagation.hooks)
        twin._share()
        return twin

    def _share(self) -> None:
        """Let the layers meet."""
        pool = ModelPool()
        for layer in self.compressed_layers:
            layer.share_pool(pool)
            layer.follow(self.propagation)

    def detach(self) -> None:
        """Take this cache's hooks off the model, if its method has any; it can then decode, but read no more prompts.

        Hooks go by themselves with the last cache that needs them.
        """
        if self.propagation is not None:
            self.propagation.hooks = None

    def save(self, path: str | os.PathLike[str], model: Any, *, extra: Mapping[str, Any] | None = None) -> None:
        """Write the cache to one safetensors file, atomically; see `headkv_mm.saved_cache`.

        Args:
            path: file to write.
            model: the model that filled it; the file is refused for another one.
            extra: JSON data to keep beside it, in place of `self.extra`.
        """
        from .saved_cache import save_cache

        save_cache(self, path, model, extra=self.extra if extra is None else extra)

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: Any) -> HeadKVCache:
        """Read a saved cache onto the model's device.

        Raises:
            ValueError: if the file is damaged, edited, of another format, or was filled by another model.
        """
        from .saved_cache import load_cache

        return load_cache(path, model)

    @property
    def compressed_layers(self) -> list[HeadKVLayer]:
        """The layers that are ours, in order."""
        return [layer for layer in self.layers if isinstance(layer, HeadKVLayer)]

    @property
    def nbytes(self) -> int:
        """Bytes of everything held: keys, values, and all bookkeeping; stock layers included."""
        return sum(layer.nbytes if isinstance(layer, HeadKVLayer) else _stock_nbytes(layer) for layer in self.layers)

    @property
    def nbytes_full(self) -> int:
        """Bytes that a stock cache would hold now."""
        return sum(
            layer.nbytes_full if isinstance(layer, HeadKVLayer) else _stock_nbytes(layer) for layer in self.layers
        )

    @property
    def nbytes_peak(self) -> int:
        """The sum over layers of the most bytes that each ever held, and one layer's dense prompt while it chose.

        Where layers wait for one another before they divide one budget, what all of them held together meanwhile, with
        what was being copied, if that was more.
        """
        ours = self.compressed_layers
        stock = sum(_stock_nbytes(layer) for layer in self.layers if not isinstance(layer, HeadKVLayer))
        held = sum(layer.nbytes_peak for layer in ours) + max((layer.nbytes_dense for layer in ours), default=0)
        return max(stock + max([held, *(layer.pool.nbytes_peak for layer in ours)]), self.nbytes)

    def kept_positions(self, layer: int) -> list[list[Tensor]]:
        """Positions that a layer keeps, counted from the first real token of each row.

        Args:
            layer: index in the model.

        Returns:
            A list over rows of lists over KV heads of sorted int64 tensors on the CPU.

        Raises:
            IndexError: if there is no such layer.
            ValueError: if the layer is not compressed (a sliding layer, say).
        """
        chosen = self.layers[layer]
        if not isinstance(chosen, HeadKVLayer):
            raise ValueError(f"layer {layer} is a stock {type(chosen).__name__}; it has no positions of its own")
        return chosen.kept_positions()

    def report(self) -> CacheReport:
        """What is held now, by layer, row and head."""
        return CacheReport.of(self)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        for layer in self.layers:
            layer.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices` [B'] int64, or a [B] bool mask of them."""
        for layer in self.layers:
            layer.batch_select_indices(indices)


def _grid(kind: str | None, given: ImageGrid | None, config: Any) -> ImageGrid | None:
    """Where the image lies; None for a text."""
    if kind not in ("image", "text", None):
        raise ValueError(f"kind must be 'image', 'text' or None, got {kind!r}")
    if kind == "text":
        if given is not None:
            raise ValueError("kind='text' and an image_grid exclude each other; give one of them")
        return None
    grid = given or ImageGrid.from_config(config)
    if kind == "image" and grid is None:
        raise ValueError(f"{type(config).__name__} states no image grid; pass image_grid=ImageGrid(height, width)")
    return grid


def check_supported(text_config: PreTrainedConfig) -> None:
    """Refuse architectures whose caches cannot be compressed head by head.

    Raises:
        ValueError: with the reason.
    """
    if getattr(text_config, "kv_lora_rank", None):
        raise ValueError(
            f"{type(text_config).__name__} uses multi-head latent attention: its cache holds one latent for all heads, "
            "so there is nothing to compress head by head; use the stock cache"
        )
    if getattr(text_config, "num_kv_shared_layers", 0):
        raise ValueError(
            f"{type(text_config).__name__} shares keys and values between layers, so what one layer evicts would be "
            "missing in another; use the stock cache"
        )


def _stock_nbytes(layer: Any) -> int:
    tensors = (getattr(layer, name, None) for name in ("keys", "values"))
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))
