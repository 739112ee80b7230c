# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from headkv_mm.evaluation.settings import EvaluationSettings


def small_model(seed: int = 0) -> Any:
    """A random model of the embedded world: its words, its 16x16 grid, but two thin layers with grouped heads."""
    from headkv_mm.demo.image_model import demo_config
    from headkv_mm.demo.patches import patch_dictionary
    from headkv_mm.llamagen import LlamaGenConfig, LlamaGenForConditionalGeneration

    content = demo_config().to_dict()
    content["text_config"] |= {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    torch.manual_seed(seed)
    model = LlamaGenForConditionalGeneration(LlamaGenConfig(**content)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                # Far from uniform attention and predictions, so that evictions matter.
                parameter.normal_(0, 1.5 / parameter.shape[1] ** 0.5 if "proj" in name else 0.7)
        model.patch_decoder.codebook.copy_(torch.from_numpy(patch_dictionary().codebook))
    return model


@pytest.fixture(scope="session")
def model() -> Any:
    return small_model()


SETTINGS = EvaluationSettings(
    methods=("none", "headkv", "streaming"),
    budgets=(1 / 8,),
    captions=4,
    batch_size=3,
    resamples=200,
    pictures=2,
)


@pytest.fixture(scope="session")
def evaluated(model: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A finished evaluation: its folder, and what results.json holds. Do not change it."""
    from headkv_mm.evaluation.report import evaluate

    folder = tmp_path_factory.mktemp("evaluated")
    return folder, evaluate(model, SETTINGS, folder, progress=False)
