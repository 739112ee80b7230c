# SPDX-License-Identifier: Apache-2.0
"""What a model computed while it drew, and the same run again on a full cache with the evicted entries masked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from headkv_mm import HeadKVCache
from headkv_mm.attach import _backbone
from headkv_mm.image_sampling import TokenDrawer


@dataclass
class Trace:
    """One entry for every forward pass of the decoder, guidance's own passes among them.

    Attributes:
        logits: [B, V] of the last token.
        positions: what the rotary module got.
        attended: what a compressed cache attended to, [layer][row][head] positions; None for prompts.
        drawn: tokens [B] of every step, as the drawer gave them.
    """

    logits: list[Tensor] = field(default_factory=list)
    positions: list[Tensor] = field(default_factory=list)
    attended: list[list[list[list[Tensor]]] | None] = field(default_factory=list)
    drawn: list[Tensor] = field(default_factory=list)


@contextmanager
def tracing(model: PreTrainedModel, head: nn.Module, *, again: Trace | None = None) -> Iterator[Trace]:
    """Record what `model` does inside.

    Args:
        model: the model that draws.
        head: the module whose output are the logits.
        again: draw the tokens of this trace, whatever the scores.
    """
    trace, backbone = Trace(), _backbone(model)
    original = TokenDrawer.__call__

    def draw(self: TokenDrawer, step: int, scores: Tensor) -> Tensor:
        tokens = original(self, step, scores) if again is None else again.drawn[len(trace.drawn)]
        trace.drawn.append(tokens)
        return tokens

    def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        cache, embeds = kwargs["past_key_values"], kwargs.get("inputs_embeds", kwargs.get("input_ids"))
        if not isinstance(cache, HeadKVCache) or embeds.shape[1] > 1 or not cache.get_seq_length():
            trace.attended.append(None)
            return
        layers = []
        for index, layer in enumerate(cache.compressed_layers):
            kept = cache.kept_positions(index)
            new = [seen.reshape(1) for seen in torch.tensor(_seen(layer, kept))]
            layers.append([[torch.cat([head.cpu(), new[row]]) for head in heads] for row, heads in enumerate(kept)])
        trace.attended.append(layers)

    def rotate(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        trace.positions.append(kwargs.get("position_ids", args[-1] if len(args) > 1 else None).clone())

    with ExitStack() as stack:
        for hook in (
            backbone.register_forward_pre_hook(before, with_kwargs=True),
            backbone.rotary_emb.register_forward_pre_hook(rotate, with_kwargs=True),
            head.register_forward_hook(lambda module, args, output: trace.logits.append(_of_last(output).clone())),
        ):
            stack.callback(hook.remove)
        stack.enter_context(mock.patch.object(TokenDrawer, "__call__", draw))
        yield trace


def masked_again(
    model: PreTrainedModel, head: nn.Module, trace: Trace, pads: list[list[int]], run: Callable[[], object]
) -> Trace:
    """The run of `trace` on full caches in which every row and head sees only what it saw then.

    Args:
        model, head: see `tracing`.
        trace: of the compressed run.
        pads: padding columns of each row, for every cache of the run in the order of their forward passes.
        run: does what was traced, without compression.
    """
    text_config = model.config.get_text_config(decoder=True)
    before = text_config._attn_implementation
    with tracing(model, head, again=trace) as found:

        def attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
            batch, heads, tokens, _ = query.shape
            group, columns = heads // key.shape[1], key.shape[2]
            if attention_mask is None:
                attention_mask = torch.ones(batch, 1, tokens, columns, dtype=torch.bool).tril(columns - tokens)
            allowed = attention_mask.expand(batch, heads, tokens, columns).clone()
            call = len(found.attended) - 1
            sets = trace.attended[call]
            if sets is not None:
                for row in range(batch):
                    for kv_head in range(key.shape[1]):
                        kept = torch.zeros(columns, dtype=torch.bool)
                        kept[sets[module.layer_idx][row][kv_head] + pads[call % len(pads)][row]] = True
                        allowed[row, kv_head * group : (kv_head + 1) * group] &= kept
            scores = query @ key.repeat_interleave(group, 1).transpose(-1, -2) * scaling
            weights = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min).softmax(-1)
            return (weights @ value.repeat_interleave(group, 1)).transpose(1, 2).contiguous(), None

        AttentionInterface.register("oracle", attention)
        AttentionMaskInterface.register("oracle", sdpa_mask)
        text_config._attn_implementation = "oracle"
        try:
            run()
        finally:
            text_config._attn_implementation = before
    return found


def largest_difference(ours: Trace, theirs: Trace) -> float:
    """Largest difference of two runs' logits."""
    assert len(ours.logits) == len(theirs.logits) > 1
    return max(float((a - b).abs().max()) for a, b in zip(ours.logits, theirs.logits))


def _seen(layer: Any, kept: list[list[Tensor]]) -> list[int]:
    """Tokens that each row has seen, padding not counted."""
    return [max(int(head.max()) for head in heads) + 1 for heads in kept]


def _of_last(output: Tensor) -> Tensor:
    """[B, V] of [B, T, V], or of [B, V] where the model has taken the last token already."""
    return output[:, -1] if output.dim() == 3 else output
