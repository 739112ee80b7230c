# SPDX-License-Identifier: Apache-2.0
"""Would a later row have labelled the heads differently? Measured on the full cache's attention."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from headkv_mm.evaluation.prompts import Prompts

_NAME = "headkv_mm_evaluation"

TAUS = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95)


@dataclass
class _Watcher:
    """Counts in every layer, while the model reads, how many tokens its heads need.

    Attributes:
        ends: after which image rows, with the column where each of them ends.
        first: first column that counts.
        visible: [B, T] bool, False for padding.
        queries: newest queries that are averaged.
        shares: [taus] float64.
        found: for every row, a tensor per layer.
    """

    ends: dict[int, int]
    first: int
    visible: Tensor
    queries: int
    shares: Tensor
    found: dict[int, list[Tensor]] = field(default_factory=dict)

    def look(self, query: Tensor, key: Tensor, scale: float) -> None:
        """Count in one layer: query [B, H, T, D], key [B, G, T, D]."""
        groups = key.shape[1]
        for row, end in self.ends.items():
            begin = end - self.queries
            asked = query[:, :, begin:end].unflatten(1, (groups, -1)).double()  # [B, G, R, Q, D]
            # From the logits: heads that look at the prompt alone leave less than float32 can hold for the image.
            logits = asked @ key[:, :, None, self.first : end].double().transpose(-1, -2) * scale  # [B, G, R, Q, n]
            columns = torch.arange(end, device=key.device)
            later = columns[self.first :] > columns[begin:, None]  # [Q, n]
            hidden = later | ~self.visible[:, None, None, None, self.first : end]
            share = logits.masked_fill(hidden, float("-inf")).softmax(-1).mean((2, 3))  # [B, G, n]
            held = share.flip(-1).cumsum(-1)
            short = held[..., None] < self.shares * held[..., -1:, None]  # [B, G, n, taus]
            self.found.setdefault(row, []).append(short.sum(2) + 1)


def _watching_attention(module: Any, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    scale = kwargs.get("scaling")
    module.watcher.look(query, key, query.shape[-1] ** -0.5 if scale is None else scale)
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, *args, **kwargs)


def watching_copy(model: Any) -> Any:
    """A copy of the model for `tokens_needed`; the model itself stays as it is."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register(_NAME, _watching_attention)
    AttentionMaskInterface.register(_NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    twin = copy.deepcopy(model)
    twin.set_attn_implementation(_NAME)
    return twin


@torch.no_grad()
def tokens_needed(
    watching: Any,
    prompts: Prompts,
    tokens: Tensor,
    rows: Sequence[int],
    *,
    row: int,
    taus: Sequence[float] = TAUS,
    queries: int | None = None,
    include_condition: bool = False,
) -> dict[int, Tensor]:
    """Tokens, counted backward, that hold a share tau of a head's attention when an image row has just ended.

    This is the statistic by which HeadKV labels heads (arXiv 2605.20600; a head is local if it needs fewer tokens than
    its window has), at any row and with the full cache: attention of the row's queries to the image tokens so far,
    each query's softmax over them alone, averaged over the queries and over the query heads of a KV head. Conditional
    rows only.

    Args:
        watching: from `watching_copy`.
        prompts: of B images.
        tokens: int64 [B, N], the image that is read.
        rows: after which rows, counted from 1.
        row: image tokens per row.
        taus: shares.
        queries: newest queries that are averaged; None: those of the row.
        include_condition: take the softmax over the prompt too.

    Returns:
        For every row int64 [layers, B, KV heads, len(taus)].
    """
    columns = prompts.ids.shape[1]
    mask = torch.cat((prompts.mask, torch.ones_like(tokens)), 1)
    watcher = _Watcher(
        ends={number: columns + number * row for number in rows},
        first=0 if include_condition else columns,
        visible=mask.bool(),
        queries=queries or row,
        shares=torch.tensor(taus, dtype=torch.float64, device=tokens.device),
    )
    for module in watching.modules():
        module.watcher = watcher
    watching(input_ids=torch.cat((prompts.ids, tokens), 1), attention_mask=mask, use_cache=False, logits_to_keep=1)
    return {number: torch.stack(layers) for number, layers in watcher.found.items()}


def stability(early: Tensor, late: Tensor, window: int, taus: Sequence[float]) -> list[dict[str, float]]:
    """How labels of an early row hold up against those of a late row.

    Args:
        early, late: [layers, B, KV heads, len(taus)] from `tokens_needed`.
        window: tokens of the local window.
        taus: the shares.

    Returns:
        For every tau: share of local heads early and late, share of labels that the late row would have given
        differently, and that share among the early local and among the early global heads.
    """
    table = []
    for index, tau in enumerate(taus):
        before, after = early[..., index] < window, late[..., index] < window
        changed = before != after
        table.append(
            {
                "tau": tau,
                "local_early": _share(before),
                "local_late": _share(after),
                "changed": _share(changed),
                "changed_of_local": _share(changed[before]),
                "changed_of_global": _share(changed[~before]),
            }
        )
    return table


def _share(flags: Tensor) -> float:
    return float(flags.double().mean()) if flags.numel() else 0.0
