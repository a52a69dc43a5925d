"""`lopt analyze`: its files, its summary, the page in a real browser, and one line for each mistake."""

import base64
import html.parser
import re
import shutil
import subprocess

import pytest
import torch

import lightning_lopt as lopt
from lightning_lopt import cli
from lightning_lopt.analysis import LinearRule, linearize, plots
from lightning_lopt.analysis.findings import analyze, describe, linear_error
from lightning_lopt.tasks import make as make_task

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
SHORT = ("--steps", "15", "--runs", "2")


@pytest.fixture(scope="module")
def rule_dir(tmp_path_factory):
    """A GRU that implements momentum with clipping beyond about |g| = 2."""
    torch.manual_seed(0)
    rule = lopt.rules.make("gru", hidden_size=6, initial_lr=2.0, initial_beta=0.8, initial_reach=1.0)
    return lopt.save_rule(rule, tmp_path_factory.mktemp("rule"))


@pytest.fixture(scope="module")
def report(rule_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("report")
    assert run("analyze", rule_dir, "--out", out, *SHORT) == 0
    return out


def run(*arguments):
    """Run the command, and return its exit status."""
    try:
        return cli.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return stop.code


class Page(html.parser.HTMLParser):
    """Collects the sources of a page and its unclosed elements."""

    def __init__(self, text):
        super().__init__()
        self.sources, self.open = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.sources += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_self_contained(report):
    text = (report / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    names = sorted(path.stem for path in report.glob("*.png"))
    drawn = ["adaptation", "clipping", "directions", "eigenvalues", "losses", "momentum", "schedule", "trajectories"]
    assert names == drawn
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    images = {base64.b64decode(source.partition(",")[2]) for source in page.sources}
    assert images == {path.read_bytes() for path in report.glob("*.png")}


def test_the_summary_describes_the_rule(report):
    text = (report / "report.html").read_text(encoding="utf-8")
    momentum, rate = map(float, re.search(r"Momentum ([\d.]+) with learning rate ([\d.]+)", text).groups())
    assert (momentum, rate) == (pytest.approx(0.8, rel=0.05), pytest.approx(2.0, rel=0.1))
    threshold = float(re.search(r"Clips beyond \|g\| = ([\d.]+)", text)[1])
    assert threshold == pytest.approx(1.915, rel=0.1)  # tanh(t) = t / 2
    assert "one fixed point, attracting" in text


@pytest.mark.skipif(BROWSER is None, reason="needs a browser: chromium or chrome on the PATH")
def test_a_browser_shows_the_page(report, tmp_path):
    from matplotlib import image

    picture, page = tmp_path / "page.png", (report / "report.html").as_uri()
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1100,4000"]
    subprocess.run(
        [BROWSER, *options, f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={picture}", page],
        check=True,
        capture_output=True,
        timeout=240,
    )
    pixels = image.imread(picture)[..., :3]
    assert pixels.shape[:2] == (4000, 1100)
    ink = (pixels.min(-1) < 0.9).reshape(40, 100, 1100).mean((1, 2))
    assert (ink > 0.002).sum() > 20  # text and figures over most of its height
    colored = (pixels.max(-1) - pixels.min(-1) > 0.3).mean()
    assert colored > 0.002  # lines of figures, which are images


def test_other_kinds_of_rules_can_be_reported():
    """On a task with several tensors, also for rules without a fixed point."""
    for kind, config in (("lstm", {"hidden_size": 3}), ("mng", {"k": 3})):
        torch.manual_seed(0)
        found = analyze(lopt.rules.make(kind, **config), make_task("digits-mlp", hidden=(4,)), steps=4, runs=1)
        assert len(describe(found)) >= 5
        assert all(len(sentence) < 250 and "nan" not in sentence for sentence in describe(found))
        assert plots.tensors(found) is not None


def test_a_line_of_fixed_points_is_drawn_with_its_learning_rates():
    """Fig. 13: a state without decay has a line of fixed points; an ordinary rule has a single one."""
    rule = LinearRule(*(torch.tensor(value) for value in ([[1.0]], [1.0], [-0.1])), 1.0, 0.0, torch.zeros(1))
    found = analyze(rule, make_task("linear-regression"), steps=20, runs=3)
    assert len(found.fixed.states) > 5
    left, right, _ = plots.manifold(found).axes
    (points,) = left.collections
    assert len(points.get_offsets()) == len(found.fixed.states)
    assert points.get_array().data == pytest.approx(1.0)  # a linear rule has one learning rate
    resting = -0.1 * found.fixed.states[:, 0]
    for line in right.lines:  # at gradient 0: momentum alone
        assert (resting - line.get_ydata()[50]).abs().min() < 1e-6
    once = LinearRule(*(torch.tensor(value) for value in ([[0.8]], [1.0], [-0.1])), 1.0, 0.0, torch.zeros(1))
    assert plots.manifold(analyze(once, make_task("linear-regression"), steps=20, runs=3)) is None


def test_history_shows_the_modes_of_each_checkpoint(rule_dir, tmp_path, monkeypatch):
    rule = lopt.load_rule(rule_dir)
    for step, factor in ((10, 1.0), (5, 0.5)):
        state = {f"rule.{name}": value for name, value in rule.state_dict().items()}
        state["rule.readout"] = factor * state["rule.readout"]
        torch.save({"state_dict": state}, tmp_path / f"epoch=0-step={step}.ckpt")
    seen = {}
    monkeypatch.setattr(
        plots, "history", lambda steps, modes, best_momentum: seen.update(zip(steps, modes, strict=True)) or FIGURE
    )
    assert run("analyze", rule_dir, "--out", tmp_path / "out", "--history", tmp_path, *SHORT) == 0
    assert list(seen) == [5, 10]
    rates = [float(modes.learning_rates[modes.dominant]) for modes in seen.values()]
    assert rates[1] == pytest.approx(2 * rates[0], rel=1e-3)
    assert (tmp_path / "out" / "history.png").exists()


def _figure():
    from matplotlib.figure import Figure

    return Figure()


FIGURE = _figure()


def test_a_linear_rule_is_its_own_linearization():
    rule = LinearRule(*(torch.tensor(value) for value in ([[0.8]], [1.0], [-0.8])), 1.0, 0.0, torch.zeros(1))
    found = analyze(rule, make_task("linear-regression"), steps=20, runs=3)
    assert linear_error(found) < 1e-5
    assert found.modes.timescales.tolist() == pytest.approx([0.8])
    assert found.modes.learning_rates.tolist() == pytest.approx([1.0])
    again = linearize(found.modes.rule(), torch.zeros(1))
    assert again.amplitudes.real.tolist() == pytest.approx([1.0])


def test_the_summary_says_why_a_linearization_does_not_track():
    """The bundled rule for quadratics warms up and decays, and a linearization has no schedule."""
    found = analyze(lopt.load_rule("gru-quadratic"), make_task("linear-regression"), runs=2)
    rates = found.schedule.learning_rates
    assert rates.argmax() > 5
    assert rates.max() > 2 * rates[-1]
    (sentence,) = (sentence for sentence in describe(found) if sentence.startswith("Linearized"))
    assert linear_error(found) > 0.05
    learning_rates = f"{float(rates[-1]):.3g} from the first step on, that of the rule up to {float(rates.max()):.3g}."
    assert sentence.endswith(learning_rates)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nonsense"], "--nonsense"),
        (["--task", "rosenbrok"], "did you mean 'rosenbrock'"),
        (["--steps", "0"], "--steps 0 is not allowed"),
        (["--history", "."], "has no checkpoints"),
        (["--out", "file"], "is a file"),
    ],
)
def test_mistakes_are_reported_in_one_line(arguments, message, rule_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert run("analyze", rule_dir, *arguments) == 2
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines())) == ("", 1)
    assert message in err


def test_rules_that_need_all_tensors_are_refused():
    with pytest.raises(ValueError, match="scope='tensor'"):
        analyze(lopt.rules.make("lstm_dmd", hidden_size=2, num_snapshots=2), make_task("rosenbrock"))
