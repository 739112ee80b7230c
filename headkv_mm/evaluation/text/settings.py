# SPDX-License-Identifier: Apache-2.0
"""What an evaluation of text runs: tasks, lengths, and one compression per method and budget."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from headkv_mm.budgets import Budget
from headkv_mm.compression import Compression
from headkv_mm.demo.documents import TASKS
from headkv_mm.evaluation.method_options import AskedOption, asked_options, check_asked_options
from headkv_mm.evaluation.settings import FULL
from headkv_mm.registry import get_method

BASELINES = ("streaming", "random")
"""Always evaluated beside the methods: a method that beats neither has found nothing."""
DEFAULT_TASKS = ("single", "multi-key", "multi-value", "multi-query", "variable-tracking", "list", "two-turn")
EVICTS_WHILE_ANSWERING = ("long-generation",)
"""Tasks whose answers are so long that the cache must stay within its budget while they are written."""


class Cell(NamedTuple):
    """One task at one length; all its documents are made alike."""

    task: str
    length: int

    def __str__(self) -> str:
        return f"{self.task}/{self.length}"


@dataclass(frozen=True)
class TextSettings:
    """What is evaluated.

    Attributes:
        tasks: kinds of documents and questions, see `headkv_mm.demo.documents.TASKS`.
        lengths: tokens of a document with its questions, counted with the model's tokenizer.
        methods: registered names; the full cache ("none") and `BASELINES` are always added.
        budgets: every method runs with each of them.
        documents: of every task and length.
        seed: chooses the documents, and decides what the random method keeps.
        query_aware: compress after document and question together; by default the document is compressed before any
            question is known.
        batch_size: documents together.
        options: see `headkv_mm.evaluation.method_options`.
        resamples: of the bootstrap.

    Raises:
        ValueError: for an unknown task, method or option, or a number out of range.
    """

    tasks: tuple[str, ...] = DEFAULT_TASKS
    lengths: tuple[int, ...] = (512, 1024, 2048)
    methods: tuple[str, ...] = (FULL, *BASELINES, "snapkv")
    budgets: tuple[Budget, ...] = (1 / 4, 1 / 8, 1 / 16)
    documents: int = 64
    seed: int = 0
    query_aware: bool = False
    batch_size: int = 16
    options: tuple[AskedOption, ...] = ()
    resamples: int = 2_000

    def __post_init__(self) -> None:
        for name, least in (("documents", 1), ("seed", 0), ("batch_size", 1), ("resamples", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        for name, example in (("tasks", "single"), ("lengths", 512), ("budgets", "1/4")):
            if not getattr(self, name):
                raise ValueError(f"there are no {name}: give at least one, such as {example}")
        if any(length < 1 for length in self.lengths):
            raise ValueError(f"lengths must be at least 1, got {', '.join(map(str, self.lengths))}")
        unknown = sorted(set(self.tasks) - set(TASKS))
        if unknown:
            raise ValueError(f"there is no task {', '.join(map(repr, unknown))}; the tasks are: {', '.join(TASKS)}")
        check_asked_options(self.options, {name: _options(name) for name in self._compared()})
        self.compressions()

    def cells(self) -> list[Cell]:
        """Task by task from the shortest length to the longest."""
        return [Cell(task, length) for task in dict.fromkeys(self.tasks) for length in sorted(set(self.lengths))]

    def compressions(self) -> list[Compression]:
        """One per run: the full cache first, then method by method from the largest budget to the smallest."""
        runs = [Compression(FULL, budget=1.0)]
        for method in self._compared():
            options = self._options_of(method)
            runs += [Compression(method, budget=budget, **options) for budget in dict.fromkeys(self.budgets)]
        return runs

    def _compared(self) -> Iterator[str]:
        yield from (name for name in dict.fromkeys((*BASELINES, *self.methods)) if name != FULL)

    def _options_of(self, method: str) -> dict[str, Any]:
        known = _options(method)
        seeded = {"seed": self.seed} if "seed" in known else {}
        return {**seeded, **asked_options(self.options, method, known)}


def _options(method: str) -> dict[str, Any]:
    """The options of a method for text, with their defaults."""
    pieces = get_method(method).pieces("text")
    return {} if pieces is None else pieces.options
