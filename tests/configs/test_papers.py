"""Published systems: each has its tests, its benchmark, and figures that are those asked for."""

import json

import pytest

from striate.configs.schema import RELATIONS, System
from striate.lib.cli import ROOT, load_experiment, main, papers

PAPERS = papers()
MEASURED = json.loads((ROOT / "configs/papers/results.json").read_text())


@pytest.mark.parametrize("name", PAPERS)
def test_a_system_is_tested_and_measured(name):
    system = PAPERS[name]["system"]
    assert (ROOT / system.tests).is_file() and system.asks
    assert (ROOT / f"benchmarks/papers/{name}.py").is_file()
    assert all(relation in RELATIONS for relation, _ in system.asks.values())
    assert MEASURED[name].keys() == {*system.asks, "seconds"}


@pytest.mark.parametrize("name", [name for name, given in PAPERS.items() if "experiment" in given])
def test_a_model_of_the_next_token_is_trained_by_name(name):
    experiment = load_experiment(f"papers/{name}")
    assert experiment == PAPERS[name]["experiment"] and experiment.run.name == name


def test_every_system_is_listed(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["systems"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines if line[2:3].strip()} >= set(PAPERS)
    assert any("striate train papers/lightning" in line for line in lines)
    for what, (relation, figure) in PAPERS["lightning"]["system"].asks.items():
        (line,) = (line for line in lines if f"{what} {relation} {figure:g}" in line)
        assert f"{MEASURED['lightning'][what]:g}" in line


def test_what_misses_its_figure_is_marked(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    main(["systems"])
    marked = sum(line.rstrip().endswith("missed") for line in capsys.readouterr().out.splitlines())
    missed = [
        not system.meets(what, MEASURED[name][what])
        for name, given in PAPERS.items()
        for system in [given["system"]]
        for what in system.asks
    ]
    assert marked == sum(missed)


def test_a_figure_is_met_on_its_side():
    system = System(paper="", form="", tests="", asks={"least": (">=", 2.0), "most": ("<=", 2.0)})
    assert [system.meets("least", x) for x in (1.9, 2.0, 2.1)] == [False, True, True]
    assert [system.meets("most", x) for x in (1.9, 2.0, 2.1)] == [True, True, False]
    assert not system.meets("least", float("nan")) and not system.meets("most", float("nan"))
