# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from headkv_mm.batch.jobs import Unit, make_jobs, make_units, missing_units
from headkv_mm.batch.prompts import PromptList, parse_prompts

KINDS = ("text", "class", "bad")


def make_list(kinds: list[str]) -> PromptList:
    lines = {"text": {"prompt": "a"}, "class": {"class": 1}, "bad": {}}
    text = "\n".join(json.dumps(lines[kind]) for kind in kinds)
    return parse_prompts(text.encode(), objects=True, source="list.jsonl")


lists = st.lists(st.sampled_from(KINDS), min_size=1, max_size=30).filter(lambda kinds: set(kinds) != {"bad"})


def test_names_and_seeds() -> None:
    text = '{"id": "a", "prompt": "x"}\n{"id": "b", "prompt": "x", "seed": 9}'
    prompts = parse_prompts(text.encode(), objects=True, source="")
    assert [(job.name, job.seed) for job in make_jobs(prompts, seed=4, num_images=1)] == [("a", 4), ("b", 9)]
    several = make_jobs(prompts, seed=4, num_images=2)
    assert [(job.name, job.seed) for job in several] == [
        ("a-seed4", 4),
        ("a-seed5", 5),
        ("b-seed9", 9),
        ("b-seed10", 10),
    ]


@given(lists, st.integers(1, 7), st.integers(1, 3))
def test_every_image_is_in_one_unit(kinds: list[str], batch_size: int, num_images: int) -> None:
    jobs = make_jobs(make_list(kinds), seed=0, num_images=num_images)
    units = make_units(jobs, batch_size)
    assert sorted(job.slot for unit in units for job in unit.jobs) == [job.slot for job in jobs]
    for unit in units:
        assert 1 <= len(unit.jobs) <= batch_size
        assert len({job.prompt.prompt is None for job in unit.jobs}) == 1
        assert unit.wanted == {job.name for job in unit.jobs}


@given(lists, st.integers(1, 7), st.integers(0, 29))
def test_mending_a_line_changes_its_own_unit_only(kinds: list[str], batch_size: int, place: int) -> None:
    place %= len(kinds)
    mended = [*kinds[:place], "text", *kinds[place + 1 :]]
    before, after = (units_by_place(make_list(one), batch_size) for one in (kinds, mended))
    changed = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
    assert changed <= {place // batch_size}


def units_by_place(prompts: PromptList, batch_size: int) -> dict[int, set[Unit]]:
    found: dict[int, set[Unit]] = {}
    for unit in make_units(make_jobs(prompts, seed=0, num_images=1), batch_size):
        found.setdefault(unit.jobs[0].slot // batch_size, set()).add(unit)
    return found


def share_of(units: list[Unit], process: int, processes: int) -> list[Unit]:
    """What accelerate gives to a process."""
    from accelerate import PartialState

    state = object.__new__(PartialState)
    state.__dict__ = {"num_processes": processes, "process_index": process}  # its own, not those of this process
    with state.split_between_processes(units) as share:
        return list(share)


@given(lists, st.integers(1, 7), st.integers(1, 40), st.data())
def test_every_missing_image_is_drawn_by_one_process(
    kinds: list[str], batch_size: int, processes: int, data: st.DataObject
) -> None:
    jobs = make_jobs(make_list(kinds), seed=0, num_images=1)
    all_units = make_units(jobs, batch_size)
    names = [job.name for job in jobs]
    done = data.draw(st.sets(st.sampled_from(names)))
    units = missing_units(all_units, done)
    shares = [share_of(units, process, processes) for process in range(processes)]
    drawn = [name for share in shares for unit in share for name in unit.wanted]
    assert sorted(drawn) == sorted(set(names) - done)
    # Whatever is done and however many there are, an image is drawn in the same company.
    company = {unit.jobs for unit in all_units}
    assert all(unit.jobs in company for share in shares for unit in share)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
