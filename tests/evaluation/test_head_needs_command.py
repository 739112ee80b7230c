# SPDX-License-Identifier: Apache-2.0
"""`headkv-mm evaluate heads`: files, resuming, bad input."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from headkv_mm.evaluation import command
from headkv_mm.evaluation.heads import material as materials
from headkv_mm.evaluation.heads.material import Images, Texts
from headkv_mm.evaluation.heads.measured import Measured, read_measured, write_measured
from headkv_mm.evaluation.heads.report import evaluate_heads
from headkv_mm.evaluation.heads.settings import HeadSettings
from headkv_mm.evaluation.heads.summary import results
from headkv_mm.evaluation.heads.tables import markdown
from headkv_mm.head_tables import HeadTable

from .text_model import small_text_model, tokenizer

IMAGES = HeadSettings(items=3, batch_size=2, budgets=(1 / 8, 40), resamples=100)
TEXT = HeadSettings(
    material="text", items=2, length=160, window=16, tasks=("single", "two-turn"), budgets=(1 / 8,), resamples=100
)


@pytest.fixture(scope="module")
def finished(model: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A finished measurement: its folder, and what results.json holds. Do not change it."""
    folder = tmp_path_factory.mktemp("heads")
    return folder, evaluate_heads(Images(model, IMAGES), IMAGES, folder, progress=False)


def predictor(content: dict[str, Any], name: str) -> dict[str, Any]:
    return next(one for one in content["predictors"] if one["name"] == name)


def test_results_are_written(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, content = finished
    assert content == json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert (folder / "table.md").read_text(encoding="utf-8") == markdown(content)
    assert (folder / "needs.png").stat().st_size > 10_000
    assert content["settings"]["budgets"] == ["1/8", "40"]
    assert sorted(path.name for path in (folder / "runs").iterdir()) == [
        "images-00000.safetensors",
        "images-00002.safetensors",
    ]
    assert torch.tensor(content["needs"]["late"]).shape == (2, 2)


def test_the_oracle_has_no_regret_and_nothing_has_less(finished: tuple[Path, dict[str, Any]]) -> None:
    _, content = finished
    assert predictor(content, "oracle curves")["spearman"]["model"]["mean"] == pytest.approx(1)
    uniform, shuffled = (predictor(content, name) for name in ("uniform", "oracle budgets, shuffled among the heads"))
    for budget in ("1/8", "40"):
        for scope in ("model", "layer"):
            regrets = {one["name"]: one["budgets"][budget][scope]["regret"] for one in content["predictors"]}
            assert regrets["oracle curves"]["low"] == regrets["oracle curves"]["high"] == 0
            assert min(one["low"] for one in regrets.values()) >= -1e-12
            assert uniform["budgets"][budget][scope]["over_uniform"]["mean"] == 0
            assert shuffled["budgets"][budget][scope]["regret"]["mean"] > regrets["oracle needs"]["mean"]


def test_powers_of_pointed_attention_rank_alike_and_divide_differently(finished: tuple[Path, dict[str, Any]]) -> None:
    _, content = finished
    plain, fourth, eighth = (
        predictor(content, f"pointed attention{contrast}") for contrast in ("", ", contrast 4", ", contrast 8")
    )
    assert plain["spearman"] == fourth["spearman"] == eighth["spearman"]
    regrets = [one["budgets"]["1/8"]["model"]["regret"]["mean"] for one in (plain, fourth, eighth)]
    assert len(set(regrets)) == 3


def test_tables_known_of_the_heads_are_predictors(model: Any, finished: tuple[Path, dict[str, Any]]) -> None:
    folder, content = finished
    shared = {key: value for key, value in content["settings"].items() if key not in ("budgets", "floor", "share")}
    items = [
        item
        for name in ("images-00000", "images-00002")
        for item in read_measured(folder / "runs" / f"{name}.safetensors", shared) or []
    ]
    tables = {"lopsided": torch.tensor([[1.0, 0.0], [0.0, 0.0]]), "level": torch.ones(2, 2)}
    found = results(IMAGES, items, shared, {"commit": None}, tables)
    lopsided, level, uniform = (predictor(found, name) for name in ("lopsided", "level", "uniform"))
    assert lopsided["kind"] == "others"
    assert level["budgets"] == uniform["budgets"]
    assert lopsided["budgets"]["1/8"]["model"]["regret"]["mean"] > uniform["budgets"]["1/8"]["model"]["regret"]["mean"]


def test_no_ranking_beats_the_best_entries(finished: tuple[Path, dict[str, Any]]) -> None:
    _, content = finished
    assert content["rankings"][0]["name"] == "attention of the last row"
    assert all(one["lost"][budget]["low"] > 0 for one in content["rankings"] for budget in ("1/8", "40"))


def test_finished_items_are_not_measured_again(
    model: Any, finished: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, content = finished
    (tmp_path / "runs").mkdir()
    kept = folder / "runs" / "images-00000.safetensors"
    (tmp_path / "runs" / kept.name).write_bytes(kept.read_bytes())
    material, asked = Images(model, IMAGES), []
    measure = material.measure

    def watched(first: int, end: int, on_item: Any) -> list[Measured]:
        asked.append((first, end))
        return measure(first, end, on_item)

    monkeypatch.setattr(material, "measure", watched)
    again = evaluate_heads(material, IMAGES, tmp_path, progress=False)
    assert asked == [(2, 3)]
    assert again["predictors"] == content["predictors"]
    assert again["needs"] == content["needs"]
    other = HeadSettings(items=3, batch_size=2, budgets=(1 / 4,), floor=0.5, resamples=100)
    assert evaluate_heads(material, other, tmp_path, progress=False)["settings"]["budgets"] == ["1/4"]
    assert asked == [(2, 3)]  # budgets are applied to what was measured
    with pytest.raises(ValueError, match="seed 0 instead of 7"):
        evaluate_heads(material, HeadSettings(items=3, batch_size=2, seed=7), tmp_path, progress=False)


def test_files_hold_what_was_written(tmp_path: Path) -> None:
    item = Measured(
        future=torch.rand(2, 3, 5),
        ranked={"one": torch.rand(2, 3, 5), "other": torch.rand(2, 3, 5)},
        window=torch.rand(2, 3, 4),
        valued=torch.rand(2, 3, 4),
        statistics={"first": torch.rand(2, 3), "second": torch.rand(2, 3)},
        entries=9,
    )
    path = tmp_path / "one.safetensors"
    assert read_measured(path, {"seed": 1}) is None
    write_measured(path, [item], {"seed": 1})
    (found,) = read_measured(path, {"seed": 1}) or []
    assert found.entries == 9
    for name in ("future", "window", "valued"):
        assert torch.equal(getattr(found, name), getattr(item, name))
    assert list(found.statistics) == ["first", "second"]
    assert torch.equal(found.statistics["second"], item.statistics["second"])
    assert torch.equal(found.ranked["other"], item.ranked["other"])
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="delete it to measure again"):
        read_measured(path, {"seed": 1})


def test_texts_are_measured_to_the_end_of_their_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    material = Texts(small_text_model(), tokenizer(), TEXT)
    stretches = []
    measure = materials.measure

    def watched(layers: Any, grams: Any, **given: Any) -> Measured:
        stretches.append((given["decided"], given["stretches"]))
        return measure(layers, grams, **given)

    monkeypatch.setattr(materials, "measure", watched)
    items = material.measure(0, 2, lambda count: None)
    for item, (decided, (stretch,)) in zip(items, stretches, strict=True):
        assert stretch[0] == decided == item.entries == item.future.shape[-1] == item.window.shape[-1]
        assert stretch[1] > decided + 10  # questions and answers
        assert bool((item.future.sum(-1) < 1).all())
        assert "attention outside the first 4 entries" in item.statistics
    assert stretches[1][1][0][1] - stretches[1][0] > stretches[0][1][0][1] - stretches[0][0]  # two turns
    content = results(
        TEXT, items, {**TEXT.measuring(), "dtype": "float32", "device": "cpu", "model": ""}, {"commit": None}, {}
    )
    assert "before any question" in markdown(content)


def test_the_command(model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model.save_pretrained(tmp_path / "model")
    args = parse("images", "--captions", "2", "--budgets", "1/8", "--resamples", "50", "--no-progress", "--json")
    args.model, args.output, args.device = str(tmp_path / "model"), str(tmp_path / "out"), "cpu"
    assert command.run(args) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "out" / "results.json").read_text())
    args.json = False
    assert command.run(args) == 0
    assert capsys.readouterr().out.startswith("# What foretells the entries that a head needs: images")
    args.documents = 3
    with pytest.raises(ValueError, match="use --captions"):
        command.run(args)


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(["heads", *arguments, "--output", "somewhere"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pictures"], "invalid choice"),
        (["images", "--captions", "1"], "at least 2"),
        (["images", "--budgets", "64MiB"], "depends on the batch"),
        (["images", "--floor", "much"], "invalid float"),
    ],
)
def test_nonsense_is_refused_in_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse(*arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"material": "sound"}, "material must be one of"),
        ({"items": 1}, "items must be at least 2"),
        ({"floor": 1.5}, "floor must lie in"),
        ({"share": 1.0}, "share must lie in"),
        ({"budgets": ()}, "no budgets"),
        ({"budgets": ("1MiB",)}, "depends on the batch"),
        ({"budgets": (1.5,)}, "outside"),
        ({"tasks": ("riddle",)}, "there is no task 'riddle'"),
    ],
)
def test_settings_are_checked(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HeadSettings(**given)


def test_tables_that_ship_are_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_text_model()
    assert Texts(model, tokenizer(), TEXT).tables == {}  # they are of the embedded model
    config = model.config
    scores = torch.rand(config.num_hidden_layers, config.num_attention_heads).tolist()
    shipped = HeadTable("r2", "", tuple(map(tuple, scores)), config.num_key_value_heads, 2, 1)
    asked = {"heads.json": shipped}
    monkeypatch.setattr(materials, "shipped_table", lambda model, name, load, check: asked.get(name))
    assert torch.equal(Texts(model, tokenizer(), TEXT).tables["shipped head table, r2"], shipped.kv_scores())


def test_material_must_fit_the_model(model: Any) -> None:
    with pytest.raises(ValueError, match="use fewer rows"):
        Images(model, HeadSettings(rows=16))
    with pytest.raises(ValueError, match="use a shorter length"):
        Texts(small_text_model(), tokenizer(), HeadSettings(material="text", length=2000))
    long_window = HeadSettings(material="text", items=2, length=160, window=100)
    with pytest.raises(ValueError, match="fewer than two windows"):
        Texts(small_text_model(), tokenizer(), long_window).measure(0, 1, lambda count: None)
