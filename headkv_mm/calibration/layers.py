# SPDX-License-Identifier: Apache-2.0
"""The calibration of `compresskv` (arXiv 2508.02401): how far each layer's output moves when it keeps few entries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from headkv_mm.allocators import Uniform
from headkv_mm.calibration.partial import load_partial, save_partial
from headkv_mm.calibration.texts import calibration_texts, check_positions, identity_of
from headkv_mm.calibration.watching import watched
from headkv_mm.evaluation.origin import versions
from headkv_mm.fingerprint import fingerprint
from headkv_mm.layer import LAYER_ATTRIBUTE, AttentionOutput
from headkv_mm.layer_tables import LayerTable
from headkv_mm.plan import LayerPlace
from headkv_mm.prompt import Prompt
from headkv_mm.registry import Pieces, get_method
from headkv_mm.text_compressor import TextCompressor
from headkv_mm.text_plan import SMALLEST, text_plan

FORMAT = "headkv-mm layer table in progress"


@dataclass(frozen=True)
class LayerCalibration:
    """How to measure.

    Attributes:
        texts: how many are read.
        length: tokens of a text, about.
        following: how many of them follow the eviction.
        entries: entries per KV head that each layer keeps.
        head_table: file of a head table of kind "srh"; None for the one that ships for the model.
        seed: chooses the texts.

    Raises:
        ValueError: for a number out of range.
    """

    texts: int = 16
    length: int = 1024
    following: int = 32
    entries: int = 32
    head_table: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("texts", 1), ("following", 1), ("entries", SMALLEST), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.length <= self.following + self.entries:
            raise ValueError(
                f"of a text of {self.length} tokens, {self.following} follow the eviction, and the others fit into "
                f"{self.entries} entries: use a length of at least {self.following + self.entries + 1}"
            )


class _MovedLayer(DynamicLayer):  # type: ignore[misc,unused-ignore]
    """A stock layer that also knows what it would have given with few entries.

    What it gives is the stock attention's, so every layer is looked at with the inputs it has in a full run.
    """

    def __init__(self, pieces: Pieces, place: LayerPlace, entries: int) -> None:
        super().__init__()
        self._pieces = pieces
        self._plan = text_plan(entries, place=place, sinks=getattr(pieces.selector, "sinks", 0))
        self._few: TextCompressor | None = None
        self.moved: float | None = None
        """|O - O_full| / |O_full| of the tokens after the eviction."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append, and lead the attention function here."""
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        keys = keys.view_as(keys)
        setattr(keys, LAYER_ATTRIBUTE, self)
        return keys, values

    def attend(
        self,
        query: Tensor,
        mask: Tensor | None,
        *,
        scale: float,
        stock: Callable[[], AttentionOutput],
        softcap: float = 0.0,
        sinks: Tensor | None = None,
    ) -> AttentionOutput:
        """The stock attention; of the first tokens few entries are kept aside, the next ones attend to them as well."""
        del mask
        given = stock()
        tokens = query.shape[2]
        if self._few is None:
            padding = torch.zeros(1, dtype=torch.int32, device=query.device)
            asked = Prompt(query, scale, softcap, sinks).asked(tokens, padding)
            self._few = TextCompressor(self._pieces, self._plan, self.keys, self.values, padding, [tokens], asked)
        else:
            visible = torch.ones(1, tokens, dtype=torch.bool, device=query.device)
            new = (self.keys[:, :, -tokens:], self.values[:, :, -tokens:])
            output = self._few.append(query, *new, visible, scale=scale, softcap=softcap, sinks=sinks).float()
            full = given[0].float()  # [1, T, H, D]
            self.moved = float((output - full).norm() / full.norm())
        return given


@torch.no_grad()
def calibrate_layers(
    model: Any,
    tokenizer: Any,
    calibration: LayerCalibration | None = None,
    *,
    text: str | None = None,
    partial: Path | None = None,
    on_text: Callable[[int], object] = lambda done: None,
) -> LayerTable:
    """Measure the layers of a model, with teacher forcing.

    A text is read but for its last tokens; then every layer keeps few entries aside, chosen as `compresskv` chooses
    them, and the last tokens follow. A layer's error is the distance of its heads' output over few entries from that
    over all of them.

    Args:
        model: a causal language model of transformers, on its device; it is the same afterwards.
        tokenizer: its tokenizer.
        calibration: the settings; the defaults if None.
        text: texts are cut from it, one after the other; None for generated ones, each with a question at its end.
        partial: file that keeps what is done, to go on from after a break; removed at the end. None for no file.
        on_text: called with the number of texts read, at the beginning and after each one.

    Raises:
        ValueError: if the text is too short, the texts do not fit the model, there is no head table for it, its
            attention cannot be watched, or `partial` is of other settings.
    """
    calibration = calibration or LayerCalibration()
    check_positions(model, calibration.length)
    pieces = _pieces(model, calibration)
    texts = calibration_texts(
        tokenizer,
        texts=calibration.texts,
        length=calibration.length,
        seed=calibration.seed,
        text=text,
        label="layers",
    )
    settings = {**asdict(calibration), "fingerprint": fingerprint(model), "dtype": str(model.dtype)}
    settings["text"] = identity_of(text)
    found = None if partial is None else load_partial(partial, FORMAT, settings)
    progress: dict[str, Any] = found or {"done": 0, "sums": []}
    training = model.training
    model.eval()
    try:
        on_text(progress["done"])
        for ids in texts[progress["done"] :]:
            moved = _moved(model, ids, pieces, calibration)
            progress["sums"] = [a + b for a, b in zip(progress["sums"] or [0.0] * len(moved), moved, strict=True)]
            progress["done"] += 1
            if partial is not None:
                save_partial(partial, FORMAT, settings, progress)
            on_text(progress["done"])
    finally:
        model.train(training)
    if partial is not None:
        partial.unlink(missing_ok=True)
    stated = {name: settings[name] for name in ("length", "following", "head_table", "seed", "dtype", "text")}
    return LayerTable(
        fingerprint=settings["fingerprint"],
        errors=tuple(total / calibration.texts for total in progress["sums"]),
        entries=calibration.entries,
        texts=calibration.texts,
        settings=stated,
        versions=versions(),
    )


def _pieces(model: Any, calibration: LayerCalibration) -> Pieces:
    """compresskv's, but with the same budget for every layer."""
    method = get_method("compresskv").with_options({"head_table": calibration.head_table}).text
    if method is None:
        raise RuntimeError("compresskv serves texts")
    return replace(method, allocator=Uniform(window=8)).for_model(model)


def _moved(model: Any, ids: Sequence[int], pieces: Pieces, calibration: LayerCalibration) -> list[float]:
    """The errors of all layers on one text."""
    with watched(model) as config:
        layers = DynamicCache(config=config).layers
        full = [index for index, layer in enumerate(layers) if type(layer) is DynamicLayer]
        for place, index in enumerate(full):
            layers[index] = _MovedLayer(pieces, LayerPlace(place, len(full)), calibration.entries)
        cache = Cache(layers=layers)
        rows = torch.tensor([list(ids)], device=model.device)
        for part in (rows[:, : -calibration.following], rows[:, -calibration.following :]):
            model(part, past_key_values=cache, use_cache=True, logits_to_keep=1)
    moved = [layers[index].moved for index in full]
    if not moved or any(value is None for value in moved):
        raise ValueError(
            "this model's attention cannot be watched: it has no full-attention layer, or does not go through "
            "transformers' attention interface"
        )
    return moved
