"""`lopt meta-train`: LightningCLI around MetaTrainer."""

from __future__ import annotations

import os
from typing import Any

# LightningCLI calls what jsonargparse has renamed; users of the command can do nothing about it.
os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")

from jsonargparse import ArgumentError
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from lightning_lopt.meta.trainer import MetaTrainer


class UsageError(Exception):
    """What the user of the command can put right."""


class MetaTrainCLI(LightningCLI):
    """`fit` and `validate`, with errors that the command reports in one line."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The Trainer's methods that MetaTrainer has a use for, and their arguments that are not the user's."""
        return {
            "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule"},
            "validate": {"model", "dataloaders", "datamodule"},
        }

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the arguments that `run` was given."""
        try:
            self.config = parser.parse_args(args)
        except ArgumentError as error:
            raise UsageError(str(error)) from None

    def instantiate_classes(self) -> None:
        """Make the MetaTrainer and the Trainer."""
        try:
            super().instantiate_classes()
        except (ValueError, TypeError, OSError, ModuleNotFoundError, MisconfigurationException) as error:
            raise UsageError(str(error)) from error

    def _run_subcommand(self, subcommand: str) -> None:
        try:
            super()._run_subcommand(subcommand)
        except (
            FileNotFoundError,
            MisconfigurationException,
        ) as error:  # a checkpoint that is not there or does not fit
            raise UsageError(str(error)) from error


def run(arguments: list[str]) -> None:
    """Do what the arguments of `lopt meta-train` say.

    Raises:
        UsageError: for what the user can put right.
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
