# SPDX-License-Identifier: Apache-2.0
"""Adapters of decoders that are driven by our own loop: what differs between them is a few methods."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from headkv_mm.pipelines.models.base import EncodedPrompts, GeneratedTokens, ImageModelAdapter, Sampling
from headkv_mm.pipelines.models.guided_loop import draw_tokens, pad_left, stack_rows

if TYPE_CHECKING:
    from torch import Tensor

    from headkv_mm.compression import Compression
    from headkv_mm.image_grid import ImageGrid
    from headkv_mm.image_sampling import TokenDrawer


class GuidedAdapter(ImageModelAdapter):
    """A decoder that continues a prompt with image tokens; guidance reads other rows in the same batch.

    A subclass gives `recognises`, `grid`, `prompt_ids`, `unconditional_ids` and `decode`; the other methods are right
    for a model with `model.model` (the decoder) and `model.lm_head` whose image tokens are the whole vocabulary.
    """

    padding: int = 0
    """Id that fills up the shorter prompts of a batch; nothing attends to it."""

    @abstractmethod
    def prompt_ids(self, prompt: str, grid: ImageGrid) -> list[int]:
        """Everything that comes before the first token of the image."""

    @abstractmethod
    def unconditional_ids(self, ids: list[int], grid: ImageGrid) -> list[int]:
        """What guidance leads away from, in place of the prompt `ids`."""

    def defaults(self, grid: ImageGrid) -> Mapping[str, Any]:
        """Sampling settings where neither the user nor the model's generation config says anything."""
        return {}

    def embed(self, tokens: Tensor) -> Tensor:
        """Embeddings [R, T, D] of image tokens [R, T]."""
        found: Tensor = self.model.get_input_embeddings()(tokens)
        return found

    def scores(self, hidden: Tensor) -> Tensor:
        """Scores [R, K] of what follows, from the last hidden states [R, D]."""
        found: Tensor = self.model.lm_head(hidden)
        return found

    def chooser(self, draw: TokenDrawer, grid: ImageGrid) -> Callable[[int, Tensor], Tensor]:
        """Gives tokens int64 [B] of a step and guided scores [B, K]; `draw` gives columns of what it gets."""
        return draw

    @property
    def decoder(self) -> Any:
        """The module that takes embeddings, mask, position ids and cache, and gives hidden states."""
        return self.model.model

    def check_prompt(self, prompt: str) -> str:
        """The prompt as it stands."""
        return prompt

    def effective_sampling(self, sampling: Sampling) -> Sampling:
        """`sampling`, then the model's generation config, then the defaults of the model's own grid."""
        return self.sampling_for(sampling, self.grid)

    def sampling_for(self, sampling: Sampling, grid: ImageGrid) -> Sampling:
        """`sampling`, then the model's generation config, then `defaults`."""
        return sampling.completed(self.model.generation_config, **self.defaults(grid))

    def encode(
        self, prompts: Sequence[str], negative_prompt: str | None = None, grid: ImageGrid | None = None
    ) -> EncodedPrompts:
        """Ids and mask [B, P], padded on the left, and those of what guidance leads away from [B, P'].

        Raises:
            ValueError: if prompt and image are longer than the model's context.
        """
        grid = grid or self.grid
        rows = [self.prompt_ids(prompt, grid) for prompt in prompts]
        if negative_prompt is None:
            others = [self.unconditional_ids(row, grid) for row in rows]
        else:
            others = [self.prompt_ids(negative_prompt, grid)] * len(rows)
        longest = max(map(len, rows + others))
        context = self.model.config.get_text_config(decoder=True).max_position_embeddings
        if longest + grid.tokens > context:
            raise ValueError(
                f"a prompt of {longest} tokens and an image of {grid.tokens} are longer than the {context} positions "
                f"of this {self.architecture} model: shorten the prompt or ask for a smaller image_grid"
            )
        ids, mask = pad_left(rows, self.padding)
        other_ids, other_mask = pad_left(others, self.padding)
        inputs = {"input_ids": ids, "attention_mask": mask, "negative_ids": other_ids, "negative_mask": other_mask}
        return EncodedPrompts(inputs, mask.sum(dim=1), grid, tuple(prompts))

    def generate(
        self,
        prompts: EncodedPrompts,
        *,
        sampling: Sampling,
        seeds: Sequence[int],
        compression: Compression,
        on_token: Callable[[], None] | None = None,
    ) -> GeneratedTokens:
        """Prompts first, what guidance leads away from behind them, on an explicit cache."""
        grid, guidance = prompts.grid, 1.0 if sampling.guidance_scale is None else sampling.guidance_scale
        ids, mask = prompts.inputs["input_ids"], prompts.inputs["attention_mask"]
        if guidance != 1:
            others = prompts.inputs["negative_ids"], prompts.inputs["negative_mask"]
            ids, mask = stack_rows((ids, mask), others, self.padding)
        cache = self.new_cache(compression, grid)

        def scores(embeddings: Tensor, seen: Tensor, positions: Tensor) -> Tensor:
            output = self.decoder(
                inputs_embeds=embeddings,
                attention_mask=seen,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            )
            return self.scores(output.last_hidden_state[:, -1])

        tokens = draw_tokens(
            self.model.get_input_embeddings()(ids),
            mask,
            steps=grid.tokens,
            guidance_scale=guidance,
            scores=scores,
            embed=self.embed,
            choose=self.chooser(sampling.drawer(seeds, grid.tokens), grid),
            on_token=on_token,
        )
        return GeneratedTokens(tokens, [cache])
