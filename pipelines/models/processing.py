# SPDX-License-Identifier: Apache-2.0
"""Finding the tokenizer of a model that came as an object, and the text of a prompt in its conversation format."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def tokenizer_of(model: PreTrainedModel, tokenizer: Any, processor: Any, architecture: str) -> tuple[Any, Any]:
    """Tokenizer and processor: those given, else those in the folder that the model was loaded from.

    Returns:
        The tokenizer, which there always is, and the processor or None.

    Raises:
        ValueError: if there is no tokenizer.
    """
    folder = str(getattr(model, "name_or_path", "") or "")
    if tokenizer is None and processor is None and os.path.isdir(folder):
        from headkv_mm.pipelines.loading import load_processor

        processor = load_processor(folder)
    found = tokenizer if tokenizer is not None else getattr(processor, "tokenizer", None)
    if found is None:
        raise ValueError(
            f"this {architecture} model came without a processor: pass processor= (or tokenizer=), or the model's "
            "folder as the model"
        )
    return found, processor


def chat_text(prompt: str, template_owner: Any, tokenizer: Any) -> tuple[str, bool]:
    """The prompt as one turn of a conversation, if there is a template for that; else as it stands.

    Returns:
        The text, and whether the tokenizer still has to add its special tokens.
    """
    owner = next((item for item in (template_owner, tokenizer) if getattr(item, "chat_template", None)), None)
    if owner is None:
        return prompt, True
    turn = {"role": "user", "content": [{"type": "text", "text": prompt}]}
    text = str(owner.apply_chat_template([turn], add_generation_prompt=True, tokenize=False))
    bos = getattr(tokenizer, "bos_token", None)
    return text, not (bos and text.startswith(bos))
