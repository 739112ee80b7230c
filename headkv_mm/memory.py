# SPDX-License-Identifier: Apache-2.0
"""Bytes: of a cache that exists (CacheReport), and of one that does not yet (plan_memory)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from .budgets import Budget, ImagePlan, StorageCost, image_plan
from .compression import Compression
from .image_grid import ImageGrid
from .registry import Pieces
from .text_plan import text_plan

if TYPE_CHECKING:
    from .cache import HeadKVCache

_LONG_PLAN = ImagePlan(tokens=1 << 30, row=1 << 29, budget=1)
"""Whether a scorer looks at attention does not depend on the plan; how many queries, at most what is asked here."""

HeadTable = list[list[list[int]]]
"""Numbers by layer, row and KV head."""


@dataclass(frozen=True)
class CacheReport:
    """What a cache holds.

    Attributes:
        method, budget, options: the compression.
        tokens_seen: tokens that went through, padding included.
        nbytes: bytes held, bookkeeping included.
        nbytes_full: bytes that a stock cache would hold after the same tokens.
        nbytes_peak: the most that was held, layer by layer.
        lengths: entries held by layer, row and KV head.
        capacities: room for entries by layer, row and KV head.
        types: "local" or "global" by layer, row and KV head; None where the method has no types or has not decided.
        local_share: share of local heads; None without types.
    """

    method: str
    budget: Budget
    options: dict[str, Any]
    tokens_seen: int
    nbytes: int
    nbytes_full: int
    nbytes_peak: int
    lengths: HeadTable
    capacities: HeadTable
    types: list[list[list[str]]] | None
    local_share: float | None

    @property
    def ratio(self) -> float:
        """Bytes held over bytes of a full cache."""
        return self.nbytes / self.nbytes_full if self.nbytes_full else 1.0

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON types."""
        return {
            **asdict(self),
            "options": {name: _plain(value) for name, value in self.options.items()},
            "ratio": self.ratio,
        }

    @classmethod
    def of(cls, cache: HeadKVCache) -> CacheReport:
        """Read a cache."""
        layers = cache.compressed_layers
        stores = [layer.store for layer in layers]
        local = [None if layer.allocation is None else layer.allocation.local for layer in layers]
        known = [labels for labels in local if labels is not None]
        typed = bool(known) and len(known) == len(layers)
        return cls(
            method=cache.compression.method,
            budget=cache.compression.budget,
            options=cache.compression.kwargs,
            tokens_seen=cache.get_seq_length(),
            nbytes=cache.nbytes,
            nbytes_full=cache.nbytes_full,
            nbytes_peak=cache.nbytes_peak,
            lengths=[
                [[len(kept) for kept in row] for row in layer.kept_positions()]
                if store is None
                else store.length.tolist()
                for layer, store in zip(layers, stores, strict=True)
            ],
            capacities=[
                [[len(kept) for kept in row] for row in layer.kept_positions()]
                if store is None
                else store.capacity.tolist()
                for layer, store in zip(layers, stores, strict=True)
            ],
            types=[[["local" if label else "global" for label in row] for row in labels.tolist()] for labels in known]
            if typed
            else None,
            local_share=float(torch.stack([labels.float().mean().cpu() for labels in known]).mean()) if typed else None,
        )


def storage_cost(
    pieces: Pieces,
    *,
    layers: int,
    rows: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    itemsize: int,
    condition: int,
    allocations: int = 1,
) -> StorageCost:
    """What the entries of a method cost in a model, bookkeeping included.

    Args:
        pieces: say which scores are kept.
        layers: compressed layers.
        rows: rows of the batch.
        heads, kv_heads, head_dim: H, G, D.
        itemsize: bytes of one number of the cache.
        condition: condition tokens of the longest row.
        allocations: how many are held: a text's also as it was decided, to grow from.
    """
    scorer = pieces.scorer
    per_slot = 2 * head_dim * itemsize + 4  # keys, values, position
    per_row = 3 * 4  # condition, tokens seen, padding
    per_region = 3 * 4 + allocations * (2 * 4 + 1)  # start, length, capacity; targets, windows, types
    if scorer.attention_window(_LONG_PLAN) > 0:
        per_slot += 4
    if pieces.selector.remembers:
        per_slot += 4
    if scorer.needs_mean_query:
        per_row += heads * head_dim * 4
    return StorageCost(
        per_entry=layers * rows * kv_heads * per_slot,
        fixed=layers * (rows * (per_row + kv_heads * per_region) + scorer.held_bytes(heads, head_dim)),
        condition=condition,
        queries=max(piece.queries_needed(_LONG_PLAN, decoding=True) for piece in (scorer, pieces.selector)),
        per_query=layers * rows * heads * head_dim * itemsize,
    )


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of keys and values that an image or a text will take.

    Attributes:
        entries_per_head: mean room per KV head: for an image condition, budget and one row; for a text the budget and
            one interval.
        nbytes: bytes of keys and values held; bookkeeping comes on top.
        nbytes_full: bytes of a stock cache at the end.
        bookkeeping: bytes of everything else that the cache holds: positions, scores, lengths, waiting queries (under
            5 % of `nbytes` for common sizes).
        nbytes_peak: the most that the cache ever holds, bookkeeping included: methods that keep the first rows of an
            image whole, to learn from them, may hold more then than at the end.
    """

    entries_per_head: int
    nbytes: int
    nbytes_full: int
    bookkeeping: int
    nbytes_peak: int

    @property
    def ratio(self) -> float:
        """Bytes held over bytes of a full cache."""
        return self.nbytes / self.nbytes_full


def plan_memory(
    model_or_config: Any,
    compression: Any = "headkv",
    *,
    budget: Budget | None = None,
    rows: int = 1,
    condition: int = 0,
    tokens: int | None = None,
    image_grid: ImageGrid | None = None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> MemoryPlan:
    """Bytes of a cache before it exists.

    Args:
        model_or_config: the model or its configuration.
        compression, budget, options: as for `HeadKVCache`.
        rows: rows of the batch; classifier-free guidance doubles them.
        condition: prompt tokens per row of an image, padding not counted.
        tokens: tokens of a text, prompt and answer together; needed where there is no image grid.
        image_grid: by default what the configuration states, unless `tokens` asks for a text.
        dtype: of the cache; the model's by default.

    Raises:
        ValueError: if neither an image grid nor `tokens` is known, or the budget is too small.
    """
    config = getattr(model_or_config, "config", model_or_config)
    text = config.get_text_config(decoder=True)
    grid = image_grid or (ImageGrid.from_config(config) if tokens is None else None)
    if grid is None and tokens is None:
        raise ValueError(
            f"{type(config).__name__} states no image grid; pass image_grid=ImageGrid(height, width) for an image, or "
            "tokens=N for a text"
        )
    parsed = Compression.parse(compression, budget=budget, **options)
    dtype = dtype or getattr(text, "dtype", None) or torch.float32
    if isinstance(dtype, str):  # what save_pretrained leaves in a configuration
        dtype = getattr(torch, dtype)
    kv_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    itemsize = torch.empty(0, dtype=dtype).element_size()
    per_entry = 2 * rows * text.num_hidden_layers * kv_heads * head_dim * itemsize
    first = 0 if grid is None else condition + grid.start
    entries = full = first + (tokens or 0 if grid is None else grid.tokens)
    held = peak = per_entry * full
    pieces = parsed.pieces("text" if grid is None else "image")
    if pieces is not None:
        cost = storage_cost(
            pieces,
            layers=text.num_hidden_layers,
            rows=rows,
            heads=text.num_attention_heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            itemsize=itemsize,
            condition=first,
            allocations=2 if grid is None else 1,
        )
        if grid is None:
            interval = getattr(pieces.schedule, "interval", None)
            whole = text_plan(parsed.budget, interval=interval, cost=cost)
            if not whole.keeps_all:
                entries = min(whole.entries(full) + whole.step, full)
                held = peak = cost.of(entries - whole.step, whole.step)
        else:
            plan = image_plan(parsed.budget, grid, cost)
            if not plan.keeps_all:
                entries = first + plan.budget + plan.row
                held = cost.of(plan.budget, plan.row)
                peak = max(held, _before_first_eviction(pieces, plan, cost))
    nbytes = per_entry * entries
    return MemoryPlan(entries, nbytes, per_entry * full, held - nbytes, peak)


def _before_first_eviction(pieces: Pieces, plan: ImagePlan, cost: StorageCost) -> int:
    """Bytes when everything is still there, and the queries that the first decision wants (or a later one like it)."""
    queries = max(pieces.allocator.queries_needed(plan), min(cost.queries, plan.row))
    later = plan.budget + plan.row if getattr(pieces.schedule, "regroup_rows", None) else 0
    entries = cost.condition + max(pieces.schedule.first(plan), later)
    return cost.fixed + queries * cost.per_query + entries * cost.per_entry


def _plain(value: Any) -> Any:
    return value if isinstance(value, (str, int, float, bool, type(None))) else repr(value)
