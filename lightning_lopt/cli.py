"""The `lopt` command.

    lopt list                            list the bundled rules
    lopt show NAME                       print a rule's card
    lopt push NAME OWNER/REPO            upload a rule to the Hugging Face Hub
    lopt evaluate ...                    compare rules with tuned optimizers
    lopt analyze NAME                    show what a rule has learned
    lopt meta-train fit --config FILE    meta-train a rule
    lopt reproduce CLAIM|PATH            measure the papers' results, or claims of your own; --list, --all

The exit status is 0 on success, and 2, with one line on stderr, after a mistake that the user can correct.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from lightning_lopt import hub
from lightning_lopt.hub.bundle import find_dir
from lightning_lopt.hub.files import CARD, UNDOCUMENTED
from lightning_lopt.rules import Scheduled

# Command -> its module and its help. The module is imported on use and has add_arguments(parser) and run(arguments).
DELEGATED = {
    "evaluate": ("lightning_lopt.evaluation.cli", "Compare rules with tuned optimizers on tasks: a table and a plot."),
    "analyze": ("lightning_lopt.analysis.cli", "What a rule has learned: figures, and a page in plain words."),
    "reproduce": ("lightning_lopt.claims.cli", "Measure what the papers claim: numbers, plots and verdicts."),
}


class _Parser(argparse.ArgumentParser):
    """A parser that reports errors in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {_one_line(message)} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: its arguments (default: those of the process).

    Returns:
        The exit status.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    if arguments[:1] == ["meta-train"]:
        return _meta_train(arguments[1:])
    command = next(iter(arguments), "")
    try:
        parsed = _parser(command).parse_args(arguments)
        parsed.run(parsed)
        sys.stdout.flush()
    except BrokenPipeError:  # as `lopt show star | head -1` makes it; Python would complain once more when it exits
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError, ModuleNotFoundError) as error:
        return _fail(f"lopt {command}", error)
    return 0


def _parser(command: str) -> _Parser:
    parser = _Parser(prog="lopt", description="Learned optimizers: use, meta-train and compare them.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, run: Callable[[argparse.Namespace], Any] | None, text: str) -> argparse.ArgumentParser:
        added: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
        added.set_defaults(run=run)
        return added

    add("list", _list, "List the bundled rules.")
    show = add("show", _show, "Print a rule's card; of a scheduled rule also its readable numbers and its schedule.")
    show.add_argument("name", metavar="NAME", help="a bundled name, a directory (./mine), or a Hub repo owner/name")
    show.add_argument("--plot", type=Path, metavar="FILE", help="save the schedule as a PNG file")
    push = add("push", _push, "Upload a rule to the Hugging Face Hub, with the token of `hf auth login` or HF_TOKEN.")
    push.add_argument("name", metavar="NAME", help="a bundled name, or a directory (./mine)")
    push.add_argument("repo_id", metavar="OWNER/REPO")
    push.add_argument("--private", action="store_true", help="create the repo as a private one")
    push.add_argument("--revision", help="branch (default: the main branch)")
    push.add_argument("--tag", help="tag for the commit")
    for name, (path, text) in DELEGATED.items():
        delegated = add(name, None, text)
        if name == command:
            module = importlib.import_module(path)
            module.add_arguments(delegated)
            delegated.set_defaults(run=module.run)
    add("meta-train", None, "Meta-train a rule (LightningCLI): fit --config FILE, validate; see meta-train fit --help.")
    return parser


def _list(arguments: argparse.Namespace) -> None:
    for name in hub.list_pretrained():
        rule = hub.load_rule(name)
        print(f"{name:<20} {rule.kind}, {rule.num_meta_params()} meta-parameters")


def _show(arguments: argparse.Namespace) -> None:
    rule = hub.load_rule(arguments.name)
    print(_card(arguments.name) or rule)
    if isinstance(rule, Scheduled):
        schedule = importlib.import_module("lightning_lopt.analysis.schedule")
        print(f"\n{schedule.describe(rule)}")
        if arguments.plot:
            schedule.plot(rule, arguments.plot)
            print(f"\nThe schedule is drawn in {arguments.plot}.")
    elif arguments.plot:
        raise ValueError(f"{arguments.name} is of kind {rule.kind!r}: --plot draws rules of kind 'scheduled'.")


def _push(arguments: argparse.Namespace) -> None:
    rule, card = hub.load_rule(arguments.name), _card(arguments.name)
    if card and UNDOCUMENTED in card:  # save_rule's own card, which has the local path; a new one has the repo id
        card = None
    options = {name: getattr(arguments, name) for name in ("private", "revision", "tag")}
    print(hub.push_to_hub(rule, arguments.repo_id, card=card, **options))


def _card(name: str) -> str | None:
    """The card of a bundled rule or of a rule in a directory, if it has one."""
    directory = find_dir(name)
    path = None if directory is None else directory / CARD
    return path.read_text(encoding="utf-8") if path and path.is_file() else None


def _meta_train(arguments: list[str]) -> int:
    try:
        from lightning_lopt.meta import cli
    except ModuleNotFoundError as error:
        missing = f"{error.name} is not installed. Install the extra: pip install 'lightning_lopt[cli]'."
        return _fail("lopt meta-train", missing)
    try:
        cli.run(arguments)
    except cli.UsageError as error:
        return _fail("lopt meta-train", error)
    return 0


def _fail(command: str, error: object) -> int:
    print(f"{command}: error: {_one_line(str(error))}", file=sys.stderr)
    return 2


def _one_line(text: str) -> str:
    return " ".join(text.split())


if __name__ == "__main__":
    sys.exit(main())
