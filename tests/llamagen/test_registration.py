# SPDX-License-Identifier: Apache-2.0
"""The model registers itself, whichever module is imported first."""

from __future__ import annotations

import subprocess
import sys

import pytest

FINISH = """
from headkv_mm.llamagen import LlamaGenConfig, LlamaGenForConditionalGeneration, register
register(); register()
from transformers import AutoConfig, AutoModelForMultimodalLM
config = AutoConfig.for_model("headkv_llamagen", image_height=2, image_width=2, codebook_size=8, max_prompt_length=4,
    text_config={"model_type": "llama", "vocab_size": 12, "hidden_size": 8, "intermediate_size": 8,
    "num_hidden_layers": 1, "num_attention_heads": 1})
assert type(config) is LlamaGenConfig
assert type(AutoModelForMultimodalLM.from_config(config)) is LlamaGenForConditionalGeneration
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "first",
    [
        "from headkv_mm.llamagen.modeling import LlamaGenForConditionalGeneration",
        "from headkv_mm.llamagen.configuration import LlamaGenConfig",
        "import headkv_mm; from transformers import LlamaModel",
        "import headkv_mm; from transformers import AutoModelForMultimodalLM",
        "import headkv_mm; from transformers import AutoConfig",
    ],
)
def test_any_order_of_imports(first: str) -> None:
    done = subprocess.run([sys.executable, "-c", first + FINISH], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
