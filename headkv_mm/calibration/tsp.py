# SPDX-License-Identifier: Apache-2.0
"""The calibration of `fastkv` (arXiv 2502.01068): after which layer most tokens of a prompt are needed no more."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from headkv_mm.attach import compress
from headkv_mm.calibration.partial import load_partial, save_partial
from headkv_mm.calibration.texts import calibration_texts, check_positions, identity_of
from headkv_mm.evaluation.origin import versions
from headkv_mm.fingerprint import fingerprint
from headkv_mm.layer_hooks import decoder_layers
from headkv_mm.schedules import TokenSelective
from headkv_mm.text_plan import SMALLEST
from headkv_mm.tsp_tables import TSPTable

FORMAT = "headkv-mm TSP table in progress"


@dataclass(frozen=True)
class TSPCalibration:
    """How to measure.

    Attributes:
        texts: how many are read.
        length: tokens of a text, about.
        ratio: share of the tokens that go on.
        tolerance: the largest distance that is good enough, see `TSPTable`.
        seed: chooses the texts.

    Raises:
        ValueError: for a number out of range.
    """

    texts: int = 16
    length: int = 1024
    ratio: float = TokenSelective.tsp_ratio
    tolerance: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("texts", 1), ("length", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not 0.0 < self.ratio < 1.0:
            raise ValueError(f"ratio must lie between 0 and 1, got {self.ratio}")
        if not self.tolerance > 0.0:
            raise ValueError(f"tolerance must be positive, got {self.tolerance}")
        least = round(TokenSelective.tsp_least / self.ratio) + 1
        if self.length < least:
            raise ValueError(
                f"of texts of {self.length} tokens a share of {self.ratio} is no more than the "
                f"{TokenSelective.tsp_least} that always go on: use a length of at least {least}"
            )


@torch.no_grad()
def calibrate_tsp(
    model: Any,
    tokenizer: Any,
    calibration: TSPCalibration | None = None,
    *,
    text: str | None = None,
    partial: Path | None = None,
    on_text: Callable[[int], object] = lambda done: None,
) -> TSPTable:
    """Measure how far the last hidden state moves, for every layer after which tokens could be left behind.

    Args:
        model: a causal language model of transformers, on its device; it is the same afterwards.
        tokenizer: its tokenizer.
        calibration: the settings; the defaults if None.
        text: texts are cut from it, one after the other; None for generated ones, each with a question at its end.
        partial: file that keeps what is done, to go on from after a break; removed at the end. None for no file.
        on_text: called with the number of texts read, at the beginning and after each one.

    Raises:
        ValueError: if the text is too short, the texts do not fit the model, the model's layers cannot be followed, or
            `partial` is of other settings.
    """
    calibration = calibration or TSPCalibration()
    layers = len(decoder_layers(model))
    check_positions(model, calibration.length)
    texts = calibration_texts(
        tokenizer, texts=calibration.texts, length=calibration.length, seed=calibration.seed, text=text, label="tsp"
    )
    settings = {**asdict(calibration), "fingerprint": fingerprint(model), "dtype": str(model.dtype)}
    settings["text"] = identity_of(text)
    found = None if partial is None else load_partial(partial, FORMAT, settings)
    progress: dict[str, Any] = found or {"done": 0, "sums": [0.0] * layers}
    training = model.training
    model.eval()
    try:
        on_text(progress["done"])
        for ids in texts[progress["done"] :]:
            distances = _distances(model, torch.tensor([ids], device=model.device), layers, calibration.ratio)
            progress["sums"] = [total + new for total, new in zip(progress["sums"], distances, strict=True)]
            progress["done"] += 1
            if partial is not None:
                save_partial(partial, FORMAT, settings, progress)
            on_text(progress["done"])
    finally:
        model.train(training)
    if partial is not None:
        partial.unlink(missing_ok=True)
    stated = {name: settings[name] for name in ("length", "seed", "dtype", "text")}
    return TSPTable(
        fingerprint=settings["fingerprint"],
        distances=tuple(total / calibration.texts for total in progress["sums"]),
        tolerance=calibration.tolerance,
        ratio=calibration.ratio,
        texts=calibration.texts,
        settings=stated,
        versions=versions(),
    )


def _distances(model: Any, ids: Tensor, layers: int, ratio: float) -> list[float]:
    """|h - h_full| / |h_full| of the last token, for every layer after which tokens are left behind."""
    full = _last_hidden(model, ids, use_cache=False)
    distances = []
    for layer in range(layers - 1):
        # Only what goes on matters: what is kept for later tokens does not touch this forward.
        with compress(model, "fastkv", budget=SMALLEST, tsp_layer=layer, tsp_ratio=ratio):
            hidden = _last_hidden(model, ids, use_cache=True)
        distances.append(float((hidden - full).norm() / full.norm()))
    return [*distances, 0.0]


def _last_hidden(model: Any, ids: Tensor, *, use_cache: bool) -> Tensor:
    """What the last token is after the last layer, [D] float32."""
    decoder: nn.Module = model.get_decoder()
    hidden: Tensor = decoder(input_ids=ids, use_cache=use_cache).last_hidden_state[0, -1]
    return hidden.float()
