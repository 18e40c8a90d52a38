"""The reader of machine code: on code written here, and on that of a small matrix product."""

import os
import subprocess
import sys

import pytest

from striate.lib.analysis import gpu_schedule
from striate.lib.errors import UserError

LOG = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'attention' for 'sm_90a'
ptxas info    : Function properties for attention
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers, 1 bytes smem
ptxas info    : Compile time = 233.449 ms
"""
SPILLED = "Registers are spilled to local memory in function 'attention', 16 bytes spill stores, 32 bytes spill loads"
SPILLING_LOG = f"ptxas warning : {SPILLED}\n" + LOG.replace(
    "0 bytes stack frame, 0 bytes spill stores, 0", "16 bytes stack frame, 16 bytes spill stores, 32"
)

# From the top: a loop without products; one around another, each with products; one whose products are waited for one
# by one, left in its middle. Behind the end, out of the way, a wait: it tries again, and jumps back into the second.
CODE = """\
        .size           attention,(.L_x_9 - attention)
.text.attention:
   -:-:-:Y:01        /*0000*/                   LDC R1, c[0x0][0x28]
.L_x_0:
   -:-:1:Y:02        /*0010*/                   MUFU.EX2 R2, R2
   -:-:-:Y:05        /*0020*/              @!P0 BRA `(.L_x_0)
.L_x_1:
   -:-:-:Y:01        /*0030*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR16], RZ, !UPT, gsb0
.L_x_2:
   -:-:-:Y:01        /*0040*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [R3+URZ], R4
   2:-:-:Y:05        /*0050*/              @!P1 BRA `(.L_x_6)
.L_x_3:
   -:-:-:-:12        /*0060*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR16], R24
   -:-:-:Y:03        /*0070*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR20], R24, gsb0
   -:-:-:Y:02        /*0080*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0
 2&1:-:3:Y:04        /*0090*/                   MUFU.EX2 R5, R24
   -:-:-:Y:02        /*00a0*/             @!UP0 FSEL R6, R24, -INF , P0
   -:-:-:Y:02        /*00b0*/                   VIADD R7, R7, 0x1
   3:-:-:Y:05        /*00c0*/                   SHFL.BFLY PT, R8, R5, 0x1, 0x1f
   -:-:-:Y:05        /*00d0*/               @P2 BRA `(.L_x_2)
   -:-:-:Y:05        /*00e0*/               @P3 BRA `(.L_x_1)
.L_x_4:
   -:-:-:Y:03        /*00f0*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR16], R24, gsb0
   -:-:-:Y:03        /*0100*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR20], R24, gsb0
   -:-:-:Y:05        /*0110*/               @P4 BRA `(.L_x_5)
   -:-:-:Y:01        /*0120*/                   MOV R9, R8
   -:-:-:Y:05        /*0130*/                   BRA `(.L_x_4)
.L_x_5:
   -:-:-:Y:05        /*0140*/               @P5 EXIT
   -:-:-:Y:05        /*0150*/                   EXIT
.L_x_6:
   2:-:-:Y:02        /*0160*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [R3+URZ], R4
   2:-:-:Y:05        /*0170*/              @!P1 BRA `(.L_x_6)
   -:-:-:Y:05        /*0180*/                   BRA `(.L_x_3)
.L_x_9:
"""


def write(folder, stem: str, log: str = LOG, code: str = CODE) -> None:
    (folder / f"{stem}.ptxas").write_text(log)
    (folder / f"{stem}.sass_ctrl").write_text(code)


def test_loops_are_what_jumps_back_before_the_end_innermost_and_with_products(tmp_path):
    write(tmp_path, "of_keys_0")
    (kernel,) = gpu_schedule.read(tmp_path)
    assert (kernel.name, kernel.registers, kernel.spills, kernel.warnings) == ("of_keys", 168, 0, ())
    inner, waiting = kernel.loops
    assert inner.instructions == dict(SYNCS=1, BRA=2, HGMMA=2, WARPGROUP=1, MUFU=1, FSEL=1, VIADD=1, SHFL=1)
    assert waiting.instructions == dict(HGMMA=2, BRA=2, MOV=1)
    assert [loop.columns for loop in kernel.loops] == [2 * 128, 2 * 256]
    assert [loop.serialised for loop in kernel.loops] == [False, True]
    assert [loop.stalls for loop in kernel.loops] == [1 + 5 + 12 + 3 + 2 + 4 + 2 + 2 + 5 + 5, 3 + 3 + 5 + 1 + 5]


def test_a_loop_of_one_product_that_is_waited_for_is_not_serialised(tmp_path):
    write(tmp_path, "product_0", code="".join(line for line in CODE.splitlines(True) if "/*0100*/" not in line))
    (kernel,) = gpu_schedule.read(tmp_path)
    assert [(loop.columns, loop.serialised) for loop in kernel.loops] == [(256, False), (256, False)]


def test_cycles_are_those_of_every_unit_for_all_warps(tmp_path):
    write(tmp_path, "attention_0")
    (kernel,) = gpu_schedule.read(tmp_path)
    # 256 columns, two a cycle; 10 instructions, of which one is an exponential, two are of integers, one is a shuffle.
    # A warpgroup has a warp for each of the four schedulers, 128 threads in all.
    one = {"matrix": 128, "issue": 10, "exponentials": 128 / 16, "integers": 2 * 128 / 64, "shuffles": 128 / 32}
    assert kernel.loops[0].cycles(warpgroups=1) == one
    assert kernel.loops[0].cycles(warpgroups=2) == {unit: 2 * cycles for unit, cycles in one.items()}


def test_what_was_spilled_is_summed_and_what_was_warned_of_is_kept(tmp_path):
    serialised = "Potential Performance Loss: wgmma.mma_async instructions are serialized due to ..."
    write(tmp_path, "attention_0", log=f"ptxas warning : {serialised}\n" + SPILLING_LOG)
    (kernel,) = gpu_schedule.read(tmp_path)
    assert kernel.spills == 16 + 32 and kernel.warnings == (serialised, SPILLED)


def test_kernels_come_in_the_order_of_their_numbers(tmp_path):
    for stem in ("b_10", "c_9", "a_11"):
        write(tmp_path, stem)
    assert [kernel.name for kernel in gpu_schedule.read(tmp_path)] == ["c", "b", "a"]


# A process of its own, because each kernel is compiled only once in a process, and for that what Mosaic GPU does when
# it is first imported.
PRODUCT = """
import jax, jax.numpy as jnp
from striate.lib.analysis.gpu_schedule import schedule_for

def kernel(x, y):
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    def body(x, y, out):
        def compute(x_tile, y_tile, there, total):
            def turn(i, carry):
                plgpu.copy_gmem_to_smem(x.at[:, pl.ds(64 * i, 64)], x_tile, there)
                plgpu.barrier_wait(there)
                plgpu.copy_gmem_to_smem(y.at[pl.ds(64 * i, 64)], y_tile, there)
                plgpu.barrier_wait(there)
                plgpu.wgmma(total, x_tile, y_tile)
                plgpu.wgmma_wait(0)
                return carry

            jax.lax.fori_loop(0, 16, turn, None)
            out[...] = total[...]

        transforms = plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)
        tile = plgpu.SMEM((64, 64), jnp.bfloat16, transforms=transforms)
        pl.run_scoped(compute, tile, tile, plgpu.Barrier(), plgpu.ACC((64, 64)))

    out = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    return plgpu.kernel(body, out_type=out, grid=(1,), grid_names=("i",))(x, y)

shapes = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((64, 1024), (1024, 64))]
compiled, kernels = schedule_for("h100:1", lambda x, y: (kernel(x, y), kernel(x + 1, y)), *shapes)
assert compiled.as_text().count('custom_call_target="mosaic_gpu') == 2
print(*((kernel.spills, [(loop.columns, loop.serialised) for loop in kernel.loops]) for kernel in kernels))
schedule_for("h100:1", kernel, *shapes)
"""


@pytest.mark.gpu
def test_a_matrix_product_has_its_loop_and_is_read_once_in_a_process():
    environment = {name: value for name, value in os.environ.items() if name != "MOSAIC_GPU_CUDA_ROOT"}
    done = subprocess.run([sys.executable, "-c", PRODUCT], capture_output=True, text=True, env=environment)
    assert done.stdout == f"(0, [({4 * 64}, False)])\n", done.stderr  # equal kernels are compiled once
    assert "UserError: The compiler wrote 0 kernels" in done.stderr and "only once in a process" in done.stderr


def test_without_a_disassembler_it_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_schedule.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(UserError, match=r'nvdisasm: pip install "striate\[gpu-compiler\]"'):
        gpu_schedule.schedule_for("h100:1", lambda x: x)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvdisasm").touch()
    assert gpu_schedule._tools() == tmp_path
