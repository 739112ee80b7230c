# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from headkv_mm.demo.parsing import score
from headkv_mm.demo.scenes import caption, unseen_scenes
from headkv_mm.evaluation import runner as runner_module
from headkv_mm.evaluation.images import OUTCOMES, cache_bytes
from headkv_mm.evaluation.prompts import encode
from headkv_mm.evaluation.report import evaluate
from headkv_mm.evaluation.runner import Runner

from .conftest import SETTINGS

Evaluated = tuple[Path, dict[str, Any]]


def without_times(content: dict[str, Any]) -> dict[str, Any]:
    content = copy.deepcopy(content)
    for run in content["runs"]:
        del run["seconds"]
    del content["origin"]
    return content


def by_name(content: dict[str, Any]) -> dict[tuple[str, float | None], dict[str, Any]]:
    return {(run["method"], run["budget"]): run for run in content["runs"]}


def test_the_files_are_there_and_nothing_else(evaluated: Evaluated) -> None:
    folder, _ = evaluated
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    runs = {"none", "headkv-1of8", "streaming-1of8"}
    expected = {"results.json", "table.md", "quality_vs_bytes.png", "pictures.png", "runs/none.tokens.safetensors"}
    assert names == expected | {f"runs/{name}.json" for name in runs}
    for name in ("quality_vs_bytes.png", "pictures.png"):
        with Image.open(folder / name) as picture:
            assert min(picture.size) > 200


def test_a_full_budget_is_the_full_cache(model: Any, tmp_path: Path) -> None:
    settings = dataclasses.replace(SETTINGS, methods=("headkv",), budgets=(1.0,), captions=2)
    runs = by_name(evaluate(model, settings, tmp_path, progress=False))
    run = runs["headkv", 1.0]
    assert set(run["fidelity"]["kl_all"]) == {0.0}
    assert set(run["fidelity"]["agreement_all"]) == {1.0}
    assert run["outcomes"] == runs["none", None]["outcomes"]
    assert run["summary"]["bytes_ratio"] == pytest.approx(1, abs=1e-3)
    assert run["summary"]["difference_to_full"]["all_right"]["mean"] == 0


def test_a_small_budget_saves_bytes_and_costs_fidelity(evaluated: Evaluated) -> None:
    runs = by_name(evaluated[1])
    for method in ("headkv", "streaming"):
        run = runs[method, 0.125]
        nbytes = run["bytes_per_image"]
        assert nbytes["nbytes"] == pytest.approx(nbytes["kv_nbytes"] + nbytes["bookkeeping_nbytes"])
        assert nbytes["nbytes"] <= nbytes["nbytes_peak"] < nbytes["nbytes_full"]
        assert 0.1 < run["summary"]["bytes_ratio"] < 0.5
        assert run["summary"]["fidelity"]["kl"]["mean"] > run["summary"]["fidelity"]["kl_all"]["mean"] > 0
    assert 0 <= runs["headkv", 0.125]["local_share"] <= 1
    assert runs["streaming", 0.125]["local_share"] is None
    assert [line["tau"] for line in runs["headkv", 0.125]["labels"]] == [0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95]


def test_outcomes_are_those_of_the_parser_on_images_generated_one_by_one(evaluated: Evaluated, model: Any) -> None:
    folder, content = evaluated
    full = by_name(content)["none", None]
    tokens = json.loads((folder / "runs" / "none.json").read_text())["pictured_tokens"]
    for index, scene in enumerate(unseen_scenes(SETTINGS.captions, SETTINGS.seed)[:2]):
        prompts = encode(model, [caption(scene)])
        alone = model.generate(prompts.ids, prompts.mask, seeds=[SETTINGS.image_seed(index)])
        assert alone[0].tolist() == tokens[index]
        found = score(scene, model.decode_image_tokens(alone)[0].numpy())
        assert [full["outcomes"][name][index] for name in OUTCOMES] == [int(getattr(found, name)) for name in OUTCOMES]


def test_the_table_says_what_the_results_say(evaluated: Evaluated) -> None:
    folder, content = evaluated
    text = (folder / "table.md").read_text(encoding="utf-8")
    run = by_name(content)["headkv", 0.125]
    line = next(line for line in text.splitlines() if line.startswith("| headkv | 1/8 |"))
    assert f"{100 * run['summary']['bytes_ratio']:.1f} %" in line
    assert f"{100 * run['summary']['outcomes']['all_right']['mean']:.1f} %" in line
    assert f"{100 * run['summary']['fidelity']['agreement']['mean']:.2f} %" in line
    assert f"{run['bytes_per_image']['nbytes']:,.0f}" in text
    assert f"{SETTINGS.captions} unseen captions ({sum(content['captions']['same'])} of them" in text
    assert "| **0.9** |" in text


def test_intervals_can_be_computed_again_from_the_results(evaluated: Evaluated) -> None:
    from headkv_mm.evaluation.bootstrap import estimate, resampling_counts

    _, content = evaluated
    counts = resampling_counts(SETTINGS.captions, content["settings"]["resamples"], SETTINGS.seed)
    for run in content["runs"]:
        found = estimate(run["outcomes"]["background"], counts)
        assert found is not None
        kept = run["summary"]["outcomes"]["background"]
        assert [kept[name] for name in ("mean", "low", "high")] == pytest.approx([found.mean, found.low, found.high])
    assert np.mean(content["captions"]["same"]) < 1


def test_finished_runs_are_not_run_again(evaluated: Evaluated, model: Any, tmp_path: Path, monkeypatch: Any) -> None:
    shutil.copytree(evaluated[0], tmp_path / "copy")

    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a finished run was run again")

    monkeypatch.setattr(runner_module, "generate_all", never)
    monkeypatch.setattr(runner_module, "compare_all", never)
    again = evaluate(model, SETTINGS, tmp_path / "copy", progress=False)
    assert {**again, "origin": None} == {**evaluated[1], "origin": None}


@pytest.mark.parametrize("lost", ["headkv-1of8.json", "none.tokens.safetensors"])
def test_an_interrupted_evaluation_ends_as_if_it_had_not_been(
    evaluated: Evaluated, model: Any, tmp_path: Path, lost: str
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(evaluated[0], folder)
    (folder / "runs" / "headkv-1of8.json").unlink()
    (folder / "runs" / lost).unlink(missing_ok=True)
    again = evaluate(model, SETTINGS, folder, progress=False)
    assert without_times(again) == without_times(evaluated[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, r"shared\.seed 0 instead of 1"),
        ({"captions": 5}, r"shared\.captions 4 instead of 5"),
        ({"first_eviction_rows": 5}, r"shared\.first_eviction_rows 4 instead of 5"),
        ({"options": (("headkv", "tau", 0.8),)}, r"options\.tau None instead of 0\.8"),
    ],
)
def test_other_settings_do_not_mix(evaluated: Evaluated, model: Any, change: dict[str, Any], message: str) -> None:
    settings = dataclasses.replace(SETTINGS, **change)
    with pytest.raises(ValueError, match=f"holds a result of other settings .*{message}.*--output"):
        Runner(model, settings, evaluated[0] / "runs", progress=False).run()


def test_another_model_does_not_mix(evaluated: Evaluated, model: Any) -> None:
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight[0, 0] += 1
    with pytest.raises(ValueError, match=r"shared\.model"):
        Runner(other, SETTINGS, evaluated[0] / "runs", progress=False).run()


def test_what_cannot_work_is_refused_before_anything_runs(model: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="fewer than one row"):
        Runner(model, dataclasses.replace(SETTINGS, budgets=(1 / 20,)), tmp_path)
    with pytest.raises(ValueError, match="keeps all 16 rows"):
        Runner(model, dataclasses.replace(SETTINGS, first_eviction_rows=16), tmp_path)
    assert not list(tmp_path.iterdir())


def test_bytes_of_a_stock_cache_are_its_keys_and_values(model: Any) -> None:
    from headkv_mm.cache import HeadKVCache

    cache = HeadKVCache(model, "none")
    ids = torch.randint(369, (2, 7))
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache, use_cache=True)
    entries = 2 * 2 * 2 * 2 * 7 * 8 * 4  # keys and values, layers, rows, heads, tokens, size, bytes
    assert cache_bytes(cache)["kv_nbytes"] == cache_bytes(cache)["nbytes_full"] == entries
