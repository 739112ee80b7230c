# SPDX-License-Identifier: Apache-2.0
"""What a measurement of the heads' needs runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from headkv_mm.budgets import Budget, check_budget
from headkv_mm.demo.documents import TASKS
from headkv_mm.evaluation.text.settings import DEFAULT_TASKS, Cell

MATERIALS = ("images", "text")
_FORMAT = 2  # of what is kept of an item; files of another one cannot be summed up


@dataclass(frozen=True)
class HeadSettings:
    """What is measured.

    Attributes:
        material: "images" or "text".
        items: unseen captions or documents; what was measured on the others serves as the calibrated table, so at
            least two.
        seed: chooses them, and the images' random numbers.
        budgets: mean entries per KV head, or shares of the entries of a full cache.
        floor: share of the mean budget that every head gets whatever is predicted.
        share: a head needs so many entries that this share of its attention is retained.
        batch_size: items whose results make one file.
        rows: image rows after which the method must decide.
        tasks: of the documents, in turn.
        length: tokens of a document.
        window: newest queries of a document that count as one row of an image does.
        resamples: of the bootstrap.

    Raises:
        ValueError: for a number out of range or an unknown task.
    """

    material: str = "images"
    items: int = 32
    seed: int = 0
    budgets: tuple[Budget, ...] = (1 / 4, 1 / 8, 1 / 16)
    floor: float = 0.25
    share: float = 0.95
    batch_size: int = 8
    rows: int = 4
    tasks: tuple[str, ...] = DEFAULT_TASKS
    length: int = 1024
    window: int = 32
    resamples: int = 2_000

    def __post_init__(self) -> None:
        if self.material not in MATERIALS:
            raise ValueError(f"material must be one of {', '.join(MATERIALS)}, got {self.material!r}")
        least = {"items": 2, "seed": 0, "batch_size": 1, "rows": 2, "length": 1, "window": 1, "resamples": 1}
        for name, number in least.items():
            if getattr(self, name) < number:
                raise ValueError(f"{name} must be at least {number}, got {getattr(self, name)}")
        if not 0.0 <= self.floor <= 1.0:
            raise ValueError(f"floor must lie in [0, 1], a share of the mean budget, got {self.floor}")
        if not 0.0 < self.share < 1.0:
            raise ValueError(f"share must lie in (0, 1), got {self.share}")
        if not self.budgets:
            raise ValueError("there are no budgets: give at least one, such as 1/8")
        if any(isinstance(check_budget(budget), str) for budget in self.budgets):
            raise ValueError("a budget in bytes depends on the batch: give shares or entries per KV head")
        unknown = sorted(set(self.tasks) - set(TASKS))
        if unknown or not self.tasks:
            raise ValueError(
                f"there is no task {', '.join(map(repr, unknown)) or 'given'}; the tasks are: {', '.join(TASKS)}"
            )

    @property
    def unit(self) -> str:
        """What the items are called."""
        return "captions" if self.material == "images" else "documents"

    def cell(self, index: int) -> Cell:
        """Task and length of document `index`."""
        return Cell(self.tasks[index % len(self.tasks)], self.length)

    def measuring(self) -> dict[str, Any]:
        """What decides the measured numbers, as JSON types; budgets and shares are applied to them afterwards."""
        own = (
            {"rows": self.rows}
            if self.material == "images"
            else {"tasks": list(self.tasks), "length": self.length, "window": self.window}
        )
        names = ("material", "items", "seed", "batch_size")
        return {"format": _FORMAT, **{name: getattr(self, name) for name in names}, **own}
