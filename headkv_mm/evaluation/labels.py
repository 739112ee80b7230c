# SPDX-License-Identifier: Apache-2.0
"""Would a later row have labelled the heads differently? Measured on the full cache's attention."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from headkv_mm.evaluation.prompts import Prompts

TAUS = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95)


def eager_copy(model: Any) -> Any:
    """A copy of the model that returns its attention weights; the model itself stays as it is."""
    twin = copy.deepcopy(model)
    twin.set_attn_implementation("eager")
    return twin


@torch.no_grad()
def tokens_needed(
    eager: Any,
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
    each query normalised over them, averaged over the queries and over the query heads of a KV head. Conditional rows
    only.

    Args:
        eager: from `eager_copy`.
        prompts: of B images.
        tokens: int64 [B, N], the image that is read.
        rows: after which rows, counted from 1.
        row: image tokens per row.
        taus: shares.
        queries: newest queries that are averaged; None: those of the row.
        include_condition: count attention to the prompt too.

    Returns:
        For every row int64 [layers, B, KV heads, len(taus)].
    """
    columns = prompts.ids.shape[1]
    attentions = eager(
        input_ids=torch.cat((prompts.ids, tokens), 1),
        attention_mask=torch.cat((prompts.mask, torch.ones_like(tokens)), 1),
        use_cache=False,
        output_attentions=True,
        logits_to_keep=1,
    ).attentions
    groups = eager.config.get_text_config().num_key_value_heads
    shares = torch.tensor(taus, dtype=torch.float64, device=tokens.device)
    found: dict[int, list[Tensor]] = {number: [] for number in rows}
    for attention in attentions:  # [B, H, P + N, P + N]
        for number in rows:
            end = columns + number * row
            seen = attention[:, :, end - (queries or row) : end, (0 if include_condition else columns) : end].double()
            share = (seen / seen.sum(-1, keepdim=True)).mean(2)  # [B, H, T]
            share = share.view(share.shape[0], groups, -1, share.shape[-1]).mean(2)  # [B, G, T]
            held = share.flip(-1).cumsum(-1)
            short = held[..., None] < shares * held[..., -1:, None]  # [B, G, T, taus]
            found[number].append(short.sum(2) + 1)
    return {number: torch.stack(layers) for number, layers in found.items()}


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
