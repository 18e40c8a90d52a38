"""What every test runs under: eight simulated devices, and no silent broadcasting between ranks."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # inherited by the programs that tests start
# Most of the time goes into compiling small programs. What XLA makes of them stays the same, LLVM does less to it.
os.environ["XLA_FLAGS"] = f"--xla_backend_optimization_level=0 {os.environ.get('XLA_FLAGS', '')}"

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.devices()  # settles the number, whichever test comes first
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True, scope="module")
def _forget_programs():
    """Compiled programs keep memory maps; some thousands of them in one process are more than the kernel allows."""
    yield
    jax.clear_caches()
