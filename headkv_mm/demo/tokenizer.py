# SPDX-License-Identifier: Apache-2.0
"""The closed vocabulary of captions and its transformers tokenizer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from headkv_mm.demo.scenes import BACKGROUNDS, COLOURS, MAX_OBJECTS, PLACES, SAME, SHAPES, Scene

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, NULL, BOS, BOI = "<pad>", "<null>", "<bos>", "<boi>"
WORDS: tuple[str, ...] = (PAD, NULL, BOS, BOI, ",", "on", SAME, *COLOURS, *BACKGROUNDS, *SHAPES, *PLACES)
MAX_PROMPT_LENGTH = 4 * MAX_OBJECTS + 3  # <bos>, three words per object and a comma between, "on" background, <boi>


def prompt_words(scene: Scene) -> list[str]:
    """All words of a scene's prompt, from `<bos>` to `<boi>`."""
    words = [BOS]
    for index, item in enumerate(scene.objects):
        words += [","] if index else []
        words += item.phrase.split()
    return [*words, "on", scene.background, BOI]


def build_tokenizer(first_id: int) -> PreTrainedTokenizerFast:
    """A word-level tokenizer that wraps captions in `<bos>` and `<boi>` and pads on the left.

    Args:
        first_id: id of the first word; the ids below belong to the image codes.

    Returns:
        The tokenizer; `padding="max_length"` pads to `MAX_PROMPT_LENGTH` columns.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    ids = {word: first_id + index for index, word in enumerate(WORDS)}
    backend = Tokenizer(models.WordLevel(ids))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(",", "isolated")]
    )
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A {BOI}", special_tokens=[(BOS, ids[BOS]), (BOI, ids[BOI])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        bos_token=BOS,
        extra_special_tokens={"null_token": NULL, "boi_token": BOI},
        padding_side="left",
        truncation_side="right",
        model_max_length=MAX_PROMPT_LENGTH,
        model_input_names=["input_ids", "attention_mask"],
    )
