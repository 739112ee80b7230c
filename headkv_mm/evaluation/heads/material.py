# SPDX-License-Identifier: Apache-2.0
"""Full-cache runs of unseen captions and documents, and what they show of the heads."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from headkv_mm.compression import Compression
from headkv_mm.demo.documents import Document, make_document, question_text
from headkv_mm.demo.scenes import caption, unseen_scenes
from headkv_mm.evaluation.heads.attending import RecordedRow, recorded_calls
from headkv_mm.evaluation.heads.measured import Measured, measure
from headkv_mm.evaluation.heads.needs import image_stretches
from headkv_mm.evaluation.heads.pointed import TEXT_QUERIES, TEXT_WINDOW, Behind
from headkv_mm.evaluation.heads.settings import HeadSettings
from headkv_mm.evaluation.heads.statistics import SINKS
from headkv_mm.evaluation.images import Batch, generate
from headkv_mm.evaluation.prompts import encode
from headkv_mm.evaluation.settings import FULL, EvaluationSettings
from headkv_mm.evaluation.text.answering import Reader, stop_tokens
from headkv_mm.evaluation.text.cells import document_depth
from headkv_mm.evaluation.text.recording import Recording
from headkv_mm.evaluation.text.tokens import Encoder, Tokens
from headkv_mm.head_tables import SHIPPED, check_head_table, load_head_table
from headkv_mm.image_grid import ImageGrid
from headkv_mm.output_projections import OutputProjections
from headkv_mm.table_files import shipped_table

OnItem = Callable[[int], object]


class Material(Protocol):
    """Items that can be measured.

    Attributes:
        model: on its device.
        tables: by name [L, G], numbers that are known of the model's heads before any item is.
    """

    model: Any
    tables: dict[str, Tensor]

    def measure(self, first: int, end: int, on_item: OnItem) -> list[Measured]:
        """Measure items `first` to `end - 1`; each depends on the settings and its number only."""
        ...


class Images:
    """Captions of the embedded world.

    Args:
        model: a LlamaGen model, on its device.
        settings: what is measured.

    Raises:
        ValueError: if the model states no grid, or the decision comes after the image.
    """

    def __init__(self, model: Any, settings: HeadSettings) -> None:
        grid = ImageGrid.from_config(model.config)
        if grid is None:
            raise ValueError(f"{type(model.config).__name__} states no image grid")
        if settings.rows >= grid.height:
            raise ValueError(
                f"the image has {grid.height} rows, so a decision after {settings.rows} is none: use fewer rows"
            )
        self.model, self._settings, self._grid = model.eval(), settings, grid
        self.tables: dict[str, Tensor] = {}
        self._scenes = unseen_scenes(settings.items, settings.seed)
        self._seeds = EvaluationSettings(methods=(FULL,), seed=settings.seed).image_seed
        self._grams = _Grams(model)

    @torch.no_grad()
    def measure(self, first: int, end: int, on_item: OnItem) -> list[Measured]:
        """Generate the images, read them once more, and look at the attention of the conditional rows."""
        scenes = self._scenes[first:end]
        prompts = encode(self.model, [caption(scene) for scene in scenes])
        seeds = [self._seeds(index) for index in range(first, end)]
        tokens = generate(self.model, Batch(scenes, prompts, seeds), Compression(FULL, budget=1.0)).tokens
        tokens = tokens.to(prompts.ids.device)
        recording = Recording(self.model)
        mask = torch.cat((prompts.mask, torch.ones_like(tokens)), 1)
        self.model(
            input_ids=torch.cat((prompts.ids, tokens), 1),
            attention_mask=mask,
            past_key_values=recording,
            use_cache=True,
            logits_to_keep=1,
        )
        calls, row, measured = recorded_calls(recording), self._grid.row_stride, []
        for index in range(len(scenes)):
            condition = int(prompts.mask[index].sum())
            layers = [RecordedRow.of(call, index, mask[index].bool(), condition) for call in calls]
            measured.append(
                measure(
                    layers,
                    self._grams.of(layers),
                    decided=condition + self._settings.rows * row,
                    row=row,
                    behind=Behind(queries=row, window=row, first=condition),
                    stretches=image_stretches(condition, row, self._grid.height, self._settings.rows),
                    entries=self._grid.tokens,
                )
            )
            on_item(1)
        return measured


class Texts:
    """Documents that are read before their questions are known; the model's own answers follow.

    Args:
        model: a causal language model, on its device.
        tokenizer: its tokenizer.
        settings: what is measured.

    Raises:
        ValueError: if the documents do not fit the model, or are shorter than two windows.
    """

    def __init__(self, model: Any, tokenizer: Any, settings: HeadSettings) -> None:
        most = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        if most is not None and settings.length > most:
            raise ValueError(
                f"the model was made for {most} positions, and a document of {settings.length} tokens is asked for: "
                "use a shorter length"
            )
        self.model, self._settings = model.eval(), settings
        self.tables = _shipped_tables(model)
        self._encoder = Encoder(tokenizer)
        self._reader = Reader(model, stop_tokens(model, tokenizer))
        self._grams = _Grams(model)

    def document(self, index: int) -> Document:
        """Document `index`: the one that `evaluate text` would make of the same seed, task, length and number."""
        settings, cell = self._settings, self._settings.cell(index)
        number = index // len(settings.tasks)
        rng = random.Random(f"{settings.seed}/{cell}/{number}")
        return make_document(cell.task, rng, cell.length, self._encoder.count, depth=document_depth(cell, number))

    @torch.no_grad()
    def measure(self, first: int, end: int, on_item: OnItem) -> list[Measured]:
        """Answer each document's questions, read everything once more, and look at the attention."""
        measured = []
        for index in range(first, end):
            measured.append(self._measure(self.document(index)))
            on_item(1)
        return measured

    def _measure(self, document: Document) -> Measured:
        read, window = self._encoder.document(document.text), self._settings.window
        if len(read) < 2 * window:
            raise ValueError(
                f"a document has {len(read)} tokens, fewer than two windows of {window}: use a longer --length"
            )
        recording = Recording(self.model)
        following = self._conversation(document, read)
        self._reader.read(recording, self._tokens([*read, *following]))
        total, count = len(read) + len(following), len(read)
        visible = torch.ones(total, dtype=torch.bool, device=self.model.device)
        layers = [RecordedRow.of(call, 0, visible, 0) for call in recorded_calls(recording)]
        return measure(
            layers,
            self._grams.of(layers),
            decided=count,
            row=window,
            behind=Behind(queries=TEXT_QUERIES, window=TEXT_WINDOW, first=SINKS),
            stretches=[(count, total)],
            entries=count,
        )

    def _conversation(self, document: Document, read: list[int]) -> list[int]:
        """Questions and the full cache's greedy answers, as they follow the document."""
        cache = DynamicCache(config=self.model.config.get_text_config(decoder=True))
        before, _ = self._reader.read(cache, self._tokens(read))
        text = ""
        for question in document.questions:
            text += question_text(question.text)
            used = copy.deepcopy(cache)
            mask, scores = self._reader.read(used, self._tokens(self._encoder.following(text)), before)
            longest = len(self._encoder.following(question.reply))
            answer = self._reader.answer(used, mask, scores, longest + longest // 4 + 16)[0]
            text += f" {self._encoder.decode(answer)}"
        return self._encoder.following(text)

    def _tokens(self, ids: list[int]) -> Tokens:
        return Tokens.padded([ids], self._encoder.pad, self.model.device)


def _shipped_tables(model: Any) -> dict[str, Tensor]:
    """Head tables that ship for this model, by name [L, G]; of most models there are none."""
    found = {kind: shipped_table(model, name, load_head_table, check_head_table) for kind, name in SHIPPED.items()}
    return {f"shipped head table, {kind}": table.kv_scores() for kind, table in found.items() if table is not None}


class _Grams:
    """Gram matrices of the output projections by layer and KV head, made once."""

    def __init__(self, model: Any) -> None:
        self._projections = OutputProjections(model)
        self._made: list[Tensor] = []

    def of(self, layers: list[RecordedRow]) -> list[Tensor]:
        """[G, R, D, D] for every layer."""
        if not self._made:
            for index, layer in enumerate(layers):
                groups, head_dim = layer.values.shape[0], layer.values.shape[-1]
                grams = self._projections.grams(index, head_dim).to(layer.values.device)
                self._made.append(grams.unflatten(0, (groups, -1)))
        return self._made
