# SPDX-License-Identifier: Apache-2.0
"""compress(): give a model's own generation a compressed cache, and take it back afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal
from weakref import WeakSet

from torch import nn
from transformers.generation import GenerationMode
from transformers.modeling_utils import PreTrainedModel

from .attention import implementation_over, is_ours
from .budgets import Budget
from .cache import HeadKVCache
from .compression import Compression
from .image_grid import ImageGrid
from .memory import CacheReport

_MISSING = object()
Kind = Literal["image", "text"]


class Session:
    """What `compress` yields: the caches of the latest generation.

    Attributes:
        compression: what is done.
        caches: the caches that the latest `generate` used; two where guidance runs a branch of its own.
    """

    def __init__(
        self, model: PreTrainedModel, compression: Compression, image_grid: ImageGrid | None, kind: Kind | None
    ) -> None:
        self.compression = compression
        self.caches: list[HeadKVCache] = []
        self._made: WeakSet[HeadKVCache] = WeakSet()
        self._model, self._image_grid, self._kind = model, image_grid, kind

    def new_cache(self, *, first: bool, words: bool = False) -> HeadKVCache:
        """Make a cache.

        Args:
            first: begins a new generation and lets go of the caches before.
            words: transformers' own `generate` asks, which writes text unless a grid was given: models whose
                configuration states one draw in a loop of their own.
        """
        kind: Kind | None = "text" if words and self._image_grid is None and self._kind is None else self._kind
        cache = HeadKVCache(self._model, self.compression, image_grid=self._image_grid, kind=kind)
        # A loop that never hands its cache on must not pile them up: two are the most that guidance needs.
        self.caches = [cache] if first else [*self.caches[-1:], cache]
        self._made.add(cache)
        return cache

    def detach(self) -> None:
        """Take the hooks of all caches off the model."""
        for cache in self._made:
            cache.detach()

    def report(self) -> CacheReport:
        """The report of the latest generation's (first) cache.

        Raises:
            RuntimeError: if nothing was generated yet.
        """
        if not self.caches:
            raise RuntimeError("nothing was generated inside `compress` yet, so there is no cache to report on")
        return self.caches[0].report()


@contextmanager
def compress(
    model: nn.Module,
    compression: Any = "headkv",
    *,
    budget: Budget | None = None,
    image_grid: ImageGrid | None = None,
    kind: Kind | None = None,
    **options: Any,
) -> Iterator[Session]:
    """While the context lasts, every cache that the model makes for itself is compressed.

        with headkv_mm.compress(model, "headkv", budget=1/6) as session:
            model.generate(**inputs)
        print(session.report())

    The hook-up is on this instance only and is undone on exit, also after an exception. It changes the instance, so it
    is not for several threads at once: those pass `past_key_values=HeadKVCache(...)` instead.

    Args:
        model: a transformers model (wrappers of accelerate and torch.compile are seen through).
        compression: a method name, a dict, a `Compression`, or None to leave everything as it is.
        budget: replaces the compression's budget.
        image_grid: where the image lies; by default what the configuration states.
        kind: "text" if a model that also draws (Janus) is to write text only. By default what its `generate` writes
            decides, and the method must serve images.
        options: options of the method.

    Raises:
        TypeError: if the model is not a transformers model.
        ValueError: for bad settings, or a model that cannot be compressed, with the reason.
    """
    target = _unwrap(model)
    session = Session(target, Compression.parse(compression, budget=budget, **options), image_grid, kind)
    with ExitStack() as stack:
        stack.callback(session.detach)
        text_config = target.config.get_text_config(decoder=True)
        stack.callback(_set_implementation, target, text_config, text_config._attn_implementation)
        _set_implementation(target, text_config, implementation_over(text_config._attn_implementation))
        session.new_cache(first=True)  # refuses what cannot work before anything runs
        session.caches.clear()

        original = target._prepare_cache_for_generation

        def prepare(generation_config: Any, model_kwargs: dict[str, Any], generation_mode: Any, *rest: Any) -> Any:
            _refuse_assistance(generation_mode)
            if model_kwargs.get("past_key_values") is not None or generation_config.use_cache is False:
                return original(generation_config, model_kwargs, generation_mode, *rest)
            if generation_config.cache_implementation in ("offloaded", "offloaded_static", "quantized"):
                raise ValueError(
                    f"cache_implementation={generation_config.cache_implementation!r} and kv_compression exclude each "
                    "other; give one of them"
                )
            model_kwargs["past_key_values"] = session.new_cache(first=True, words=True)
            return None

        def prepare_static(*args: Any, **kwargs: Any) -> HeadKVCache:
            return session.new_cache(first=True)

        def fill(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            """Give a cache to forwards that bring none: guidance branches and loops outside `generate`."""
            use_cache = kwargs.get("use_cache")
            if use_cache is None:
                use_cache = getattr(text_config, "use_cache", True)
            if module.training or not use_cache or kwargs.get("past_key_values") is not None:
                return None
            return args, {**kwargs, "past_key_values": session.new_cache(first=False)}

        _override(stack, target, "_prepare_cache_for_generation", prepare)
        if hasattr(target, "_prepare_static_cache"):
            _override(stack, target, "_prepare_static_cache", prepare_static)
        hook = _backbone(target).register_forward_pre_hook(fill, with_kwargs=True)
        stack.callback(hook.remove)
        yield session


def _unwrap(model: nn.Module) -> PreTrainedModel:
    from accelerate.utils import extract_model_from_parallel

    target = extract_model_from_parallel(model, keep_fp32_wrapper=True)
    if not isinstance(target, PreTrainedModel):
        raise TypeError(f"compress() takes a transformers model, got {type(target).__name__}")
    return target


def _set_implementation(model: PreTrainedModel, text_config: Any, name: str) -> None:
    """Set the attention implementation of the text backbone only; vision and image decoders keep theirs."""
    if text_config._attn_implementation == name:
        return
    keys = [key for key in model.config.sub_configs or {} if getattr(model.config, key, None) is text_config]
    model.set_attn_implementation({keys[0]: name} if keys else name)
    if is_ours(name) and text_config._attn_implementation != name:
        raise ValueError(
            f"{type(model).__name__} does not go through transformers' attention interface, so its cache cannot be "
            "compressed; use the stock cache"
        )


def _backbone(model: PreTrainedModel) -> nn.Module:
    """The decoder stack: the innermost model that has the text configuration."""
    text_config = model.config.get_text_config(decoder=True)
    having: list[nn.Module] = [
        module for module in model.modules() if isinstance(module, PreTrainedModel) and module.config is text_config
    ]
    return having[-1]


def _override(stack: ExitStack, model: nn.Module, name: str, function: Any) -> None:
    """Set an attribute of the instance; the stack puts back what was there."""
    before = model.__dict__.get(name, _MISSING)

    def restore() -> None:
        if before is _MISSING:
            model.__dict__.pop(name, None)
        else:
            model.__dict__[name] = before

    stack.callback(restore)
    model.__dict__[name] = function


def _refuse_assistance(generation_mode: Any) -> None:
    if generation_mode == GenerationMode.ASSISTED_GENERATION:
        raise ValueError(
            "assisted decoding takes tokens back, and a compressed cache cannot restore what it evicted; "
            "generate without an assistant, or without kv_compression"
        )
