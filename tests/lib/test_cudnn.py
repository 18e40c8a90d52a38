"""Attention by cuDNN without a GPU: what its masks mean, when it is chosen, and the calls in the program for CUDA."""

import logging
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import striate
from striate import Tokens, masks, scores
from striate.lib import attention, cudnn
from striate.lib.parallel import Ring
from suites.attention import mesh

LENGTH = 24
WINDOWS = [masks.window(size) for size in (0, 1, 3, LENGTH - 2, LENGTH - 1, 100)]
EXPRESSIBLE = [masks.everything(), masks.causal(), *WINDOWS, masks.causal() & masks.window(5, 7)]
OTHERS = [
    masks.nothing(),
    masks.after("position"),
    masks.window(3, 3),  # cuDNN, as jax calls it, has no bound on the right but the diagonal
    masks.window(None, 2),
    masks.window(3, name="frame"),
    masks.difference("position", "frame", low=0),
    masks.difference("position", "position", 1, 3),
    masks.query("position", 0),
    masks.causal() & masks.same("document"),
    masks.causal() | masks.prefix(),
    masks.window(3) | masks.sink(2),
    ~masks.causal(),
    masks.causal() & masks.modulo("position", "position", 2),
    masks.causal() & masks.switch([True, True, False, False]),
]


def arrays(dtype=jnp.bfloat16, length=LENGTH, width=16, value_width=None, seed=0):
    rng = np.random.default_rng(seed)
    shapes = (2, length, 4, width), (2, length, 2, width), (2, length, 2, value_width or width)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


@pytest.fixture
def gpu(monkeypatch, caplog):
    """A GPU of some capability where jax finds cuDNN 9.10; what is logged is that of the test alone."""
    device = SimpleNamespace(capability="8.0")
    for module in (attention, cudnn):
        monkeypatch.setattr(module, "capability", lambda: device.capability)
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000)
    for cached in (cudnn._refusal, attention._log_choice):
        cached.cache_clear()
    caplog.set_level(logging.INFO, logger="striate")
    yield device
    cudnn._refusal.cache_clear()


@pytest.mark.smoke
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("mask", EXPRESSIBLE, ids=str)
def test_the_arguments_say_what_the_mask_says(mask, scale):
    q, k, v = arrays(jnp.float32)
    weights = jnp.asarray(np.random.default_rng(1).normal(size=q.shape), jnp.float32)

    def values_and_gradients(attend):
        return attend(q, k, v), *jax.grad(lambda *x: (weights * attend(*x)).sum(), argnums=(0, 1, 2))(q, k, v)

    how = cudnn.expressed(mask, LENGTH)
    got = values_and_gradients(
        lambda *x: jax.nn.dot_product_attention(*x, scale=scale, implementation="xla", **how),
    )
    wanted = values_and_gradients(
        lambda *x: striate.attention(*x, mask=mask, scale=scale, implementation="reference"),
    )
    for mine, true in zip(got, wanted, strict=True):
        np.testing.assert_allclose(mine, true, rtol=2e-5, atol=2e-5)


def test_windows_are_as_wide_as_they_are_and_always_causal():
    """That of size n is n tokens back and the token itself; one that reaches the first token is no window."""
    assert cudnn.expressed(masks.window(3), LENGTH) == {"is_causal": True, "local_window_size": (3, 0)}
    assert cudnn.expressed(masks.window(3), 4) == cudnn.expressed(masks.causal(), 4) == {"is_causal": True}
    assert cudnn.expressed(masks.everything(), 4) == {}
    for mask in EXPRESSIBLE:
        how = cudnn.expressed(mask, LENGTH)
        assert how.get("is_causal") or "local_window_size" not in how, mask


@pytest.mark.parametrize("mask", OTHERS, ids=str)
def test_what_cannot_be_expressed_is_not(mask):
    assert cudnn.expressed(mask, LENGTH) is None


def chosen(options: dict, **shape) -> str:
    """What attention takes by itself, read from the program."""
    q, k, v = arrays(**shape)
    program = str(jax.make_jaxpr(lambda *x: striate.attention(*x, implementation=None, **options))(q, k, v))
    return "cudnn" if "dot_product_attention_fwd" in program else "xla"


@pytest.mark.parametrize("capability", ["8.0", "8.6", "9.0", "10.0", "12.0"])
@pytest.mark.parametrize("mask", [None, *EXPRESSIBLE], ids=str)
def test_a_gpu_takes_cudnn_where_the_mask_allows(gpu, caplog, capability, mask):
    gpu.capability = capability
    for _ in range(2):
        assert chosen({"mask": mask}) == chosen({"mask": mask}, dtype=jnp.float16) == "cudnn"
    assert caplog.messages == ["attention on cpu: cudnn, one device"]  # the backend is not that of the fixture


CAUSAL = {"mask": masks.causal()}
PACKED = {"mask": masks.causal() & masks.same("document")}
REASONS = [
    ("7.5", CAUSAL, {}, "is for GPUs of compute capability 8.0 or more, and this one has 7.5"),
    ("gfx942", CAUSAL, {}, "is for GPUs of compute capability 8.0 or more, and this one has gfx942"),
    ("8.0", CAUSAL, {"dtype": jnp.float32}, "takes bfloat16 and float16, and not float32"),
    ("8.0", CAUSAL | {"return_lse": True}, {}, "gives no log-sum-exp: that of jax has 16 bits and no gradient"),
    ("8.0", CAUSAL | {"score": scores.softcap(5.0)}, {}, "has the plain softmax, and not Softcap"),
    ("8.0", CAUSAL | {"score": scores.sink_logit(np.zeros(4))}, {}, "has the plain softmax, and not SinkLogit"),
    ("8.0", CAUSAL | {"q_tokens": Tokens.arange(2, LENGTH)}, {}, "takes tokens in natural order, and those that are"),
    ("8.0", PACKED, {}, "has causal() and windows back, and not causal() & same('document')"),
    ("8.0", {"mask": masks.window(3, 3)}, {}, "has causal() and windows back, and not window(3, right=3)"),
    ("8.0", CAUSAL, {"width": 12}, "takes a head_dim that 8 divides, up to 128, on H100 and H200 also 256, and not 12"),
    ("8.0", CAUSAL, {"width": 256}, "on H100 and H200 also 256, and not 256"),
    ("9.0", CAUSAL, {"width": 136}, "on H100 and H200 also 256, and not 136"),
    ("8.0", CAUSAL, {"value_width": 8}, "takes values as wide as keys, and not 8 for 16"),
    ("8.0", CAUSAL, {"length": 1}, "takes two tokens or more, and not one"),
]


@pytest.mark.parametrize(("capability", "options", "shape", "reason"), REASONS)
def test_where_it_cannot_run_the_reason_is_said_once(gpu, caplog, capability, options, shape, reason):
    gpu.capability = capability
    for _ in range(2):
        assert chosen(options, **shape) == "xla"
    (message,) = caplog.messages
    assert message.startswith("attention on cpu: xla, one device; 'cudnn' ") and reason in message
    with pytest.raises(NotImplementedError, match=f"'cudnn' .*{re.escape(reason)}.*: use implementation=None or 'xla'"):
        striate.attention(*arrays(**shape), implementation="cudnn", **options)


def test_traced_tokens_are_not_known_to_be_in_order(gpu, caplog):
    q, k, v = arrays()

    def attend(tokens):
        return striate.attention(q, k, v, mask=masks.causal(), q_tokens=tokens)

    assert "dot_product_attention_fwd" not in str(jax.make_jaxpr(attend)(Tokens.arange(2, LENGTH)))
    assert "takes tokens in natural order" in caplog.text


def test_a_strategy_has_its_own_way(gpu, caplog):
    assert attention.choose(None, Ring(mesh(sequence=2)), jnp.dtype(jnp.bfloat16)) == "xla"
    assert "'cudnn' is for one device and does not run under Ring" in caplog.text


def test_no_cudnn_is_a_reason_and_no_error(gpu, caplog, monkeypatch):
    def missing():
        raise RuntimeError("cuDNN is not detected.")

    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", missing)
    assert chosen(CAUSAL) == "xla"
    assert caplog.messages == ["attention on cpu: xla, one device; 'cudnn' is refused by jax (cuDNN is not detected)"]


def test_without_a_gpu_nothing_changes(caplog):
    attention._log_choice.cache_clear()
    with caplog.at_level(logging.INFO, logger="striate"):
        assert chosen(CAUSAL) == "xla"
    assert caplog.messages == ["attention on cpu: xla, one device"]
    with pytest.raises(NotImplementedError, match="'cudnn' is for GPUs, and this program is not: use"):
        striate.attention(*arrays(), mask=masks.causal(), implementation="cudnn")


CALLS = r"@(__cudnn\$fmha\w+)\(|mask_type\W*(\w+)|sliding_window_length\W*(\d+)|fmha_scale\W*([\d.]+)"


def calls(function, *inputs) -> list[str]:
    """The calls of cuDNN in the program for CUDA: what is called, its scale, kind of mask and length of window."""
    text = jax.jit(function).trace(*inputs).lower(lowering_platforms=("cuda",)).as_text().replace(r"\22", '"')
    return ["".join(found) for found in re.findall(CALLS, text)]


@pytest.mark.parametrize(
    ("mask", "kind", "window"),
    [
        (masks.everything(), "NO_MASK", "0"),
        (masks.causal(), "CAUSAL", "0"),
        (masks.window(3), "CAUSAL", "4"),  # which counts the token itself
        (masks.window(100), "CAUSAL", "0"),
    ],
    ids=str,
)
def test_the_program_for_cuda_calls_it(gpu, mask, kind, window):
    def attend(*x):
        return striate.attention(*x, mask=mask, scale=0.25)

    forward = ["__cudnn$fmhaSoftmax", "0.25", kind, window]
    assert calls(attend, *arrays()) == forward
    backward = calls(jax.grad(lambda *x: attend(*x).astype(jnp.float32).sum(), argnums=(0, 1, 2)), *arrays())
    assert backward == [*forward, "__cudnn$fmhaSoftmaxBackward", *forward[1:]]


def test_inside_shard_map_the_gradient_of_what_all_devices_share_is_summed(gpu):
    """As jax has it alone, each device would keep the gradient of its own part."""
    spread, shared = PartitionSpec("data"), PartitionSpec()

    @jax.shard_map(mesh=mesh(data=2), in_specs=(spread, shared, shared), out_specs=(shared, shared))
    def gradients(q, k, v):
        return jax.grad(lambda *x: striate.attention(q, *x).astype(jnp.float32).sum(), argnums=(0, 1))(k, v)

    q, k, v = arrays()
    program = str(jax.make_jaxpr(gradients)(q, k[:1], v[:1]))
    assert "dot_product_attention_bwd" in program and len(re.findall("psum", program)) == 2
