"""The order of a hybrid model: what its recurrences are predicted to send, against traced programs, and the choice."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.interpreters.partial_eval import dce_jaxpr
from rich.console import Console

import striate
from striate import Tokens, UserError, masks
from striate.lib.layouts import Contiguous, Dealt, Striped, ZigZag, balanced
from striate.lib.parallel import HARDWARE, Across, Recurrent, ReorderedScan, StateScan, ValueColumns
from striate.lib.parallel.choose import GENERIC, choose
from striate.lib.parallel.costs import Hardware, Problem
from striate.lib.parallel.hybrid import crossings
from suites.attention import mesh
from suites.jaxprs import equations

SHARDS, LENGTH, HEADS, KEYS, VALUES = 4, 64, 2, 16, 32
SHAPE = {"heads": 4, "kv_heads": 2, "head_dim": 8}
ORDERS = [Contiguous(SHARDS), ZigZag(SHARDS), Striped(SHARDS, 2)]


def recurrent(rule="sum", layers=1) -> Recurrent:
    return Recurrent(layers=layers, heads=HEADS, key_width=KEYS, value_width=VALUES, rule=rule)


def problem(**change) -> Problem:
    fixed = {"rows": 1, "length": LENGTH, "shards": SHARDS, "heads": 4, "kv_heads": 2, "head_dim": 8, "itemsize": 4}
    return Problem(**{**fixed, "backward": True, "tile": 1, **change})


def sent(crossing, layout, rule) -> float:
    """Bytes that a device sends, forward and backward, in a program that is traced and not run."""
    q, k, v = (jnp.zeros((1, LENGTH, HEADS, width)) for width in (KEYS, KEYS, VALUES))
    parallel = crossing.on(mesh(sequence=SHARDS), layout)

    def loss(q, k, v):
        return (striate.linear_attention(q, k, v, rule=rule, parallel=parallel) ** 2).sum()

    jaxpr = jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(q, k, v).jaxpr
    # A compiler drops what nobody asks for, as this does: the state after the sequence.
    jaxpr, _ = dce_jaxpr(jaxpr, [True] * 3)
    # What an all-to-all or a sum of shares leaves at home is not sent.
    away = (SHARDS - 1) / SHARDS
    shares = {"all_gather": SHARDS - 1, "ppermute": 1, "psum": 1, "all_to_all": away, "reduce_scatter": away}
    return sum(
        share * times * x.aval.size * x.aval.dtype.itemsize
        for name, share in shares.items()
        for equation, times in equations(jaxpr, name)
        for x in equation.invars
    )


@pytest.mark.parametrize("rule", ["sum", "delta"])
@pytest.mark.parametrize("layout", ORDERS, ids=lambda layout: type(layout).__name__)
def test_what_is_predicted_to_be_sent_is_what_a_program_sends(layout, rule):
    found = list(crossings(recurrent(rule), problem(), layout, GENERIC))
    kinds = [(crossing.kind, crossing.exchange) for crossing in found]
    states = ReorderedScan if isinstance(layout, Striped) else StateScan
    assert kinds == [(states, "gather"), (states, "steps"), (ValueColumns, None)]
    for crossing in found:
        # Documents, and where they begin, go along: a number a token, and one a state.
        assert sum(crossing.sent) == pytest.approx(sent(crossing, layout, rule), rel=0.05), crossing
        one_way = next(
            x for x in crossings(recurrent(rule), problem(backward=False), layout, GENERIC) if str(x) == str(crossing)
        )
        assert one_way.sent == (crossing.sent[0], 0) and one_way.seconds < crossing.seconds


def test_time_is_compute_where_links_cost_nothing_and_bytes_where_compute_does():
    near = Hardware("compute of no cost", np.inf, 1e9, np.inf, switched=True, latency=0.0)
    fast = Hardware("links of no cost", 1e12, np.inf, np.inf, latency=0.0)
    for layout in ORDERS:
        for crossing in crossings(recurrent(layers=3), problem(), layout, near):
            assert crossing.seconds == pytest.approx(sum(crossing.sent) / 1e9)
        own = 64 * (KEYS + VALUES) + 2 * KEYS * VALUES
        for crossing in crossings(recurrent(layers=3), problem(), layout, fast):
            # Columns of values alone are shared out: every device multiplies all queries and keys.
            if crossing.kind is ValueColumns:
                operations = LENGTH * HEADS * ((own - 64 * KEYS) / SHARDS + 64 * KEYS)
            else:
                operations = LENGTH * HEADS * (own + KEYS * VALUES) / SHARDS
            assert crossing.seconds == pytest.approx(3 * 4 * 2 * operations / (1e12 * fast.efficiency))


def test_an_order_without_intervals_leaves_the_columns():
    dealt = balanced(masks.causal(), Tokens.arange(1, LENGTH), SHARDS, 4)
    assert isinstance(dealt, Dealt)
    for layout in (dealt, Striped(SHARDS, 8)):  # 64 tokens are no multiple of 8 x 4 x 4
        assert [x.kind for x in crossings(recurrent(), problem(), layout, GENERIC)] == [ValueColumns]
    narrow = replace(recurrent(), value_width=30)
    assert not list(crossings(narrow, problem(), dealt, GENERIC))


def test_states_decide_where_attention_does_not():
    """Causal attention alone runs evenly in zigzag; recurrences that outweigh it take the order that suits them."""
    tokens, link = Tokens.arange(1, 65536), HARDWARE["v5p"]
    fixed = {"heads": 8, "kv_heads": 8, "hardware": link}
    model = Recurrent(layers=3, heads=8, key_width=128, value_width=128, rule="delta")
    hybrid = choose(masks.causal(), tokens, 8, recurrent=model, **fixed)
    assert hybrid.layout == choose(masks.causal(), tokens, 8, **fixed).layout == ZigZag(8)
    assert hybrid.chosen.recurrences.kind is StateScan
    assert hybrid.chosen.seconds == hybrid.chosen.costs.seconds + hybrid.chosen.recurrences.seconds
    # In zigzag a device hands on the states of two runs: with a thousand such layers that is what counts.
    many = choose(masks.causal(), tokens, 8, recurrent=replace(model, layers=1000), **fixed)
    assert many.layout == Contiguous(8)
    assert many.chosen.seconds == min(candidate.seconds for candidate in many.candidates)


def test_few_devices_gather_states_and_many_pass_them_on_where_all_are_near():
    def exchange(shards, hardware):
        given = problem(length=2**20, shards=shards, itemsize=2)
        ways = crossings(Recurrent(1, 16, 128, 128), given, Contiguous(shards), HARDWARE[hardware])
        return min(ways, key=lambda way: way.seconds).exchange

    assert [exchange(shards, "h100") for shards in (2, 4, 64)] == ["gather", "gather", "steps"]
    # In a ring of links a step to a device far away takes all links between, and a gather goes both ways round.
    assert {exchange(shards, "v5p") for shards in (2, 8, 64, 256)} == {"gather"}


@pytest.mark.parametrize("layers", [1, 1000])
def test_what_was_chosen_runs_and_is_the_same_function(layers):
    rng, grid, tokens = np.random.default_rng(0), mesh(sequence=SHARDS), Tokens.arange(1, LENGTH)
    choice = choose(masks.causal(), tokens, grid, tile=1, recurrent=recurrent("delta", layers), heads=HEADS)
    assert isinstance(choice.parallel, Across)
    q, k = (jnp.asarray(rng.normal(size=(1, LENGTH, HEADS, KEYS)), jnp.float32) for _ in range(2))
    k /= jnp.linalg.norm(k, axis=-1, keepdims=True)
    v = jnp.asarray(rng.normal(size=(1, LENGTH, HEADS, VALUES)), jnp.float32)

    def both(q, k, v, tokens, parallel):
        out = striate.linear_attention(q, k, v, rule="delta", tokens=tokens, parallel=parallel.recurrence)
        return striate.attention(q, k, out, mask=masks.causal(), q_tokens=tokens, parallel=parallel.attention)

    wanted = both(q, k, v, tokens, Across(None, None))
    got = choice.layout.restore(both(*choice.layout.permute((q, k, v, tokens)), choice.parallel))
    np.testing.assert_allclose(got, wanted, atol=1e-5)


def test_reasons_and_table_name_the_recurrences():
    choice = choose(masks.causal(), Tokens.arange(1, 4096), 8, recurrent=Recurrent(3, 8, 64, 64), **SHAPE)
    across = choice.chosen.recurrences
    assert f"Recurrences cross by {across}: a device sends" in " ".join(choice.reasons)
    assert f"and {across} in {choice.chosen.order} order" in choice.reasons[0]
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(choice.table())
    text = console.export_text()
    assert "recurrences" in text and text.count("ValueColumns") >= 1 and str(across) in text
    assert "recurrences" not in str(choose(masks.causal(), Tokens.arange(1, 4096), 8, **SHAPE).reasons)


def test_two_mesh_axes_have_no_way_for_recurrences():
    with pytest.raises(UserError, match="RingUlysses 2: no way for recurrences"):
        choose(masks.causal(), Tokens.arange(1, LENGTH), mesh(ring=2, sequence=2), recurrent=recurrent(), **SHAPE)
