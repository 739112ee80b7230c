# SPDX-License-Identifier: Apache-2.0
"""Image models with random weights for `image_throughput.py`: how they are built, prompted, driven and checked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import StaticCache

from headkv_mm import Compression, HeadKVCache, ImageGrid
from headkv_mm.pipelines.models import adapter_class_for
from headkv_mm.pipelines.models.base import EncodedPrompts, GeneratedTokens, ImageModelAdapter, Sampling
from headkv_mm.shapes import Shape
from headkv_mm.weight_bytes import model_class


class RandomWords:
    """Stands for a tokenizer or a processor: prompts of a given length."""

    boi_token_id, bos_token_id, pad_token_id, downsample_ratio = 10, 11, 12, 8

    def __init__(self, length: int, grid: tuple[int, int]) -> None:
        self.length, self.size = length, grid

    def get_vocab(self) -> dict[str, int]:
        """No word that is known."""
        return {}

    @staticmethod
    def words(count: int) -> list[int]:
        """Ids of words that every model has."""
        return [13 + place % 7 for place in range(count)]

    def __call__(self, text: str | list[str], **_: Any) -> dict[str, Any]:
        """Ids, and what Emu3's processor says of the image."""
        if isinstance(text, str):
            return {"input_ids": [self.bos_token_id, *self.words(self.length - 2)]}  # one is added: it begins the image
        ids = torch.tensor([self.words(self.length)] * len(text))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "image_sizes": [self.size]}


@dataclass
class Bench:
    """A model and how it is driven."""

    shape: Shape
    model: Any
    adapter: ImageModelAdapter
    guidance: float

    @property
    def grid(self) -> ImageGrid:
        """The shape's image; the adapter's own may be another one that the architecture draws."""
        assert self.shape.grid is not None
        return self.shape.grid

    def prompts(self, batch: int) -> EncodedPrompts:
        """Prompts for a batch, on the model's device."""
        device = self.model.device
        if self.model.config.model_type == "headkv_llamagen":
            if self.model.config.conditioning != "class":
                raise SystemExit("text-conditional LlamaGen has the same blocks: measure its class-conditional shape")
            ids = torch.arange(batch, device=device)[:, None] + self.model.config.codebook_size  # [B, 1]
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            return EncodedPrompts(inputs, torch.ones(batch, dtype=torch.long), self.grid)
        encoded = self.adapter.encode(["words"] * batch, grid=self.grid)
        moved = {name: tensor.to(device) for name, tensor in encoded.inputs.items()}
        return EncodedPrompts(moved, encoded.condition_lengths, encoded.grid, encoded.prompts)

    def ours(self, batch: int, compression: Compression) -> GeneratedTokens:
        """Our loop."""
        sampling = Sampling(guidance_scale=self.guidance, do_sample=False, temperature=1.0, top_k=0, top_p=1.0)
        with torch.no_grad():
            return self.adapter.generate(
                self.prompts(batch), sampling=sampling, seeds=list(range(batch)), compression=compression
            )

    def own(self, batch: int) -> Callable[[], GeneratedTokens] | None:
        """The model's own loop with its own cache; None if our adapter runs just that."""
        config, inputs = self.model.config, self.prompts(batch).inputs
        greedy = {"guidance_scale": self.guidance, "do_sample": False}
        if config.model_type == "headkv_llamagen":
            # Its published code has a static cache of full length, and attends over all of it at every step.
            def run() -> GeneratedTokens:
                length = config.max_prompt_length + config.num_image_tokens
                cache = StaticCache(config=config.get_text_config(decoder=True), max_cache_len=length)
                return GeneratedTokens(self.model.generate(**inputs, **greedy, past_key_values=cache), [cache])

            return run
        if config.model_type == "janus":
            names = ("input_ids", "attention_mask")

            def run() -> GeneratedTokens:
                kept = {name: inputs[name] for name in names}
                return GeneratedTokens(self.model.generate(**kept, **greedy, generation_mode="image"))

            return run
        return None


def build(shape: Shape, layers: int | None, device: str, dtype: torch.dtype, guidance: float) -> Bench:
    """The model with random weights, and its adapter."""
    assert shape.grid is not None
    torch.manual_seed(0)
    config = shape.config(layers=layers, dtype=dtype)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = model_class(config)(config).eval()
    finally:
        torch.set_default_dtype(before)
    own = model.generation_config
    own.bos_token_id, own.pad_token_id = RandomWords.bos_token_id, RandomWords.pad_token_id
    own.generation_kwargs = {"boi_token_id": RandomWords.boi_token_id}
    words = RandomWords(shape.condition, (shape.grid.height, shape.grid.width))
    kind = adapter_class_for(config)
    nothing: Any = (lambda codes: codes) if kind.takes_image_decoder else None  # no picture is made
    return Bench(shape, model, kind(model, words, words, nothing), guidance)


def gate(small: Bench, compressions: list[Compression]) -> None:
    """Refuse to time code that is wrong.

    Raises:
        SystemExit: if a budget of everything changes tokens, or compressed attention its results.
    """
    everything = small.ours(1, Compression(compressions[0].method, budget=1.0)).tokens
    if not torch.equal(everything, small.ours(1, Compression("none")).tokens):
        raise SystemExit("gate failed: a budget of 100 % does not give the tokens of the full cache; nothing is timed")
    text, decoder = small.model.config.get_text_config(decoder=True), small.model.get_decoder()
    grid = small.grid
    tolerance = 1e-4 if small.model.dtype == torch.float32 else 3e-2
    generator = torch.Generator().manual_seed(0)
    steps = min(2 * grid.row_stride, 64)
    embeddings = torch.randn(2, 8 + steps, text.hidden_size, generator=generator).to(
        small.model.device, small.model.dtype
    )
    (projection,) = (module for name, module in decoder.named_modules() if name.endswith("self_attn.o_proj"))
    for compression in compressions:
        caches = (
            HeadKVCache(small.model, "none", image_grid=grid),
            HeadKVCache(small.model, compression, image_grid=grid),
        )
        for step in range(steps):
            part = embeddings[:, :8] if step == 0 else embeddings[:, 7 + step : 8 + step]  # [2, T, hidden]
            full, ours = (attention_of(decoder, projection, part, cache) for cache in caches)
            error = float((full - ours).abs().max() / full.abs().max())
            if not error <= tolerance:
                raise SystemExit(f"gate failed: {compression} is off by {error:.1e} before evicting; nothing is timed")


def attention_of(decoder: Any, projection: torch.nn.Module, embeddings: torch.Tensor, cache: Any) -> torch.Tensor:
    """What attention hands on, [B, T, H * D], of new columns on a cache."""
    seen: list[torch.Tensor] = []
    hook = projection.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    try:
        with torch.no_grad():
            decoder(inputs_embeds=embeddings, past_key_values=cache)
    finally:
        hook.remove()
    return seen[0]
