"""The `lopt` command: what it prints, its exit status, and one line for each mistake."""

import re
import subprocess
import sys
import types
from functools import partial
from pathlib import Path

import pytest
import torch
from hub_server import TOKEN, serve
from lightning_cases import KNOWN_WARNINGS

import lightning_lopt as lopt
from lightning_lopt import cli, hub

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "examples" / "configs").glob("*.yaml"))
SHORT = [
    *(
        "--trainer.max_steps=2",
        "--trainer.limit_val_batches=1",
        "--model.steps_per_epoch=2",
        "--model.compiled=false",  # compiling takes longer than all the rest
        "--trainer.accelerator=cpu",
    ),
    *("--model.validation_horizon=3", "--model.validation_seeds=1", "--model.estimator.truncation=2"),
    *("--model.tasks=[breast-cancer-logreg]", "--model.validation_tasks=[breast-cancer-logreg]"),
    *("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"),
]

pytestmark = [
    *KNOWN_WARNINGS,
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),  # huggingface_hub's own
    pytest.mark.filterwarnings("ignore:.MetaTrainer.configure_optimizers. will be overridden"),
    # A resumed run first ends the epoch that the checkpoint was made in, without a step and so without metrics.
    pytest.mark.filterwarnings("ignore:.ModelCheckpoint.*could not find the monitored key"),
]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LIGHTNING_LOPT_DATA", raising=False)
    return tmp_path


def run(*arguments):
    """The exit status, whether it was returned or raised."""
    try:
        return cli.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return stop.code


def assert_one_line(capsys, command, message):
    out, err = capsys.readouterr()
    assert out == ""
    lines = [line for line in err.splitlines() if line]
    assert len(lines) == 1, err
    assert lines[0].startswith(f"{command}: error: ")
    assert re.search(message, lines[0]), err


# --- list, show, push ---


def test_list(capsys):
    assert run("list") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == lopt.list_pretrained()
    assert any(line.startswith("star ") and "meta-parameters" in line for line in lines)


def test_show(capsys, folder):
    assert run("show", "star") == 0
    assert capsys.readouterr().out.startswith((hub.bundled_dir() / "star" / "README.md").read_text())
    lopt.save_rule(lopt.rules.make("blackbox"), folder / "mine", card="# My card\n")
    assert run("show", "mine") == 0
    assert "# My card" in capsys.readouterr().out
    (folder / "mine" / "README.md").unlink()
    assert run("show", "mine") == 0
    assert "kind='blackbox', 197 meta-parameters" in capsys.readouterr().out


def test_push(capsys, folder, monkeypatch):
    lopt.save_rule(lopt.rules.make("star"), folder / "private-name")
    lopt.save_rule(lopt.rules.make("star"), folder / "mine", card="# My card\n")
    with serve() as (server, _):
        monkeypatch.setattr(hub, "push_to_hub", partial(lopt.push_to_hub, endpoint=server.url, token=TOKEN))
        assert run("push", "mine", "someone/my-star", "--tag", "v1") == 0
        sha = capsys.readouterr().out.split()[-1]
        files = server.repos["someone/my-star"].commits[sha]
        assert b"# My card" in files["README.md"]
        assert server.repos["someone/my-star"].tags == {"v1": sha}
        assert run("push", "private-name", "someone/other") == 0
        files = server.repos["someone/other"].commits[capsys.readouterr().out.split()[-1]]
        assert b"private-name" not in files["README.md"]
        assert b'from_pretrained("someone/other")' in files["README.md"]
    import huggingface_hub

    huggingface_hub.close_session()


@pytest.mark.parametrize(
    ("arguments", "command", "message"),
    [
        ([], "lopt", "arguments are required: COMMAND"),
        (["train"], "lopt", "invalid choice: 'train' .*choose from"),
        (["--version", "x"], "lopt", "unrecognized arguments|required|invalid choice"),
        (["show"], "lopt show", "arguments are required: NAME"),
        (["show", "nope"], "lopt show", r"Unknown rule 'nope'.*Pass one of \[.*'star'"),
        (["show", "empty"], "lopt show", r"config\.json: is missing"),
        (["push", "star", "nope"], "lopt push", "'nope' is neither a directory nor a Hub repo id"),
        (["push", "star", "me/it", "--tag", "a b"], "lopt push", "tag='a b' is not allowed"),
        (["list", "more"], "lopt", "unrecognized arguments: more"),
    ],
    ids=str,
)
def test_mistakes(capsys, folder, arguments, command, message):
    (folder / "empty").mkdir()
    assert run(*arguments) == 2
    assert_one_line(capsys, command, message)


@pytest.mark.parametrize(
    "arguments", [["--help"], ["push", "-h"], ["meta-train", "--help"], ["meta-train", "fit", "-h"]]
)
def test_help(capsys, arguments):
    assert run(*arguments) == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: lopt")
    if arguments == ["--help"]:
        assert all(command in out for command in ("list", "show", "push", "evaluate", "meta-train"))


# --- Delegated commands ---


@pytest.fixture
def delegate(monkeypatch):
    """A stand-in for lightning_lopt.evaluation.cli."""
    module = types.ModuleType("delegate")
    module.add_arguments = lambda parser: parser.add_argument("--steps", type=int, default=3)
    module.run = lambda arguments: print("ran", arguments.steps)
    monkeypatch.setitem(sys.modules, "delegate", module)
    monkeypatch.setitem(cli.DELEGATED, "evaluate", ("delegate", "text"))
    return module


def test_a_delegated_command(capsys, delegate):
    assert run("evaluate", "--steps", "7") == 0
    assert capsys.readouterr().out == "ran 7\n"
    assert run("evaluate", "--steps", "x") == 2
    assert_one_line(capsys, "lopt evaluate", "invalid int value: 'x'")


@pytest.mark.parametrize(
    "error", [ValueError("bad\n  value"), FileNotFoundError("no file"), ModuleNotFoundError("no m")]
)
def test_its_errors_are_one_line(capsys, delegate, error):
    def fail(arguments):
        raise error

    delegate.run = fail
    assert run("evaluate") == 2
    assert_one_line(capsys, "lopt evaluate", " ".join(str(error).split()))


def test_it_is_not_imported_for_other_commands(capsys, monkeypatch):
    monkeypatch.setitem(cli.DELEGATED, "evaluate", ("lightning_lopt.no_such_module", "text"))
    assert run("list") == run("--help") == 0
    assert run("evaluate") == 2


# --- meta-train ---


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_the_configurations_run(config, folder):
    assert run("meta-train", "fit", "--config", config, *SHORT, "--model.estimator.num_pairs=1") == 0
    out = folder / "runs" / config.stem
    rule = lopt.load_rule(out / "rule" / "best")
    assert rule.kind == {"star": "star", "star_paper": "star", "tiny": "scheduled"}.get(config.stem, config.stem)
    assert (out / "lightning_logs" / "version_0" / "config.yaml").is_file()
    header = (out / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"meta_loss", "val/meta_loss", "val/final/breast-cancer-logreg"} <= set(header)
    assert (out / "checkpoints" / "last.ckpt").is_file()


def test_a_run_is_repeated_from_the_configuration_that_it_saved_and_resumed(folder):
    tiny = ["--config", CONFIGS[-1], *SHORT]
    assert CONFIGS[-1].stem == "tiny"
    assert run("meta-train", "fit", *tiny) == 0
    weights = lopt.load_rule(folder / "runs/tiny/rule").state_dict()
    saved = folder / "config.yaml"
    (folder / "runs/tiny/lightning_logs/version_0/config.yaml").rename(saved)
    assert run("meta-train", "fit", "--config", saved, "--model.export=again") == 0
    again = lopt.load_rule(folder / "again").state_dict()
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    resume = ["--ckpt_path=runs/tiny/checkpoints/last.ckpt", "--trainer.max_steps=4", "--model.export=more"]
    assert run("meta-train", "fit", "--config", saved, *resume) == 0
    assert "| steps | 4 on 1 processes |" in (folder / "more" / "README.md").read_text()
    assert run("meta-train", "validate", "--config", saved, "--ckpt_path=runs/tiny/checkpoints/last.ckpt") == 0


def test_flags_alone_and_another_meta_optimizer(folder):
    arguments = [
        *("--model.rule", "star", "--model.tasks", "[quadratic]", "--model.estimator", "PES", "--model.export", "rule"),
        *("--model.estimator.truncation", "2", "--model.estimator.num_pairs", "2", "--model.steps_per_epoch", "1"),
        *("--model.trainable", "[rms_decays]", "--optimizer", "torch.optim.SGD", "--optimizer.lr", "0.1"),
        *("--trainer.max_steps", "1", "--trainer.logger", "false", "--trainer.enable_checkpointing", "false"),
        *("--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu"),
    ]
    assert run("meta-train", "fit", *arguments) == 0
    before, after = lopt.load_rule("star"), lopt.load_rule(folder / "rule")
    assert after.rms_decays != before.rms_decays
    assert torch.equal(after.schedule_fraction, before.schedule_fraction)


TASK = ["--model.tasks=[quadratic]"]
PES = ["--model.estimator=PES"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "subcommand"),
        (["fly"], "fly"),
        (["fit"], "required: .*model.rule"),
        (["fit", "--config", "nope.yaml"], "nope.yaml"),
        (["fit", "--config", "bad.yaml"], "bad.yaml|Problem|parse|Unable"),
        (["fit", "--model.rule=star", *TASK, *PES, "--model.lr=fast"], "model.lr.*fast"),
        (["fit", "--model.rule=star", *TASK, *PES, "--model.speed=1"], "model.speed"),
        (["fit", "--model.rule=star", *TASK, "--model.estimator=ESP"], "model.estimator.*ESP"),
        (["fit", "--model.rule=nope", *TASK, *PES], "Unknown rule 'nope'"),
        (["fit", "--model.rule={kind: nope}", *TASK, *PES], "Unknown kind 'nope'; known are .*'star'"),
        (["fit", "--model.rule={class_path: lightning_lopt.rules.STAR}", *TASK, *PES], "or a mapping with a 'kind'"),
        (["fit", "--model.rule={kind: star, speed: 1}", *TASK, *PES], "Unknown config key 'speed'; allowed are"),
        (["fit", "--model.rule=star", "--model.tasks=[nope]", *PES], "Unknown task 'nope'"),
        (["fit", "--model.rule=star", *TASK, *PES, "--model.zero=[w9]"], "'w9' matches no meta-parameter"),
        (["fit", "--model.rule=star", *TASK, *PES, "--model.estimator.horizon.low=0"], r"Horizon\(0, None\)"),
        (["fit", "--model.rule=star", *TASK, *PES, "--trainer.accelerator=warp"], "warp"),
        (["fit", "--model.rule=star", "--model.tasks=[fashion-mlp]", *PES], "LIGHTNING_LOPT_DATA"),
        (["fit", "--model.rule=star", *TASK, *PES, "--ckpt_path=no.ckpt", "--trainer.max_steps=1"], "no.ckpt"),
    ],
    ids=lambda value: " ".join(value[1:]) if isinstance(value, list) else "",
)
def test_mistakes_in_meta_training(capsys, folder, arguments, message):
    (folder / "bad.yaml").write_text("model: {rule: [}")
    assert run("meta-train", *arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line or "Traceback" in line]
    assert len(lines) == 1
    assert lines[0].startswith("lopt meta-train: error: ")
    assert re.search(message, lines[0])


def test_a_missing_extra_is_named(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lightning_lopt.meta.cli", None)
    monkeypatch.delattr(lopt.meta, "cli", raising=False)
    assert run("meta-train", "fit") == 2
    assert_one_line(capsys, "lopt meta-train", r"Install the extra: pip install 'lightning_lopt\[cli\]'")


# --- The process ---


def test_the_console_script_is_declared():
    assert 'lopt = "lightning_lopt.cli:main"' in (ROOT / "pyproject.toml").read_text()


def test_in_a_process_of_its_own():
    command = [sys.executable, "-m", "lightning_lopt.cli", "show"]
    options = {"cwd": ROOT, "capture_output": True, "text": True, "timeout": 120, "check": False}
    done = subprocess.run([*command, "nope"], **options)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("lopt show: error: Unknown rule 'nope'")
    assert len(done.stderr.splitlines()) == 1
