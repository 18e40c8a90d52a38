"""What both passes around a ring share: the call of their kernel, and the lists of live blocks of the ring's steps."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from striate.pallas_kernels.common import like
from striate.pallas_kernels.tpu.chips import vmem
from striate.pallas_kernels.tpu.steps import LONGEST, live_steps


def call(kernel, body, heads: int, lists, given, results, fresh, scratch_shapes, collective: int, name: str):
    """body(cores, Lists, *refs) on every core that takes part: all arrays in HBM, `results` in place.

    `heads` are dealt to the cores, if they can be. `fresh` are the shapes of further results. Kernels that may run at
    the same time need different numbers `collective`.
    """
    cores = kernel.cores if heads % kernel.cores == 0 else 1
    in_place = pl.BlockSpec(memory_space=pl.ANY)
    spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=len(lists),
        grid=(cores,),
        in_specs=[in_place] * (len(given) + len(results)),
        out_specs=[in_place] * (len(results) + len(fresh)),
        scratch_shapes=scratch_shapes,
    )
    program = pl.pallas_call(
        lambda row, code, count, *refs: body(cores, Lists(row, code, count), *refs),
        grid_spec=spec,
        out_shape=[*map(like, results), *fresh],
        input_output_aliases={len(lists) + len(given) + i: i for i in range(len(results))},
        interpret=kernel.interpret,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=vmem(), collective_id=collective
        ),
        name=name,
    )
    return kernel.traced(program)(*lists, *given, *results)


class Lists(NamedTuple):
    """The lists of live blocks of all steps of a ring, as long as each other, one after the other. int32."""

    row: Any
    code: Any
    count: Any

    @classmethod
    def of(cls, verdict_SBRCN: jax.Array) -> Lists:
        """From the verdicts of every step of the ring."""
        blocks = math.prod(verdict_SBRCN.shape[:-1])
        if blocks > LONGEST:
            raise NotImplementedError(
                "'pallas_tpu_fused' keeps the lists of all blocks that a device meets on the way around the ring in "
                f"the memory of the scalar core, {blocks} here, and at most {LONGEST} fit: use 'pallas_tpu'."
            )
        return cls(*(x.reshape(-1) for x in jax.vmap(live_steps)(verdict_SBRCN)))

    def at(self, step) -> tuple[Part, Part, Any]:
        """(row, code, count) of one step."""
        start = step * (self.row.shape[0] // self.count.shape[0])
        return Part(self.row, start), Part(self.code, start), self.count[step]


class Part(NamedTuple):
    """A list from some place on."""

    ref: Any
    start: Any

    def __getitem__(self, i):
        return self.ref[self.start + i]


def own(specs, first_head, row, code) -> list[pl.BlockSpec]:
    """The blocks of a grid whose first axis is the heads from `first_head` on, and whose list is (row, code)."""

    def place(spec, head, *at):
        return spec.index_map(first_head + head, *at, row, code)

    return [pl.BlockSpec(spec.block_shape, functools.partial(place, spec)) for spec in specs]
