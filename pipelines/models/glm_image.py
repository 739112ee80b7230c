# SPDX-License-Identifier: Apache-2.0
"""Adapter for GLM-Image: an autoregressive stage whose tokens a diffusers pipeline turns into pictures."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from functools import partial
from threading import Lock
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch

from headkv_mm.pipelines.models.base import EncodedPrompts, GeneratedTokens, ImageModelAdapter, Sampling
from headkv_mm.pipelines.models.special_tokens import without_special_tokens

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PreTrainedConfig, PreTrainedModel

    from headkv_mm.compression import Compression
    from headkv_mm.image_grid import ImageGrid

_PIXELS = 32  # of a picture's side that one token stands for
_UPSAMPLED = 2  # the diffusion stage reads every token twice in both directions
_SIDES = {"target_h": 1152, "target_w": 768}  # of the picture that the processor asks for by default
_SAMPLING = {"do_sample": True, "temperature": 1.0, "top_k": 50, "top_p": 1.0}  # transformers' own defaults
_SPECIAL = ("image_token", "grid_bos_token", "grid_eos_token", "bos_token")

# The model class notes positions of the image in progress on the module, so two runs of one model must not overlap.
_TURNS: WeakKeyDictionary[Any, Lock] = WeakKeyDictionary()
_TURNS_LOCK = Lock()


class GlmImageAdapter(ImageModelAdapter):
    """The autoregressive stage of GLM-Image, which has no guidance, with two KV heads.

    The model first draws a small preview, which counts as condition, then the image. Runs of one model take turns.

    `image_decoder` is the `GlmImagePipeline`, or a `functools.partial` of it with further arguments of its call, such
    as `num_inference_steps` and `guidance_scale` of the diffusion stage.
    """

    architecture = "GLM-Image"
    needs_processor = True
    takes_image_decoder = True

    def __init__(
        self, model: PreTrainedModel, tokenizer: Any = None, processor: Any = None, image_decoder: Any = None
    ) -> None:
        """Bind the model, its processor and the diffusers pipeline, which moves to the model's device.

        Raises:
            ValueError: if one of them is missing.
        """
        super().__init__(model, tokenizer, processor, image_decoder)
        if processor is None or image_decoder is None:
            raise ValueError(
                "a GLM-Image model draws with its processor and with the diffusion stage beside it: give the whole "
                "GlmImagePipeline or its folder as model"
            )
        self._decoder, self._decoder_arguments = _unpacked(image_decoder)
        if not hasattr(self._decoder, "vision_language_encoder"):
            raise ValueError(f"image_decoder must be a GlmImagePipeline, got {type(self._decoder).__name__}")
        if not _is_placed(self._decoder):
            self._decoder.to(model.device)
        self._codes = torch.arange(model.config.vq_config.num_embeddings)
        height, width = (getattr(processor, name, pixels) for name, pixels in _SIDES.items())
        self._own_grid = self._sized_grid(height // _PIXELS, width // _PIXELS)

    @classmethod
    def recognises(cls, config: PreTrainedConfig) -> bool:
        """Whether `config` is a `GlmImageConfig`."""
        return getattr(config, "model_type", None) == "glm_image"

    @property
    def grid(self) -> ImageGrid:
        """What the processor asks for by default: 36x24 tokens, a picture of 1152x768."""
        return self._own_grid

    def check_grid(self, grid: ImageGrid) -> ImageGrid:
        """Any height and width; the size of the preview follows from them.

        Raises:
            ValueError: if the grid has newlines or another start, or is so narrow that no preview is left.
        """
        wanted = self._sized_grid(grid.height, grid.width)
        if grid.start not in (0, wanted.start) or grid.row_stride != grid.width:
            raise ValueError(
                f"GLM-Image writes no newlines, and its preview has a size of its own: "
                f"ask for ImageGrid({grid.height}, {grid.width})"
            )
        if not wanted.start:
            raise ValueError(
                f"GLM-Image has no preview for an image of {grid.height}x{grid.width} tokens: ask for one less narrow"
            )
        return wanted

    def check_prompt(self, prompt: str) -> str:
        """The prompt as it stands.

        Raises:
            ValueError: if it holds one of the tokens that the processor writes.
        """
        return without_special_tokens(prompt, self.processor, _SPECIAL)

    def effective_sampling(self, sampling: Sampling) -> Sampling:
        """`sampling`, then the model's generation config, then transformers' defaults, as the stock pipeline samples.

        Raises:
            ValueError: if guidance is asked for.
        """
        if sampling.guidance_scale not in (None, 1):
            raise ValueError(
                "GLM-Image draws its tokens without guidance: leave guidance_scale out; that of the diffusion stage is "
                "image_decoder=functools.partial(glm_image_pipeline, guidance_scale=...)"
            )
        config = self.model.generation_config
        own = {name: value for name in _SAMPLING if (value := getattr(config, name, None)) is not None}
        # The stock pipeline samples whatever the generation config says.
        return sampling.with_defaults(**{**_SAMPLING, **own, "do_sample": True, "guidance_scale": 1.0})

    def encode(
        self, prompts: Sequence[str], negative_prompt: str | None = None, grid: ImageGrid | None = None
    ) -> EncodedPrompts:
        """Ids and mask [B, P], padded on the left, and the sizes of image and preview."""
        grid = grid or self.grid
        inputs = self._inputs(list(prompts), grid.height, grid.width)
        return EncodedPrompts(inputs, inputs["attention_mask"].sum(dim=1), grid, tuple(prompts))

    def generate(
        self,
        prompts: EncodedPrompts,
        *,
        sampling: Sampling,
        seeds: Sequence[int],
        compression: Compression,
        on_token: Callable[[], None] | None = None,
    ) -> GeneratedTokens:
        """Run the model's stock `generate`; one run of a model at a time."""
        from headkv_mm.image_sampling import TokenDrawer
        from headkv_mm.pipelines.models import stock_loop

        grid, ids = prompts.grid, prompts.inputs["input_ids"]
        codes, steps = self._codes.to(ids.device), grid.start + grid.tokens
        draw = stock_loop.DrawTokens(
            ids.shape[1],
            lambda step: codes,
            TokenDrawer(
                seeds,
                steps,
                do_sample=bool(sampling.do_sample),
                temperature=sampling.temperature or 1.0,
                top_k=sampling.top_k or 0,
                top_p=sampling.top_p or 1.0,
            ),
            on_token,
        )
        with _turn(self.model):
            tokens, cache = stock_loop.generate_tokens(
                self.model,
                prompts.inputs,
                steps=steps,
                processors=[draw],
                cache=self.new_cache(compression, grid) if compression.resolve().compresses else None,
            )
        return GeneratedTokens(tokens[:, grid.start :], [cache])

    def decode(self, tokens: torch.Tensor, prompts: EncodedPrompts, seeds: Sequence[int]) -> list[Image]:
        """RGB pictures from the diffusion stage, each on its own: in a batch they would pad each other's texts."""
        # A copy, because a call notes its schedule and settings on the pipeline; the modules are shared.
        decoder = copy.copy(self._decoder)
        decoder.scheduler = copy.deepcopy(self._decoder.scheduler)
        decoder.set_progress_bar_config(disable=True)
        grid, images = prompts.grid, []
        for prompt, row, seed in zip(prompts.prompts, tokens, seeds, strict=True):
            prior = row.view(grid.height, grid.width)
            prior = prior.repeat_interleave(_UPSAMPLED, 0).repeat_interleave(_UPSAMPLED, 1)
            made = decoder(
                prompt=prompt,
                height=grid.height * _PIXELS,
                width=grid.width * _PIXELS,
                prior_token_ids=prior.reshape(1, -1).to(decoder.transformer.device),
                **{"generator": torch.Generator().manual_seed(seed), **self._decoder_arguments},
            )
            images.append(made.images[0])
        return images

    def _sized_grid(self, height: int, width: int) -> ImageGrid:
        """The grid with what the processor makes of the preview."""
        from headkv_mm.image_grid import ImageGrid

        _, (_, *preview) = self._inputs(["a"], height, width)["image_grid_thw"].tolist()
        return ImageGrid(height, width, start=preview[0] * preview[1])

    def _inputs(self, prompts: list[str], height: int, width: int) -> dict[str, Any]:
        """What the stock pipeline makes of prompts: chat template, sizes, padding on the left."""
        messages = [[{"role": "user", "content": [{"type": "text", "text": prompt}]}] for prompt in prompts]
        processing = {
            "padding": True,
            "padding_side": "left",
            "target_h": height * _PIXELS,
            "target_w": width * _PIXELS,
        }
        apply = self.processor.apply_chat_template
        # Newer transformers want these apart from what the template gets.
        apart = "processor_kwargs" in inspect.signature(apply).parameters
        arguments: dict[str, Any] = {"processor_kwargs": processing} if apart else processing
        return dict(apply(messages, tokenize=True, return_dict=True, return_tensors="pt", **arguments))


def _unpacked(decoder: Any) -> tuple[Any, dict[str, Any]]:
    """The diffusers pipeline, and further arguments of its call."""
    return (decoder.func, dict(decoder.keywords)) if isinstance(decoder, partial) else (decoder, {})


def _turn(model: PreTrainedModel) -> Lock:
    """The lock of a model."""
    with _TURNS_LOCK:
        return _TURNS.setdefault(model, Lock())


def _is_placed(decoder: Any) -> bool:
    """Whether accelerate decides where the parts of a diffusers pipeline are."""
    parts = [part for part in decoder.components.values() if isinstance(part, torch.nn.Module)]
    return getattr(decoder, "hf_device_map", None) is not None or any(hasattr(part, "_hf_hook") for part in parts)
