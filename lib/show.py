"""`striate show`: masks and layouts as pictures and tables in the terminal, and as PNG.

Everything is read from block summaries (a mask's verdicts, a layout's work), so that no length builds a T x T array.
The verdict of a block of one token is exact, hence so are the pictures of up to FINEST tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from time import perf_counter
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np
from rich.columns import Columns
from rich.console import Console, Group
from rich.panel import Panel
from rich.progress import track
from rich.table import Table
from rich.text import Text
from tyro.conf import Positional, arg

from striate.lib import masks
from striate.lib.analysis import plots
from striate.lib.attention import attention
from striate.lib.errors import UserError
from striate.lib.layouts import Contiguous, Layout, Striped, Work, ZigZag
from striate.lib.tokens import Tokens

FINEST = 2048  # blocks that a picture is made from, in each direction
WIDEST = 96  # columns of a picture; a wider one does not fit the height of a screen
SMALL = 64  # tokens in the picture of who owns which token
DEVICES = "0123456789abcdefghijklmnopqrstuvwxyz"
BALANCE = (
    "none, some, all: tiles by what is visible, added up where heads differ. Path: tiles of the busiest device, step "
    "by step around the ring, and their sum. Ideal: the same tiles shared out evenly. Gain: the contiguous path over "
    "this one."
)
TIMING = "Measured: seconds of the slowest device at each ring step, each alone, and their sum."
WIDTH = 64  # of the head that is timed
PADDING = (0, 2, 0, 0)  # of a cell: above, right, below, left


@dataclass(frozen=True)
class ShowMask:
    """Draw a mask: token by token, tile by tile, and how evenly each layout spreads its tiles over devices."""

    formula: Annotated[Positional[str], arg(metavar="FORMULA")]
    """Such as "causal() & same('document')"."""
    length: int = 64
    """Tokens."""
    documents: Annotated[tuple[int, ...], arg(metavar="INT ...")] = ()
    """Lengths of the packed documents, repeated until the length is full; by default it is one document."""
    field: Annotated[tuple[str, ...], arg(metavar="NAME=V,V,... ...")] = ()
    """Further Tokens fields; the values fill the length in equal runs."""
    layout: Literal["contiguous", "striped", "zigzag"] = "contiguous"
    """The order of the tokens in the picture; contiguous is the natural one."""
    shards: int = 4
    """Devices that the sequence is cut over."""
    stripe: Annotated[int | None, arg(metavar="INT")] = None
    """Tokens of a stripe; by default those of a tile."""
    tile: int = 8
    """Tokens of a tile, in each direction."""
    png: Annotated[Path | None, arg(metavar="FILE")] = None
    """Also draw the mask in every layout, to this file; one whose heads differ is drawn head by head, in one layout."""

    def __call__(self) -> None:
        mask, tokens = masks.parse(self.formula), make_tokens(self.length, self.documents, self.field)
        mask.check(tokens, tokens)
        layouts = make_layouts(self.shards, self.tile, self.stripe)
        layout = next(layout for name, layout in reversed(layouts.items()) if name.startswith(self.layout))
        permuted = layout.permute(tokens)
        work = predict(mask, tokens, layouts, self.tile)
        console = Console(highlight=False)
        console.print(Text.assemble((str(mask), "bold"), f"   {self.length} tokens in the order {layout}"))
        formulas = {formula: named(heads) for formula, heads in mask.by_formula(mask.heads or 1).items()}
        for formula, heads in formulas.items():
            if mask.heads:
                console.print(Text.assemble(f"\n{heads}: ", (str(formula), "bold")))
            views = token_view(formula, permuted, console), tile_view(formula, permuted, self.tile, console)
            console.print(Columns([view for view in views if view]))
        console.print()
        console.print(balance(layouts, work))
        if self.png:
            panels = {heads: picture(formula, permuted, 256)[0] for formula, heads in formulas.items()}
            if len(formulas) == 1:
                panels = {name: picture(formula, layouts[name].permute(tokens), 256)[0] for name in work}
            console.print(f"wrote {plots.masks(panels, self.length, self.shards, str(mask), self.png)}")


@dataclass(frozen=True)
class ShowLayout:
    """Compare the layouts of a sequence over devices: who owns which token, and who waits for whom around the ring."""

    mask: str = "causal()"
    """The formula whose tiles are counted."""
    length: int = 262_144
    """Tokens."""
    documents: Annotated[tuple[int, ...], arg(metavar="INT ...")] = ()
    """Lengths of the packed documents, repeated until the length is full; by default it is one document."""
    field: Annotated[tuple[str, ...], arg(metavar="NAME=V,V,... ...")] = ()
    """Further Tokens fields; the values fill the length in equal runs."""
    shards: int = 8
    """Devices that the sequence is cut over."""
    stripe: Annotated[int | None, arg(metavar="INT")] = None
    """Tokens of a stripe; by default those of a tile."""
    tile: int = 512
    """Tokens of a tile, in each direction."""
    time: int = 0
    """Also time each device's share of each ring step on this machine, alone, the best of so many runs: minutes."""
    png: Annotated[Path | None, arg(metavar="FILE")] = None
    """Also draw the picture to this file."""

    def __call__(self) -> None:
        mask, tokens = masks.parse(self.mask), make_tokens(self.length, self.documents, self.field)
        mask.check(tokens, tokens)
        layouts = make_layouts(self.shards, self.tile, self.stripe)
        work = predict(mask, tokens, layouts, self.tile)
        console = Console(highlight=False)
        where = f"   {self.length} tokens over {self.shards} devices, tiles of {self.tile}"
        console.print(Text.assemble((str(mask), "bold"), where))
        console.print(balance(layouts, work))
        owned = small_owners(layouts)
        console.print()
        console.print(ownership(owned))
        if self.time > 0:
            console.print()
            console.print(timing(measure(mask, tokens, {name: layouts[name] for name in work}, self.time)))
        if self.png:
            console.print(f"wrote {plots.layouts(owned, work, self.png)}")


def make_tokens(length: int, documents: tuple[int, ...] = (), fields: tuple[str, ...] = ()) -> Tokens:
    """Tokens of one row, numpy int32 (1, length), in natural order.

    Args:
      length: tokens.
      documents: lengths of the documents, repeated until the length is full; the last one is cut.
      fields: further fields as "name=1,0,0": the values fill the length in equal runs.

    Raises:
      UserError: lengths below 1, or a field that cannot be read.
    """
    documents = documents or (length,)
    _positive(length=length, documents=min(documents))
    index = np.arange(length, dtype=np.int32)
    starts = np.cumsum((0, *documents * -(-length // sum(documents))), dtype=np.int32)
    document = np.searchsorted(starts, index, side="right").astype(np.int32) - 1
    tokens = Tokens(position=(index - starts[document])[None], document=document[None])
    for field in fields:
        name, _, values = field.partition("=")
        try:
            runs = np.array(values.split(","), np.int32)
        except ValueError as error:
            raise UserError(f"The field {field!r} cannot be read: write NAME=V,V,... with whole numbers.") from error
        tokens = tokens.replace(**{name: runs[index * len(runs) // length][None]})
    return tokens


def make_layouts(shards: int, tile: int, stripe: int | None = None) -> dict[str, Layout]:
    """The layouts that are compared, by the names that are printed; a stripe is a tile unless given."""
    stripe = tile if stripe is None else stripe
    _positive(shards=shards, tile=tile, stripe=stripe)
    striped = {f"striped({width})": Striped(shards, width) for width in (1, stripe)}
    return {"contiguous": Contiguous(shards), **striped, "zigzag": ZigZag(shards)}


def named(heads: list[int]) -> str:
    """Such as "heads 0, 2-5"."""
    starts = [head for head in heads if head - 1 not in heads]
    ends = [head for head in heads if head + 1 not in heads]
    runs = [f"{start}" if start == end else f"{start}-{end}" for start, end in zip(starts, ends, strict=True)]
    return f"head{'s' if len(heads) > 1 else ''} {', '.join(runs)}"


def verdicts(mask: masks.Mask, tokens: Tokens, block: int) -> np.ndarray:
    """int8 (queries, keys) of NONE, MIXED, ALL for blocks of one row of Tokens, in the order they are in."""

    def blocks(tokens):
        missing = -tokens.shape[1] % block  # a last shorter block repeats its last token
        return {name: np.pad(x[0], (0, missing), "edge").reshape(-1, block) for name, x in tokens.fields().items()}

    query = jax.tree.map(lambda x: x[:, None], mask.query_summaries(blocks(tokens.as_queries())))
    key = jax.tree.map(lambda x: x[None, :], mask.key_summaries(blocks(tokens)))
    return np.broadcast_to(mask.verdict(query, key), (-(-tokens.shape[1] // block),) * 2)


def picture(mask: masks.Mask, tokens: Tokens, cells: int) -> tuple[np.ndarray, int]:
    """(NONE, MIXED or ALL for at most cells x cells cells, tokens of a cell in each direction).

    Merged from the verdicts of smaller blocks; of single tokens, hence exact, up to FINEST of them.
    """
    block = -(-tokens.shape[1] // FINEST)
    blocks = -(-tokens.shape[1] // (block * cells))
    merged = verdicts(mask, tokens, block)
    starts = np.arange(0, len(merged), blocks)
    least, greatest = (end.reduceat(end.reduceat(merged, starts, 0), starts, 1) for end in (np.minimum, np.maximum))
    return np.where(least == greatest, least, masks.MIXED), block * blocks


def token_view(mask: masks.Mask, tokens: Tokens, console: Console) -> Panel:
    """The mask in the order of the tokens, in half blocks: two rows of queries to a line of text."""
    levels, cell = picture(mask, tokens, min(console.width - 4, WIDEST))
    levels = np.pad(levels, ((0, len(levels) % 2), (0, 0)), constant_values=masks.NONE)
    lines = [_half_blocks(upper, lower, console) for upper, lower in zip(levels[::2], levels[1::2], strict=True)]
    title = "a cell is one token" if cell == 1 else f"a cell is {cell} x {cell} tokens"
    return Panel.fit(Text("\n").join(lines), title=title, subtitle="queries down, keys to the right")


def _half_blocks(upper: np.ndarray, lower: np.ndarray, console: Console) -> Text:
    """One line of text for two rows of verdicts; without colours, what is visible in part counts as visible."""
    cells = list(zip(upper.tolist(), lower.tolist(), strict=True))
    if not console.color_system:
        return Text("".join(" ▄▀█"[2 * (up != masks.NONE) + (low != masks.NONE)] for up, low in cells))
    colours, line = plots.VERDICT_COLOURS, Text()
    for (up, low), run in groupby(cells):
        line.append("▀" * len(list(run)), f"{colours[up]} on {colours[low]}")
    return line


def tile_view(mask: masks.Mask, tokens: Tokens, tile: int, console: Console) -> Panel | None:
    """The verdict of every tile; None where they do not fit the console."""
    if 2 * -(-tokens.shape[1] // tile) > min(console.width - 4, WIDEST):
        return None
    signs = {masks.NONE: "··", masks.MIXED: "▒▒", masks.ALL: "██"}
    rows = [
        Text.assemble(*((signs[v], plots.VERDICT_COLOURS[v]) for v in row))
        for row in verdicts(mask, tokens, tile).tolist()
    ]
    legend = Text("·· none  ▒▒ some  ██ all", "dim")
    return Panel.fit(Group(Text("\n").join(rows), legend), title=f"tiles of {tile} x {tile}")


def predict(mask: masks.Mask, tokens: Tokens, layouts: Mapping[str, Layout], tile: int) -> dict[str, Work]:
    """The work of the layouts that the length fits, by name; of the contiguous one it has to."""
    layouts["contiguous"].check(tokens.shape[1])
    fitting = {name: layout for name, layout in layouts.items() if tokens.shape[1] % layout.unit == 0}
    return {name: layout.work(mask, tokens, (tile, tile)) for name, layout in fitting.items()}


def balance(layouts: Mapping[str, Layout], work: Mapping[str, Work]) -> Table:
    """What every layout makes of the mask, in tiles; the row of a layout that the length does not fit says so."""
    table = Table("layout", box=None, padding=PADDING, caption=BALANCE, caption_justify="left")
    for column in ("none", "some", "all", "path", "ideal", "gain"):
        table.add_column(column, justify="right")
    table.add_column("path, step by step")
    for name, layout in layouts.items():
        if name not in work:
            table.add_row(name, *[""] * 6, f"needs a multiple of {layout.unit} tokens")
            continue
        path = work[name].critical_path
        steps = [(tiles, len(list(run))) for tiles, run in groupby(work[name].live.max(axis=1).tolist())]
        table.add_row(
            name,
            *map(str, work[name].counts.sum((0, 1))),
            str(path),
            f"{work[name].ideal:.1f}".removesuffix(".0"),
            f"{work['contiguous'].critical_path / max(path, 1):.2f}x",
            ", ".join(f"{count} x {tiles}" if count > 1 else str(tiles) for tiles, count in steps),
        )
    return table


def measure(mask: masks.Mask, tokens: Tokens, layouts: Mapping[str, Layout], runs: int) -> dict[str, np.ndarray]:
    """Seconds[step, device] by layout: each device's share of each ring step, forward, alone on this machine.

    A share is attention from the queries of one shard to the keys of another, in float32, with one head of width WIDTH
    or those that the mask tells apart; the best of some runs counts. One compiled program serves all shares, which
    skips what is hidden.
    """
    shards = layouts["contiguous"].shards
    length = tokens.shape[1] // shards
    arrays = jax.random.normal(jax.random.key(0), (3, 1, length, mask.heads or 1, WIDTH))

    def share(query: Tokens, key: Tokens):
        return attention(*arrays, mask=mask, q_tokens=query, k_tokens=key)

    def part(tokens: Tokens, shard: int) -> Tokens:
        return tokens.map(lambda x: jnp.asarray(x[:, shard * length : (shard + 1) * length]))

    compiled = jax.jit(share).lower(part(tokens, 0), part(tokens, 0)).compile()

    def run(query: Tokens, key: Tokens) -> float:
        started = perf_counter()
        compiled(query, key).block_until_ready()
        return perf_counter() - started

    stderr = Console(stderr=True)
    seconds = {name: np.zeros((shards, shards)) for name in layouts}
    for name, layout in layouts.items():
        parts = [part(layout.permute(tokens), shard) for shard in range(shards)]
        pairs = list(np.ndindex(shards, shards))
        for step, device in track(pairs, f"timing {name}", console=stderr, disable=not stderr.is_terminal):
            times = [run(parts[device], parts[(device - step) % shards]) for _ in range(runs)]
            seconds[name][step, device] = min(times)
    return seconds


def timing(seconds: Mapping[str, np.ndarray]) -> Table:
    """The measured critical path of every layout."""
    table = Table("layout", box=None, padding=PADDING, caption=TIMING, caption_justify="left")
    for column in ("path", "ideal", "gain"):
        table.add_column(column, justify="right")
    path = {name: times.max(axis=1).sum() for name, times in seconds.items()}
    for name, times in seconds.items():
        ideal = times.sum() / len(times)
        table.add_row(name, f"{path[name]:.2f} s", f"{ideal:.2f} s", f"{path['contiguous'] / path[name]:.2f}x")
    return table


def owners(layout: Layout, length: int) -> np.ndarray:
    """int (length,): the device that holds each token, tokens in natural order."""
    return layout.restore(np.repeat(np.arange(layout.shards), length // layout.shards), axis=0)


def small_owners(layouts: Mapping[str, Layout]) -> dict[str, np.ndarray]:
    """The owners of about SMALL tokens under each layout, stripes cut to two a device: enough to see the pattern."""
    each = max(4, SMALL // layouts["contiguous"].shards // 4 * 4)
    owned = {}
    for name, layout in layouts.items():
        if isinstance(layout, Striped):
            layout = replace(layout, stripe=min(layout.stripe, each // 2))
        owned[name] = owners(layout, each * layout.shards)
    return owned


def ownership(owned: Mapping[str, np.ndarray]) -> Table:
    """Who owns which token: a digit is a token and names its device."""
    length = len(next(iter(owned.values())))
    table = Table("layout", f"the device of each token, drawn for {length}", box=None, padding=PADDING)
    for name, devices in owned.items():
        text = Text(no_wrap=True, overflow="ellipsis")
        for device in devices.tolist():
            text.append(DEVICES[device % len(DEVICES)], plots.DEVICE_COLOURS[device % len(plots.DEVICE_COLOURS)])
        table.add_row(name, text)
    return table


def _positive(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise UserError(f"--{name} is {number}: it has to be 1 or more.")
