"""VeLO's meta-parameters under the names that its authors' checkpoints give them.

A name is a path through the tree of haiku modules, joined by "/": "rnn_params/linear_1/w". Shapes are ours but for the
leading 1 of the LSTM's start, the single column of `step_size`, and the first layer, which comes in 14 blocks of rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

ROOTS = frozenset({"lstm_init_state", "rnn_params", "ff_mod_stack"})
UNUSED = ("rnn_params/linear/w", "rnn_params/linear/b")  # a layer that the authors' code computes and throws away
BLOCKS = tuple(f"ff_mod_stack/~/w0__{block}" for block in range(14))
_MODULES = {
    "mix": "linear_1",
    "input": "linear_2",
    "gates": "rnn/linear",
    "controls": "rnn_to_controls",
    "step": "step_size",
}
NAMES = {  # ours -> theirs, for all but w0
    "initial_hidden": "lstm_init_state/hidden",
    "initial_cell": "lstm_init_state/cell",
    **{f"{ours}_{leaf}": f"rnn_params/{theirs}/{leaf}" for ours, theirs in _MODULES.items() for leaf in "wb"},
    **{name: f"ff_mod_stack/~/{name}" for name in ("b0", "w1", "b1", "w2", "b2")},
}
ARGUMENTS = {  # of the authors' constructor -> ours, where they differ
    "use_bugged_loss_features": "bugged_loss_features",
    "use_bugged_next_lstm_state": "bugged_lstm_state",
}


def path(name: str) -> str:
    """A path in the form that npz files have: parts joined by "|", with "~" for the "/" of a module's name.

    Example:
        >>> path("theta|rnn_params|rnn~linear|w"), path("ff_mod_stack|~|b0"), path("rnn_params/rnn/linear/w")
        ('rnn_params/rnn/linear/w', 'ff_mod_stack/~/b0', 'rnn_params/rnn/linear/w')
    """
    if "|" not in name:
        return name
    parts = name.removeprefix("theta|").split("|")
    return "/".join(part if part == "~" else part.replace("~", "/") for part in parts)


def sizes(theta: Mapping[str, Tensor]) -> dict[str, int]:
    """The sizes that a configuration needs: units of the LSTM, and networks in the bank.

    Raises:
        ValueError: where the arrays that tell them are missing, or are not what their names say.
    """
    found = {}
    for size, name in (("lstm_hidden_size", "rnn_params/rnn_to_controls/w"), ("param_inits", "ff_mod_stack/~/b0")):
        array = theta.get(name)
        if array is None or array.dim() != 2:
            what = "is missing" if array is None else f"has {array.dim()} dims, expected 2"
            raise ValueError(f"theta[{name!r}] {what}. Pass all arrays of a VeLO, by the paths of their modules.")
        found[size] = len(array)
    return found


def converted(theta: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our meta-parameters from the authors' arrays.

    Args:
        theta: path -> array, all of one VeLO.
        expected: our meta-parameters, for their shapes.

    Raises:
        ValueError: for an array that is missing, unknown, of another shape or dtype, or not finite.
    """
    shapes = {theirs: _their_shape(ours, tuple(expected[ours].shape)) for ours, theirs in NAMES.items()}
    bank, _, units = expected["w0"].shape
    shapes |= {name: (bank, width, units) for name, width in zip(BLOCKS, _widths(), strict=True)}
    for name in sorted((shapes.keys() | theta.keys()) - set(UNUSED)):
        found = tuple(theta[name].shape) if name in theta else None
        if found != shapes.get(name):
            hint = " Old checkpoints with a validation flag cannot be read." if found and found[0] == 31 else ""
            raise ValueError(f"theta[{name!r}] has shape {found}, expected {shapes.get(name)} (None: absent).{hint}")
        if not (theta[name].is_floating_point() and theta[name].isfinite().all()):
            raise ValueError(f"theta[{name!r}] is {theta[name].dtype} or holds NaN or inf. Pass finite numbers.")
    ours = {name: theta[theirs].reshape(expected[name].shape).clone() for name, theirs in NAMES.items()}
    return {**ours, "w0": torch.cat([theta[name] for name in BLOCKS], dim=1)}


def as_tensor(name: str, value: Any) -> Tensor:
    """An array as a tensor; a ValueError naming it if it is none."""
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"theta[{name!r}] is {type(value).__name__}, not an array.") from None


def _their_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    if name.startswith("initial"):
        return (1, *shape)
    return (*shape, 1) if name.startswith("step") else shape


def _widths() -> tuple[int, ...]:
    """Features per block: g, clipped g, p, m, v, m r, r, factored g, g r, rows, columns, their inverse roots, and m."""
    return (1, 1, 1, 3, 1, 3, 1, 3, 1, 3, 3, 3, 3, 3)
