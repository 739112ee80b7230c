# SPDX-License-Identifier: Apache-2.0
"""Makes the transformers Auto classes know the LlamaGen model, so that it loads without remote code."""

from __future__ import annotations


def register() -> None:
    """Register the configuration with `AutoConfig`; calling it again changes nothing.

    The model class follows by itself: making a `LlamaGenConfig` imports the model, which registers with
    `AutoModelForMultimodalLM`. So this function loads no modeling code and may run while transformers is being
    imported.
    """
    from transformers.models.auto.configuration_auto import AutoConfig

    from headkv_mm.llamagen.configuration import LlamaGenConfig

    AutoConfig.register(LlamaGenConfig.model_type, LlamaGenConfig, exist_ok=True)
