"""What `striate show` draws and counts, against the dense mask and closed forms."""

import io
import itertools
import re

import numpy as np
import pytest
from rich.console import Console

from striate.lib import masks, show
from striate.lib.analysis import plots
from striate.lib.cli import main

FORMULAS = [
    "causal()",
    "causal() & same('document')",
    "window(5, right=3) | sink(2) & same('document')",
    "~window(4) & (causal() | prefix()) & same('document')",
    "key('position', None, 3)",
    "nothing()",
    "table('kind', 'kind', [[1, 0], [1, 1]]) | ~modulo('position', None, 5, 1)",
]
TOKENS = show.make_tokens(48, (20, 7, 9), ("prefix=1,0,0", "kind=0,1,2,1"))


def printed(renderable, **settings) -> str:
    console = Console(file=io.StringIO(), width=100, **settings)
    console.print(renderable)
    return console.file.getvalue()


def drawn(text: str) -> np.ndarray:
    """The booleans of a picture of half blocks: every character is two rows of one column."""
    lines = [re.fullmatch(r"│ (.*) │", line)[1] for line in text.splitlines()[1:-1]]
    upper = [[sign in "▀█" for sign in line] for line in lines]
    lower = [[sign in "▄█" for sign in line] for line in lines]
    return np.array(list(itertools.chain(*zip(upper, lower, strict=True))))


@pytest.mark.parametrize("formula", FORMULAS)
@pytest.mark.parametrize("name", ["contiguous", "striped(4)", "zigzag"])
def test_the_picture_is_the_dense_mask(formula, name):
    mask, tokens = masks.parse(formula), show.make_layouts(3, 4)[name].permute(TOKENS)
    expected = np.asarray(mask.dense(tokens, tokens)[0])
    text = printed(show.token_view(mask, tokens, Console(file=io.StringIO(), width=100)))
    np.testing.assert_array_equal(drawn(text), expected)


@pytest.mark.parametrize("formula", FORMULAS)
def test_colours_of_the_picture_are_the_verdicts(formula):
    mask = masks.parse(formula)
    console = Console(file=io.StringIO(), width=24, force_terminal=True, color_system="truecolor")
    levels, cell = show.picture(mask, TOKENS, 20)
    assert cell == 3
    colours = [re.findall(r"38;2;([\d;]+);48;2;([\d;]+)m(▀+)", line) for line in shown(mask, console)]
    rows = [[(pair[half], len(pair[2])) for pair in line] for line in colours for half in (0, 1)]
    got = np.array([[colour for colour, count in row for _ in range(count)] for row in rows])
    names = {v: ";".join(str(int(c[i : i + 2], 16)) for i in (1, 3, 5)) for v, c in plots.VERDICT_COLOURS.items()}
    np.testing.assert_array_equal(got, np.vectorize(names.get)(levels))


def shown(mask, console) -> list[str]:
    console.print(show.token_view(mask, TOKENS, console))
    return console.file.getvalue().splitlines()[1:-1]


@pytest.mark.parametrize("formula", FORMULAS)
def test_a_cell_of_several_tokens_says_whether_some_or_all_are_visible(formula):
    mask = masks.parse(formula)
    levels, cell = show.picture(mask, TOKENS, 10)
    assert cell == 5 and levels.shape == (10, 10)
    dense = np.asarray(mask.dense(TOKENS, TOKENS)[0])
    for row, column in np.ndindex(10, 10):
        block = dense[5 * row : 5 * row + 5, 5 * column : 5 * column + 5]
        expected = masks.ALL if block.all() else masks.MIXED if block.any() else masks.NONE
        assert levels[row, column] == expected


def tile_signs(mask, tokens) -> list[str]:
    text = printed(show.tile_view(mask, tokens, 8, Console(file=io.StringIO(), width=100)))
    return [match[1][::2] for match in re.finditer(r"│ ([·▒█]{12}) ", text)]


@pytest.mark.parametrize("formula", FORMULAS)
def test_tiles_drawn_as_none_or_all_are_so(formula):
    mask = masks.parse(formula)
    dense = np.asarray(mask.dense(TOKENS, TOKENS)[0]).reshape(6, 8, 6, 8).swapaxes(1, 2)
    for tiles, line in zip(dense, tile_signs(mask, TOKENS), strict=True):
        for tile, sign in zip(tiles, line, strict=True):
            assert {"·": not tile.any(), "█": tile.all(), "▒": True}[sign]


def test_causal_tiles_are_some_on_the_diagonal_only():
    expected = ["▒·····", "█▒····", "██▒···", "███▒··", "████▒·", "█████▒"]
    assert tile_signs(masks.parse("causal()"), show.make_tokens(48)) == expected


def test_the_picture_fits_the_terminal():
    mask = masks.parse("causal()")
    for width in (20, 57, 80, 300):
        console = Console(file=io.StringIO(), width=width)
        for length in (3, 64, 1000, 5000):
            console.print(show.token_view(mask, show.make_tokens(length), console))
        assert max(map(len, console.file.getvalue().splitlines())) <= width


def test_tokens_have_the_documents_and_fields_asked_for():
    assert TOKENS.document[0].tolist() == [0] * 20 + [1] * 7 + [2] * 9 + [3] * 12
    assert TOKENS.position[0].tolist() == [*range(20), *range(7), *range(9), *range(12)]
    assert TOKENS["prefix"][0].tolist() == [1] * 16 + [0] * 32


@pytest.mark.parametrize("stripe", [1, 4])
def test_the_owner_of_a_token_is_the_shard_it_is_permuted_into(stripe):
    layouts = show.make_layouts(4, 4, stripe)
    for layout in layouts.values():
        owners = show.owners(layout, 64)
        np.testing.assert_array_equal(owners[layout.order(64)], np.repeat(np.arange(4), 16))
    owned = show.small_owners(layouts)
    assert list(owned) == list(layouts)
    assert [set(np.bincount(devices)) for devices in owned.values()] == [{16}] * len(layouts)


def rows(text: str) -> dict[str, list[str]]:
    """The rows of the printed table by layout."""
    found = (re.match(r"\s*(contiguous|striped\(\d+\)|zigzag)\s+(.*)", line) for line in text.splitlines())
    table: dict[str, list[str]] = {}
    for match in filter(None, found):
        table.setdefault(match[1], re.split(r"\s{2,}", match[2].strip()))
    return table


def test_show_layout_counts_single_tokens_as_the_closed_forms_do(capsys, monkeypatch):
    """With N shards of c tokens: (N - 1)c^2 + c(c + 1)/2 contiguous, N c(c + 1)/2 striped, T(T + 1)/(2N) zigzag."""
    monkeypatch.setenv("COLUMNS", "120")
    assert main(["show", "layout", "--length", "128", "--tile", "1"]) == 0
    table = rows(capsys.readouterr().out)
    paths = {name: (row[3], row[4], row[5]) for name, row in table.items()}
    assert paths == {
        "contiguous": ("1928", "1032", "1.00x"),
        "striped(1)": ("1088", "1032", "1.77x"),
        "zigzag": ("1032", "1032", "1.87x"),
    }
    assert table["contiguous"][6] == "136, 7 x 256"


def test_show_layout_takes_a_quarter_of_a_million_tokens(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    assert main(["show", "layout"]) == 0
    output = capsys.readouterr().out
    gains = {name: float(row[5].removesuffix("x")) for name, row in rows(output).items()}
    assert gains["striped(512)"] >= 1.7 and gains["zigzag"] >= 1.8
    assert "0123456701234567" in output and "77777777" in output


def test_a_share_that_sees_nothing_takes_no_time():
    layouts = {"contiguous": show.Contiguous(4)}
    seconds = show.measure(masks.parse("causal()"), show.make_tokens(8192), layouts, runs=3)["contiguous"]
    assert seconds.shape == (4, 4) and (seconds > 0).all()
    assert 3 * seconds[1, 0] < seconds[1, 3] and 3 * seconds[3, 2] < seconds[3, 3]


def test_the_measured_path_is_the_slowest_device_at_each_step():
    seconds = {"contiguous": np.array([[1.0, 2.0], [0.0, 3.0]]), "zigzag": np.array([[1.5, 1.0], [1.0, 0.5]])}
    table = rows(printed(show.timing(seconds)))
    assert table == {"contiguous": ["5.00 s", "3.00 s", "1.00x"], "zigzag": ["2.50 s", "2.00 s", "2.00x"]}


def test_show_mask_prints_all_of_it(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    words = ["show", "mask", "causal() & same('document')", "--documents", "20", "30", "14", "--layout", "striped"]
    assert main(words) == 0
    output = capsys.readouterr().out
    assert "Striped(shards=4, stripe=8)" in output and "one token" in output and "8 x 8" in output
    dense = np.zeros((64, 64), bool)
    for start, end in ((0, 20), (20, 50), (50, 64)):
        dense[start:end, start:end] = np.tri(end - start, dtype=bool)
    some = sum(block.any() for block in dense.reshape(8, 8, 8, 8).swapaxes(1, 2).reshape(64, 64))
    none, mixed, all_ = map(int, rows(output)["contiguous"][:3])
    assert none + mixed + all_ == 64 and mixed + all_ >= some


def test_heads_that_differ_are_drawn_once_for_each_formula(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "120")
    formula = "causal() & (switch([1, 0, 0, 0, 1, 0]) | window(3))"
    assert main(["show", "mask", formula, "--length", "32", "--png", str(tmp_path / "heads.png")]) == 0
    output = capsys.readouterr().out
    assert "causal() & (switch([True, False, False, False, True, False]) | window(3))" in output
    lines = output.splitlines()
    first, second = lines.index("heads 0, 4: causal()"), lines.index("heads 1-3, 5: window(3)")
    tokens = show.make_tokens(32)
    for start, mask in ((first, masks.causal()), (second, masks.window(3))):
        picture = [re.match(r"[│╭╰].*?[│╮╯]", line)[0] for line in lines[start + 1 : start + 19]]
        np.testing.assert_array_equal(drawn("\n".join(picture)), mask.dense(tokens, tokens)[0])
    some = [tiles.live.sum() for tiles in works(masks.causal(), masks.window(3))]
    assert sum(map(int, rows(output)["contiguous"][1:3])) == 2 * some[0] + 4 * some[1]
    assert (tmp_path / "heads.png").stat().st_size > 1000


def works(*formulas: masks.Mask) -> list:
    return [show.Contiguous(4).work(mask, show.make_tokens(32), (8, 8)) for mask in formulas]


def test_a_layout_that_does_not_fit_is_left_out_with_its_reason(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    assert main(["show", "mask", "causal()", "--length", "60"]) == 0
    table = rows(capsys.readouterr().out)
    assert table["striped(8)"] == ["needs a multiple of 32 tokens"]
    assert table["zigzag"] == ["needs a multiple of 8 tokens"]
    assert table["striped(1)"][5] == "1.25x"  # (3 + 3 x 4) / (4 x 3) tiles


@pytest.mark.parametrize("options", [["show", "mask", "window(9)"], ["show", "layout", "--length", "4096"]])
def test_png(tmp_path, options):
    import matplotlib.image

    main([*options, "--png", str(tmp_path / "new" / "picture.png")])
    picture = matplotlib.image.imread(tmp_path / "new" / "picture.png")
    blue = np.isclose(picture[..., :3], [0, 0x72 / 255, 0xB2 / 255], atol=0.01).all(-1)
    assert 0.01 < blue.mean() < 0.5


def test_png_of_losses(tmp_path):
    bits = np.linspace(8, 3, 1000)
    bits[[0, 7]] = np.nan
    steps = np.arange(50)
    drawn = [
        plots.loss_by_position(bits, tmp_path / "position.png"),
        plots.loss_curve((steps, 8 - steps / 10), (steps[::10], 8 - steps[::10] / 9), tmp_path / "curve.png"),
        plots.loss_curve((steps, 8 - steps / 10), ([], []), tmp_path / "line.png", {"xz -9": 2.1}),
    ]
    contents = [path.read_bytes() for path in drawn]
    assert all(content.startswith(b"\x89PNG") for content in contents) and len(set(contents)) == 3


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["mask", "causl()"], "'causal'"),
        (["mask", "causal() & same('documnt')"], "'document'"),
        (["mask", "prefix()"], "'prefix'"),
        (["mask", "prefix()", "--field", "prefix=one"], "NAME=V,V"),
        (["mask", "causal()", "--length", "63"], "60 or 64"),
        (["mask", "causal()", "--layout", "striped", "--length", "48"], "32 or 64"),
        (["mask", "causal()", "--length", "0"], "--length is 0"),
        (["mask", "causal()", "--documents", "3", "0"], "--documents is 0"),
        (["mask", "causal()", "--tile", "0"], "--tile is 0"),
        (["layout", "--shards", "-1"], "--shards is -1"),
        (["layout", "--shards", "7"], "262143"),
    ],
)
def test_what_cannot_be_shown_is_one_line(words, says, capsys):
    assert main(["show", *words]) == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err.startswith("striate: ") and output.err.count("\n") == 1
    assert says in output.err
