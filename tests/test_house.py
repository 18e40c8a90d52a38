"""The house keeps its shape: imports go down one staircase, files stay short, start-up is light, the wheel is whole."""

import ast
import importlib.metadata
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
OUTSIDE_THE_PACKAGE = {"benchmarks", "build", "dist", "docs", "notebooks", "runs", "tests", "tools"}
MADE_BY_TOOLS = {"build", "dist", "runs", "striate.egg-info", "__pycache__"}

# From the bottom up: a file may import its own stair and those below it. Prefixes of dotted paths from the root.
LANGUAGE = ("errors", "layouts", "masks", "ngrams", "positions", "recurrence", "scores", "text", "tiles", "tokens")
MIXERS = ("attention", "bank", "blockwise", "chunks", "convolution", "cope", "frames", "orthogonal_memory", "routing")
MIXERS += ("cudnn", "linear_attention", "linear_variants", "noncausal", "scans", "delta_product")
STAIRCASE = {
    "language": ("lib.__init__", *(f"lib.{name}" for name in LANGUAGE)),
    "kernels": ("pallas_kernels",),
    "mixers": tuple(f"lib.{name}" for name in MIXERS),
    "parallel": ("lib.parallel",),
    "models": ("models", "lib.decoding", "lib.analysis", "lib.plan"),
    "training": ("lib.training",),
    "configs": ("configs",),
    "commands": ("lib.cli", "lib.show"),
    "front door": ("__init__", "__main__"),
}


def package_files(root: Path = ROOT) -> list[Path]:
    """Every Python file of the import package `striate`, whose root is the root of the repository."""
    folders = [folder for folder in root.iterdir() if folder.is_dir() and not folder.name.startswith(".")]
    inside = [folder for folder in folders if folder.name not in OUTSIDE_THE_PACKAGE]
    return sorted([*root.glob("*.py"), *(path for folder in inside for path in folder.rglob("*.py"))])


def text_files() -> list[Path]:
    """Every text file of the project, as a clone of it would hold them."""
    kept = [path for path in ROOT.rglob("*") if path.is_file() and path.suffix not in (".png", ".pyc")]
    inside = [path for path in kept if not MADE_BY_TOOLS.intersection(path.relative_to(ROOT).parts)]
    return sorted(path for path in inside if not path.relative_to(ROOT).parts[0].startswith(".") or ".ci" in path.parts)


def dotted(path: Path, root: Path) -> str:
    return ".".join(path.relative_to(root).with_suffix("").parts)


def stair(path: Path, root: Path) -> str:
    name = dotted(path, root)
    for title, prefixes in STAIRCASE.items():
        if any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes):
            return title
    pytest.fail(f"{path.relative_to(root)} stands on no stair: give it one in STAIRCASE of tests/test_house.py.")


def find_module(parts: tuple[str, ...], root: Path) -> Path | None:
    """The file of a module below the root, or None."""
    candidates = [root.joinpath(*parts, "__init__.py")]
    if parts:
        candidates.append(root.joinpath(*parts).with_suffix(".py"))
    return next((path for path in candidates if path.exists()), None)


def imports(path: Path, root: Path) -> Iterator[tuple[int, Path]]:
    """(line, imported file of the package) for every import in a file, relative and inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            wanted = [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = ("striate", *path.relative_to(root).parts[: -node.level]) if node.level else ()
            module = (*above, *(node.module.split(".") if node.module else ()))
            wanted = [(*module, alias.name) for alias in node.names]
        else:
            continue
        for package, *parts in wanted:
            if package == "striate":
                found = find_module(tuple(parts), root) or find_module(tuple(parts[:-1]), root)
                if found:
                    yield node.lineno, found


def upward_imports(root: Path) -> list[str]:
    heights = list(STAIRCASE)
    return [
        f"{path.relative_to(root)}:{line} ({below}) imports {target.relative_to(root)} ({above}), which is above it"
        for path in package_files(root)
        for line, target in imports(path, root)
        for below, above in [(stair(path, root), stair(target, root))]
        if heights.index(above) > heights.index(below)
    ]


def test_imports_go_down_the_staircase():
    assert not (found := upward_imports(ROOT)), "\n".join(found)


@pytest.mark.parametrize(
    "statement",
    [
        "from striate.lib.training import loop",
        "import striate.lib.training.loop",
        "from .training.loop import train",
        "from .training import loop as run",
        "def later():\n    from striate.lib.training.loop import train",
        "import striate",
    ],
)
def test_an_upward_import_is_found(tmp_path, statement):
    (tmp_path / "lib/training").mkdir(parents=True)
    for name in ("__init__", "lib/__init__", "lib/training/__init__", "lib/tokens"):
        (tmp_path / f"{name}.py").touch()
    (tmp_path / "lib/training/loop.py").write_text("from striate.lib import masks, tokens\nfrom .. import masks\n")
    (tmp_path / "lib/masks.py").write_text(f"from striate.lib import tokens\nfrom .tokens import Tokens\n{statement}\n")
    (found,) = upward_imports(tmp_path)
    line = 4 if statement.startswith("def") else 3
    assert found.startswith(
        f"lib/masks.py:{line} (language) imports {'__init__' if statement == 'import striate' else 'lib/'}"
    )


def test_every_package_is_listed():
    listed = set(PROJECT["tool"]["setuptools"]["packages"])
    folders = {path.parent.relative_to(ROOT) for path in package_files()}
    present = {".".join(("striate", *folder.parts)) for folder in folders}
    assert not present - listed, f"add {sorted(present - listed)} to tool.setuptools.packages of pyproject.toml"
    assert not listed - present, f"take {sorted(listed - present)} out of tool.setuptools.packages of pyproject.toml"
    bare = sorted(str(folder) for folder in folders if not (ROOT / folder / "__init__.py").exists())
    assert not bare, f"add an __init__.py to {bare}"


def test_every_import_is_a_declared_dependency():
    declared = {canonical(re.match(r"[\w.-]+", line)[0]) for line in PROJECT["project"]["dependencies"]}
    distributions, found = importlib.metadata.packages_distributions(), []
    for path in package_files():
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            for package in {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {"striate"}:
                if not declared.intersection(map(canonical, distributions.get(package, [package]))):
                    found.append(
                        f"{path.relative_to(ROOT)}:{node.lineno} imports {package}, which pyproject.toml lacks"
                    )
    assert not found, "\n".join(found)


@pytest.mark.parametrize("name", ["constraints.txt", "constraints-floor.txt"])
def test_constraints_pin_every_dependency_and_hold_no_address(name):
    lines = [line for line in (ROOT / name).read_text().splitlines() if not line.startswith("#")]
    assert not (loose := [line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.!+]+", line)]), loose
    pinned = {canonical(line.partition("==")[0]) for line in lines}
    wanted = PROJECT["project"]["dependencies"] + PROJECT["project"]["optional-dependencies"]["dev"]
    missing = {canonical(re.match(r"[\w.-]+", requirement)[0]) for requirement in wanted} - pinned
    assert not missing, f"{name} does not pin {sorted(missing)}"


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_functions_and_files_are_short():
    found = []
    for path in (path for path in text_files() if path.suffix == ".py"):
        source = path.read_text()
        if (lines := len(source.splitlines())) > 500:
            found.append(f"{path.relative_to(ROOT)} has {lines} lines, at most 500: divide it")
        if "pallas_kernels" in path.parts:
            continue
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef) and (lines := node.end_lineno - node.lineno + 1) > 60:
                found.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name} has {lines} lines, at most 60")
    assert not found, "\n".join(found)


def test_no_path_of_one_machine():
    private = re.compile(r"/(?:root|home|Users|work|opt)/\w|/tmp/\w|(?:file|https?)://[^\s/]*(?:pypi|simple)")
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in text_files()
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if private.search(line) and path != Path(__file__)
    ]
    assert not found, "\n".join(found)


def run(code: str, *options: str, **settings) -> str:
    """What a fresh interpreter prints for `code`; its error when it fails."""
    done = subprocess.run([sys.executable, *options, "-c", code], capture_output=True, text=True, **settings)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_front_door_is_light():
    heavy = {
        "matplotlib",
        "optax",
        "orbax",
        "pyarrow",
        "rich",
        "tensorboardX",
        "tensorflow",
        "tensorflow_datasets",
        "tyro",
    }
    loaded = run("import striate, sys; print(*sorted({name.partition('.')[0] for name in sys.modules}))").split()
    assert "jax" in loaded
    assert not (found := heavy.intersection(loaded)), f"`import striate` loads {found}: import them where they are used"


def test_every_module_imports_without_a_deprecation_and_without_tensorflow():
    names = [dotted(path, ROOT) for path in package_files() if path.name not in ("__init__.py", "__main__.py")]
    code = f"import importlib, sys\nfor name in {names}: importlib.import_module('striate.' + name)\n"
    code += "import orbax.checkpoint, tensorflow_datasets\nprint('tensorflow' in sys.modules)"
    deprecations = ("DeprecationWarning", "PendingDeprecationWarning", "FutureWarning")
    assert run(code, *(f"-Werror::{name}" for name in deprecations)) == "False\n"


@pytest.mark.smoke
def test_the_wheel_is_whole_and_works_elsewhere(tmp_path):
    source, site, elsewhere = tmp_path / "source", tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    # A copy, because setuptools builds in the tree and would take up what an earlier build left there.
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", *MADE_BY_TOOLS))
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    offline = ["--no-index", "--no-deps"]
    wheelhouse = ["--wheel-dir", str(tmp_path)]
    subprocess.run([*pip, "wheel", *offline, "--no-build-isolation", *wheelhouse, str(source)], check=True)
    (wheel,) = tmp_path.glob("striate-*.whl")
    files = {*package_files(), *(data for path in package_files() for data in path.parent.glob("*.json"))}
    modules = {f"striate/{path.relative_to(ROOT)}" for path in files}
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == modules
    subprocess.run([*pip, "install", *offline, "--no-compile", "--target", str(site), str(wheel)], check=True)
    code = "import striate as st; print(st.__file__); print(st.masks.causal() & st.masks.same('document'))"
    place, formula = run(code, "-P", cwd=elsewhere, env={"PYTHONPATH": str(site), "JAX_PLATFORMS": "cpu"}).splitlines()
    assert Path(place) == site / "striate/__init__.py"
    assert "causal()" in formula
