"""`lopt meta-train`: LightningCLI around MetaTrainer."""

from __future__ import annotations

import os
from typing import Any

# LightningCLI uses deprecated names of jsonargparse, which users of the command cannot change.
os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")

from jsonargparse import ArgumentError
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from lightning_lopt.meta.trainer import MetaTrainer


class UsageError(Exception):
    """A mistake that the user of the command can correct."""


class MetaTrainCLI(LightningCLI):
    """The subcommands `fit` and `validate`, with errors that the command reports in one line."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return the Trainer methods that MetaTrainer supports, with those of their arguments that users do not set."""
        return {
            "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule"},
            "validate": {"model", "dataloaders", "datamodule"},
        }

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the arguments of `run`."""
        try:
            self.config = parser.parse_args(args)
        except ArgumentError as error:
            raise UsageError(str(error)) from None

    def instantiate_classes(self) -> None:
        """Build the MetaTrainer and the Trainer."""
        try:
            super().instantiate_classes()
        except (ValueError, TypeError, OSError, ModuleNotFoundError, MisconfigurationException) as error:
            raise UsageError(str(error)) from error

    def _run_subcommand(self, subcommand: str) -> None:
        try:
            super()._run_subcommand(subcommand)
        except (FileNotFoundError, MisconfigurationException) as error:  # a missing or incompatible checkpoint
            raise UsageError(str(error)) from error


def run(arguments: list[str]) -> None:
    """Run `lopt meta-train`.

    Args:
        arguments: the command's arguments.

    Raises:
        UsageError: for a mistake that the user can correct.
    """
    MetaTrainCLI(
        MetaTrainer,
        args=arguments,
        seed_everything_default=False,  # MetaTrainer has a seed of its own
        save_config_kwargs={"overwrite": True},
        parser_kwargs={
            "prog": "lopt meta-train",
            "parser_mode": "omegaconf",
            "exit_on_error": False,
            **{name: {"parser_mode": "omegaconf", "exit_on_error": False} for name in MetaTrainCLI.subcommands()},
        },
    )
