"""The reader of machine schedules: on a schedule written here, and on that of a real matrix product."""

import json
import subprocess
import sys

import pytest

from striate.lib.analysis import tpu_schedule

# Two loops of a kernel: bundles 1 and 2 with matrix work in both, 3 to 5 with it in one. Bundle 4 branches back to 3.
SCHEDULE = """\
= control target key start
LB: loop body
= control target key end

     0   :  { %1 = sfence }
   0x1 LB: > { %v2 = vmatmul.bf16.gmra.mxu0 %v1  ;;  %3 = vst [vmem:[#allocation2_spill]] %v3 }
   0x2   : > { %v3 = vmatmul.bf16.gmra.mxu0 %v2 }
   0x3 PB: >> { %v4 = vadd.f32 %v3, %v3 }
   0x4   : >> { %v5 = vmatmul.bf16.gmra.mxu1 %v4  ;;  %6 = sbr.rel (%p1) target = $region3 }
   0x5   :  { %7 = vst [vmem:[#allocation3]] %v5 }
"""
USE = """\
== CAPACTIY:
MXU, VALU, VSTORE, VSTORE:SPILL, SALU
    2     4      1            1     2
== UTILIZATION:
0 0 0 0 1
2 0 1 1 0
1 4 0 0 0
0 2 0 0 0
1 0 0 0 1
0 0 1 0 0
"""


def write(folder, key: str, name: str, schedule: str, use: str) -> None:
    (folder / f"{key}-{name}-02-final_bundles.txt").write_text(schedule)
    (folder / f"{key}-{name}-01-schedule-analysis_final_bundles.txt").write_text("total scheduled bundles: 6")
    (folder / f"{key}-{name}-00-final_hlo-static-per-bundle-utilization.txt").write_text(use)


def test_blocks_end_where_control_may_enter_or_leave(tmp_path):
    write(tmp_path, "17", "attention-fwd.1", SCHEDULE, USE)
    (kernel,) = tpu_schedule.read(tmp_path)
    assert kernel.name == "attention-fwd.1"
    assert [block.bundles for block in kernel.blocks] == [1, 2, 2, 1] and kernel.bundles == 6
    assert [block.units["MXU"] for block in kernel.blocks] == [0, 3, 1, 0]
    assert [block.bound for block in kernel.matrix_blocks] == [2, 1]
    assert [block.spills for block in kernel.matrix_blocks] == [1, 0] and kernel.spills == 1
    assert [block.use("MXU") for block in kernel.matrix_blocks] == [3 / 4, 1 / 4]
    assert [block.use("VALU") for block in kernel.matrix_blocks] == [4 / 8, 2 / 8]


def test_kernels_come_in_the_order_of_compilation_and_those_without_a_schedule_are_left_out(tmp_path):
    for key, name in ("12", "b[0].2"), ("11", "b[0].1"), ("13", "a"):
        write(tmp_path, key, name, SCHEDULE, USE)
    (tmp_path / "13-a-00-final_hlo-static-per-bundle-utilization.txt").unlink()
    assert [kernel.name for kernel in tpu_schedule.read(tmp_path)] == ["b[0].1", "b[0].2"]


def test_another_form_is_refused_with_its_numbers(tmp_path):
    write(tmp_path, "17", "attention", SCHEDULE, USE + "0 0 0 0 0\n")
    with pytest.raises(ValueError, match="6 bundles has the use of 7"):
        tpu_schedule.read(tmp_path)


# A process of its own, because libtpu writes schedules only where its first load in a process asked for them.
MATMUL = """
import json, sys
import jax, jax.numpy as jnp
from jax.experimental import pallas as pl
from striate.lib.analysis.tpu_schedule import schedule_for

def product(a, b, out):
    out[...] = jnp.dot(a[...], b[...], preferred_element_type=jnp.float32)

def blocks(topology, rows):
    a, b = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((rows, 256), (256, 512)))
    call = pl.pallas_call(product, out_shape=jax.ShapeDtypeStruct((rows, 512), jnp.float32), name="product")
    compiled, kernels = schedule_for(topology, call, a, b)
    assert "product" in compiled.as_text()
    (kernel,) = (kernel for kernel in kernels if kernel.name.startswith("product"))
    return [(block.bundles, block.bound, block.units["MXU"], block.use("MXU")) for block in kernel.matrix_blocks]

print(json.dumps([blocks(topology, rows) for topology in sys.argv[1:] for rows in (256, 512)]))
"""


@pytest.mark.tpu
def test_a_matrix_product_takes_at_least_its_bound_and_twice_the_work_for_twice_the_rows():
    topologies = ["v5p:2x2x1", "v6e:2x2"]
    done = subprocess.run([sys.executable, "-c", MATMUL, *topologies], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for small, large in zip(*[iter(json.loads(done.stdout))] * 2, strict=True):
        for bundles, bound, _, use in small + large:
            assert 0 < bound <= bundles and 0 < use <= 1
        assert sum(block[2] for block in large) >= 2 * sum(block[2] for block in small)


@pytest.mark.tpu
def test_a_process_that_has_loaded_libtpu_is_told_to_start_anew():
    code = MATMUL.replace("print", "from striate.lib.plan import describe; describe('v6e:1x1'); print")
    done = subprocess.run([sys.executable, "-c", code, "v6e:1x1"], capture_output=True, text=True)
    assert "UserError: libtpu wrote no schedule for v6e:1x1" in done.stderr
