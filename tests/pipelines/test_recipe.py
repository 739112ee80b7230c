# SPDX-License-Identifier: Apache-2.0
"""The adapter in docs/image_models.md works as it stands, and is as short as it claims."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from headkv_mm import Compression
from headkv_mm.pipelines import models as adapters

from . import adapter_checks as checks

PAGE = Path(__file__).parents[2] / "docs" / "image_models.md"


@pytest.fixture(scope="module")
def recipe() -> str:
    section = PAGE.read_text(encoding="utf-8").split("## Adding a model")[1]
    return re.search(r"^```python\n(.*?)^```$", section, flags=re.MULTILINE | re.DOTALL)[1]


@pytest.fixture
def made(recipe: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    monkeypatch.setattr(adapters, "_ADAPTERS", list(adapters._ADAPTERS))
    names: dict[str, Any] = {"__name__": "recipe"}
    exec(recipe, names)
    assert capsys.readouterr().out.startswith("(8, 8) headkv 1/4")
    return names


def test_it_draws(made: dict[str, Any]) -> None:
    assert isinstance(made["pipe"]._adapter, made["DoodleAdapter"])
    for item in made["out"]:
        picture = item.images[0]
        assert isinstance(picture, Image.Image)
        assert [grey // 17 for grey in picture.getchannel(0).tobytes()] == item.tokens[0].tolist()
        assert item.report.nbytes < item.report.nbytes_full


def test_it_compresses_rightly(made: dict[str, Any]) -> None:
    adapter = made["pipe"]._adapter
    prompts = adapter.encode(["a cat", "a much longer dog"])
    run = checks.watch(adapter, prompts, adapter.model.lm_head, Compression("headkv", budget=0.25), guidance_scale=3)
    expected = checks.oracle_scores(adapter, prompts, adapter.model.lm_head, run, [12, 0, 17, 17], guidance_scale=3)
    assert (run.scores - expected).abs().max() < 1e-4
    alone = [made["pipe"](prompt, seed=0, guidance_scale=3).tokens for prompt in prompts.prompts]
    assert all(torch.equal(item.tokens, tokens) for item, tokens in zip(made["out"], alone, strict=True))


def test_it_is_short(recipe: str) -> None:
    adapter = recipe.split("@register_adapter\n")[1].split("\ntorch.manual_seed")[0]
    assert len([line for line in adapter.splitlines() if line.strip()]) <= 20
