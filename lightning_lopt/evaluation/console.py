"""Terminal output that `lopt evaluate` and `lopt reproduce` share: the console and the progress bar."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from lightning_lopt.evaluation.compare import Progress

NEEDED = ("matplotlib", "rich")
SECONDS_PER_LINE = 10


def open_console(out: Path) -> Console:
    """A console to print to, once the libraries for reports are installed and the output folder is usable.

    Raises:
        ModuleNotFoundError: matplotlib or rich is not installed.
        ValueError: `out` is a file.
    """
    for name in NEEDED:
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(
                f"Reports need {name}, which is not installed: pip install 'lightning_lopt[plot]'."
            )
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {str(out)!r} is a file; name a directory, which is created if needed.")
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=150)  # wide tables fit in files and pipes


@contextmanager
def progress_bar(console: Console) -> Iterator[Progress]:
    """A progress bar on a terminal; elsewhere a line when something is done, and every ten seconds until then."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    if not console.is_terminal:
        start = last = time.monotonic()

        def print_line(text: str, done: int, total: int) -> None:
            nonlocal last
            now = time.monotonic()
            if done == total or now - last > SECONDS_PER_LINE:
                last = now
                count = "" if done == total else f", {done:,} of {total:,}"
                console.print(f"{now - start:8.0f} s  {text}{count}", soft_wrap=True, highlight=False)

        yield print_line
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f} of {task.total:,.0f}"),
    )
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as bars:
        bar = bars.add_task("starting", total=1)
        yield lambda text, done, total: bars.update(bar, description=text, completed=done, total=total)
