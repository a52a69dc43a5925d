"""An analysis as files: figures, and a report.html that holds them and needs nothing else."""

from __future__ import annotations

import base64
import html
import io
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_lopt.analysis import plots
from lightning_lopt.analysis.findings import Findings, strong_modes, words

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CAPTIONS = {
    "losses": "The rule on the task, and its linearization run alone (App. B).",
    "momentum": "Momentum moves the update function up and down (fig. 3b, 8); the answer to one gradient.",
    "eigenvalues": "The modes at the fixed point (fig. 3c, 8, 9, 14): each a momentum with a learning rate.",
    "directions": "Update functions along the modes that matter (fig. 9b): momentum moves them up and down.",
    "trajectories": "States of real runs (fig. 3a, 8). At a single fixed point their variance goes to 0.",
    "clipping": "Gradient clipping (fig. 4, 10): the first update, and the gradients that come.",
    "schedule": "What happens without gradients (fig. 5, 11): a learning-rate schedule of the rule's own.",
    "adaptation": "Learning-rate adaptation (fig. 6, 12): where constant gradients hold the state.",
    "manifold": "Where the state rests without gradients (fig. 13), and the learning rates it has there.",
    "tensors": "Tensor by tensor (fig. 7), biases dashed.",
}
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 1080px; margin: 2rem auto;
       padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2rem; }
figure { margin: 1.5rem 0; } img { max-width: 100%; height: auto; } figcaption { color: #555; font-size: .9rem; }
table { border-collapse: collapse; } th, td { text-align: right; padding: .2rem .9rem .2rem 0;
        border-bottom: 1px solid #ddd; font-variant-numeric: tabular-nums; }
""".strip()


def figures(findings: Findings, star: tuple[float, float] | None = None) -> dict[str, Figure]:
    """Name -> figure, in the order of the report; those that apply to the rule and task.

    Args:
        findings: what was found.
        star: (learning rate, momentum) of the task's best momentum, where known.
    """
    drawn: dict[str, Figure | None] = {
        name: getattr(plots, name)(findings) for name in CAPTIONS if name != "eigenvalues"
    }
    drawn["eigenvalues"] = plots.eigenvalues(findings, star)
    return {name: figure for name in CAPTIONS if (figure := drawn[name]) is not None}


def write(
    findings: Findings,
    directory: Path,
    *,
    star: tuple[float, float] | None = None,
    more: dict[str, tuple[str, Figure]] | None = None,
) -> list[Path]:
    """Write a PNG for each figure, and `report.html`.

    Args:
        findings: what was found.
        directory: where to; made if need be.
        star: as for `figures`.
        more: further figures, name -> (caption, figure).
    """
    drawn = {name: (CAPTIONS[name], figure) for name, figure in figures(findings, star).items()} | (more or {})
    title = f"{findings.name} on {findings.task}"
    steps, runs = findings.recording.losses.shape
    intro = (
        f"{runs} runs of {steps} steps; kind {findings.rule.kind}, {findings.rule.num_meta_params()} meta-parameters."
    )
    body = [f"<p>{html.escape(intro)}</p>", "<h2>In plain words</h2>", "<ul>"]
    body += [f"<li>{html.escape(sentence)}</li>" for sentence in words(findings)]
    body += ["</ul>", "<h2>Modes</h2>", _table(findings)]
    return write_page(title, body, drawn, directory)


def write_page(title: str, body: list[str], drawn: dict[str, tuple[str, Figure]], directory: Path) -> list[Path]:
    """Write PNGs and a page with them.

    Args:
        title: the page's.
        body: HTML before the figures.
        drawn: name -> (caption, figure).
        directory: where to.

    Returns:
        The files, the page first.
    """
    directory.mkdir(parents=True, exist_ok=True)
    page = directory / "report.html"
    parts, written = [*body, "<h2>Figures</h2>"], [page]
    for name, (caption, figure) in drawn.items():
        png = _png(figure)
        written.append(directory / f"{name}.png")
        written[-1].write_bytes(png)
        source, text = base64.b64encode(png).decode(), html.escape(caption)
        image = f'<img src="data:image/png;base64,{source}" alt="{text}">'
        parts.append(f"<figure>{image}<figcaption>{text}</figcaption></figure>")
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    text = "\n".join([f"<h1>{html.escape(title)}</h1>", *parts])
    page.write_text(f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n{text}\n</body></html>\n', "utf-8")
    return written


def _table(findings: Findings) -> str:
    modes, rows = findings.modes, []
    for index in strong_modes(modes)[:8]:
        value = modes.eigenvalues[index]
        cells = (
            f"{float(value.real):.4f}" + (f" ± {float(value.imag):.4f} i" if abs(float(value.imag)) > 1e-9 else ""),
            f"{float(modes.timescales[index]):.4f}",
            f"{float(modes.learning_rates[index]):.4g}",
        )
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    rows.append(f"<tr><td>plain gradient</td><td>0</td><td>{modes.direct:.4g}</td></tr>")
    head = "".join(f"<th>{text}</th>" for text in ("eigenvalue", "momentum", "learning rate"))
    return f"<table><tr>{head}</tr>{''.join(rows)}</table>"


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
