# SPDX-License-Identifier: Apache-2.0
"""The rows of a generation's first forward: prompts, and behind them what guidance leads away from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from headkv_mm.llamagen.configuration import LlamaGenConfig
from headkv_mm.llamagen.text_features import TextProjection


@dataclass(frozen=True)
class PromptRows:
    """What the blocks read first.

    Attributes:
        inputs: `input_ids` [R, P] or `inputs_embeds` [R, P, D]; R = 2B with guidance, negative prompts last.
        mask: int64 [R, P], 0 at padding.
        images: B.
    """

    inputs: dict[str, torch.Tensor]
    mask: torch.Tensor
    images: int

    @property
    def device(self) -> torch.device:
        """Where the prompts are."""
        return self.mask.device


def class_ids(config: LlamaGenConfig, labels: Sequence[int] | torch.Tensor) -> torch.Tensor:
    """Ids int64 [B, 1] of class labels [B].

    Raises:
        ValueError: for a label out of range, or a model without classes.
    """
    if config.num_classes is None:
        raise ValueError(f"class_labels are for models with conditioning 'class', this one has {config.conditioning!r}")
    found = torch.as_tensor(labels)
    if found.dim() != 1 or not found.numel() or found.is_floating_point() or found.dtype is torch.bool:
        raise ValueError(f"class_labels must be a list of whole numbers, got {labels!r}")
    if not 0 <= int(found.min()) <= int(found.max()) < config.num_classes:
        raise ValueError(f"class labels must be in 0..{config.num_classes - 1}, got {found.tolist()}")
    return config.codebook_size + found.long()[:, None]


def id_rows(
    config: LlamaGenConfig,
    ids: torch.Tensor,
    mask: torch.Tensor | None,
    negative_ids: torch.Tensor | None,
    negative_mask: torch.Tensor | None,
    *,
    guided: bool,
) -> PromptRows:
    """Rows of prompts that are words or a class.

    Args:
        config: of the model.
        ids: integers [B, P].
        mask: [B, P]; by default the columns that hold the padding id are masked.
        negative_ids: [1 or B, P]; by default the unconditional prompt.
        negative_mask: like `mask`.
        guided: add the negative prompts.

    Raises:
        ValueError: for another shape, ids out of range, or padding elsewhere than on the left.
    """
    mask = _checked_ids(config, ids, mask)
    if not guided:
        return PromptRows({"input_ids": ids}, mask, len(ids))
    if negative_ids is None:
        negative_ids, negative_mask = _unconditional_prompt(config, ids)
    else:
        negative_mask = _checked_ids(config, negative_ids, negative_mask)
    batch = len(ids)
    if len(negative_ids) not in (1, batch):
        raise ValueError(f"expected 1 or {batch} negative prompts, got {len(negative_ids)}")
    rows = torch.cat((ids, negative_ids.to(ids.device).expand(batch, -1)))  # [2B, P]
    return PromptRows({"input_ids": rows}, torch.cat((mask, negative_mask.to(ids.device).expand(batch, -1))), batch)


def feature_rows(
    config: LlamaGenConfig,
    projection: TextProjection,
    features: torch.Tensor,
    mask: torch.Tensor | None,
    negative_features: torch.Tensor | None,
    negative_mask: torch.Tensor | None,
    *,
    guided: bool,
) -> PromptRows:
    """Rows of prompts that are features of a text encoder.

    Args:
        config: of the model.
        projection: the model's.
        features: [B, P, feature_size], the text in the last columns.
        mask: [B, P], 0 at padding; by default there is none.
        negative_features: [1 or B, P, feature_size]; by default the learned null features, under the prompts' mask.
        negative_mask: like `mask`.
        guided: add the negative prompts.

    Raises:
        ValueError: for another shape, or padding elsewhere than on the left.
    """
    mask = _checked_features(config, features, mask)
    batch = len(features)
    if guided and negative_features is None:
        negative_features, negative_mask = projection.null_features[None], mask
    elif guided and negative_features is not None:
        negative_mask = _checked_features(config, negative_features, negative_mask)
        if len(negative_features) not in (1, batch):
            raise ValueError(f"expected 1 or {batch} negative prompts, got {len(negative_features)}")
    # The published models were trained with zeros at padding; nothing sees them.
    embeddings = projection(features * mask[..., None].to(features.dtype))  # [B, P, D]
    if negative_features is None or negative_mask is None:
        return PromptRows({"inputs_embeds": embeddings}, mask, batch)
    away = projection(negative_features.to(features.device)).expand(batch, -1, -1)
    return PromptRows(
        {"inputs_embeds": torch.cat((embeddings, away))},  # [2B, P, D]
        torch.cat((mask, negative_mask.to(mask.device).expand(batch, -1))),
        batch,
    )


def _checked_ids(config: LlamaGenConfig, ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The prompts' mask [B, P], after checking ids and mask."""
    wanted = config.max_prompt_length
    if ids.dim() != 2 or ids.shape[0] < 1 or ids.shape[1] != wanted:
        raise ValueError(
            f"prompts must have shape [batch, {wanted}], got {tuple(ids.shape)}: pad them on the left, "
            'for example with tokenizer(captions, padding="max_length", return_tensors="pt")'
        )
    words = config.get_text_config().vocab_size
    if not 0 <= int(ids.min()) <= int(ids.max()) < words:
        raise ValueError(f"prompt ids must be in 0..{words - 1}")
    if mask is None:
        return torch.ones_like(ids) if config.pad_token_id is None else (ids != config.pad_token_id).long()
    return _checked_mask(mask, ids)


def _checked_features(config: LlamaGenConfig, features: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The features' mask [B, P], after checking both."""
    wanted = (config.max_prompt_length, config.feature_size)
    if features.dim() != 3 or features.shape[0] < 1 or tuple(features.shape[1:]) != wanted:
        raise ValueError(
            f"text features must have shape [batch, {wanted[0]}, {wanted[1]}], got {tuple(features.shape)}: pad them "
            "on the left"
        )
    if mask is None:
        return features.new_ones(features.shape[:2], dtype=torch.long)
    return _checked_mask(mask, features[..., 0])


def _checked_mask(mask: torch.Tensor, prompts: torch.Tensor) -> torch.Tensor:
    """The mask as int64 [B, P] on the prompts' device."""
    if mask.shape != prompts.shape:
        raise ValueError(f"attention_mask must have the prompts' shape {tuple(prompts.shape)}, got {tuple(mask.shape)}")
    mask = mask.to(device=prompts.device, dtype=torch.long)
    if bool((mask[:, -1] != 1).any()) or bool((mask[:, 1:] < mask[:, :-1]).any()):
        raise ValueError("prompts must be padded on the left: every row of attention_mask is zeros, then ones")
    return mask


def _unconditional_prompt(config: LlamaGenConfig, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask [1, P] of the prompt without a caption: the null class, or `<bos> <null> <boi>`."""
    words: list[int | None] = [config.null_token_id]
    if config.num_classes is None:
        bos = config.bos_token_id
        words = [bos if isinstance(bos, int) else None, *words, config.boi_token_id]
    known = [word for word in words if word is not None]
    if len(known) < len(words):
        raise ValueError(
            "guidance needs negative_prompt_ids: this config has no bos, null and boi ids for the unconditional prompt"
        )
    padding = config.max_prompt_length - len(known)
    # Any id will do under the mask if the config names no padding id.
    row = [config.pad_token_id or 0] * padding + known
    return ids.new_tensor([row]), ids.new_tensor([[0] * padding + [1] * len(known)])
