# SPDX-License-Identifier: Apache-2.0
"""Memory and time of generated text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from headkv_mm.pipelines.outputs import format_budget, format_bytes

if TYPE_CHECKING:
    from headkv_mm.memory import CacheReport


@dataclass(frozen=True)
class TextReport:
    """Memory and time of the runs of one call of the text-generation pipeline.

    A run generates the rows of a batch together. Bytes are those of the largest run: what the machine had to hold.

    Attributes:
        method: name of the compression, "none" for the full cache.
        budget: what was asked for; None for the full cache.
        options: the method's options.
        nbytes: bytes the KV cache held at the end of a run, bookkeeping included.
        nbytes_peak: the most that was held, layer by layer.
        nbytes_full: bytes a full cache holds at the end of that run.
        rows: sequences generated, over all runs; beams count as one.
        runs: number of runs.
        prompt_tokens: tokens of the prompts, padding not counted.
        tokens: tokens generated, padding not counted.
        seconds: wall-clock time of prefill and decoding.
        caches: what each run's cache held, head by head. Empty for the full cache.
    """

    method: str
    budget: float | int | str | None
    options: dict[str, Any]
    nbytes: int
    nbytes_peak: int
    nbytes_full: int
    rows: int
    runs: int
    prompt_tokens: int
    tokens: int
    seconds: float
    caches: tuple[CacheReport, ...] = field(default=(), repr=False)

    @property
    def ratio(self) -> float:
        """Bytes held at the end as a share of the full cache."""
        return self.nbytes / self.nbytes_full if self.nbytes_full else 1.0

    @property
    def tokens_per_second(self) -> float:
        """Tokens generated per second, all rows together, prefill included."""
        return self.tokens / self.seconds if self.seconds > 0 else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers, text, lists and dicts."""
        return {
            "method": self.method,
            "budget": self.budget,
            "options": {name: plain(value) for name, value in self.options.items()},
            "nbytes": self.nbytes,
            "nbytes_peak": self.nbytes_peak,
            "nbytes_full": self.nbytes_full,
            "ratio": self.ratio,
            "rows": self.rows,
            "runs": self.runs,
            "prompt_tokens": self.prompt_tokens,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "tokens_per_second": self.tokens_per_second,
            "caches": [cache.to_dict() for cache in self.caches],
        }

    def __str__(self) -> str:
        return (
            f"{cache_name(self.method, self.budget)}: {format_bytes(self.nbytes)} held of "
            f"{format_bytes(self.nbytes_full)} ({self.ratio:.1%}), {format_bytes(self.nbytes_peak)} at the peak\n"
            f"{self.tokens} tokens after {self.prompt_tokens} of the prompt in {self.seconds:.2f} s "
            f"({self.tokens_per_second:.0f} tokens/s)"
        )


def merge_text_reports(reports: Sequence[TextReport]) -> TextReport:
    """One report over several runs with the same settings: largest bytes, summed rows, tokens and seconds."""
    if len(reports) == 1:
        return reports[0]
    largest = max(reports, key=lambda report: report.nbytes_full)
    return replace(
        largest,
        nbytes_peak=max(report.nbytes_peak for report in reports),
        rows=sum(report.rows for report in reports),
        runs=sum(report.runs for report in reports),
        prompt_tokens=sum(report.prompt_tokens for report in reports),
        tokens=sum(report.tokens for report in reports),
        seconds=sum(report.seconds for report in reports),
        caches=tuple(cache for report in reports for cache in report.caches),
    )


def cache_name(method: str, budget: float | int | str | None) -> str:
    """What people call a cache: "full cache" or "snapkv 1/4"."""
    return "full cache" if method == "none" else f"{method} {format_budget(budget)}".strip()


def plain(value: Any) -> Any:
    """An option as JSON can hold it; the pieces of a method become their text."""
    return value if isinstance(value, str | int | float | bool | None) else repr(value)
