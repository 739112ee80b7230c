# SPDX-License-Identifier: Apache-2.0
"""Text features as prompt embeddings."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from headkv_mm.llamagen.configuration import LlamaGenConfig


class TextProjection(nn.Module):
    """Brings a text encoder's features to the width of the blocks: two linear maps and a GELU (arXiv:2406.06525).

    Attributes:
        null_features: [P, feature_size], learned; they stand for a text in the unconditional prompt.
    """

    def __init__(self, config: LlamaGenConfig) -> None:
        """Allocate the weights for a model with `conditioning="text"`."""
        super().__init__()
        width, features = config.get_text_config().hidden_size, config.feature_size or 0
        self.fc1 = nn.Linear(features, width, bias=False)
        self.fc2 = nn.Linear(width, width, bias=False)
        self.null_features = nn.Parameter(torch.zeros(config.max_prompt_length, features))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Embeddings [B, P, hidden_size] of features [B, P, feature_size]."""
        hidden = functional.gelu(self.fc1(features.to(self.fc1.weight.dtype)), approximate="tanh")
        embeddings: torch.Tensor = self.fc2(hidden)
        return embeddings
