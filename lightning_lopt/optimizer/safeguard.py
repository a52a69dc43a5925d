"""The safeguard: keeps parameters and states finite, without device synchronization."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from lightning_lopt.optimizer.sharding import whole
from lightning_lopt.rules import StepContext, UpdateRule, compute_dtype

SKIP_LIMIT = 20  # steps in a row that one tensor may be skipped before training stops
CHECK_EVERY = 10  # steps between checks of the skip counters, each of which waits for the device once
COUNTERS = ("skipped", "skipped_in_row")


def checked(safeguard: bool | str, rule: UpdateRule, backend: str) -> bool | str:
    """The value of the argument `safeguard`; a ValueError if the rule or the backend cannot have it."""
    if safeguard not in (True, False, "fallback"):
        raise ValueError(f"safeguard={safeguard!r} is not allowed: use True, False or 'fallback'.")
    if safeguard == "fallback":
        one = torch.ones(1, dtype=torch.float32, device="cpu")
        meta_params = {name: p.detach().float().cpu() for name, p in rule.meta_params().items()}
        terms = rule.terms(meta_params, one, rule.init_state(one), one, StepContext(one[0], one[0], 1))
        if terms.keys() == {"nominal"}:
            raise ValueError(
                f"safeguard='fallback' is not allowed for this rule of kind {rule.kind!r}: the nominal term is its "
                "only term, so there is nothing to fall back from. Use safeguard=True."
            )
        if "nominal" not in terms:
            raise ValueError(
                f"safeguard='fallback' is not allowed for this rule of kind {rule.kind!r}: it has no nominal term to "
                "fall back on. Use safeguard=True, or a configuration with nominal_stepsize > 0."
            )
        if backend == "fused":
            raise ValueError("safeguard='fallback' has no fused kernel: use backend='auto' or 'reference'.")
    return safeguard


def new_counters(device: torch.device) -> dict[str, Tensor]:
    """A tensor's counters, both 0: of its skipped updates, and of those in a row up to now."""
    return {name: torch.zeros((), dtype=torch.int64, device=device) for name in COUNTERS}


def count(counters: dict[str, Tensor], finite: Tensor) -> None:
    """Count a step in a state dict: skipped unless `finite`."""
    counters["skipped"] = counters["skipped"] + ~finite
    counters["skipped_in_row"] = (counters["skipped_in_row"] + 1) * ~finite


def all_finite(*tensors: Tensor) -> Tensor:
    """() bool: no NaN or inf in any floating tensor. Sums show them, in one pass and without a temporary."""
    sums = [t.sum(dtype=compute_dtype(t.dtype)) for t in tensors if t.is_floating_point()]
    return torch.isfinite(whole(torch.stack(sums).sum()))


def new_tensors(new: Any, old: Any) -> Iterable[Tensor]:
    """The tensors of a state (a NamedTuple) that a step has replaced."""
    return (a for a, b in zip(new, old, strict=True) if a is not b)


def where_finite(finite: Tensor, new: Any, old: Any) -> Any:
    """The new state if the step was `finite`, else the old one."""
    return type(new)(*(a if a is b else torch.where(finite, a, b) for a, b in zip(new, old, strict=True)))


def check_rows(rows: Tensor, name: Callable[[int], str]) -> None:
    """Raise a RuntimeError if one tensor has been skipped `SKIP_LIMIT` times in a row. Waits for the device.

    Args:
        rows: (n,) skipped updates in a row, of each tensor.
        name: index -> what to call the tensor.
    """
    rows = rows.cpu()
    if not len(rows) or int(rows.max()) < SKIP_LIMIT:
        return
    index = int(rows.argmax())
    raise RuntimeError(
        f"The gradient, value or update of {name(index)} was not finite in {int(rows[index])} steps in a row. "
        "They were skipped, so parameters and states are as they were before. Look for NaN in the data or an "
        "overflow in the loss (low precision, log of 0); safeguard=False lets such steps pass."
    )
