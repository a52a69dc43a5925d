"""The record of a rule in a Trainer's checkpoint: which rule trained, where it came from, and its weights."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn  # type: ignore[attr-defined]

from lightning_lopt.rules import UpdateRule


def save_record(rule: UpdateRule, options: dict[str, Any]) -> dict[str, Any]:
    """A rule and the callback's options (those that optimizer groups hold) as tensors and plain types: kilobytes."""
    source = getattr(rule, "source", None)
    return {
        "kind": rule.kind,
        "config": rule.config.to_dict(),
        **options,
        "source": source and source.name,
        "revision": source and source.revision,
        "sha256": fingerprint(rule),
        "weights": {name: tensor.detach().cpu().clone() for name, tensor in rule.state_dict().items()},
    }


def load_record(record: dict[str, Any], rule: UpdateRule, options: dict[str, Any]) -> None:
    """Give a rule the weights of a record, in place; warn of whatever differs otherwise.

    Raises:
        MisconfigurationException: if the record is of a rule of another kind or configuration.
    """
    mine = {"kind": rule.kind, "config": rule.config.to_dict()}
    origin = record["source"] or "made in code"
    for key, value in mine.items():
        if record[key] != value:
            raise MisconfigurationException(
                f"The checkpoint was made with a rule of {key} {record[key]}, and LearnedOptimizer has {key} {value}. "
                f"Pass the rule that was saved ({origin}), or load the model's weights alone."
            )
    for key, value in options.items():
        if record[key] != value:  # it is in the optimizer's groups, which are restored
            rank_zero_warn(
                f"The checkpoint was made with {key}={record[key]!r}, and the run continues with that, not with "
                f"{key}={value!r}."
            )
    if record["sha256"] != fingerprint(rule):
        rank_zero_warn(
            f"The weights of the rule differ from those of the checkpoint ({origin}, sha256 {record['sha256'][:12]}); "
            "the run continues with the checkpoint's."
        )
    rule.load_state_dict(record["weights"])


def fingerprint(rule: UpdateRule) -> str:
    """sha256 over kind, configuration and weights."""
    digest = hashlib.sha256(json.dumps([rule.kind, rule.config.to_dict()], sort_keys=True).encode())
    for name, tensor in sorted(rule.state_dict().items()):
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(name.encode() + flat.view(torch.uint8).numpy().tobytes())  # as bytes: numpy has no bfloat16
    return digest.hexdigest()
