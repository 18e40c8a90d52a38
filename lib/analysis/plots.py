"""Pictures as PNG files: loss by position, loss over steps, masks in every layout, and who owns which token.

All take numpy arrays and a path, and return the path. The colours are Okabe and Ito's, told apart by every kind of
colour vision. matplotlib is imported by the first picture; its Figure without pyplot has no global state and no window.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import numpy as np

from striate.lib.layouts import Work
from striate.lib.masks import ALL, MIXED, NONE

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#E69F00", "#009E73", "#E6E6E6"
VERDICT_COLOURS = {NONE: GREY, MIXED: ORANGE, ALL: BLUE}
VERDICT_NAMES = {NONE: "hidden", MIXED: "partly visible", ALL: "visible"}
DEVICE_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")


def loss_by_position(bits_T: np.ndarray, path: str | Path) -> Path:
    """Mean loss against position in the context, averaged in bins of equal ratio.

    Args:
      bits_T: float[T], mean bits per byte of the tokens at each position; NaN where no token was counted.
      path: the PNG file to write.
    """
    length = len(bits_T)
    edges = np.unique(np.geomspace(1, length + 1, 33).astype(int)) - 1
    bins = [(low, high) for low, high in pairwise(edges) if np.isfinite(bits_T[low:high]).any()]
    figure, (axes,) = _figure(6.0, 3.4)
    axes.plot(
        [np.sqrt((low + 1) * high) for low, high in bins],
        [np.nanmean(bits_T[low:high]) for low, high in bins],
        color=BLUE,
        marker="o",
        markersize=3,
    )
    axes.set_xscale("log", base=2)
    axes.set(xlabel="position in the context (tokens)", ylabel="held-out loss (bits per byte)")
    return _save(figure, path)


def loss_curve(
    training: tuple[np.ndarray, np.ndarray],
    held_out: tuple[np.ndarray, np.ndarray],
    path: str | Path,
    references: Mapping[str, float] | None = None,
) -> Path:
    """Loss over the run.

    Args:
      training: (steps, bits per byte) of the training batches.
      held_out: (steps, bits per byte) of the evaluations; may be empty.
      path: the PNG file to write.
      references: horizontal lines by name, in bits per byte, such as {"xz -9": 2.1}.
    """
    figure, (axes,) = _figure(6.0, 3.4)
    axes.plot(*training, color=BLUE, linewidth=1, label="training")
    if len(held_out[0]):
        axes.plot(*held_out, color=ORANGE, marker="o", markersize=4, label="held out")
    for name, bits in (references or {}).items():
        axes.axhline(bits, color="black", linewidth=1, linestyle=(0, (4, 3)), label=f"{name}: {bits:.2f}")
    axes.set(xlabel="step", ylabel="loss (bits per byte)")
    axes.legend(frameon=False)
    return _save(figure, path)


def masks(panels: Mapping[str, np.ndarray], length: int, shards: int, title: str, path: str | Path) -> Path:
    """One mask in several orders of the tokens, side by side; lines mark where one device ends and the next begins.

    Args:
      panels: by name of the order, int (queries, keys) of NONE, MIXED, ALL.
      length: tokens.
      shards: devices that the sequence is cut over.
      title: the formula.
      path: the PNG file to write.
    """
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    figure, axes = _figure(2.3 * len(panels) + 0.3, 3.2, columns=len(panels))
    colours = ListedColormap(list(VERDICT_COLOURS.values()))
    for ax, (name, verdicts) in zip(axes, panels.items(), strict=True):
        ax.imshow(verdicts, cmap=colours, vmin=NONE, vmax=ALL, interpolation="nearest", extent=(0, length, length, 0))
        for edge in range(1, shards):
            ax.axhline(edge * length / shards, color="white", linewidth=1.5)
            ax.axvline(edge * length / shards, color="white", linewidth=1.5)
        ax.set_title(name, fontsize=10)
        ax.set_xlabel("keys (tokens, layout order)", fontsize=8)
        ax.tick_params(labelsize=7, left=ax is axes[0], labelleft=ax is axes[0])
    axes[0].set_ylabel("queries (tokens, layout order)", fontsize=8)
    shown = [kind for kind in VERDICT_COLOURS if any((verdicts == kind).any() for verdicts in panels.values())]
    patches = [Patch(color=VERDICT_COLOURS[kind], label=VERDICT_NAMES[kind]) for kind in shown]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(shown), frameon=False, fontsize=8)
    lines = textwrap.wrap(title, int(10 * figure.get_figwidth()), max_lines=3, placeholder=" ...")
    figure.suptitle("\n".join(lines), fontsize=11, family="monospace")
    return _save(figure, path)


def layouts(owners: Mapping[str, np.ndarray], work: Mapping[str, Work], path: str | Path) -> Path:
    """Who owns which token under every layout, and how long the ring then takes.

    Args:
      owners: int[T] by layout name, the device that holds each token, tokens in natural order.
      work: the predicted work by layout name; the bars are its critical path.
      path: the PNG file to write.
    """
    from matplotlib.colors import ListedColormap

    figure, (left, right) = _figure(8.0, 0.5 * len(owners) + 1.1, columns=2, width_ratios=(3, 2))
    names = list(work)
    table = np.stack([owners[name] for name in names])
    devices = int(table.max()) + 1
    colours = [DEVICE_COLOURS[device % len(DEVICE_COLOURS)] for device in range(devices)]
    left.imshow(table, cmap=ListedColormap(colours), vmin=0, vmax=devices - 1, aspect="auto", interpolation="nearest")
    left.set_yticks(range(len(names)), names)
    left.set_xticks([])
    left.set_xlabel(f"tokens in natural order, coloured by the device that holds them (0 .. {devices - 1})", fontsize=8)
    right.barh(range(len(names)), [work[name].critical_path for name in names], color=BLUE, height=0.6)
    ideal = work["contiguous"].ideal
    right.axvline(ideal, color="black", linewidth=1, linestyle=(0, (4, 3)))
    right.text(ideal, -0.7, "ideal", ha="center", fontsize=8)
    right.set_yticks([])
    right.set_ylim(len(names) - 0.5, -0.5)
    right.set_xlabel("critical path (tiles)", fontsize=8)
    right.locator_params(axis="x", nbins=4)
    right.xaxis.set_major_formatter("{x:,.0f}")
    for row in range(1, len(names)):
        left.axhline(row - 0.5, color="white", linewidth=6)
    for ax in (left, right):
        ax.tick_params(labelsize=8, length=0)
        ax.spines[:].set_visible(False)
    return _save(figure, path)


def _figure(width: float, height: float, columns: int = 1, width_ratios: tuple[float, ...] | None = None):
    """A figure in inches and its row of axes, without the frame on the upper right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, columns, width_ratios=width_ratios, squeeze=False)[0]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure, path: str | Path) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path
