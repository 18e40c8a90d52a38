"""The linear recurrence on a TPU: both passes as kernels that walk the blocks of a sequence, the state in VMEM.

A step of the grid is a block of chunks of one key/value head, with all query heads that it serves. The chunks of a head
follow one another, and the state stays in VMEM from the first to the last. The forward pass writes down what it is
before each block, where gradients will be asked for. The backward pass walks the blocks from the last to the first:
from that state it computes those between the chunks of the block again, then goes back through them, each by the vector
Jacobian products of chunk.py, with the cotangent of the state in VMEM.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from striate.lib.recurrence import Inputs, Recurrence, State, running_sum, segments
from striate.lib.tiles import vary_alike
from striate.pallas_kernels.tpu.chips import LANES
from striate.pallas_kernels.tpu.chunk import Chunk, Rule, across, within
from striate.pallas_kernels.tpu.parts import compiler_params, in_turn

CHUNKS = (16, 32, 64, 128, 256, 512)  # tokens
BLOCK = 2**18  # bytes of the queries, or of the values, of a block at most; half, where a chunk needs much by itself


@dataclass(frozen=True)
class Kernel(Recurrence):
    """The recurrence by these kernels, in chunks of so many tokens."""

    chunk: int
    interpret: ClassVar[Any] = False
    usual: ClassVar[int] = 128  # tokens of a chunk, on every chip

    def run(self, inputs: Inputs, state: State) -> tuple[jax.Array, State]:
        out, state = self._over_blocks(inputs, state, read=True)
        return jnp.moveaxis(out, 3, 1)[:, : inputs.k.shape[1]], state

    def leave(self, inputs: Inputs, state: State) -> State:
        return self._over_blocks(inputs, state, read=False)[1]

    @classmethod
    def suits(cls, inputs: Inputs, chunk: int | None) -> str | None:
        """None; or why these kernels do not take such inputs."""
        if inputs.q.dtype not in (jnp.bfloat16, jnp.float32):
            return f"takes bfloat16 and float32, and not {inputs.q.dtype}"
        if not inputs.q.dtype == inputs.k.dtype == inputs.v.dtype:
            return f"takes one dtype, and not q {inputs.q.dtype}, k {inputs.k.dtype}, v {inputs.v.dtype}"
        if chunk not in (None, *CHUNKS):
            return f"takes chunks of {', '.join(map(str, CHUNKS))} tokens, and not {chunk}"
        return None

    def _over_blocks(self, inputs: Inputs, state: State, read: bool):
        inputs, state = vary_alike((inputs, state))
        plan = Plan.of(self, inputs)
        document, segment = segments(inputs.document, state.document)
        segment = plan.chunked(segment, mode="edge")
        before = jnp.pad(segment[:, :-1, -1], ((0, 0), (1, 0)))
        given = Given(
            plan.by_heads(inputs.q) if read else None,
            plan.by_heads(inputs.k),
            plan.by_heads(inputs.v),
            None if inputs.log_decay is None else plan.sums(inputs.log_decay, segment),
            None if inputs.beta is None else plan.rows(plan.chunked(inputs.beta)),
            state.memory,
            state.total[:, :, None],
        )
        segment = (segment - before[:, :, None]).reshape(len(segment), -1, plan.chunks, plan.chunk)
        out, memory, total = _recur(plan, given, segment)
        return out, State(memory, total[:, :, 0], document[:, -1])


class Interpreted(Kernel):
    """The same, step by step on any device."""

    interpret = True


class Given(NamedTuple):
    """What a call is given, or of this the blocks of a step, or the cotangents of either; N blocks of M chunks of C."""

    q: Any  # (B, K, G, T, D); None where nothing is read
    k: Any  # (B, K, T, D)
    v: Any  # (B, K, T, V)
    sums: Any  # float32 (B, K, N, M, C) or (B, K, T, D), of the log-decays from the beginning of chunk or segment
    beta: Any  # float32 (B, K, N, M, C)
    memory: Any  # float32 (B, K, D, V)
    total: Any  # float32 (B, K, 1, D)


class Plan(NamedTuple):
    """What is static of a call, and how its arrays are cut."""

    rule: Rule
    chunk: int
    chunks: int  # of a block
    interpret: Any

    @classmethod
    def of(cls, kernel: Kernel, inputs: Inputs) -> Plan:
        _, length, _, group, width = inputs.q.shape
        by_channel = inputs.log_decay is not None and inputs.log_decay.ndim == 4
        rule = Rule(kernel.rule, kernel.normalise, by_channel, inputs.q.dtype)
        lanes = max(group * max(width, LANES), inputs.v.shape[3])
        most = BLOCK // 2 if by_channel or kernel.rule == "delta" else BLOCK
        chunks = min(most // (kernel.chunk * lanes * inputs.q.dtype.itemsize), -(-length // kernel.chunk))
        return cls(rule, kernel.chunk, max(1, chunks), kernel.interpret)

    def padded(self, x, mode="constant"):
        """(B, T, ...) with T a multiple of the tokens of a block."""
        missing = -x.shape[1] % (self.chunk * self.chunks)
        return jnp.pad(x, [(0, missing if axis == 1 else 0) for axis in range(x.ndim)], mode=mode)

    def chunked(self, x, mode="constant"):
        """(B, T, ...) as (B, chunks, C, ...)."""
        x = self.padded(x, mode)
        return x.reshape(x.shape[0], -1, self.chunk, *x.shape[2:])

    def by_heads(self, x):
        """(B, T, K, D) as (B, K, T, D), (B, T, K, G, D) as (B, K, G, T, D)."""
        return jnp.moveaxis(self.padded(x), 1, -2)

    def rows(self, x):
        """(B, chunks, C, K) as (B, K, N, M, C)."""
        x = jnp.moveaxis(x, 3, 1)
        return x.reshape(*x.shape[:2], -1, self.chunks, self.chunk)

    def sums(self, log_decay, segment):
        """Given.sums of (B, T, K) or (B, T, K, D) with the segments (B, chunks, C)."""
        g = self.chunked(log_decay)
        b = running_sum(g.reshape(-1, *g.shape[2:]), segment.reshape(-1, self.chunk))
        b = b.reshape(*g.shape[:2], *b.shape[1:])  # (B, chunks, K, C, 1 | D)
        if log_decay.ndim == 3:
            return self.rows(jnp.moveaxis(b[..., 0], 2, 3))
        return jnp.moveaxis(b, 2, 1).reshape(*b.shape[:1], b.shape[2], -1, b.shape[4])

    def tokens(self, number: int):
        """Those of a chunk of a block."""
        return pl.ds(number * self.chunk, self.chunk)

    def within(self, segment, given: Given, number: int):
        """(chunk.within, that chunk) of the blocks of a step."""
        refs = self._of_chunk(given, number)
        chunk = Chunk(*(None if ref is None else ref[at].astype(jnp.float32) for ref, at in refs))
        return functools.partial(within, self.rule, segment[pl.ds(number, 1)]), chunk

    def put(self, gradients: Given, number: int, of_chunk: Chunk) -> None:
        for (ref, at), x in zip(self._of_chunk(gradients, number), of_chunk, strict=True):
            if ref is not None:
                ref[at] = x.astype(ref.dtype)

    def _of_chunk(self, given: Given, number: int):
        tokens, row = self.tokens(number), pl.ds(number, 1)
        of_sums = (tokens,) if self.rule.by_channel else (row,)
        return (
            (given.q, (slice(None), tokens)),
            (given.k, (tokens,)),
            (given.v, (tokens,)),
            (given.sums, of_sums),
            (given.beta, (row,)),
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _recur(plan: Plan, given: Given, segment):
    """(out (B, K, G, T, V), or None, memory, total); segment int32 (B, N, M, C), 0 where the state goes on."""
    return _forward(plan, given, segment, keep=False)[:3]


def _recur_forward(plan, given, segment):
    *results, before = _forward(plan, given, segment, keep=True)
    return tuple(results), (given, segment, before)


def _recur_backward(plan, saved, cotangents):
    return _backward(plan, *saved, *cotangents), None


_recur.defvjp(_recur_forward, _recur_backward)


class Blocks(NamedTuple):
    """Which blocks a step of the grid (B, K, N) has."""

    plan: Plan
    blocks: int
    backwards: bool

    def spec(self, x) -> pl.BlockSpec:
        """Of tokens (B, K, ..., T, n)."""
        between = x.shape[2:-2]
        tokens = self.plan.chunk * self.plan.chunks
        shape = (None, None, *between, tokens, x.shape[-1])
        return pl.BlockSpec(shape, lambda b, h, n: (b, h, *(0,) * len(between), self.at(n), 0))

    def numbered(self, x) -> pl.BlockSpec:
        """Of (B, K, N, ., .)."""
        return pl.BlockSpec((None, None, None, *x.shape[3:]), lambda b, h, n: (b, h, self.at(n), 0, 0))

    def of_segment(self, x) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, *x.shape[2:]), lambda b, h, n: (b, self.at(n), 0, 0))

    def whole(self, x) -> pl.BlockSpec:
        """Of a state (B, K, ., .): one block as long as a head lasts."""
        return pl.BlockSpec((None, None, *x.shape[2:]), lambda b, h, n: (b, h, 0, 0))

    def of(self, given: Given) -> Given:
        of_sums = self.spec if self.plan.rule.by_channel else self.numbered
        kinds = Given(self.spec, self.spec, self.spec, of_sums, self.numbered, self.whole, self.whole)
        return Given(*(None if x is None else kind(x) for kind, x in zip(kinds, given, strict=True)))

    def at(self, n):
        return self.blocks - 1 - n if self.backwards else n


def _forward(plan: Plan, given: Given, segment, keep: bool):
    """(out, memory, total, (memory (B, K, N, D, V), total (B, K, N, 1, D)) before each block, or None)."""
    (batch, heads, *_), blocks = given.k.shape, segment.shape[1]
    at = Blocks(plan, blocks, backwards=False)
    q, v = given.q, given.v
    out = None if q is None else _like(given, (*q.shape[:-1], v.shape[-1]), v.dtype)
    memory, total = (_like(given, x.shape) for x in (given.memory, given.total))
    before = tuple(_like(given, (batch, heads, blocks, *x.shape[2:])) for x in (memory, total)) if keep else None
    specs = (
        None if out is None else at.spec(out),
        at.whole(memory),
        at.whole(total),
        tuple(map(at.numbered, before)) if keep else None,
    )
    return pl.pallas_call(
        functools.partial(_forward_step, plan),
        grid=(batch, heads, blocks),
        in_specs=(at.of_segment(segment), at.of(given)),
        out_specs=specs,
        out_shape=(out, memory, total, before),
        interpret=plan.interpret,
        compiler_params=compiler_params("parallel", "parallel", "arbitrary"),
        name="striate_linear_forward",
    )(segment, given)


def _forward_step(plan: Plan, segment, given: Given, out, memory, total, before):
    @pl.when(pl.program_id(2) == 0)
    def _():
        memory[...], total[...] = given.memory[...], given.total[...]

    state = memory[...], total[...]
    if before is not None:
        before[0][...], before[1][...] = state

    def begin(number):
        function, chunk = plan.within(segment, given, number)
        return function(chunk)

    def go_on(number, chunk):
        nonlocal state
        read, *state = across(plan.rule, chunk, *state)
        return (read,)

    def write(number, read):
        if out is not None:
            out[:, plan.tokens(number)] = read.astype(out.dtype)

    # What a chunk is by itself is issued before what the one before it does with the state.
    in_turn([(number,) for number in range(plan.chunks)], 1, begin, go_on, write)
    memory[...], total[...] = state


def _backward(plan: Plan, given: Given, segment, before, d_out, d_memory, d_total) -> Given:
    """The cotangents of what was given."""
    (batch, heads, *_), blocks = given.k.shape, segment.shape[1]
    at = Blocks(plan, blocks, backwards=True)
    of_given, of_state = at.of(given), (at.whole(d_memory), at.whole(d_total))
    (gradients,) = pl.pallas_call(
        functools.partial(_backward_step, plan),
        grid=(batch, heads, blocks),
        in_specs=(
            at.of_segment(segment),
            of_given,
            tuple(map(at.numbered, before)),
            None if d_out is None else at.spec(d_out),
            *of_state,
        ),
        out_specs=(of_given,),
        out_shape=(jax.tree.map(lambda x: _like(given, x.shape, x.dtype), given),),
        interpret=plan.interpret,
        compiler_params=compiler_params("parallel", "parallel", "arbitrary"),
        name="striate_linear_backward",
    )(segment, given, before, d_out, d_memory, d_total)
    return gradients


def _backward_step(plan: Plan, segment, given: Given, before, d_out, d_memory, d_total, gradients: Given):
    @pl.when(pl.program_id(2) == 0)
    def _():
        gradients.memory[...], gradients.total[...] = d_memory[...], d_total[...]

    chunks, pulls = zip(*(jax.vjp(*plan.within(segment, given, number)) for number in range(plan.chunks)), strict=True)
    states = [tuple(ref[...] for ref in before)]
    for chunk in chunks[:-1]:
        states.append(across(plan.rule, chunk._replace(weights=None, row=None), *states[-1])[1:])
    d_state = gradients.memory[...], gradients.total[...]

    def begin(number):
        nonlocal d_state
        _, pull = jax.vjp(functools.partial(across, plan.rule), chunks[number], *states[number])
        d_read = None if d_out is None else d_out[:, plan.tokens(number)].astype(jnp.float32)
        d_chunk, *d_state = pull((d_read, *d_state))
        return d_chunk

    in_turn(
        [(number,) for number in reversed(range(plan.chunks))],
        1,
        begin,
        lambda number, d_chunk: pulls[number](d_chunk),
        lambda number, d_given: plan.put(gradients, number, d_given),
    )
    gradients.memory[...], gradients.total[...] = d_state


def _like(given: Given, shape, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
    """An output that varies over the mesh axes over which what is given does."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(given.k).manual_axis_type)
