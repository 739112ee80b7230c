# SPDX-License-Identifier: Apache-2.0
"""Text caches on disk: one safetensors file, whose header says what it is and whose model filled it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .devices import input_device, layer_devices
from .fingerprint import fingerprint, stated_config

if TYPE_CHECKING:
    from .cache import HeadKVCache

FORMAT = "headkv-mm cache"
VERSION = 2
_HEADER = "headkv_mm"
_SUMMED = 1 << 24
"""Bytes per piece of the checksum."""


def save_cache(
    cache: HeadKVCache, path: str | os.PathLike[str], model: Any, *, extra: Mapping[str, Any] | None = None
) -> None:
    """Write a cache; the file appears whole or not at all.

    Args:
        cache: a text's cache that holds something.
        path: file to write.
        model: the model that filled it.
        extra: JSON data to keep in the header.

    Raises:
        ValueError: for an empty cache, an image's, one with stock layers of other kinds, one of a model that is divided
            among processes, or `extra` that is no JSON.
    """
    from safetensors.torch import save_file

    layers = cache.compressed_layers
    if cache.image_grid is not None:
        raise ValueError("only the cache of a text can be saved; an image is finished when its cache is")
    if len(layers) != len(cache.layers):
        raise ValueError("this model has sliding or linear layers, whose stock caches cannot be saved here")
    if any(layer.place.shard.size > 1 for layer in layers):
        raise ValueError("a cache whose heads are divided among processes cannot be saved; fill it in one process")
    if not cache.get_seq_length():
        raise ValueError("the cache is empty; let the model read something into it first")
    from .layer_state import layer_state

    states = [layer_state(layer) for layer in layers]
    # Options in the header are JSON; pieces swapped for objects of one's own are not.
    compression = {**cache.compression.to_dict()}
    tensors = {f"{index}.{name}": value for index, state in enumerate(states) for name, value in state.tensors.items()}
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    try:
        header = json.dumps(
            {
                "format": FORMAT,
                "version": VERSION,
                "model": fingerprint(model),
                "config": stated_config(model),
                "compression": compression,
                "known": _known(cache),
                "layers": [state.numbers for state in states],
                "checksum": _checksum(tensors),
                "extra": dict(extra or {}),
            }
        )
    except TypeError as error:
        raise ValueError(f"the cache's options and extra must be JSON types to be saved: {error}") from error
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        save_file(tensors, temporary, metadata={_HEADER: header})
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def load_cache(path: str | os.PathLike[str], model: Any) -> HeadKVCache:
    """Read a cache that `save_cache` wrote, onto the model's device.

    Raises:
        ValueError: if the file is damaged, edited, of another format or version, or was filled by another model.
        FileNotFoundError: if there is none.
    """
    from safetensors import SafetensorError, safe_open

    from .cache import HeadKVCache
    from .layer_state import LayerState, restore_layer

    if not Path(path).is_file():
        raise FileNotFoundError(f"{os.fspath(path)}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(_HEADER)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{os.fspath(path)} is damaged or no saved cache: {str(error).splitlines()[0]}") from error
    header = _read_header(path, text)
    if header["model"] != fingerprint(model):
        raise ValueError(
            f"{os.fspath(path)} was filled by another model (or other weights of it); read the document again with "
            "this one"
        )
    config = stated_config(model)
    if differing := [name for name in config if header["config"].get(name) != config[name]]:
        raise ValueError(
            f"{os.fspath(path)} was filled by this model with another configuration ({', '.join(differing)}); read the "
            "document again with this one"
        )
    if header["checksum"] != _checksum(tensors):
        raise ValueError(f"{os.fspath(path)} was edited or cut after it was saved; read the document again")
    cache = HeadKVCache(model, dict(header["compression"]), kind="text", known=header["known"])
    devices, default = layer_devices(model), input_device(model)
    for index, (layer, numbers) in enumerate(zip(cache.compressed_layers, header["layers"], strict=True)):
        prefix = f"{index}."
        device = devices.get(index, default)
        own = {
            name.removeprefix(prefix): value.to(device) for name, value in tensors.items() if name.startswith(prefix)
        }
        restore_layer(layer, LayerState(own, numbers))
    cache.extra = header["extra"]
    return cache


def _known(cache: HeadKVCache) -> dict[str, dict[str, Any]]:
    """What the pieces of the cache's method know of the model: a table that said so may be gone when it is loaded."""
    from .known import known_of

    bound, stated = cache.compressed_layers[0].pieces, cache.compression.pieces("text")
    return {} if bound is None or stated is None else known_of(bound, stated)


def _read_header(path: str | os.PathLike[str], text: str | None) -> dict[str, Any]:
    try:
        header: Any = json.loads(text or "")
    except json.JSONDecodeError:
        header = None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise ValueError(f"{os.fspath(path)} is no saved cache of headkv-mm")
    if header.get("version") != VERSION:
        raise ValueError(
            f"{os.fspath(path)} has version {header.get('version')!r} of the format, and this package reads {VERSION}; "
            "read the document again"
        )
    missing = {"model", "config", "compression", "known", "layers", "checksum", "extra"} - set(header)
    if missing:
        raise ValueError(f"{os.fspath(path)} lacks {', '.join(sorted(missing))} in its header; it was edited")
    return header


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        raw = tensor.flatten().view(torch.uint8) if tensor.numel() else tensor.new_empty(0, dtype=torch.uint8)
        for part in raw.split(_SUMMED):
            digest.update(part.numpy().tobytes())
    return digest.hexdigest()
