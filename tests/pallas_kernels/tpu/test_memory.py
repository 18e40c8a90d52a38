"""What attention takes of a TPU's memory beside its arrays, as their compiler counts it: benchmarks/tpu_memory.py."""

import importlib.util
from pathlib import Path

import pytest

FILE = Path(__file__).resolve().parents[3] / "benchmarks" / "tpu_memory.py"


@pytest.mark.tpu
@pytest.mark.parametrize("case", range(4))
def test_it_is_less_than_the_arrays_take(case):
    spec = importlib.util.spec_from_file_location("tpu_memory", FILE)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    memory = benchmark.measure(benchmark.CASES[case])
    assert memory.temporary < 0.75 * memory.needed
