"""Positions: what their definitions say in float64, relative, blind to the order of the tokens, and differentiable."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oracles import derivatives
from oracles import positions as oracle
from striate import Tokens, UserError
from striate.lib import positions
from striate.lib.layouts import Striped
from striate.lib.positions import NTK, Linear, NoPE, Rope, XPos, YaRN, frequencies, lrpe, per_axis, rope, xpos

RNG = np.random.default_rng(0)
EPSILON = float(np.finfo(np.float32).eps)
BATCH, LENGTH, HEADS, WIDTH = 2, 48, 3, 16
X = RNG.normal(size=(BATCH, LENGTH, HEADS, WIDTH)).astype(np.float32)
POSITION = RNG.integers(0, 1000, size=(BATCH, LENGTH)).astype(np.int32)
PLACE = RNG.integers(0, 300, size=(BATCH, LENGTH, 3)).astype(np.int32)
FREQUENCY = {
    "given": frequencies(WIDTH),
    "partial": frequencies(6, theta=500.0),
    "per head": RNG.uniform(0, 1, (HEADS, 5)).astype(np.float32),
    "three axes": per_axis(frequencies(4), frequencies(4), frequencies(8)),
    "mixed axes, per head": RNG.uniform(0, 1, (3, HEADS, 8)).astype(np.float32),
}


def place_and_frequency(case, full=False):
    """As `rope` takes them; in full, (B, T, axes) and (axes, heads or 1, F), as the oracle does."""
    place, frequency = PLACE if "axes" in case else POSITION, np.asarray(FREQUENCY[case])
    if full and "axes" not in case:
        place, frequency = place[..., None], frequency[None]
    return place, frequency if not full or "head" in case else frequency[:, None]


@pytest.mark.smoke
@pytest.mark.parametrize("case", FREQUENCY)
def test_pairs_are_turned_by_the_sum_of_their_angles(case):
    # Angles of up to 1000, or three of up to 300, each known to a unit in its last place.
    allowed = 1000 * EPSILON * np.abs(X).max()
    expected = oracle.rope(X, *place_and_frequency(case, full=True))
    np.testing.assert_allclose(rope(X, *place_and_frequency(case)), expected, rtol=0, atol=allowed)


@pytest.mark.parametrize("greatest", [2**15, 10**6, 10**7])
def test_the_error_of_an_angle_is_in_proportion_to_it(greatest):
    position = RNG.integers(greatest // 2, greatest, size=(1, 2000)).astype(np.int32)
    ones = np.concatenate([np.ones((1, 2000, 1, 64)), np.zeros((1, 2000, 1, 64))], -1).astype(np.float32)
    got = np.float64(rope(ones, position))[0, :, 0]
    angle = position[0][:, None] * oracle.frequencies(128)
    error = np.abs(got[:, :64] + 1j * got[:, 64:] - np.exp(1j * angle))
    assert (error <= (angle + 1) * EPSILON).all()


def test_whole_and_fractional_positions_are_one_scale():
    np.testing.assert_array_equal(rope(X, np.float32(POSITION)), rope(X, POSITION))
    half = rope(rope(X, np.float32(POSITION) / 2), np.float32(POSITION) / 2)
    np.testing.assert_allclose(half, rope(X, POSITION), atol=1000 * EPSILON * np.abs(X).max())


def test_position_zero_changes_nothing_and_the_dtype_stays():
    np.testing.assert_array_equal(rope(X, 0 * POSITION), X)
    assert rope(jnp.asarray(X, jnp.bfloat16), POSITION, FREQUENCY["partial"]).dtype == jnp.bfloat16


ENCODERS = {
    "rope": (lambda x, place, role: rope(x, place), 1),
    "partial": (lambda x, place, role: rope(x, place, FREQUENCY["partial"]), 1),
    "three axes": (lambda x, place, role: rope(x, place, FREQUENCY["three axes"]), 3),
    "xpos": (lambda x, place, role: xpos(x, place, role, (0, 1300)), 1),
    "lrpe": (lambda x, place, role: lrpe(x, place), 1),
    "lrpe of two axes": (lambda x, place, role: lrpe(x, place, per_axis(*jnp.split(frequencies(32), 2))), 2),
}


@pytest.mark.parametrize("case", ENCODERS)
def test_products_depend_on_differences_alone(case):
    encode, axes = ENCODERS[case]
    place = PLACE[..., :axes] if axes > 1 else POSITION

    def products(shift):
        moved = np.int32(place + shift)
        return np.einsum("bthd,bshd->bhts", encode(X, moved, "query"), encode(X[::-1], moved, "key"))

    before, after, other = products(0), products(300), products(np.arange(LENGTH).reshape(1, -1, *[1] * (axes > 1)))
    np.testing.assert_allclose(after, before, rtol=0, atol=2e-4 * np.abs(before).max())
    assert np.abs(other - before).max() > 0.1 * np.abs(before).max()


@pytest.mark.parametrize("case", ENCODERS)
def test_any_order_of_the_tokens_gives_the_same(case):
    encode, axes = ENCODERS[case]
    place, layout = PLACE[..., :axes] if axes > 1 else POSITION, Striped(4, 3)
    natural = encode(X, place, "key")
    np.testing.assert_array_equal(layout.restore(encode(layout.permute(X), layout.permute(place), "key")), natural)


def pull(function, arrays, cotangent):
    return jax.vjp(function, *map(jnp.float32, arrays))[1](jnp.float32(cotangent))


@pytest.mark.parametrize("case", ["given", "per head", "mixed axes, per head"])
def test_gradients_of_rope_reach_arrays_positions_and_frequencies(case):
    place, frequency = place_and_frequency(case)
    arrays = X[:, :3], place[:, :3] % 50, frequency

    def full(x, place, frequency):
        place, frequency = (place, frequency) if "axes" in case else (place[..., None], frequency[None])
        return oracle.rope(x, place, frequency if "head" in case else frequency[:, None])

    cotangent = RNG.normal(size=arrays[0].shape)
    for got, true in zip(pull(rope, arrays, cotangent), derivatives.gradients(full, arrays, cotangent), strict=True):
        np.testing.assert_allclose(got, true, rtol=0, atol=100 * EPSILON * np.abs(true).max())


@pytest.mark.parametrize("case", ["xpos", "lrpe"])
def test_gradients_of_products_reach_both_sides_and_frequencies(case):
    n, m, places = 40, 17, np.array([[40]], np.int32)
    q, k, frequency = X[:1, :1], X[:1, 1:2], np.asarray(frequencies(16 if case == "xpos" else 32))

    def product(q, k, frequency):
        if case == "xpos":
            turned = (
                xpos(x, at, role, (0, 50), frequency)
                for x, at, role in ((q, places, "query"), (k, m + 0 * places, "key"))
            )
        else:
            turned = lrpe(q, places, frequency), lrpe(k, m + 0 * places, frequency)
        return jnp.einsum("bthd,bthd->h", *turned)

    def true_product(q, k, frequency):
        if case == "xpos":
            return oracle.xpos_products(q, k, n, m, frequency, 512.0, 0.4)[0, 0]
        return oracle.lrpe_products(q, k, np.array([n]), np.array([m]), frequency[None])[0, 0]

    cotangent = RNG.normal(size=HEADS)
    np.testing.assert_allclose(product(q, k, frequency), true_product(q, k, frequency), atol=1e-4)
    true = derivatives.gradients(true_product, (q, k, frequency), cotangent)
    for got, expected in zip(pull(product, (q, k, frequency), cotangent), true, strict=True):
        np.testing.assert_allclose(got, expected, rtol=0, atol=100 * EPSILON * np.abs(expected).max())


def test_interpolated_positions_are_squeezed():
    squeezed = rope(X, POSITION, frequencies(WIDTH, scaling=Linear(4.0)))
    np.testing.assert_allclose(squeezed, rope(X, POSITION / np.float32(4)), atol=1000 * EPSILON * np.abs(X).max())


def test_ntk_slows_the_slowest_pair_and_leaves_the_fastest():
    plain, scaled = frequencies(64), frequencies(64, scaling=NTK(8.0))
    ratio = np.asarray(plain / scaled)
    assert ratio[0] == 1 and ratio[-1] == pytest.approx(8.0, rel=1e-5) and (np.diff(ratio) > 0).all()
    np.testing.assert_allclose(ratio, 8.0 ** (np.arange(32) / 31), rtol=1e-5)


def test_yarn_is_the_ramp_of_its_paper_and_says_its_temperature():
    yarn = YaRN(factor=16.0, length=4096)
    expected = oracle.yarn(128, 10_000.0, 16.0, 4096, 1.0, 32.0)
    kept = expected / oracle.frequencies(128)
    assert (kept == 1).any() and (kept == 1 / 16).any() and ((kept > 1 / 16) & (kept < 1)).sum() > 5
    np.testing.assert_allclose(frequencies(128, scaling=yarn), expected, rtol=1e-5)
    assert np.sqrt(1 / yarn.temperature) == pytest.approx(0.1 * np.log(16) + 1)
    assert Linear(4.0).temperature == NTK(4.0).temperature == YaRN(1.0, 64).temperature == 1.0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_xpos_is_finite_and_right_at_both_ends_of_the_longest_span(dtype):
    low, high = -5000, 33_994 - 5000
    x = jnp.asarray(X[:1, :2], dtype)
    products = {}
    for end in (low, (low + high) // 2, high - 9):
        q = xpos(x, np.array([[end + 9, end]], np.int32), "query", (low, high))
        k = xpos(x, np.array([[end, end + 9]], np.int32), "key", (low, high))
        assert np.isfinite(q).all() and np.isfinite(k).all()
        products[end] = np.einsum("thd,thd->th", *np.float64((q[0], k[0])))
    expected = products.pop((low + high) // 2)
    for found in products.values():
        np.testing.assert_allclose(found, expected, rtol=0, atol=(2e-3 if dtype == "float32" else 0.1) * WIDTH)
    # Farther apart than anything: the scales multiply, and the product is still a number.
    first, last = (np.array([[end, end]], np.int32) for end in (low, high))
    hidden = xpos(x, first, "query", (low, high)), xpos(x, last, "key", (low, high))
    assert np.isfinite(jnp.einsum("bthd,bthd->bth", *hidden)).all()


def test_xpos_decays():
    ones = np.ones((1, 2, 1, 64), np.float32)
    q, k = (xpos(ones, np.array([[0, 2000]], np.int32), role, (0, 4096)) for role in ("query", "key"))
    near, far = np.sum(q * k, -1)[0, 1, 0], np.sum(q[:, 1:] * k[:, :1], -1).item()
    assert abs(far) < 0.5 * near


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"role": "value"}, "role 'value'; it is 'query' or 'key'"),
        ({"span": (0, 40_000)}, r"span \(0, 40000\) scales by up to 2\^71, .* at most 33994 .* a base of at least 603"),
        ({"span": (0, 900)}, r"positions \d+ to 9\d\d, outside of its span \(0, 900\)"),
        ({"span": (9, 0)}, r"span \(9, 0\); it is the least and the greatest"),
    ],
)
def test_xpos_out_of_range_is_answered(change, message):
    with pytest.raises(UserError, match=message):
        xpos(X, POSITION, **{"role": "key", "span": (0, 1000)} | change)


def test_a_greater_base_makes_room():
    xpos(X, POSITION, "key", (0, 40_000), base=603.0)
    with pytest.raises(UserError, match="float16 has room for 2"):
        xpos(np.float16(X), POSITION, "key", (0, 4000))


# A question, two frames of four tokens, an answer; and a document that begins with a frame of the same number.
FRAMES = [-1, -1, -1, 7, 7, 7, 7, 8, 8, 8, 8, -1, -1], [8, 8, 8, -1, -1, 2, 2]


def video_tokens():
    length = sum(map(len, FRAMES))
    document = np.repeat([3, 1], [len(frames) for frames in FRAMES])
    position = np.concatenate([np.arange(len(frames)) for frames in FRAMES])
    fields = {"position": position, "document": document, "frame": np.concatenate(FRAMES)}
    return Tokens(**{name: np.int32(x).reshape(1, length) for name, x in fields.items()})


def test_tokens_of_a_frame_share_their_time():
    expected = np.concatenate([oracle.times(frames) for frames in FRAMES])
    assert expected[:13].tolist() == [0, 1, 2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 6]
    np.testing.assert_array_equal(positions.temporal(video_tokens())[0], expected)
    # Numbers of their own for every token of text mean the same.
    tokens = video_tokens()
    frame = np.where(tokens["frame"] < 0, 100 + np.arange(20, dtype=np.int32), tokens["frame"])
    np.testing.assert_array_equal(positions.temporal(tokens.replace(frame=frame))[0], expected)


def test_a_document_may_begin_anywhere():
    tokens = video_tokens()
    later = tokens.replace(position=tokens.position + 50)
    np.testing.assert_array_equal(positions.temporal(later), positions.temporal(tokens) + 50)


def test_time_is_the_same_in_any_order():
    tokens, order = video_tokens(), RNG.permutation(20)
    shuffled = tokens.map(lambda x: x[:, order])
    np.testing.assert_array_equal(positions.temporal(shuffled), positions.temporal(tokens)[:, order])


def test_dual_positions_turn_by_order_and_by_time():
    tokens, x = video_tokens(), X[:1, :20]
    turned = rope(rope(x, tokens.position), 0.5 * jnp.float32(positions.temporal(tokens)))
    np.testing.assert_allclose(rope(x, positions.dual(tokens, gamma=0.5)), turned, atol=1e-5)
    one_document = np.asarray(positions.dual(tokens))[0, :13]
    assert (np.diff(one_document) > 0).all()
    with pytest.raises(UserError, match="field 'frame', but the Tokens have 'document', 'position': add it"):
        positions.dual(Tokens.arange(1, 4))


def test_sinusoids():
    angle = POSITION[..., None] * oracle.frequencies(32)
    expected = np.concatenate([np.sin(angle), np.cos(angle)], -1)
    np.testing.assert_allclose(positions.sinusoidal(POSITION, 32), expected, atol=1000 * EPSILON)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rope(X[..., 1:], POSITION), "pairs of dims and got 15, which is no multiple of 2: use 14 or 16"),
        (lambda: rope(X, POSITION, frequencies(18)), "9 frequencies turn 18 dims of 16: use 8 frequencies or fewer"),
        (lambda: rope(X, POSITION[:, 1:]), r"positions \(2, 47\) .* do not fit: they are \(batch, length"),
        (lambda: rope(X, POSITION, FREQUENCY["three axes"][:2]), r"frequencies \(2, 8\) do not fit"),
        (lambda: rope(X, PLACE), r"positions \(2, 48, 3\) and frequencies \(8,\) do not fit"),
        (lambda: rope(X, POSITION[0]), r"positions \(48,\) .* do not fit"),
        (lambda: lrpe(X, POSITION, frequencies(16)), r"8 frequencies for 16 dims; .* frequencies\(32\)"),
        (lambda: frequencies(2, scaling=NTK(2.0)), "needs 4 dims or more, got 2"),
        (lambda: Linear(0.0), r"Linear\(factor=0.0\) cannot be: factor is a number greater than 0"),
        (lambda: YaRN(2.0, 1.5), r"YaRN\(length=1.5\) cannot be: length is a whole number"),
        (lambda: YaRN(2.0, 64, slow=32.0), "slow is less than fast"),
        (lambda: Rope(scaling=2.0), "scaling is Linear, NTK, YaRN or None"),
        (lambda: Rope(fields="frame"), "fields is a tuple"),
        (lambda: Rope().check(15), "use 14 or 16"),
        (lambda: Rope(dims=(32,)).check(16), "turns 32 dims by 1 fields, and heads have 16: give dims"),
        (lambda: Rope(fields=("row", "column", "frame")).check(16), r"5 \+ 5 \+ 5 dims by 3 fields"),
        (lambda: XPos(span=(0, 50_000)).check(16), "at most 33994 positions"),
    ],
)
def test_what_cannot_be_is_answered(call, message):
    with pytest.raises(UserError, match=message):
        call()


NAMED = [
    NoPE(),
    Rope(),
    Rope(theta=500.0, dims=(8,), scaling=YaRN(4.0, 128)),
    Rope(fields=("frame", "position"), dims=(4, 8)),
    XPos(span=(-3, 1000), gamma=0.7),
]


@pytest.mark.parametrize("position", NAMED, ids=str)
def test_a_named_position_prints_as_text_that_is_read_back(position):
    assert positions.parse(str(position)) == position


def test_text_may_be_short():
    assert positions.parse("Rope(500.0, scaling=Linear(2))") == Rope(theta=500.0, scaling=Linear(2.0))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rope()", r"there is no rope \(did you mean Rope\?\), there are NoPE, Rope, XPos"),
        ("Rope(thera=3)", "thera"),
        ("Rope(theta=-1)", "theta is a number greater than 0"),
        ("Rope(", "cannot be read"),
        ("Rope(theta=width)", "cannot be read"),
        ("Linear(2)", "is none by itself"),
        ("10000", "is none by itself"),
        ("", "cannot be read"),
    ],
)
def test_text_that_is_no_position_is_answered(text, message):
    with pytest.raises(UserError, match=message):
        positions.parse(text)


def test_named_positions_are_the_functions():
    tokens = Tokens(position=POSITION, frame=PLACE[..., 0])
    by_two = per_axis(frequencies(4), frequencies(8))
    expected = {
        NoPE(): (X, X),
        Rope(theta=500.0, dims=(8,)): [rope(X, POSITION, frequencies(8, 500.0))] * 2,
        Rope(fields=("frame", "position"), dims=(4, 8)): [rope(X, np.stack([PLACE[..., 0], POSITION], -1), by_two)] * 2,
        XPos(span=(0, 1000)): [xpos(X, POSITION, role, (0, 1000)) for role in ("query", "key")],
    }
    for position, (q, k) in expected.items():
        position.check(WIDTH)
        np.testing.assert_array_equal(position.queries(X, tokens), q)
        np.testing.assert_array_equal(position.keys(X, tokens), k)


def test_queries_are_divided_by_the_temperature():
    tokens, yarn = Tokens(position=POSITION), YaRN(4.0, 128)
    position = Rope(scaling=yarn)
    turned = rope(X, POSITION, frequencies(WIDTH, scaling=yarn))
    np.testing.assert_array_equal(position.keys(X, tokens), turned)
    np.testing.assert_allclose(position.queries(X, tokens), turned * (0.1 * np.log(4) + 1) ** 2, rtol=1e-6)


def test_compiled_positions_are_not_checked_against_the_span():
    turn = jax.jit(functools.partial(xpos, role="key", span=(0, 900)))
    assert np.isfinite(turn(X, POSITION)).all()
