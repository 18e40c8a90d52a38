"""The command line, run in process: what it understands, what it refuses and how, and that it starts quickly."""

import dataclasses
import json
import re
import subprocess
import sys

import pytest

from striate.configs.schema import Experiment
from striate.lib import cli
from striate.lib.cli import COMMANDS, Configured, main, parse
from striate.lib.errors import UserError

SHIPPED = sorted(path.stem for path in cli.ROOT.glob("configs/[a-z]*.py") if path.stem != "schema")
CONFIG = """
from striate.configs.schema import Experiment
from striate.lib.training.data import DataConfig
from striate.lib.training.loop import RunConfig
from striate.lib.training.optimiser import OptimiserConfig
from striate.lib.training.partition import MeshConfig
from striate.models.decoder import DecoderConfig, Layer

model = DecoderConfig(layers=2, pattern=(Layer(), Layer(mask="window(7) & same('document')")))
experiment = Experiment(model, DataConfig(length=512), OptimiserConfig(learning_rate=1e-2), MeshConfig(), RunConfig())
"""


@pytest.fixture
def config(tmp_path) -> str:
    path = tmp_path / "small.py"
    path.write_text(CONFIG)
    return str(path)


def refused(words: list[str], capsys) -> str:
    """The one line that a command line is refused with."""
    assert main(words) == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err.startswith("striate: ") and output.err.count("\n") == 1
    return output.err


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_the_overview_names_every_command(words, capsys):
    assert main(words) == 0
    output = capsys.readouterr().out
    assert all(name in output and kind.__doc__.split()[0] in output for name, kind in COMMANDS.items())


def test_a_group_lists_its_own_commands(capsys):
    assert main(["show"]) == 0
    output = capsys.readouterr().out
    assert "show mask" in output and "show config" in output and "evaluate" not in output


POSITIONAL = {"--config": "CONFIG", "--run": "RUN", "--formula": "FORMULA", "--name": "NAME"}


@pytest.mark.parametrize("name", COMMANDS)
def test_help_lists_every_option(name, config, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    alone = name in ("show layout", "systems")
    takes = [config] if issubclass(COMMANDS[name], Configured) else [] if alone else ["causal()"]
    command = parse([*name.split(), *takes])
    assert main([*name.split(), "--help"]) == 0
    output = capsys.readouterr().out
    assert " ".join(COMMANDS[name].__doc__.split()) in " ".join(output.split())
    for option in cli.options(command):
        if ".pattern.1." not in option:
            assert POSITIONAL.get(option, option.replace("--experiment.", "--")) in output


def test_help_of_a_config_shows_the_values_of_the_config(config, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["train", config, "--help"]) == 0
    output = capsys.readouterr().out
    assert "(default: 0.01)" in output and "window(7)" in output
    assert main(["train", "--help"]) == 0
    assert "(default: 0.01)" not in capsys.readouterr().out


def test_any_field_can_be_overridden(config):
    words = "--optimiser.learning-rate 3e-4 --optimiser.weight_decay 0.2 --mesh.layout=zigzag --data.batch 4"
    before = parse(["train", config]).experiment
    after = parse(["train", config, *words.split()]).experiment
    assert after == dataclasses.replace(
        before,
        optimiser=dataclasses.replace(before.optimiser, learning_rate=3e-4, weight_decay=0.2),
        mesh=dataclasses.replace(before.mesh, layout="zigzag"),
        data=dataclasses.replace(before.data, batch=4),
    )


def test_tuples_can_be_overridden(config):
    words = [
        "--data.ngram-orders",
        "2",
        "3",
        "4",
        "--model.pattern.1.mask",
        "causal()",
        "--model.implementation",
        "xla",
    ]
    experiment = parse(["train", config, *words]).experiment
    assert experiment.data.ngram_orders == (2, 3, 4)
    assert [layer.mask for layer in experiment.model.pattern] == ["causal() & same('document')", "causal()"]
    assert experiment.model.implementation == "xla"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["trian"], "'train'"),
        (["shw", "mask"], "'show mask'"),
        (["show", "layuot"], "'show layout'"),
        (["train", "CONFIG", "--optimizer.learning-rate", "3e-4"], "'--optimiser.learning-rate'"),
        (["train", "CONFIG", "--optimiser.learning_rates=3e-4"], "'--optimiser.learning-rate'"),
        (["train", "CONFIG", "--data.lenght", "512"], "'--data.length'"),
        (["train", "CONFIG", "--model.pattern.2.mask", "causal()"], "'--model.pattern.1.mask'"),
        (["show", "config", "CONFIG", "--jsn"], "'--json'"),
        (["show", "layout", "--shard", "4"], "'--shards'"),
        (["train", "--data.length", "512", "CONFIG"], "CONFIG first"),
        (["train"], "CONFIG first"),
        (["train", "stdlb"], "'stdlib'"),
        (["train", "nowhere/stdlb.py"], "'stdlib'"),
        (["evaluate", "nowhere"], "'nowhere'"),
    ],
)
def test_a_mistake_is_answered_in_one_line_with_the_nearest_name(words, says, config, capsys):
    assert says in refused([config if word == "CONFIG" else word for word in words], capsys)


@pytest.mark.parametrize(
    "words", [["--data.length", "many"], ["--mesh.sequence", "2.5"], ["--data.ngram-orders", "two"], ["--data.name"]]
)
def test_a_value_of_the_wrong_type_is_refused_with_its_option(words, config, capsys):
    assert main(["train", config, *words]) == 2
    output = capsys.readouterr()
    assert output.out == "" and words[0] in output.err


def test_what_a_config_refuses_is_one_line(config, capsys):
    assert "heads" in refused(["train", config, "--model.heads", "3", "--model.kv-heads", "2"], capsys)


def test_a_file_without_an_experiment(tmp_path, capsys):
    (tmp_path / "empty.py").write_text("experiment = 3\n")
    assert "experiment = Experiment(...)" in refused(["train", str(tmp_path / "empty.py")], capsys)


def test_errors_of_users_and_interrupts_end_with_their_codes(config, capsys, monkeypatch):
    def fail(error):
        def command(self):
            raise error

        monkeypatch.setattr(cli.Train, "__call__", command)
        return main(["train", config])

    assert fail(UserError("too long")) == 2 and capsys.readouterr().err == "striate: too long\n"
    assert fail(KeyboardInterrupt()) == 130
    with pytest.raises(ValueError, match="a mistake of ours"):
        fail(ValueError("a mistake of ours"))


def test_show_config_prints_what_would_be_trained(config, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    words = [config, "--data.length", "1024"]
    assert main(["show", "config", *words, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    experiment = parse(["train", *words]).experiment
    assert printed == json.loads(json.dumps(dataclasses.asdict(experiment)))
    assert printed["data"]["length"] == 1024
    assert main(["show", "config", *words]) == 0
    table = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if "--" in line)
    expected = {name: repr(value) for name, value in cli.options(experiment).items()}
    assert {name: value.strip() for name, value in table.items()} == expected


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_config_is_an_experiment(name):
    assert isinstance(cli.load_experiment(name), Experiment)
    assert cli.load_experiment(name) == cli.load_experiment(str(cli.ROOT / "configs" / f"{name}.py"))


def test_runs_are_found_by_path_and_by_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "first").mkdir(parents=True)
    assert "striate train" in refused(["evaluate", "first"], capsys)
    (tmp_path / "runs" / "first" / "config.json").write_text("{}")
    assert cli.find_run("first").resolve() == cli.find_run("runs/first").resolve() == tmp_path / "runs" / "first"
    assert "'first'" in refused(["generate", "frist"], capsys)


def test_bench_runs_the_benchmark_of_that_name(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "ROOT", tmp_path)
    assert "clone" in refused(["bench", "speed"], capsys)
    (tmp_path / "benchmarks").mkdir()
    script = "import sys, pathlib; pathlib.Path(sys.argv[2]).write_text(sys.argv[1]); sys.exit(3)"
    (tmp_path / "benchmarks" / "speed.py").write_text(script)
    assert "'speed'" in refused(["bench", "sped"], capsys)
    assert main(["bench", "speed", "--json", str(tmp_path / "figures")]) == 3
    assert (tmp_path / "figures").read_text() == "--json"
    (tmp_path / "benchmarks" / "top_speed.py").write_text("import sys; sys.exit(4)")
    assert main(["bench", "top-speed"]) == main(["bench", "top_speed"]) == 4
    assert "'top-speed'" in refused(["bench", "top-sped"], capsys)


def test_help_imports_nothing_heavy():
    code = "import sys; from striate.lib.cli import main; main(['--help']); main(['show', 'mask', 'causal()'])"
    code += "; print(*{name.partition('.')[0] for name in sys.modules}, sep=chr(10), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "train" in done.stdout
    loaded = set(done.stderr.split())
    assert "striate" in loaded
    assert not loaded & {"flax", "matplotlib", "optax", "orbax", "tensorboardX", "tensorflow_datasets"}


@pytest.mark.long
def test_train_evaluate_generate(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for index in range(12):
        path = tmp_path / "text" / f"{index}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"document {index}: " + "all work and no play " * 40)
    words = "--data.name text --data.data-dir cache --data.held-out 0.3 --data.length 256 --data.batch 1"
    words += " --model.width 32 --model.heads 2 --model.kv-heads 1 --model.head-dim 16 --model.hidden 64"
    words += " --mesh.sequence 2 --mesh.stripe 32 --optimiser.warmup 1 --run.name small --run.steps 4"
    words += " --run.eval-every 2 --run.checkpoint-every 2 --run.sample-length 8"
    (tmp_path / "small.py").write_text(CONFIG)
    train = ["train", "small.py", *words.split()]
    assert main(train) == 0
    written = capsys.readouterr().out
    bits = re.search(r"held out: [\d.]+ bits per byte; xz -9 on the same bytes: [\d.]+", written)[0]
    assert main(["evaluate", "small"]) == 0
    assert bits in capsys.readouterr().out
    for _ in range(2):
        assert main(["generate", "small", "--prompt", "all work", "--steps", "8", "--seed", "3"]) == 0
    first, second = capsys.readouterr().out.split("all work")[1:]
    assert first == second
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*")}
    assert "model.hidden" in refused([*train, "--model.hidden", "128"], capsys)
    assert "temperature" in refused(["generate", "small", "--temperature", "-1"], capsys)
    assert files == {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*")}
