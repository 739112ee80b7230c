# SPDX-License-Identifier: Apache-2.0
"""Positions on the image grid: rotary angles by row and column, and learned embeddings of the next cell."""

from __future__ import annotations

import torch
from torch import nn

from headkv_mm.llamagen.configuration import LlamaGenConfig


class AxialRotaryEmbedding(nn.Module):
    """Two-axis rotary angles from sequence positions; takes the place of Llama's own module.

    With P prompt columns, prompt position j lies at (j, j); image token i lies at (P + row, P + column). Without
    `prompt_rotary` the image token lies at (row, column), and the cosines and sines of prompts are zeros, which makes
    zeros of their queries and keys. The first half of the frequencies turns with the row, the second half with the
    column. The angles are computed in every forward pass: a buffer that is not saved would be lost by
    `from_pretrained`.
    """

    def __init__(self, config: LlamaGenConfig) -> None:
        """Take the sizes from `config`; there are no parameters."""
        super().__init__()
        text = config.get_text_config()
        self.prompt_length = config.max_prompt_length
        self.prompt_rotary = config.prompt_rotary
        self.image_width = config.image_width
        self.axis_frequencies = text.head_dim // 4
        self.theta = float((text.rope_parameters or {}).get("rope_theta", 10000.0))

    @torch.no_grad()
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines.

        Args:
            x: any tensor with the wanted dtype and device.
            position_ids: integers [B or 1, T], sequence positions.

        Returns:
            cos and sin, each [B or 1, T, head_dim] in the dtype of `x`.
        """
        image_index = (position_ids - self.prompt_length).clamp(min=0)
        # j for prompts, P for image tokens
        anchor = position_ids.clamp(max=self.prompt_length) if self.prompt_rotary else 0
        row = anchor + image_index // self.image_width
        column = anchor + image_index % self.image_width
        steps = torch.arange(self.axis_frequencies, device=x.device, dtype=torch.float32)
        frequencies = self.theta ** (-steps / self.axis_frequencies)  # [head_dim / 4]
        angles = torch.cat((row[..., None] * frequencies, column[..., None] * frequencies), dim=-1)
        angles = torch.cat((angles, angles), dim=-1)  # [B, T, head_dim]
        cosines, sines = angles.cos(), angles.sin()
        if not self.prompt_rotary:
            in_image = (position_ids >= self.prompt_length)[..., None]
            cosines, sines = cosines * in_image, sines * in_image
        return cosines.to(x.dtype), sines.to(x.dtype)


class LearnedPositions(nn.Module):
    """Learned embeddings that say which cell comes next.

    The input at position p predicts image token p - P + 1. From p = P - 1 on it gets the row and column embedding of
    that cell; positions below P get the embedding of their prompt slot.
    """

    def __init__(self, config: LlamaGenConfig) -> None:
        """Allocate the three tables."""
        super().__init__()
        width = config.get_text_config().hidden_size
        self.prompt_length = config.max_prompt_length
        self.image_width = config.image_width
        self.slots = nn.Embedding(config.max_prompt_length, width)
        self.rows = nn.Embedding(config.image_height + 1, width)  # one more: the row after the last token
        self.columns = nn.Embedding(config.image_width, width)

    def forward(self, position_ids: torch.Tensor) -> torch.Tensor:
        """Embeddings [B or 1, T, hidden_size] of sequence positions [B or 1, T]."""
        cell = position_ids - self.prompt_length + 1
        next_cell = cell.clamp(min=0)
        slots = self.slots(position_ids.clamp(max=self.prompt_length - 1))
        cells = self.rows(next_cell // self.image_width) + self.columns(next_cell % self.image_width)
        in_prompt = (position_ids < self.prompt_length)[..., None]
        predicts_cell = (cell >= 0)[..., None]
        result: torch.Tensor = slots * in_prompt + cells * predicts_cell
        return result
