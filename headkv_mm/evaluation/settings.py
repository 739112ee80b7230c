# SPDX-License-Identifier: Apache-2.0
"""What an evaluation of images runs: captions, seeds, and one compression per method and budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from headkv_mm.budgets import Budget
from headkv_mm.compression import Compression
from headkv_mm.evaluation.method_options import AskedOption, asked_options, check_asked_options
from headkv_mm.registry import get_method

FULL = "none"
FIRST_EVICTION_OPTIONS = ("grouping_rows", "first_eviction_rows")
"""Options by which methods are told when to evict first; a method has one of them."""

_SEEDS_PER_EVALUATION = 1 << 20


@dataclass(frozen=True)
class EvaluationSettings:
    """What is evaluated.

    Attributes:
        methods: registered names. The full cache ("none") is always evaluated, since the others are compared with it.
        budgets: every method runs with each of them.
        captions: number of unseen captions; one image is generated for each.
        seed: chooses the captions and the images' random numbers.
        batch_size: images generated together.
        first_eviction_rows: image rows decoded before the first eviction, the same for all methods.
        options: (method or None for every method that has the option, name, value).
        resamples: bootstrap resamples.
        pictures: captions shown in the picture grid, the first ones.

    Raises:
        ValueError: for an unknown method or option, or a number out of range.
    """

    methods: tuple[str, ...] = (FULL, "headkv", "lines", "streaming")
    budgets: tuple[Budget, ...] = (1 / 4, 1 / 6, 1 / 8)
    captions: int = 256
    seed: int = 0
    batch_size: int = 64
    first_eviction_rows: int = 4
    options: tuple[AskedOption, ...] = ()
    resamples: int = 10_000
    pictures: int = 6

    def __post_init__(self) -> None:
        for name, least in (
            ("captions", 1),
            ("seed", 0),
            ("batch_size", 1),
            ("first_eviction_rows", 1),
            ("resamples", 1),
            ("pictures", 0),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not self.budgets and set(self.methods) - {FULL}:
            raise ValueError("there are no budgets: give at least one, such as 1/6")
        self._check_options()
        self.compressions()

    def compressions(self) -> list[Compression]:
        """One per run: the full cache first, then method by method from the largest budget to the smallest."""
        runs = [Compression(FULL, budget=1.0)]
        for method in dict.fromkeys(self.methods):
            if method != FULL:
                options = self.options_of(method)
                runs += [Compression(method, budget=budget, **options) for budget in dict.fromkeys(self.budgets)]
        return runs

    def options_of(self, method: str) -> dict[str, Any]:
        """Options of a method: the common first eviction, then what was asked for.

        Raises:
            ValueError: if the method cannot be told when to evict first.
        """
        known = image_options(method)
        first = [name for name in FIRST_EVICTION_OPTIONS if name in known]
        if not first:
            raise ValueError(
                f"method {method!r} has none of the options {', '.join(FIRST_EVICTION_OPTIONS)}, so its first eviction "
                "cannot be set to that of the others; leave it out"
            )
        return {first[0]: self.first_eviction_rows, **asked_options(self.options, method, known)}

    def image_seed(self, index: int) -> int:
        """Seed of the image of caption `index`: the same for every method and budget."""
        return self.seed * _SEEDS_PER_EVALUATION + index

    def _check_options(self) -> None:
        for _, name, _ in self.options:
            if name in FIRST_EVICTION_OPTIONS:
                raise ValueError(f"option {name!r} is the same for all methods: set it with first_eviction_rows")
        check_asked_options(self.options, {method: image_options(method) for method in self.methods if method != FULL})


def image_options(method: str) -> dict[str, Any]:
    """Options of a method for images, with their defaults.

    Raises:
        ValueError: if the method is unknown or does not serve images.
    """
    pieces = get_method(method).pieces("image")
    return {} if pieces is None else pieces.options


def run_name(compression: Compression) -> str:
    """File-name part of a run, such as "headkv-1of6"."""
    if compression.method == FULL:
        return FULL
    return f"{compression.method}-{budget_label(compression.budget).replace('/', 'of')}"


def run_settings(shared: Mapping[str, Any], compression: Compression) -> dict[str, Any]:
    """Everything that decides the outcome of a run, as JSON types.

    Args:
        shared: captions, seeds, model and sampling; the same for all runs of a folder.
        compression: what differs.
    """
    return {
        "shared": dict(shared),
        "method": compression.method,
        "budget": None if compression.method == FULL else compression.budget,
        "options": {name: plain(value) for name, value in compression.options},
    }


def budget_label(budget: Budget) -> str:
    """A budget as people write it: 1/6 rather than 0.1667."""
    if not isinstance(budget, float):
        return str(budget).replace(" ", "")
    fraction = Fraction(budget).limit_denominator(64)
    return str(fraction) if abs(float(fraction) - budget) < 1e-6 else f"{budget:.4g}"


def plain(value: Any) -> Any:
    """A value as a JSON type."""
    return value if isinstance(value, (str, int, float, bool, type(None))) else repr(value)
