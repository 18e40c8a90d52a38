"""Positions by their definitions in float64, on complex numbers."""

import numpy as np


def frequencies(dim, theta=10_000.0):
    return np.float64(theta) ** (-np.arange(dim // 2) / (dim // 2))


def angles(position, frequency):
    """(B, T, heads or 1, F), for position (B, T, axes) and frequency (axes, heads or 1, F)."""
    return np.einsum("bta,ahf->bthf", np.float64(position), np.float64(frequency))


def rope(x, position, frequency):
    """Pair (x[d], x[d + F]) turned by its angle; shapes as in `angles`."""
    factor = np.exp(1j * angles(position, frequency))
    pairs = factor.shape[-1]
    turned = factor * (x[..., :pairs] + 1j * np.float64(x[..., pairs : 2 * pairs]))
    return np.concatenate([turned.real, turned.imag, x[..., 2 * pairs :]], axis=-1)


def xpos_products(q, k, n, m, frequency, base, gamma):
    """<q at n, k at m>: q, k (..., D), n and m numbers."""
    pairs = len(frequency)
    zeta = (np.arange(pairs) / pairs + gamma) / (1 + gamma)
    q, k = (x[..., :pairs] + 1j * np.float64(x[..., pairs:]) for x in (q, k))
    return (q * k.conj() * np.exp(1j * (n - m) * frequency) * zeta ** ((n - m) / base)).sum(-1).real


def lrpe_products(q, k, n, m, frequency):
    """<q at n, k at m>: q, k (..., D), n and m (axes,), frequency (axes, D)."""
    return (np.float64(q) * k * np.cos((n - m) @ frequency)).sum(-1)


def yarn(dim, theta, factor, length, slow, fast):
    """Pair by pair, as in equation (18) and definition 2 of Peng et al. 2023."""
    scaled = []
    for frequency in frequencies(dim, theta):
        turns = length * frequency / (2 * np.pi)
        ramp = 0.0 if turns < slow else 1.0 if turns > fast else (turns - slow) / (fast - slow)
        scaled.append((1 - ramp) * frequency / factor + ramp * frequency)
    return np.array(scaled)


def times(frames):
    """The time of every token of one document in order: text is -1, video the number of its frame."""
    time = []
    for at, frame in enumerate(frames):
        goes_on = at > 0 and frame >= 0 and frame == frames[at - 1]
        time.append(time[-1] if goes_on else time[-1] + 1 if time else 0)
    return np.array(time)
