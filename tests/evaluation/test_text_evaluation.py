# SPDX-License-Identifier: Apache-2.0
"""A whole evaluation of text: files, resuming, refusals, the command."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from headkv_mm.evaluation import command
from headkv_mm.evaluation.text import runner as runner_module
from headkv_mm.evaluation.text.report import evaluate_text
from headkv_mm.evaluation.text.runner import TextRunner, open_text_model
from headkv_mm.evaluation.text.settings import BASELINES, DEFAULT_TASKS, TextSettings
from headkv_mm.registry import methods

from .text_model import small_text_model, tokenizer

SETTINGS = TextSettings(
    tasks=("single", "list"), lengths=(128, 160), methods=("snapkv",), budgets=(1 / 4, 24), documents=3, resamples=50
)
RUNS = {"none", *(f"{method}-{budget}" for method in (*BASELINES, "snapkv") for budget in ("1of4", "24"))}

Evaluated = tuple[Path, dict[str, Any]]


@pytest.fixture(scope="module")
def model() -> Any:
    return small_text_model()


@pytest.fixture(scope="module")
def evaluated(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Evaluated:
    folder = tmp_path_factory.mktemp("evaluated")
    return folder, evaluate_text(model, tokenizer(), SETTINGS, folder, progress=False)


def test_the_files_are_there_and_nothing_else(evaluated: Evaluated) -> None:
    folder, _ = evaluated
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    pictures = {"quality_vs_bytes.png", "depth_by_length.png"}
    assert names == {"results.json", "table.md", *pictures, *(f"runs/{name}.json" for name in RUNS)}
    for name in pictures:
        with Image.open(folder / name) as picture:
            assert min(picture.size) > 200


def test_baselines_and_the_full_cache_are_always_there(evaluated: Evaluated) -> None:
    assert {run["method"] for run in evaluated[1]["runs"]} == {"none", "streaming", "random", "snapkv"}
    assert evaluated[1]["runs"][0]["method"] == "none"
    assert [run["options"] for run in evaluated[1]["runs"] if run["method"] == "random"] == [{"seed": 0}] * 2


def test_bytes_are_what_caches_hold(evaluated: Evaluated) -> None:
    for run in evaluated[1]["runs"]:
        for cell in run["cells"].values():
            assert 0 < cell["nbytes"] <= cell["nbytes_peak"]
        if run["method"] == "none":
            assert run["summary"]["bytes_ratio"] == pytest.approx(1, abs=1e-3)
        else:
            assert 0.1 < run["summary"]["bytes_ratio"] < 0.8
    longest = next(run for run in evaluated[1]["runs"] if run["method"] == "none")["cells"]["single/160"]
    assert longest["nbytes_full"] <= 2 * 2 * 2 * 8 * 4 * 160


def test_a_fixed_seed_gives_the_same_results(evaluated: Evaluated, model: Any, tmp_path: Path) -> None:
    again = evaluate_text(model, tokenizer(), SETTINGS, tmp_path, progress=False)
    assert {**again, "origin": None} == {**evaluated[1], "origin": None}
    first = evaluated[0]
    for name in RUNS:
        assert (tmp_path / "runs" / f"{name}.json").read_bytes() == (first / "runs" / f"{name}.json").read_bytes()


def test_what_is_finished_is_not_run_again(
    evaluated: Evaluated, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(evaluated[0], folder)
    path = folder / "runs" / "snapkv-24.json"
    content = json.loads(path.read_text())
    del content["cells"]["list/160"]
    path.write_text(json.dumps(content))
    (folder / "runs" / "random-1of4.json").unlink()
    ran: list[tuple[str, list[str]]] = []
    original = runner_module.CellRunner.run

    def watched(self: Any, cell: Any, compressions: Any, *rest: Any) -> Any:
        ran.append((str(cell), [item.method for item in compressions]))
        return original(self, cell, compressions, *rest)

    monkeypatch.setattr(runner_module.CellRunner, "run", watched)
    again = evaluate_text(model, tokenizer(), SETTINGS, folder, progress=False)
    assert again["runs"] == evaluated[1]["runs"]
    assert ran == [(cell, ["random"]) for cell in ("single/128", "single/160", "list/128")] + [
        ("list/160", ["random", "snapkv"])
    ]
    ran.clear()
    evaluate_text(model, tokenizer(), SETTINGS, folder, progress=False)
    assert not ran


def test_more_tasks_can_be_added_to_a_folder(evaluated: Evaluated, model: Any, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(evaluated[0], folder)
    more = dataclasses.replace(SETTINGS, tasks=("multi-key", "single"), lengths=(160,))
    content = evaluate_text(model, tokenizer(), more, folder, progress=False)
    assert set(content["runs"][0]["cells"]) == {"multi-key/160", "single/160"}
    before = {(run["method"], run["budget"]): run["cells"]["single/160"] for run in evaluated[1]["runs"]}
    assert {(run["method"], run["budget"]): run["cells"]["single/160"] for run in content["runs"]} == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, r"shared\.seed 0 instead of 1"),
        ({"documents": 4}, r"shared\.documents 3 instead of 4"),
        ({"query_aware": True}, r"shared\.query_aware False instead of True"),
        ({"options": (("snapkv", "pool", 5),)}, r"options\.pool None instead of 5"),
    ],
)
def test_other_settings_do_not_mix(evaluated: Evaluated, model: Any, change: dict[str, Any], message: str) -> None:
    settings = dataclasses.replace(SETTINGS, **change)
    with pytest.raises(ValueError, match=f"holds a result of other settings .*{message}.*--output"):
        TextRunner(model, tokenizer(), settings, evaluated[0] / "runs", progress=False).run()


def test_another_model_does_not_mix(evaluated: Evaluated, model: Any) -> None:
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight[0, 0] += 1
    with pytest.raises(ValueError, match=r"shared\.model"):
        TextRunner(other, tokenizer(), SETTINGS, evaluated[0] / "runs", progress=False).run()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": ("single", "riddles")}, "no task 'riddles'"),
        ({"tasks": ()}, "there are no tasks"),
        ({"methods": ("lines",)}, "serves image only"),
        ({"documents": 0}, "documents must be at least 1"),
        ({"options": ((None, "colour", 1),)}, "none of the methods .* has an option 'colour'"),
        ({"options": (("tova", "sinks", 1),)}, "not evaluated: add 'tova'"),
        ({"lengths": (0,)}, "lengths must be at least 1"),
    ],
)
def test_nonsense_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SETTINGS, **change)


def test_what_the_model_cannot_do_is_refused_before_anything_runs(model: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="made for 1024 positions"):
        TextRunner(model, tokenizer(), dataclasses.replace(SETTINGS, lengths=(2048,)), tmp_path)
    with pytest.raises(ValueError, match="budget 4 is too small"):
        TextRunner(model, tokenizer(), dataclasses.replace(SETTINGS, budgets=(4,)), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_length_that_cannot_be_met_is_refused(model: Any, tmp_path: Path) -> None:
    settings = dataclasses.replace(SETTINGS, lengths=(20,))
    with pytest.raises(ValueError, match="ask for a longer one"):
        TextRunner(model, tokenizer(), settings, tmp_path, progress=False).run()


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(["text", "--output", "somewhere", *arguments])


def test_the_command_evaluates_a_folder(model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model.save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    short = ["--tasks", "list", "--lengths", "128", "--budgets", "1/4", "--documents", "2", "--no-progress", "--json"]
    args = parse(*short, "--methods", "snapkv", "--option", "snapkv.pool=3")
    args.model, args.output, args.device = str(tmp_path / "model"), str(tmp_path / "out"), "cpu"
    assert command.run(args) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "out" / "results.json").read_text())
    assert [run["options"] for run in printed["runs"] if run["method"] == "snapkv"] == [{"pool": 3}]
    assert not (tmp_path / "out" / "depth_by_length.png").exists()
    args.json = False
    assert command.run(args) == 0
    text = capsys.readouterr().out
    assert text.startswith("# Questions about documents in a compressed KV cache")
    assert "snapkv (pool=3)" in text
    assert "before any question is known (query-agnostic)" in text


def test_all_means_every_method_that_the_model_has_tables_for(
    model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model.save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    args = parse(
        "--tasks", "list", "--lengths", "128", "--budgets", "1/4", "--documents", "1", "--no-progress", "--json"
    )
    args.model, args.output, args.device = str(tmp_path / "model"), str(tmp_path / "out"), "cpu"
    args.methods = parse("--methods", "all").methods
    assert command.run(args) == 0
    output = capsys.readouterr()
    evaluated = {run["method"] for run in json.loads(output.out)["runs"]}
    assert {"snapkv", "fastkv", "laprox", "ams"} <= evaluated
    missing = set(methods("text")) - evaluated
    assert {"headkv-r2", "compresskv"} <= missing  # no table ships for this model
    for name in missing:
        assert f"{name} is left out: " in output.err


def test_defaults_of_the_command() -> None:
    args = parse()
    assert (args.tasks, args.methods, args.query_aware) == (None, ("all",), False)
    assert (args.budgets, args.lengths, args.documents, args.seed) == ((1 / 4, 1 / 8, 1 / 16), (512, 1024, 2048), 64, 0)
    assert parse("--tasks", "single, list", "--lengths", "512, 64").tasks == ("single", "list")
    assert set(DEFAULT_TASKS) & {"frequent-words", "long-generation"} == set()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lengths", "512,x"], "at least 1, got 'x'"),
        (["--lengths", ","], "no number is given"),
        (["--tasks", ","], "nothing is named"),
        (["--budgets", "1GiB"], "depends on the batch"),
    ],
)
def test_nonsense_on_the_command_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(*arguments)
    assert message in capsys.readouterr().err


def test_a_folder_without_a_language_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no language model"):
        open_text_model(str(tmp_path), "cpu")
    with pytest.raises(ValueError, match="device 'abacus' is unknown"):
        open_text_model(str(tmp_path), "abacus")
