# SPDX-License-Identifier: Apache-2.0
"""What the text-to-image pipeline was asked for, and the single images it makes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from headkv_mm.pipelines.outputs import GenerationReport, ImageOutput, merge_reports

if TYPE_CHECKING:
    import torch

    from headkv_mm.pipelines.models.base import ImageModelAdapter


class Asked(NamedTuple):
    """The prompts of a call.

    Attributes:
        prompts: checked, or checked as they are read.
        total: how many; None if nobody knows.
        single: the call was for one prompt, not for a list.
    """

    prompts: Iterable[Any]
    total: int | None
    single: bool = False


class ImageJob(NamedTuple):
    """One image to make."""

    prompt_index: int
    prompt: Any
    seed: int


class MadeImage(NamedTuple):
    """One image with what belongs to it."""

    job: ImageJob
    image: Any
    tokens: torch.Tensor
    kept: list[list[torch.Tensor]] | None
    report: GenerationReport


def asked_for(
    inputs: Any,
    class_labels: int | Sequence[int] | torch.Tensor | None,
    features: torch.Tensor | Sequence[torch.Tensor] | None,
    feature_mask: torch.Tensor | None,
    adapter: ImageModelAdapter,
    check: Callable[[Any], Any],
) -> Asked:
    """The prompts of a call, all of them checked unless they are lazy.

    Args:
        inputs, class_labels, features, feature_mask: what the call got; exactly one kind.
        adapter: knows what labels and features the model reads.
        check: checks a text.

    Raises:
        ValueError: for none or several kinds, an empty list, or what the model cannot read.
        TypeError: for another type.
    """
    if sum(given is not None for given in (inputs, class_labels, features)) != 1:
        raise ValueError("give exactly one of prompts, class_labels and features")
    if feature_mask is not None and features is None:
        raise ValueError("feature_mask has no effect without features")
    if class_labels is not None:
        labels, single = _labels(class_labels)
        return Asked(adapter.label_prompts(labels), len(labels), single)
    if features is not None:
        import torch

        single = isinstance(features, torch.Tensor) and features.dim() == 2
        if single:
            features = [features] if feature_mask is None else features[None]  # type: ignore[list-item, call-overload]
            feature_mask = None if feature_mask is None else feature_mask.reshape(1, -1)
        found = adapter.feature_prompts(features, feature_mask)
        return Asked(found, len(found), single)
    if isinstance(inputs, str):
        return Asked([check(inputs)], 1, single=True)
    if isinstance(inputs, (list, tuple)):
        if not inputs:
            raise ValueError("got an empty list of prompts: give at least one")
        return Asked([check(prompt) for prompt in inputs], len(inputs))
    if not isinstance(inputs, Iterable) and not hasattr(inputs, "__getitem__"):
        raise TypeError(f"prompts must be text or a list of texts, got {type(inputs).__name__}")
    return Asked((check(item) for item in inputs), None)


def _labels(labels: int | Sequence[int] | torch.Tensor) -> tuple[list[int], bool]:
    """Labels as a list, and whether it was a single one."""
    listed = labels.tolist() if hasattr(labels, "tolist") else labels
    if isinstance(listed, int):
        return [listed], True
    if not isinstance(listed, (list, tuple, range)):
        raise TypeError(f"class_labels must be an integer or a list of integers, got {type(labels).__name__}")
    if not listed:
        raise ValueError("got an empty list of class_labels: give at least one")
    return list(listed), False


def collect(made: list[MadeImage]) -> ImageOutput:
    """One prompt's images, in order, from one or several runs."""
    import torch

    reports = list({id(item.report): item.report for item in made}.values())
    kept = [item.kept for item in made if item.kept is not None]
    return ImageOutput(
        images=[item.image for item in made],
        report=merge_reports(reports),
        prompts=[str(item.job.prompt) for item in made],
        seeds=[item.job.seed for item in made],
        tokens=torch.stack([item.tokens for item in made]),
        kept_tokens=kept or None,
    )
