# SPDX-License-Identifier: Apache-2.0
"""The text-to-image pipeline for autoregressive image models."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

from transformers.pipelines.base import Pipeline

from headkv_mm.fingerprint import fingerprint
from headkv_mm.memory import plan_memory
from headkv_mm.pipelines.caches import kept_image_tokens, run_report
from headkv_mm.pipelines.image_jobs import ImageJob, MadeImage, asked_for, collect
from headkv_mm.pipelines.kv_arguments import KVArguments
from headkv_mm.pipelines.models import adapter_for
from headkv_mm.pipelines.models.base import Sampling
from headkv_mm.pipelines.progress import token_bar
from headkv_mm.pipelines.seeds import check_seed, image_seeds

if TYPE_CHECKING:
    import torch

    from headkv_mm.image_grid import ImageGrid
    from headkv_mm.pipelines.outputs import ImageOutput

_KV = ("kv_compression", "kv_budget", "kv_options")
_SAMPLING = ("guidance_scale", "do_sample", "temperature", "top_k", "top_p")
_OTHER = ("image_grid", "keep_tokens", "negative_prompt", "num_images", "progress", "seed")
_IGNORED = ("local_files_only",)  # transformers.pipeline leaves it in the arguments


class TextToImagePipeline(Pipeline):
    """Makes images from prompts with an autoregressive model and, if asked, a compressed KV cache.

    Every argument below may be given when the pipeline is made and again with a call, which then goes first.

    Args of a call:
        inputs: a prompt, a list of prompts, or a generator or dataset of prompts.
        class_labels: in place of prompts, a class or a list of classes, for models that draw classes.
        features: in place of prompts, a text encoder's features [B, n, C], or [n, C] for one prompt, or a list of
            those, for models that read them.
        feature_mask: [B, n], 0 at the padding of `features`, on either side.
        num_images: images per prompt, 1 by default.
        batch_size: images that are generated together; by default all images of one prompt.
        seed: seed of a prompt's first image; image j has `seed + j`, whatever else is in the batch. Or a list with
            one seed per image, of a prompt or of all prompts together. By default drawn from torch's global generator.
        kv_compression: name of a method, a dict, or a `Compression`; "none" or None for the full cache.
        kv_budget: share of the image's entries kept per KV head (0 to 1), entries per KV head (int), or bytes
            ("512MiB"). The prompt is always kept and comes on top.
        kv_options: dict of options of the method.
        guidance_scale: strength of classifier-free guidance, 1 for none.
        negative_prompt: what guidance leads away from; needs a guidance_scale above 1.
        do_sample, temperature, top_k, top_p: how tokens are drawn; by default as the model's generation config says.
        keep_tokens: also return which image tokens each head held at the end.
        progress: show a progress bar on stderr.
        image_grid: an `ImageGrid`, for models that draw several sizes.

    Returns of a call:
        An `ImageOutput` for one prompt; a list of them for a list of prompts; an iterator for anything lazy.

    Raises:
        ValueError: for a prompt the model cannot read, an unknown method or option, a value out of range.
        TypeError: for an argument the pipeline does not have, or of a wrong type.
    """

    _load_tokenizer = None
    _load_processor = None
    _load_image_processor = False
    _load_feature_extractor = False
    _load_video_processor = False
    # The base class would take temperature and its like out of the arguments; they belong to `Sampling` here.
    _pipeline_calls_generate = False

    def __init__(self, *args: Any, image_decoder: Any = None, text_encoder: Any = None, **kwargs: Any) -> None:
        """Bind the model to its adapter and check all arguments.

        Args:
            *args: for the base class.
            image_decoder: what turns tokens into pictures, for models that cannot do it themselves.
            text_encoder: what reads the prompts, for models that read another model's features: its folder, or the
                model with its `tokenizer`.
            **kwargs: for the base class, and arguments of a call.
        """
        super().__init__(*args, **kwargs)
        tokenizer: Any = self.__dict__.get("tokenizer")
        self._adapter = adapter_for(
            self.model, tokenizer=tokenizer, processor=self.processor, image_decoder=image_decoder
        )
        if text_encoder is not None:
            self._adapter.bind_text_encoder(text_encoder)
        self.tokenizer = self._adapter.tokenizer
        self.model.eval()
        self._check(self._forward_params)

    def __call__(
        self,
        inputs: Any = None,
        *args: Any,
        class_labels: int | Sequence[int] | torch.Tensor | None = None,
        features: torch.Tensor | Sequence[torch.Tensor] | None = None,
        feature_mask: torch.Tensor | None = None,
        num_workers: int | None = None,
        batch_size: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Make images; see the class."""
        del num_workers  # reading prompts needs no workers
        if args:
            raise TypeError(f"pass everything but the prompt by name, got {len(args) + 1} positional arguments")
        parameters = {**self._forward_params, **self._sanitize_parameters(**kwargs)[1]}
        size = self._batch_size if batch_size is None else batch_size
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            raise ValueError(f"batch_size must be a positive integer (images generated together), got {size!r}")
        asked = asked_for(inputs, class_labels, features, feature_mask, self._adapter, self._prompt)
        self._check(parameters, prompts=asked.total or 1)
        outputs = self._outputs(asked.prompts, size, parameters, total=asked.total)
        if asked.single:
            return next(outputs)
        return outputs if asked.total is None else list(outputs)

    @property
    def image_grid(self) -> ImageGrid:
        """The tokens of an image."""
        return self._grid(self._forward_params)

    def check_prompts(self, prompts: Iterable[str]) -> list[str]:
        """The prompts as the model reads them, without generating anything.

        Raises:
            TypeError: for a prompt that is no text.
            ValueError: for an empty prompt, or one that the model cannot read.
        """
        return [self._prompt(prompt) for prompt in prompts]

    def check_class_labels(self, labels: Iterable[int]) -> list[Any]:
        """What stands for class labels in the outputs, "class 207", without generating anything.

        Raises:
            TypeError: for a label that is no integer.
            ValueError: for a label out of range, or a model that draws no classes.
        """
        return self._adapter.label_prompts(list(labels))

    def settings(self) -> dict[str, Any]:
        """What decides about the tokens of an image beside model, prompt and seed, as plain values."""
        parameters = self._forward_params
        compression, grid = parameters.get("kv", KVArguments()).resolve(), self._grid(parameters)
        values = {
            "kv_compression": compression.to_dict() if compression.resolve().compresses else None,
            "sampling": self._adapter.sampling_for(parameters.get("sampling", Sampling()), grid).to_dict(),
            "negative_prompt": parameters.get("negative_prompt"),
            "image_grid": [grid.height, grid.width, *([grid.row_stride] if grid.row_stride != grid.width else [])],
        }
        if self._adapter.text_encoder is not None:
            values["text_encoder"] = fingerprint(self._adapter.text_encoder)
        return values

    def _sanitize_parameters(self, **parameters: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        unknown = sorted(set(parameters) - {*_KV, *_SAMPLING, *_OTHER, *_IGNORED})
        if unknown:
            raise TypeError(
                f"the text-to-image pipeline has no argument {', '.join(map(repr, unknown))}: "
                f"it takes {', '.join((*_KV, *_SAMPLING, *_OTHER))}"
            )
        own: dict[str, Any] = getattr(self, "_forward_params", {})  # not there yet while the pipeline is made
        given: dict[str, Any] = {name: parameters[name] for name in _OTHER if parameters.get(name) is not None}
        call = KVArguments.of(parameters)
        if call.given:
            given["kv"] = own.get("kv", KVArguments()).overridden_by(call)
        chosen = {name: parameters[name] for name in _SAMPLING if parameters.get(name) is not None}
        if chosen:
            given["sampling"] = Sampling(**chosen).with_defaults(**own.get("sampling", Sampling()).to_dict())
        if "seed" in given:
            given["seed"] = check_seed(given["seed"])
        count = given.get("num_images", 1)
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"num_images must be a positive integer, got {count!r}")
        return {}, given, {}

    def preprocess(self, prompts: list[Any], negative_prompt: str | None = None, grid: Any = None) -> dict[str, Any]:
        """Encode checked prompts, one row per image."""
        return {"prompts": self._adapter.encode(prompts, negative_prompt, grid)}

    def _forward(self, model_inputs: dict[str, Any], **run: Any) -> dict[str, Any]:
        encoded, compression, sampling = model_inputs["prompts"], run["compression"], run["sampling"]
        encoded.inputs.update(self._ensure_tensor_on_device(encoded.inputs, self.device))
        began = time.perf_counter()
        made = self._adapter.generate(
            encoded, sampling=sampling, seeds=run["seeds"], compression=compression, on_token=run["on_token"]
        )
        tokens = made.tokens.cpu()  # also waits for the device
        seconds = time.perf_counter() - began
        report = run_report(
            made.caches,
            images=len(tokens),
            tokens=tokens.numel(),
            seconds=seconds,
            settings=sampling.to_dict(),
            weights=sum(parameter.nbytes for parameter in self.model.parameters()),
        )
        kept = None
        if run["keep_tokens"]:
            text = self.model.config.get_text_config(decoder=True)
            kept = kept_image_tokens(
                made.caches[0],
                encoded.condition_lengths.cpu() + encoded.grid.start,
                encoded.grid.tokens,
                text.num_hidden_layers,
                text.num_key_value_heads,
            )
        return {"tokens": tokens, "report": report, "kept": kept, "prompts": encoded, "seeds": run["seeds"]}

    def postprocess(self, model_outputs: dict[str, Any]) -> list[Any]:
        """Pictures of the tokens of a run."""
        return self._adapter.decode(model_outputs["tokens"], model_outputs["prompts"], model_outputs["seeds"])

    def _grid(self, parameters: dict[str, Any]) -> ImageGrid:
        """The grid asked for, or the model's own."""
        asked = parameters.get("image_grid")
        return self._adapter.grid if asked is None else self._adapter.check_grid(asked)

    def _prompt(self, prompt: Any) -> str:
        """A prompt the model can read.

        Raises:
            TypeError: if it is no text.
            ValueError: if it is empty or the model cannot read it.
        """
        if not isinstance(prompt, str):
            raise TypeError(f"a prompt must be text, got {type(prompt).__name__}")
        if not prompt.strip():
            raise ValueError("the prompt is empty: say what to draw")
        return self._adapter.check_prompt(prompt)

    def _check(self, parameters: dict[str, Any], prompts: int = 1) -> None:
        """Check what only fits together with the model, the number of prompts and the other arguments.

        Raises:
            ValueError: in one line.
        """
        image_seeds(parameters.get("seed"), parameters.get("num_images", 1), prompts=prompts)
        grid = self._grid(parameters)
        compression = parameters.get("kv", KVArguments()).resolve()
        if compression.resolve().compresses:
            plan_memory(self.model, compression, image_grid=grid)  # refuses a budget that is too small
        negative = parameters.get("negative_prompt")
        sampling = self._adapter.sampling_for(parameters.get("sampling", Sampling()), grid)
        if negative is not None:
            if sampling.guidance_scale == 1:
                raise ValueError("negative_prompt has no effect without guidance: set guidance_scale above 1")
            self._prompt(negative)

    def _outputs(
        self, prompts: Iterable[Any], batch_size: int | None, parameters: dict[str, Any], total: int | None
    ) -> Iterator[ImageOutput]:
        """Generate run by run and give out every prompt's images once all are there."""
        count = parameters.get("num_images", 1)
        jobs = (
            ImageJob(index, prompt, seed)
            for index, prompt in enumerate(prompts)
            for seed in image_seeds(parameters.get("seed"), count, index=index, prompts=total)
        )
        waiting: list[MadeImage] = []
        grid = self._grid(parameters)
        tokens = None if total is None else total * count * (grid.start + grid.tokens)
        with token_bar(tokens, show=bool(parameters.get("progress", False))) as advance:
            while run := list(islice(jobs, batch_size or count)):
                waiting += self._run(run, parameters, partial(advance, len(run)))
                while len(waiting) >= count:
                    yield collect(waiting[:count])
                    waiting = waiting[count:]

    def _run(self, jobs: list[ImageJob], parameters: dict[str, Any], on_token: Any) -> list[MadeImage]:
        """Generate the images of `jobs` together."""
        negative = parameters.get("negative_prompt")
        encoded = self.preprocess(
            [job.prompt for job in jobs],
            negative_prompt=None if negative is None else self._prompt(negative),
            grid=self._grid(parameters),
        )
        made = self.forward(
            encoded,
            compression=parameters.get("kv", KVArguments()).resolve(),
            sampling=self._adapter.sampling_for(parameters.get("sampling", Sampling()), self._grid(parameters)),
            seeds=[job.seed for job in jobs],
            keep_tokens=bool(parameters.get("keep_tokens", False)),
            on_token=on_token,
        )
        images = self.postprocess(made)
        kept = made["kept"] or [None] * len(jobs)
        return [
            MadeImage(job, image, tokens, held, made["report"])
            for job, image, tokens, held in zip(jobs, images, made["tokens"], kept)
        ]
