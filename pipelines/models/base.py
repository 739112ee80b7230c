# SPDX-License-Identifier: Apache-2.0
"""What a pipeline needs to know about an image model: one adapter class per architecture."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PreTrainedConfig, PreTrainedModel

    from headkv_mm.compression import Compression
    from headkv_mm.image_grid import ImageGrid
    from headkv_mm.image_sampling import TokenDrawer


@dataclass(frozen=True)
class Sampling:
    """How image tokens are drawn. None means what the model's generation config says.

    Attributes:
        guidance_scale: strength of classifier-free guidance, 1 for none.
        do_sample: draw tokens; if False take the best one.
        temperature: divides the scores before drawing.
        top_k: draw from the k best tokens only, 0 for all.
        top_p: draw from the smallest set of tokens that holds this probability.

    Raises:
        ValueError: for a value out of range.
        TypeError: for a value that is no number.
    """

    guidance_scale: float | None = None
    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        for name in ("guidance_scale", "temperature", "top_k", "top_p"):
            value = getattr(self, name)
            wanted = int if name == "top_k" else (int, float)
            if value is not None and (isinstance(value, bool) or not isinstance(value, wanted)):
                raise TypeError(f"{name} must be {'an integer' if name == 'top_k' else 'a number'}, got {value!r}")
        if self.guidance_scale is not None and not 1 <= self.guidance_scale < float("inf"):
            raise ValueError(f"guidance_scale must be at least 1 (1 means no guidance), got {self.guidance_scale}")
        if self.temperature is not None and not 0 < self.temperature < float("inf"):
            raise ValueError(
                f"temperature must be above 0, got {self.temperature}: do_sample=False takes the best token"
            )
        if self.top_k is not None and self.top_k < 0:
            raise ValueError(f"top_k must be at least 0 (0 means all tokens), got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")

    def with_defaults(self, **defaults: Any) -> Sampling:
        """These settings, with `defaults` where they say nothing."""
        return replace(self, **{name: value for name, value in defaults.items() if getattr(self, name) is None})

    def completed(self, generation_config: Any, **defaults: Any) -> Sampling:
        """These settings; where they say nothing what a model's generation config says; else `defaults`.

        Without `defaults`: no guidance, and tokens drawn from the whole distribution.
        """
        plain = {"guidance_scale": 1.0, "do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, **defaults}
        own = {name: value for name in plain if (value := getattr(generation_config, name, None)) is not None}
        return self.with_defaults(**{**plain, **own})

    def drawer(self, seeds: Sequence[int], steps: int) -> TokenDrawer:
        """What draws the tokens of one run with these settings, which must be complete."""
        from headkv_mm.image_sampling import TokenDrawer

        names = ("do_sample", "temperature", "top_k", "top_p")
        return TokenDrawer(seeds, steps, **{name: getattr(self, name) for name in names})

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain numbers."""
        return asdict(self)


@dataclass(frozen=True)
class EncodedPrompts:
    """Prompts as the model reads them.

    Attributes:
        inputs: keyword arguments for the model, tensors with one row per image.
        condition_lengths: int64 [B], how many positions of each row come before what is generated, padding not
            counted.
        grid: the image that will be drawn.
        prompts: the prompts themselves, for models whose pictures need them again.
    """

    inputs: dict[str, Any]
    condition_lengths: torch.Tensor
    grid: ImageGrid
    prompts: tuple[Any, ...] = ()


@dataclass(frozen=True)
class GeneratedTokens:
    """What a run gave.

    Attributes:
        tokens: int64 [B, grid.tokens], image tokens in raster order, newline tokens included; what comes before the
            image (`grid.start` tokens) is left out.
        caches: the KV caches of the run, still full. Row b of the first one belongs to image b; guidance adds rows
            behind them, or a second cache.
    """

    tokens: torch.Tensor
    caches: list[Any] = field(default_factory=list)


class ImageModelAdapter(ABC):
    """Drives one architecture of autoregressive image models.

    A subclass says which configurations it knows, how prompts become inputs, how its model generates tokens on a
    given cache, and how tokens become pictures. It holds no state of a run, so one adapter serves several threads.

    Attributes:
        architecture: name for messages.
        needs_processor: the pipeline must load the model's processor (tokenizer and image processor in one).
        takes_image_decoder: pictures come from something beside the model (`image_decoder=` of the pipeline).
        unused_tensors: beginnings of names of tensors that published checkpoints hold and transformers' class does not.
        text_encoder: the model that reads the prompts, where there is one beside the image model.
    """

    architecture: ClassVar[str]
    needs_processor: ClassVar[bool] = False
    takes_image_decoder: ClassVar[bool] = False
    unused_tensors: ClassVar[tuple[str, ...]] = ()
    text_encoder: Any = None

    def __init__(
        self, model: PreTrainedModel, tokenizer: Any = None, processor: Any = None, image_decoder: Any = None
    ) -> None:
        """Bind a loaded model and what came with it.

        Raises:
            ValueError: if something is missing, or an image decoder comes with a model that has its own.
        """
        if image_decoder is not None and not self.takes_image_decoder:
            raise ValueError(
                f"{self.architecture} models turn tokens into pictures themselves: leave image_decoder out"
            )
        self.model = model
        self.tokenizer = tokenizer
        self.processor = processor
        self.image_decoder = image_decoder

    @classmethod
    @abstractmethod
    def recognises(cls, config: PreTrainedConfig) -> bool:
        """Whether this adapter drives models with `config`."""

    @property
    @abstractmethod
    def grid(self) -> ImageGrid:
        """Where the image lies in what the model generates, if the user asks for no other grid."""

    @abstractmethod
    def check_prompt(self, prompt: str) -> str:
        """The prompt as the model wants it.

        Raises:
            ValueError: in one line, what the model cannot read and what it can.
        """

    @abstractmethod
    def effective_sampling(self, sampling: Sampling) -> Sampling:
        """`sampling` with the model's defaults where it says nothing."""

    @abstractmethod
    def encode(
        self, prompts: Sequence[str], negative_prompt: str | None = None, grid: ImageGrid | None = None
    ) -> EncodedPrompts:
        """Inputs for one image per prompt; `prompts` went through `check_prompt`, `grid` through `check_grid`."""

    @abstractmethod
    def generate(
        self,
        prompts: EncodedPrompts,
        *,
        sampling: Sampling,
        seeds: Sequence[int],
        compression: Compression,
        on_token: Callable[[], None] | None = None,
    ) -> GeneratedTokens:
        """Generate one image per row.

        Args:
            prompts: what `encode` gave, on the model's device.
            sampling: complete settings.
            seeds: one per image. An image depends on its own seed only, not on the batch.
            compression: how the KV cache is kept.
            on_token: called after every step, with one more token of every image done.
        """

    @abstractmethod
    def decode(self, tokens: torch.Tensor, prompts: EncodedPrompts, seeds: Sequence[int]) -> list[Image]:
        """RGB pictures of image tokens int64 [B, grid.tokens].

        Args:
            tokens: what `generate` gave.
            prompts: what the tokens were made from.
            seeds: one per image, for decoders that draw random numbers.
        """

    def label_prompts(self, labels: Sequence[int]) -> list[Any]:
        """What stands for class labels among the prompts, for models that draw classes.

        Raises:
            ValueError: for a label out of range, or a model without classes.
        """
        raise ValueError(f"{self.architecture} models draw texts, not classes: give prompts in place of class_labels")

    def feature_prompts(self, features: Any, mask: torch.Tensor | None) -> list[Any]:
        """What stands for a text encoder's features among the prompts, for models that read those.

        Raises:
            ValueError: for another shape, or a model that reads no features.
        """
        raise ValueError(f"{self.architecture} models read no text features: leave features out")

    def bind_text_encoder(self, encoder: Any) -> None:
        """Read prompts with a text encoder, for models that need one beside them.

        Raises:
            ValueError: if it does not fit, or the model needs none.
        """
        raise ValueError(f"{self.architecture} models read prompts without a text encoder: leave text_encoder out")

    def sampling_for(self, sampling: Sampling, grid: ImageGrid) -> Sampling:
        """`effective_sampling`, for models whose defaults depend on the grid that is drawn."""
        return self.effective_sampling(sampling)

    def new_cache(self, compression: Compression, grid: ImageGrid) -> Any:
        """An empty cache for one run: a compressed one, or transformers' own where nothing is compressed."""
        if compression.resolve().compresses:
            from headkv_mm.cache import HeadKVCache

            return HeadKVCache(self.model, compression, image_grid=grid)
        from transformers import DynamicCache

        return DynamicCache(config=self.model.config.get_text_config(decoder=True))

    def check_grid(self, grid: ImageGrid) -> ImageGrid:
        """The grid to draw when the user asks for `grid`; its height and width are what counts.

        Raises:
            ValueError: if the model cannot draw it.
        """
        if grid != self.grid:
            own = self.grid
            raise ValueError(
                f"this {self.architecture} model draws images of {own.height}x{own.width} tokens and cannot draw "
                f"{grid.height}x{grid.width}: leave image_grid out, or use another model"
            )
        return grid
