# SPDX-License-Identifier: Apache-2.0
"""What holds for every test: no network, and GPU tests only where there is a GPU."""

from __future__ import annotations

import os
import sys

import pytest
from hypothesis import settings

# Shared machines are slow now and then; a slow example is not a wrong one.
settings.register_profile("headkv-mm", deadline=None)
settings.load_profile("headkv-mm")

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub


# A background job ignores Ctrl-C, and a child inherits that. Put right in the child and not by `preexec_fn`, which
# forks this process: one of its other threads may hold a lock then, and nothing ever frees the copy.
HEARS_CTRL_C = """
import runpy, signal
signal.signal(signal.SIGINT, signal.default_int_handler)
runpy.run_module("headkv_mm.cli", run_name="__main__", alter_sys=True)
"""


@pytest.fixture(scope="session")
def interruptible_command() -> list[str]:
    """Starts headkv-mm in a process that hears SIGINT; its arguments follow."""
    return [sys.executable, "-c", HEARS_CTRL_C]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips the tests marked `gpu` on a machine without a CUDA device."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def small_image_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model folder with random weights and a grid of 6x6 tokens, so that a run takes a moment only."""
    import torch

    from headkv_mm.demo.tokenizer import BOI, BOS, MAX_PROMPT_LENGTH, NULL, PAD, WORDS, build_tokenizer
    from headkv_mm.llamagen import LlamaGenConfig, LlamaGenForConditionalGeneration

    codes = 12
    ids = {word: codes + index for index, word in enumerate(WORDS)}
    config = LlamaGenConfig(
        text_config={
            "model_type": "llama",
            "vocab_size": codes + len(WORDS),
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "bos_token_id": None,
            "eos_token_id": None,
        },
        image_height=6,
        image_width=6,
        codebook_size=codes,
        max_prompt_length=MAX_PROMPT_LENGTH,
        patch_size=2,
        pad_token_id=ids[PAD],
        bos_token_id=ids[BOS],
        boi_token_id=ids[BOI],
        null_token_id=ids[NULL],
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    LlamaGenForConditionalGeneration(config).save_pretrained(folder)
    build_tokenizer(codes).save_pretrained(folder)
    return str(folder)
