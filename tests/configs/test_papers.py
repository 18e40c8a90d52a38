"""Published systems: each has its tests, its benchmark, and figures that are those asked for."""

import json

import pytest

from striate.lib.cli import ROOT, load_experiment, main, papers

PAPERS = papers()
MEASURED = json.loads((ROOT / "configs/papers/results.json").read_text())


@pytest.mark.parametrize("name", PAPERS)
def test_a_system_has_tests_and_a_benchmark(name):
    system = PAPERS[name]["system"]
    assert (ROOT / system.tests).is_file() and system.asks
    assert (ROOT / f"benchmarks/papers/{name}.py").is_file()
    assert all(relation in (">=", "<=") for relation, _ in system.asks.values())


@pytest.mark.parametrize("name", MEASURED)
def test_what_was_measured_is_what_is_asked_for(name):
    assert MEASURED[name].keys() == {*PAPERS[name]["system"].asks, "seconds"}


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
