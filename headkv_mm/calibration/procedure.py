# SPDX-License-Identifier: Apache-2.0
"""Which heads find the right answer while the model writes it.

Two ways to count, for two methods: "r2" of `headkv-r2` (arXiv 2410.19258) and "srh" of `compresskv` (arXiv 2508.02401).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headkv_mm.calibration.partial import Progress, load_progress, save_progress
from headkv_mm.calibration.prompts import NeedlePrompt, needle_prompt
from headkv_mm.calibration.watching import Measure, WatchedCache, retrieved, span_mass, watched
from headkv_mm.evaluation.origin import versions
from headkv_mm.evaluation.text.answering import Reader, stop_tokens
from headkv_mm.evaluation.text.tokens import Tokens
from headkv_mm.fingerprint import fingerprint
from headkv_mm.head_tables import KINDS, HeadTable

MEASURES: dict[str, Measure] = {"r2": retrieved, "srh": span_mass}
DEPTHS = 10
"""The right answer lies at this many depths in turn, from the first sentence to the last."""
DEFAULT_LENGTH = 1024


@dataclass(frozen=True)
class Calibration:
    """How to measure.

    Attributes:
        examples: prompts that are tried; only those answered right count.
        length: tokens of a prompt, about.
        seed: chooses the prompts.
        max_new_tokens: longest answer.
        kind: "r2": at every step, what is found among the entries attended to most; "srh": all the attention that the
            sentence gets, at the steps that write a token of it.

    Raises:
        ValueError: for a number out of range, or an unknown kind.
    """

    examples: int = 100
    length: int = DEFAULT_LENGTH
    seed: int = 0
    max_new_tokens: int = 50
    kind: str = "r2"

    def __post_init__(self) -> None:
        if self.kind not in MEASURES:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        for name, least in (("examples", 1), ("length", 1), ("seed", 0), ("max_new_tokens", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")


@torch.no_grad()
def calibrate(
    model: Any,
    tokenizer: Any,
    calibration: Calibration | None = None,
    *,
    partial: Path | None = None,
    on_example: Callable[[int, int], object] = lambda done, answered: None,
) -> HeadTable:
    """Measure the heads of a model.

    For every prompt the model decodes greedily with the full cache. At each step and for every query head, the
    attention row of the newest token is looked at: how it looks at the sentence with the right answer (`MEASURES`). A
    prompt's score is the sum over its steps, the table's the mean over the prompts that were answered right.

    Args:
        model: a causal language model of transformers, on its device; it is the same afterwards.
        tokenizer: its tokenizer.
        calibration: the settings; the defaults if None.
        partial: file that keeps what is done, to go on from after a break; removed at the end. None for no file.
        on_example: called with the numbers of prompts tried and answered right, at the beginning and after each one.

    Raises:
        ValueError: if no prompt is answered right, the prompts do not fit the model or tokenizer, the model cannot be
            watched, or `partial` is of other settings.
    """
    calibration = calibration or Calibration()
    _check_length(model, calibration)
    settings = {**asdict(calibration), "fingerprint": fingerprint(model), "dtype": str(model.dtype)}
    progress = Progress() if partial is None else load_progress(partial, settings)
    training = model.training
    model.eval()
    try:
        with watched(model) as config:
            watcher = _Watcher(model, tokenizer, config, calibration)
            on_example(progress.done, progress.answered)
            while progress.done < calibration.examples:
                watcher.try_next(progress)
                if partial is not None:
                    save_progress(partial, settings, progress)
                on_example(progress.done, progress.answered)
    finally:
        model.train(training)
    if partial is not None:
        partial.unlink(missing_ok=True)
    return _table(progress, calibration, settings)


class _Watcher:
    """Tries prompts one after the other."""

    def __init__(self, model: Any, tokenizer: Any, config: Any, calibration: Calibration) -> None:
        self._tokenizer, self._config, self._calibration = tokenizer, config, calibration
        self._stop = stop_tokens(model, tokenizer)
        self._reader, self._device = Reader(model, self._stop), model.device

    def try_next(self, progress: Progress) -> None:
        """Try one more prompt and add what it shows."""
        settings = self._calibration
        rng = random.Random(f"heads {settings.seed} {progress.done}")
        depth = (progress.done % DEPTHS) / (DEPTHS - 1)
        prompt = needle_prompt(self._tokenizer, rng, settings.length, depth)
        cache = WatchedCache(self._config)
        answer = self._answer(prompt, cache)
        found, kv_heads = cache.found()
        if prompt.is_right(answer):
            sums = torch.tensor(progress.sums, dtype=torch.float64) if progress.sums else torch.zeros_like(found)
            progress.sums = (sums + found).tolist()
            progress.answered, progress.kv_heads = progress.answered + 1, kv_heads
        progress.done += 1

    def _answer(self, prompt: NeedlePrompt, cache: WatchedCache) -> str:
        """Decode greedily; every row from the prompt's last token on is watched."""
        mask, _ = self._reader.read(cache, self._tokens(prompt.ids[:-1]))
        cache.watch(prompt.span, MEASURES[self._calibration.kind])
        in_span = set(prompt.ids[slice(*prompt.span)])
        token, answer, text = prompt.ids[-1], list[int](), ""
        while len(answer) < self._calibration.max_new_tokens:
            mask, scores = self._reader.read(cache, self._tokens((token,)), mask)
            token = int(scores.argmax())
            if self._calibration.kind == "r2" or token in in_span:
                cache.count()
            if token in self._stop:
                break
            answer.append(token)
            text = str(self._tokenizer.decode(answer, skip_special_tokens=True)).strip()
            if "\n" in text:  # a model that goes on with questions of its own
                break
        return text.partition("\n")[0].rstrip()

    def _tokens(self, ids: tuple[int, ...]) -> Tokens:
        rows: Tensor = torch.tensor([ids], device=self._device)
        return Tokens(rows, torch.ones_like(rows))


def _check_length(model: Any, calibration: Calibration) -> None:
    most = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    needed = calibration.length + calibration.max_new_tokens
    if most is not None and needed > most:
        raise ValueError(
            f"the model was made for {most} positions, and prompts of {calibration.length} tokens with answers of up "
            f"to {calibration.max_new_tokens} need {needed}: use a shorter length"
        )


def _table(progress: Progress, calibration: Calibration, settings: dict[str, Any]) -> HeadTable:
    """The mean over the prompts that count.

    Raises:
        ValueError: if there are none.
    """
    if not progress.answered:
        raise ValueError(
            f"none of the {progress.done} prompts was answered right, so nothing is known about the heads; try shorter "
            "prompts (--length), longer answers (--max-new-tokens), or a model that answers questions about a text"
        )
    scores = tuple(tuple(total / progress.answered for total in row) for row in progress.sums)
    stated = {name: value for name, value in settings.items() if name not in ("fingerprint", "examples", "kind")}
    return HeadTable(
        kind=calibration.kind,
        fingerprint=settings["fingerprint"],
        scores=scores,
        kv_heads=progress.kv_heads,
        examples=progress.done,
        answered=progress.answered,
        settings=stated,
        versions=versions(),
    )
