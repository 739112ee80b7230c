# SPDX-License-Identifier: Apache-2.0
"""What the text-to-image pipeline returns: images, and a report of the memory and time they took."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from headkv_mm.memory import CacheReport

HEAD_TYPES = ("local", "global")
_SMALL_SHARE = 0.05  # of the weights: below it a full cache hardly decides what fits


@dataclass(frozen=True)
class GenerationReport:
    """Memory and time of the runs that made some images.

    A run generates several images together. Bytes are those of the largest run: what the machine had to hold.

    Attributes:
        method: name of the compression, "none" for the full cache.
        budget: what was asked for; None for the full cache.
        options: the method's options.
        nbytes: bytes the KV cache held at the end of a run, tables and buffers included.
        nbytes_peak: most bytes it ever held.
        nbytes_full: bytes a full cache holds at the end of that run.
        images: images of these runs.
        runs: number of runs.
        tokens: image tokens generated.
        seconds: wall-clock time of prefill and decoding, pictures not included.
        settings: sampling settings.
        caches: what each run's cache held, head by head. Empty for the full cache.
        nbytes_weights: bytes of the weights of the model that draws; 0 if unknown.
    """

    method: str
    budget: float | int | str | None
    options: dict[str, Any]
    nbytes: int
    nbytes_peak: int
    nbytes_full: int
    images: int
    runs: int
    tokens: int
    seconds: float
    settings: dict[str, Any] = field(default_factory=dict)
    caches: tuple[CacheReport, ...] = field(default=(), repr=False)
    nbytes_weights: int = 0

    @property
    def ratio(self) -> float:
        """Bytes held at the end as a share of the full cache."""
        return self.nbytes / self.nbytes_full if self.nbytes_full else 1.0

    @property
    def nbytes_saved(self) -> int:
        """Bytes the compression saved at the end of a run; negative where its tables cost more than it saved."""
        return self.nbytes_full - self.nbytes

    @property
    def advice(self) -> str | None:
        """A sentence where compression pays little, or not at all; else None."""
        if self.caches and self.nbytes_saved <= 0:
            return (
                "compression costs more than it saves here: what comes before the image always stays, and its tables "
                "come on top; use the full cache"
            )
        if self.nbytes_weights and self.nbytes_full < _SMALL_SHARE * self.nbytes_weights:
            return (
                f"a full cache is only {self.nbytes_full / self.nbytes_weights:.2%} of the "
                f"{format_bytes(self.nbytes_weights)} of weights: compression pays with more images at once"
            )
        return None

    @property
    def tokens_per_second(self) -> float:
        """Image tokens per second, all images of a run together."""
        return self.tokens / self.seconds if self.seconds > 0 else 0.0

    @property
    def head_types(self) -> dict[str, int]:
        """How many heads were found local and global, counted over layers and rows; empty without head types."""
        found = Counter(kind for cache in self.caches for layer in cache.types or () for row in layer for kind in row)
        return {kind: found[kind] for kind in HEAD_TYPES} if found else {}

    @property
    def local_share(self) -> float | None:
        """Share of heads found local; None for a method without head types."""
        found = self.head_types
        return found["local"] / sum(found.values()) if found else None

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers, text, lists and dicts."""
        return {
            "method": self.method,
            "budget": self.budget,
            "options": {name: _plain(value) for name, value in self.options.items()},
            "nbytes": self.nbytes,
            "nbytes_peak": self.nbytes_peak,
            "nbytes_full": self.nbytes_full,
            "nbytes_saved": self.nbytes_saved,
            "nbytes_weights": self.nbytes_weights,
            "ratio": self.ratio,
            "images": self.images,
            "runs": self.runs,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "tokens_per_second": self.tokens_per_second,
            "head_types": self.head_types,
            "local_share": self.local_share,
            "settings": dict(self.settings),
            "caches": [cache.to_dict() for cache in self.caches],
        }

    def __str__(self) -> str:
        name = "full cache" if self.method == "none" else f"{self.method} {format_budget(self.budget)}"
        lines = [
            f"{name}: {format_bytes(self.nbytes)} held of {format_bytes(self.nbytes_full)} "
            f"({self.ratio:.1%}), {format_bytes(self.nbytes_peak)} at the peak",
            f"{self.tokens} tokens of {self.images} image{'s' if self.images != 1 else ''} in {self.seconds:.2f} s "
            f"({self.tokens_per_second:.0f} tokens/s)",
        ]
        if self.local_share is not None:
            lines.append(f"{self.local_share:.0%} of the heads are local")
        if self.advice is not None:
            lines.append(self.advice)
        return "\n".join(lines)


def merge_reports(reports: Sequence[GenerationReport]) -> GenerationReport:
    """One report over several runs with the same settings: largest bytes, summed images, tokens and seconds."""
    if len(reports) == 1:
        return reports[0]
    largest = max(reports, key=lambda report: report.nbytes_full)
    return replace(
        largest,
        nbytes_peak=max(report.nbytes_peak for report in reports),
        images=sum(report.images for report in reports),
        runs=sum(report.runs for report in reports),
        tokens=sum(report.tokens for report in reports),
        seconds=sum(report.seconds for report in reports),
        caches=tuple(cache for report in reports for cache in report.caches),
    )


@dataclass(frozen=True)
class ImageOutput:
    """The images of one prompt.

    Attributes:
        images: RGB pictures, in the order of the seeds.
        report: memory and time of the runs that made them. With `batch_size` a run may hold other prompts' images
            too.
        prompts: the prompt of every image, as the model read it.
        seeds: the seed of every image; `seed=seeds[j]` makes image j again.
        tokens: int64 [images, T], the image tokens.
        kept_tokens: with `keep_tokens=True`, for every image the image tokens that each layer and head still held at
            the end: `kept_tokens[image][layer][head]` is an int64 tensor of raster indices. Else None.
    """

    images: list[Image]
    report: GenerationReport
    prompts: list[str]
    seeds: list[int]
    tokens: torch.Tensor = field(repr=False)
    kept_tokens: list[list[list[torch.Tensor]]] | None = field(default=None, repr=False)


def format_bytes(count: int) -> str:
    """A byte count for people, such as "1.3 MiB"."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def format_budget(budget: float | int | str | None) -> str:
    """A budget for people: "1/6", "0.3", "64 per head" or "512MiB"."""
    if isinstance(budget, float):
        parts = round(1 / budget) if budget > 0 else 0
        return f"1/{parts}" if parts > 1 and abs(parts * budget - 1) < 1e-9 else f"{budget:g}"
    if isinstance(budget, int):
        return f"{budget} per head"
    return str(budget or "")


def _plain(value: Any) -> Any:
    """An option as JSON can hold it; the pieces of a method become their text."""
    return value if isinstance(value, str | int | float | bool | None) else repr(value)
