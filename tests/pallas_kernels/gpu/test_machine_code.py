"""The kernels by the real compiler of GPUs: machine code for H100 and H200, and rings of GPUs that are not here."""

import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import striate
from striate import Tokens, masks, scores
from striate.lib import plan
from striate.lib.analysis.gpu_schedule import schedule_for
from striate.lib.attention import EXPERIMENTAL
from striate.lib.decoding.paging import paged_attention
from striate.lib.parallel import Ring

pytestmark = pytest.mark.gpu

WIDTHS = [(64, 64), (128, 128), (192, 128), (256, 256)]
PACKED = masks.causal() & masks.same("document")
RULE = masks.parse(
    "causal() & same('document') & (window(400) | sink(3)) | prefix() & modulo('position', 'position', 3)"
)
SCORES = {
    "softcap": scores.softcap(50.0),
    "alibi": scores.alibi(np.float32([0.5, 0.25, 0.1, 0.05])),
    "sigmoid": scores.sigmoid(-1.0),
    "t5": scores.t5_bias(np.zeros((4, 32), np.float32)),
}


@pytest.fixture(autouse=True)
def _asked_for(monkeypatch):
    monkeypatch.setenv(EXPERIMENTAL, "pallas_gpu")


def arrays(length: int, heads=4, kv_heads=2, width=128, value_width=None, dtype=jnp.bfloat16, mesh=None):
    """Shapes of (q, k, v, tokens), cut over the mesh axis "sequence"."""
    sharding = NamedSharding(mesh, P(None, "sequence")) if mesh else None

    def shape(*dimensions, dtype=dtype):
        return jax.ShapeDtypeStruct((1, length, *dimensions), dtype, sharding=sharding)

    field = shape(dtype=jnp.int32)
    value = shape(kv_heads, value_width or width)
    return shape(heads, width), shape(kv_heads, width), value, Tokens(field, field, prefix=field)


def both_passes(mask, score=None, parallel=None):
    def loss(q, k, v, tokens):
        how = {"implementation": "pallas_gpu", "parallel": parallel, "q_tokens": tokens, "k_tokens": tokens}
        return striate.attention(q, k, v, mask=mask, score=score, **how).astype(jnp.float32).sum()

    return jax.grad(loss, argnums=(0, 1, 2))


def test_gpus_are_described_after_jax_has_looked_for_its_own():
    program = "import jax; jax.devices(); from striate.lib import plan; print(len(plan.describe('h200:8')))"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.stdout.strip().endswith("8"), done.stderr


@pytest.mark.parametrize(("width", "value_width"), WIDTHS)
def test_the_matrix_unit_is_what_is_waited_for(width, value_width):
    _, kernels = schedule_for("h200:1", both_passes(PACKED), *arrays(4096, width=width, value_width=value_width))
    backward = {"backward"} if width + value_width <= 256 else {"dq", "dk", "dv"}
    assert {kernel.name.removesuffix("_mosaic_gpu_kernel") for kernel in kernels} == {
        f"attention_{name}" for name in {"forward"} | backward
    }
    for kernel in kernels:
        whole, masked = kernel.loops
        assert masked.columns == whole.columns > 0 and not (whole.serialised or masked.serialised)
        assert sum(masked.instructions.values()) > sum(whole.instructions.values())
        cycles = whole.cycles(warpgroups=2)
        assert cycles["matrix"] > 0.95 * max(cycles.values()), cycles
        # Sums stay in registers; places in memory may not.
        assert whole.spills <= (0 if "forward" in kernel.name or width == 64 else 64), kernel


def test_where_reruns_shall_be_equal_the_matrix_unit_is_too(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_deterministic_ops=true")
    _, kernels = schedule_for("h200:1", both_passes(PACKED), *arrays(2048))
    for kernel in kernels:
        cycles = kernel.loops[0].cycles(warpgroups=2)
        assert cycles["matrix"] == max(cycles.values()) and not any(loop.serialised for loop in kernel.loops)
    assert len(kernels) == 3


@pytest.mark.parametrize("name", SCORES)
def test_scores(name):
    _, kernels = schedule_for("h100:1", both_passes(RULE, SCORES[name]), *arrays(2048, kv_heads=4))
    assert len(kernels) == (3 if name == "t5" else 2) and not any(
        loop.serialised for kernel in kernels for loop in kernel.loops
    )


@pytest.mark.parametrize("page", [None, 8, 128])
def test_a_cache_is_read_where_it_lies(page):
    batch, length, heads, kv_heads, width = 16, 8192, 32, 8, 128
    cache = (batch, length) if page is None else (batch * length // page, page)
    q, k = (jax.ShapeDtypeStruct(x, jnp.bfloat16) for x in ((batch, 1, heads, width), (*cache, kv_heads, width)))
    at, place, table = (
        jax.ShapeDtypeStruct((batch, n), jnp.int32) for n in (1, length, 1 if page is None else length // page)
    )

    def attend(q, k, v, at, place, table):
        how = {"q_tokens": Tokens(at), "k_tokens": Tokens(place), "mask": masks.causal()}
        if page is None:
            return striate.attention(q, k, v, implementation="pallas_gpu", **how)
        return paged_attention(q, k, v, table, implementation="pallas_gpu", **how)

    compiled, (kernel,) = schedule_for("h200:1", attend, q, k, k, at, place, table)
    assert (kernel.spills, kernel.warnings) == (0, ()) and not any(loop.serialised for loop in kernel.loops), kernel
    assert compiled.memory_analysis().temp_size_in_bytes < k.size * k.dtype.itemsize / 10


def permutes(program: str) -> list[bool]:
    """For every permute of a scheduled program, whether a kernel runs between its start and its end."""
    found, open_ones = [], {}
    for line in program.splitlines():
        if start := re.match(r"\s*%(collective-permute-start[.\d]*) = ", line):
            open_ones[start[1]] = False
        elif end := re.search(r"collective-permute-done\(%(collective-permute-start[.\d]*)\)", line):
            found.append(open_ones.pop(end[1]))
        elif re.search(r" collective-permute\(", line):
            found.append(False)
        elif 'custom_call_target="mosaic_gpu' in line:
            open_ones = dict.fromkeys(open_ones, True)
    return found


def test_the_reader_of_permutes_sees_one_that_nothing_hides():
    start, end = (
        "  %collective-permute-start.3 = (f32[])",
        "  %x = collective-permute-done(%collective-permute-start.3)",
    )
    kernel = '  %y = custom-call(%a), custom_call_target="mosaic_gpu_v2"'
    assert permutes("\n".join([start, kernel, end])) == [True]
    assert permutes("\n".join([start, end, kernel])) == [False]
    assert permutes("  %z = f32[] collective-permute(%a), channel_id=1") == [False]


@pytest.mark.parametrize("count", [8, pytest.param("2x8", marks=pytest.mark.slow)])
def test_a_ring_computes_while_keys_travel(count):
    topology = f"h200:{count}"
    mesh = Mesh(np.array(plan.describe(topology)), ("sequence",))
    compiled = plan.compile_for(
        topology, both_passes(PACKED, parallel=Ring(mesh)), *arrays(mesh.size * 4096, mesh=mesh)
    )
    hidden = permutes(compiled.as_text())
    # Only the last gradients of keys and values come home after all the work.
    assert len(hidden) > 4 and all(hidden[:-2]), hidden


@pytest.mark.slow
def test_a_ring_takes_memory_in_proportion_to_its_tokens():
    mesh, taken = Mesh(np.array(plan.describe("h200:8")), ("sequence",)), []
    for length in (2**17, 2**20):
        shapes = arrays(length, heads=32, kv_heads=8, mesh=mesh)
        compiled = plan.compile_for("h200:8", both_passes(PACKED, parallel=Ring(mesh)), *shapes)
        taken.append(compiled.memory_analysis().temp_size_in_bytes)
    # No more than 32 KB for a token of 32 heads: nothing grows with the pairs.
    assert taken[1] < 1.01 * 8 * taken[0] and taken[1] < 2**20 / 8 * 32 * 1024
