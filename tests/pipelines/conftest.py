# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from headkv_mm.demo.tokenizer import BOI, BOS, MAX_PROMPT_LENGTH, NULL, PAD, WORDS, build_tokenizer
from headkv_mm.llamagen import LlamaGenConfig, LlamaGenForConditionalGeneration
from headkv_mm.pipelines.text_to_image import TextToImagePipeline

CODES, GRID, PATCH = 30, 8, 2


@pytest.fixture(scope="session")
def tiny_config() -> LlamaGenConfig:
    ids = {word: CODES + index for index, word in enumerate(WORDS)}
    return LlamaGenConfig(
        text_config={
            "model_type": "llama",
            "vocab_size": CODES + len(WORDS),
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "initializer_range": 0.5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
            "bos_token_id": None,
            "eos_token_id": None,
        },
        image_height=GRID,
        image_width=GRID,
        codebook_size=CODES,
        max_prompt_length=MAX_PROMPT_LENGTH,
        patch_size=PATCH,
        pad_token_id=ids[PAD],
        bos_token_id=ids[BOS],
        boi_token_id=ids[BOI],
        null_token_id=ids[NULL],
    )


@pytest.fixture(scope="session")
def tiny_model(tiny_config: LlamaGenConfig) -> LlamaGenForConditionalGeneration:
    """Random weights; sharp enough that tokens depend on the prompt and on what the cache holds."""
    torch.manual_seed(0)
    model = LlamaGenForConditionalGeneration(tiny_config).eval()
    colours = torch.randint(0, 256, (CODES, 1, 1, 3), dtype=torch.uint8)
    model.patch_decoder.codebook.copy_(colours.expand(-1, PATCH, PATCH, -1))
    return model


@pytest.fixture(scope="session")
def tiny_folder(tiny_model: LlamaGenForConditionalGeneration, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model.save_pretrained(folder)
    build_tokenizer(CODES).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pipe(tiny_model: LlamaGenForConditionalGeneration) -> TextToImagePipeline:
    """The full cache unless a call says otherwise."""
    return TextToImagePipeline(model=tiny_model, device="cpu")


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without merges: one token per byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = {token: index for index, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    backend = Tokenizer(models.BPE(vocab=ids, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", ids["<s>"])])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="left"
    )


@pytest.fixture(scope="session")
def tiny_llama(tiny_tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Random weights; sharp enough that tokens depend on what the cache holds."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.5,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def tiny_llama_folder(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("models") / "llama"
    tiny_llama.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder
