# SPDX-License-Identifier: Apache-2.0
"""Runs an evaluation: every method and budget has its own file, and finished ones are skipped."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from headkv_mm.budgets import image_plan
from headkv_mm.compression import Compression
from headkv_mm.evaluation.fidelity import first_affected_token
from headkv_mm.evaluation.full_cache import FullCache, OnToken
from headkv_mm.evaluation.images import Batch, batches
from headkv_mm.evaluation.measure import compare_all, generate_all, label_stability
from headkv_mm.evaluation.settings import FULL, EvaluationSettings, budget_label, run_name, run_settings
from headkv_mm.evaluation.storage import check_same, read_json, read_tokens, write_json, write_tokens
from headkv_mm.fingerprint import fingerprint
from headkv_mm.image_grid import ImageGrid

_SAMPLING = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "guidance_scale": 1.0}
"""What `generate` does where a generation config says nothing."""
_TOKENS = f"{FULL}.tokens.safetensors"


class Runner:
    """An evaluation of one model into one folder.

    Args:
        model: a LlamaGen model of the embedded world, on its device.
        settings: what to run.
        folder: gets one JSON file per run, and the full cache's images as tokens.
        progress: draw a bar on stderr.

    Raises:
        ValueError: if the model speaks other words, or a budget is too small.
    """

    def __init__(self, model: Any, settings: EvaluationSettings, folder: Path, *, progress: bool = True) -> None:
        grid = ImageGrid.from_config(model.config)
        if grid is None:
            raise ValueError(f"{type(model.config).__name__} states no image grid")
        self.model, self.settings, self.folder, self.grid = model.eval(), settings, folder, grid
        self.compressions = settings.compressions()
        for compression in self.compressions[1:]:
            plan = image_plan(compression.budget, grid)
            pieces = compression.pieces("image")
            if pieces is not None and not plan.keeps_all:
                pieces.schedule.first(plan)  # refuses a first eviction beyond the image
        self.shared = shared_settings(model, settings)
        self.parts: list[Batch] = list(batches(model, settings))
        self._progress = progress
        self._full: FullCache | None = None

    def run(self) -> list[dict[str, Any]]:
        """Run what is not finished yet.

        Returns:
            The runs' files, the full cache first.

        Raises:
            ValueError: if the folder holds results of other settings.
        """
        for path in sorted(self.folder.glob("*.json")):
            check_same(path, {"shared": read_json(path).get("shared", {})}, {"shared": self.shared})
        _compile_kernels(self.model.device)
        unfinished = [item for item in self.compressions if self._finished(item) is None]
        for compression in unfinished:
            write_json(self._path(compression), self._run(compression))
        return [read_json(self._path(item)) for item in self.compressions]

    def _path(self, compression: Compression) -> Path:
        return self.folder / f"{run_name(compression)}.json"

    def _finished(self, compression: Compression) -> dict[str, Any] | None:
        """A run's file if it is there; refuses one of other options."""
        path = self._path(compression)
        if not path.is_file():
            return None
        found = read_json(path)
        wanted = run_settings(self.shared, compression)
        check_same(path, {name: found.get(name, {}) for name in wanted}, wanted)
        return found

    def _run(self, compression: Compression) -> dict[str, Any]:
        settings = run_settings(self.shared, compression)
        if compression.method == FULL:
            result, _ = self._generate_full(settings)
            return {**settings, **result}
        full = self._full_cache()
        forced = 1 if full.has_scores else 2
        with self._bar(f"{compression.method} {budget_label(compression.budget)}", 1 + forced) as on_token:
            result, tokens = generate_all(self.model, self.parts, compression, on_token)
            fidelity, seconds = compare_all(
                self.model,
                self.parts,
                compression,
                full,
                start=first_affected_token(self.settings.first_eviction_rows, self.grid.row_stride),
                on_token=on_token,
            )
        result["seconds"]["compare"] = seconds
        return {
            **settings,
            **result,
            "fidelity": fidelity,
            "labels": label_stability(compression, full, self.grid),
            "pictured_tokens": tokens[: self.settings.pictures].tolist(),
        }

    def _generate_full(self, settings: dict[str, Any]) -> tuple[dict[str, Any], Tensor]:
        with self._bar("full cache", 1) as on_token:
            result, tokens = generate_all(self.model, self.parts, self.compressions[0], on_token)
        write_tokens(self.folder / _TOKENS, tokens, settings)
        return {
            **result,
            "fidelity": None,
            "labels": None,
            "pictured_tokens": tokens[: self.settings.pictures].tolist(),
        }, tokens

    def _full_cache(self) -> FullCache:
        if self._full is None:
            settings = run_settings(self.shared, self.compressions[0])
            tokens = read_tokens(self.folder / _TOKENS, settings)
            if tokens is None:
                _, tokens = self._generate_full(settings)
            self._full = FullCache(self.model, self.parts, tokens)
        return self._full

    @contextmanager
    def _bar(self, name: str, passes: int) -> Iterator[OnToken]:
        """A bar over steps: every pass decodes each batch token by token."""
        from tqdm.auto import tqdm

        steps = passes * len(self.parts) * self.grid.tokens
        with tqdm(total=steps, desc=name, unit="step", disable=not self._progress) as bar:
            yield bar.update


def shared_settings(model: Any, settings: EvaluationSettings) -> dict[str, Any]:
    """What all runs of a folder have in common, as JSON types."""
    stated = {name: getattr(model.generation_config, name, None) for name in _SAMPLING}
    sampling = {name: default if stated[name] is None else stated[name] for name, default in _SAMPLING.items()}
    return {
        "captions": settings.captions,
        "seed": settings.seed,
        "batch_size": settings.batch_size,
        "first_eviction_rows": settings.first_eviction_rows,
        "pictures": settings.pictures,
        "model": fingerprint(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "sampling": sampling,
    }


def _compile_kernels(device: Any) -> None:
    """Compile the CPU kernels now, so that no run's seconds hold the time that takes."""
    import torch

    from headkv_mm.kernels import dispatch

    if device.type == "cpu" and dispatch.backend_for(torch.zeros(1)) == "numba":
        from headkv_mm.kernels import cpu

        cpu.warm_up()


def open_model(folder: str | None, device: str | None) -> Any:
    """Load a model to evaluate, in float32 on a CPU, where half precision is slow.

    Args:
        folder: a model folder; None for the embedded model.
        device: "cpu", "cuda", ...; None for an accelerator if there is one.

    Raises:
        ValueError: if the folder holds no LlamaGen model, or the device is unknown.
        FileNotFoundError: if the embedded weights are missing.
    """
    import torch

    from headkv_mm.demo import image_model_path
    from headkv_mm.llamagen import LlamaGenConfig, LlamaGenForConditionalGeneration

    path = Path(folder) if folder is not None else image_model_path()
    if not (path / "config.json").is_file():
        raise ValueError(f"{path} has no config.json: give a model folder as save_pretrained writes it")
    found = read_json(path / "config.json").get("model_type")
    if found != LlamaGenConfig.model_type:
        raise ValueError(f"{path} holds a {found!r} model; the evaluation needs {LlamaGenConfig.model_type!r}")
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        where = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device {device!r} is unknown: use cpu or cuda") from error
    return LlamaGenForConditionalGeneration.from_pretrained(path, dtype=torch.float32).to(where).eval()
