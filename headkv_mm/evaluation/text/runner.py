# SPDX-License-Identifier: Apache-2.0
"""Runs an evaluation of text: every method and budget has its own file, which grows cell by cell."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from headkv_mm.budgets import check_budget
from headkv_mm.cache import HeadKVCache
from headkv_mm.compression import Compression
from headkv_mm.evaluation.settings import run_name, run_settings
from headkv_mm.evaluation.storage import check_same, read_json, write_json
from headkv_mm.evaluation.text.answering import Reader, stop_tokens
from headkv_mm.evaluation.text.cells import CellRunner, OnDocuments, Outcome, document_depth
from headkv_mm.evaluation.text.settings import EVICTS_WHILE_ANSWERING, Cell, TextSettings
from headkv_mm.evaluation.text.tokens import Encoder
from headkv_mm.fingerprint import fingerprint


class TextRunner:
    """An evaluation of one model into one folder.

    Args:
        model: a causal language model, on its device.
        tokenizer: its tokenizer.
        settings: what to run.
        folder: gets one JSON file per run.
        progress: draw a bar on stderr.

    Raises:
        ValueError: if a length or budget does not fit the model, or its cache cannot be compressed.
    """

    def __init__(
        self, model: Any, tokenizer: Any, settings: TextSettings, folder: Path, *, progress: bool = True
    ) -> None:
        self.settings, self.folder, self._progress = settings, folder, progress
        self.compressions = settings.compressions()
        _check_model(model.eval(), settings)
        for compression in self.compressions:
            check_budget(compression.budget)
            HeadKVCache(model, compression)  # refuses what cannot work before anything runs
        encoder = Encoder(tokenizer)
        self._cells = CellRunner(model, encoder, Reader(model, stop_tokens(model, tokenizer)), settings)
        self.shared = {
            "documents": settings.documents,
            "seed": settings.seed,
            "query_aware": settings.query_aware,
            "batch_size": settings.batch_size,
            "model": fingerprint(model),
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": model.device.type,
        }

    def run(self) -> list[dict[str, Any]]:
        """Run what is not finished yet.

        Returns:
            The runs' files, the full cache first.

        Raises:
            ValueError: if the folder holds results of other settings.
        """
        for path in sorted(self.folder.glob("*.json")):
            check_same(path, {"shared": read_json(path).get("shared", {})}, {"shared": self.shared})
        for compression in self.compressions:
            self._load(compression)
        for cell in self.settings.cells():
            missing = [item for item in self.compressions if str(cell) not in self._load(item)["cells"]]
            if missing:
                with self._bar(cell, missing) as on_documents:
                    outcomes = self._cells.run(cell, missing, on_documents)
                for compression, outcome in zip(missing, outcomes, strict=True):
                    content = self._load(compression)
                    content["cells"][str(cell)] = _plain(cell, outcome)
                    write_json(self._path(compression), content)
        return [self._load(compression) for compression in self.compressions]

    def _path(self, compression: Compression) -> Path:
        return self.folder / f"{run_name(compression)}.json"

    def _load(self, compression: Compression) -> dict[str, Any]:
        """A run's file, or a new one; refuses one of other options."""
        wanted = run_settings(self.shared, compression)
        path = self._path(compression)
        if not path.is_file():
            return {**wanted, "cells": {}}
        found = read_json(path)
        check_same(path, {name: found.get(name, {}) for name in wanted}, wanted)
        return found

    @contextmanager
    def _bar(self, cell: Cell, compressions: Sequence[Compression]) -> Iterator[OnDocuments]:
        from tqdm.auto import tqdm

        total = self.settings.documents * len(compressions)
        with tqdm(total=total, desc=str(cell), unit="document", disable=not self._progress) as bar:
            yield bar.update


def _plain(cell: Cell, outcome: Outcome) -> dict[str, Any]:
    """A cell of a run's file; bytes are per document."""
    depths = [document_depth(cell, index) for index in range(len(outcome.partial))]
    held = outcome.ends if cell.task in EVICTS_WHILE_ANSWERING else outcome.nbytes
    return {
        "partial": outcome.partial,
        "depth": None if None in depths else depths,
        **{name: held[name] / len(outcome.partial) for name in held},
    }


def _check_model(model: Any, settings: TextSettings) -> None:
    most = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if most is not None and max(settings.lengths) > most:
        raise ValueError(
            f"the model was made for {most} positions, and a document of {max(settings.lengths)} tokens is asked for: "
            "use shorter lengths"
        )


def open_text_model(folder: str | None, device: str | None) -> tuple[Any, Any]:
    """Load a language model and its tokenizer, in float32 on a CPU, where half precision is slow.

    Args:
        folder: a model folder or id; None for the embedded model.
        device: "cpu", "cuda", ...; None for an accelerator if there is one.

    Raises:
        ValueError: if there is no such model, or the device is unknown.
        FileNotFoundError: if the embedded weights are missing.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from headkv_mm.demo import text_model_path

    name = str(text_model_path()) if folder is None else folder
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        where = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device {device!r} is unknown: use cpu or cuda") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        dtype = torch.float32 if where.type == "cpu" else "auto"
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{name} holds no language model with its tokenizer: {reason}") from error
    return model.to(where).eval(), tokenizer
