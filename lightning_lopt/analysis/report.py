"""Write an analysis as files: PNG figures, and a self-contained report.html."""

from __future__ import annotations

import base64
import html
import io
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_lopt.analysis import plots
from lightning_lopt.analysis.findings import Findings, describe, strong_modes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CAPTIONS = {
    "losses": "Loss of the rule on the task, and of its linearization (App. B).",
    "momentum": "Momentum shifts the update function up and down (fig. 3b, 8). Right: the response to one gradient.",
    "eigenvalues": "The modes at the fixed point (fig. 3c, 8, 9, 14). Each is a momentum with a learning rate.",
    "directions": "Update functions along the strong modes (fig. 9b). Momentum shifts them up and down.",
    "trajectories": "States of real runs (fig. 3a, 8). If they converge to one fixed point, their variance goes to 0.",
    "clipping": "Gradient clipping (fig. 4, 10): the first update, and the distribution of gradients in the runs.",
    "schedule": "A run without gradients (fig. 5, 11) shows the rule's autonomous learning-rate schedule.",
    "adaptation": "Learning-rate adaptation (fig. 6, 12): fixed points of the state under constant gradients.",
    "manifold": "Fixed points of the state without gradients (fig. 13), and the learning rates at them.",
    "tensors": "Differences between tensors (fig. 7); biases are dashed.",
}
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 1080px; margin: 2rem auto;
       padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2rem; }
figure { margin: 1.5rem 0; } img { max-width: 100%; height: auto; } figcaption { color: #555; font-size: .9rem; }
table { border-collapse: collapse; } th, td { text-align: right; padding: .2rem .9rem .2rem 0;
        border-bottom: 1px solid #ddd; font-variant-numeric: tabular-nums; }
""".strip()


def figures(findings: Findings, best_momentum: tuple[float, float] | None = None) -> dict[str, Figure]:
    """Draw the figures that apply to the rule and task: name -> figure, in the order of the report.

    Args:
        findings: the results of the analysis.
        best_momentum: (learning rate, momentum) of the best momentum optimizer for the task, if known.
    """
    drawn: dict[str, Figure | None] = {
        name: getattr(plots, name)(findings) for name in CAPTIONS if name != "eigenvalues"
    }
    drawn["eigenvalues"] = plots.eigenvalues(findings, best_momentum)
    return {name: figure for name in CAPTIONS if (figure := drawn[name]) is not None}


def write(
    findings: Findings,
    directory: Path,
    *,
    best_momentum: tuple[float, float] | None = None,
    more: dict[str, tuple[str, Figure]] | None = None,
) -> list[Path]:
    """Write `report.html` and a PNG for each figure.

    Args:
        findings: the results of the analysis.
        directory: target directory, created if necessary.
        best_momentum: as for `figures`.
        more: further figures, name -> (caption, figure).

    Returns:
        The files, the page first.
    """
    drawn = {name: (CAPTIONS[name], figure) for name, figure in figures(findings, best_momentum).items()}
    drawn |= more or {}
    title = f"{findings.name} on {findings.task}"
    steps, runs = findings.recording.losses.shape
    intro = (
        f"{runs} runs of {steps} steps; kind {findings.rule.kind}, {findings.rule.num_meta_params()} meta-parameters."
    )
    body = [f"<p>{html.escape(intro)}</p>", "<h2>Summary</h2>", "<ul>"]
    body += [f"<li>{html.escape(sentence)}</li>" for sentence in describe(findings)]
    body += ["</ul>", "<h2>Modes</h2>", _table(findings)]
    return write_page(title, body, drawn, directory)


def write_page(title: str, body: list[str], drawn: dict[str, tuple[str, Figure]], directory: Path) -> list[Path]:
    """Write PNGs and a page that embeds them.

    Args:
        title: title of the page.
        body: HTML before the figures.
        drawn: name -> (caption, figure).
        directory: target directory, created if necessary.

    Returns:
        The files, the page first.
    """
    directory.mkdir(parents=True, exist_ok=True)
    page = directory / "report.html"
    sections = [f"<h1>{html.escape(title)}</h1>", *body, "<h2>Figures</h2>"]
    written = [page]
    for name, (caption, figure) in drawn.items():
        png = _png(figure)
        written.append(directory / f"{name}.png")
        written[-1].write_bytes(png)
        source = base64.b64encode(png).decode()
        text = html.escape(caption)
        image = f'<img src="data:image/png;base64,{source}" alt="{text}">'
        sections.append(f"<figure>{image}<figcaption>{text}</figcaption></figure>")
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    content = "\n".join(sections)
    page.write_text(f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n{content}\n</body></html>\n', "utf-8")
    return written


def _table(findings: Findings) -> str:
    modes = findings.modes
    rows = [("eigenvalue", "momentum", "learning rate")]
    for index in strong_modes(modes)[:8]:
        value = complex(modes.eigenvalues[index])
        imaginary = f" ± {value.imag:.4f} i" if abs(value.imag) > 1e-9 else ""
        momentum = f"{float(modes.timescales[index]):.4f}"
        rows.append((f"{value.real:.4f}{imaginary}", momentum, f"{float(modes.learning_rates[index]):.4g}"))
    rows.append(("plain gradient descent", "0", f"{modes.direct:.4g}"))
    cells = ["".join(f"<td>{text}</td>" for text in row) for row in rows]
    cells[0] = cells[0].replace("td>", "th>")
    return f"<table>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>"


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
