"""Import VeLO: the checkpoints of its authors, and the two files of PyLO's torch version.

The authors' checkpoints are trees as in `importers`, alone (`theta.state`) or in a checkpoint of their meta-training
(`params`, as on gs://gresearch), with the constructor's arguments in a `config.gin` beside it. Of that text only lines
such as `HyperV2.param_inits = 256` are read, and nothing of it is executed.

PyLO has the LSTM and the bank of networks in two repos, `VeLO_RNN` and `VeLO_MLP`, each with a config.json and a
model.safetensors. They are loaded as a pair, by the name of either. Layers that the published code never uses, and
PyLO's scratch copies of the mixed network, are left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_lopt.hub.errors import clip, refusal, show
from lightning_lopt.rules import VeLO, velo_theta
from lightning_lopt.rules.velo_mlp import HIDDEN, NUM_FEATURES, OUTPUTS

GIN = "config.gin"
MAX_TREE_BYTES = 12 << 20  # the published weights have 9.3 MB
_BEGINS = re.compile(rb"[\x80-\x8f](\xa6params[\x80-\x8f])?[\xa0-\xbf](lstm_init_state|rnn_params|ff_mod_stack)")
_GIN_LINE = re.compile(r"(?:[\w./-]+/)?(?:\w+\.)*HyperV2\.(\w+)\s*=\s*(.+?)\s*(?:#.*)?")
_FLAGS = {"True": True, "False": False}

CONSTRUCTOR = (
    "the file leaves out the constructor's arguments, and there is no config.gin beside it, so those of VeLO's default "
    "weights are used. For others: rules.VeLO.from_jax(hub.read_theta(path), **arguments)"
)
LEFT_OUT = (
    "PyLO's format leaves out which of VeLO's checkpoints it is, and its constructor's arguments, so those of the "
    "default weights are used. For others, make the rule with them, load the weights into it, and save it"
)


# --- the authors' checkpoints


def may_be_tree(data: bytes) -> bool:
    """Whether a file begins as VeLO's tree does; other trees have a lower size limit."""
    return _BEGINS.match(data) is not None


def paths(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """The arrays of a tree by their paths: six modules have leaves of the same name."""
    for name, value in tree.items():
        if isinstance(value, Tensor):
            yield prefix + name, value
        elif isinstance(value, dict):
            yield from paths(value, f"{prefix}{name}/")


def is_tree(names: Any) -> bool:
    """Whether the names of a tree's top level, or the paths of its arrays, are those of a VeLO."""
    return {name.split("/")[0] for name in names} == velo_theta.ROOTS


def from_theta(theta: Mapping[str, Tensor], file: str, arguments: Mapping[str, Any]) -> VeLO:
    """Build the rule of a VeLO's arrays by path, with arguments of the authors' constructor."""
    try:
        return VeLO.from_jax(theta, **arguments)
    except ValueError as error:
        raise refusal(file, str(error), "Get another copy.") from None


def parse_gin(data: bytes, file: str) -> dict[str, Any]:
    """Read the arguments of the authors' constructor from their config.gin; others' lines are left alone.

    What the file leaves out has the constructor's own default, where that differs from ours.
    """
    try:
        text = data.decode()
    except UnicodeDecodeError:
        raise refusal(file, "is not text", "Get another copy.") from None
    found: dict[str, Any] = {"use_bugged_loss_features": True}
    for line in text.splitlines():
        match = _GIN_LINE.fullmatch(line.strip())
        if match is None:
            continue
        name, value = match.groups()
        if name in _FIXED and value == _FIXED[name]:
            continue
        if name not in _ARGUMENTS:
            what = f"sets HyperV2.{name} to {show(value)}"
            raise refusal(file, what, f"Read are {', '.join(sorted(_ARGUMENTS))}; the rest must be as published.")
        found[name] = _FLAGS[value] if value in _FLAGS else _number(value, name, file)
    return found


_ARGUMENTS = frozenset(
    {
        "lstm_hidden_size",
        "param_inits",
        "step_mult",
        "exp_mult",
        "clip_param_scale_amount",
        "use_bugged_loss_features",
        "use_bugged_next_lstm_state",
    }
)
_FIXED = {
    "ff_hidden_size": "4",
    "ff_hidden_layers": "2",
    "mix_layers": "True",
    "interp_mult": "1.0",
    "validation_mode": "False",
    "with_validation_feature_dim": "False",
    "clip_param_scale_amount": "None",
}


def _number(text: str, name: str, file: str) -> int | float:
    if re.fullmatch(r"[0-9]{1,9}", text):
        return int(text)
    if not re.fullmatch(r"[0-9]{0,9}\.?[0-9]{0,20}(e-?[0-9]{1,3})?", text) or not re.match(r"\.?[0-9]", text):
        raise refusal(file, f"sets HyperV2.{name} to {show(text)}, not a number or flag", "Get another copy.")
    return float(text)


# --- PyLO's pair


class Part(NamedTuple):
    """One of PyLO's two files."""

    name: str  # of PyLO's class
    partner: str  # the other's
    param_inits: int
    lstm_hidden_size: int | None  # only the LSTM's file has it
    shapes: dict[str, list[int]]  # of the tensors that are read, by PyLO's names
    ignored: frozenset[str]  # tensors that may be there


def part_of(spec: Mapping[str, Any], file: str) -> Part | None:
    """The part that a config.json of PyLO's describes; None if it is another file."""
    if "lstm_hidden_size" in spec:
        values = {"input_size": NUM_FEATURES, "lstm_hidden_size": 512, "param_inits": 256, "mix_layers": True, **spec}
        return _rnn(_checked(values, "VeLORNN", {"input_size": NUM_FEATURES, "mix_layers": True}, file))
    if "param_inits" in spec:
        fixed = {"input_size": NUM_FEATURES, "hidden_size": HIDDEN, "hidden_layers": 1, "output_size": OUTPUTS}
        return _mlp(_checked({**fixed, **spec}, "VeLOMLP", fixed, file))
    return None


def _checked(values: dict[str, Any], name: str, fixed: Mapping[str, Any], file: str) -> dict[str, Any]:
    for key, value in values.items():
        if key in ("lstm_hidden_size", "param_inits"):
            fits = type(value) is int and 1 <= value <= 4096
        else:
            fits = key in fixed and type(value) is type(fixed[key]) and value == fixed[key]
        if not fits:
            what = f"{clip(key, 40)}={show(value)} does not belong to the {name} of PyLO's that can be read"
            raise refusal(file, what, f"It must have {', '.join(f'{key}={value}' for key, value in fixed.items())}.")
    return values


def _rnn(values: Mapping[str, Any]) -> Part:
    units, inits = values["lstm_hidden_size"], values["param_inits"]
    layers = {"mix_layer2": (units, NUM_FEATURES), "final_mix_layer": (units, NUM_FEATURES)}
    layers |= {"lstm.linear": (4 * units, 2 * units), "rnn_to_controls": (inits, units), "step_size": (1, units)}
    shapes = {f"{name}.weight": list(shape) for name, shape in layers.items()}
    shapes |= {f"{name}.bias": [shape[0]] for name, shape in layers.items()}
    shapes |= {f"lstm_init_state.{place}": [1, units] for place in (0, 1)}
    return Part("VeLO_RNN", "VeLO_MLP", inits, units, shapes, frozenset({"mix_layer1.weight", "mix_layer1.bias"}))


def _mlp(values: Mapping[str, Any]) -> Part:
    shapes = {
        "input_weights_": [HIDDEN, NUM_FEATURES],
        "input_bias_": [HIDDEN],
        "hidden_weights_.0": [HIDDEN, HIDDEN],
        "hidden_bias_.0": [HIDDEN],
        "output_weights_": [OUTPUTS, HIDDEN],
        "output_bias_": [OUTPUTS],
    }
    inits = values["param_inits"]
    bank = {name: [inits, *shape] for name, shape in shapes.items()}
    return Part(
        "VeLO_MLP", "VeLO_RNN", inits, None, bank, frozenset(name.replace("_.", ".").rstrip("_") for name in shapes)
    )


def partner_name(name: str, part: Part, file: str) -> str:
    """The name of the directory or repo that should hold the other part: RNN for MLP in its last component."""
    own, other = part.name[-3:], part.partner[-3:]
    head, _, last = name.rstrip("/").rpartition("/")
    if own not in last:
        what = f"describes PyLO's {part.name}, which is half of a rule"
        raise refusal(
            file, what, f"Put its {part.partner} beside it, and name them .../{part.name}, .../{part.partner}."
        )
    place = last.rindex(own)
    return f"{head}/" * bool(head or name.startswith("/")) + last[:place] + other + last[place + len(own) :]


def joined(parts: Mapping[str, tuple[Part, Mapping[str, Tensor]]], file: str) -> VeLO:
    """Build the rule from both parts: name of the part -> (part, its tensors)."""
    if parts.keys() != {"VeLO_RNN", "VeLO_MLP"}:
        raise refusal(file, f"holds {' and '.join(parts)} again", "Pass a VeLO_RNN with its VeLO_MLP beside it.")
    (rnn, lstm), (mlp, bank) = parts["VeLO_RNN"], parts["VeLO_MLP"]
    if rnn.param_inits != mlp.param_inits:
        what = f"VeLO_RNN has param_inits={rnn.param_inits}, and VeLO_MLP has {mlp.param_inits}"
        raise refusal(file, what, "Take both from the same checkpoint.")
    tensors = {**lstm, **bank}
    named = {"mix": "mix_layer2", "input": "final_mix_layer", "gates": "lstm.linear"}
    named |= {"controls": "rnn_to_controls", "step": "step_size"}
    ours = {f"{name}_w": tensors[f"{theirs}.weight"].mT for name, theirs in named.items()}
    ours |= {f"{name}_b": tensors[f"{theirs}.bias"] for name, theirs in named.items()}
    ours |= {"initial_hidden": tensors["lstm_init_state.0"], "initial_cell": tensors["lstm_init_state.1"]}
    for layer, theirs in enumerate(("input_{}_", "hidden_{}_.0", "output_{}_")):
        ours |= {f"w{layer}": tensors[theirs.format("weights")].mT, f"b{layer}": tensors[theirs.format("bias")]}
    assert rnn.lstm_hidden_size is not None
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        rule = VeLO(VeLO.Config.from_dict({"lstm_hidden_size": rnn.lstm_hidden_size, "param_inits": rnn.param_inits}))
    shapes = {name: tensor.shape for name, tensor in rule.state_dict().items()}
    rule.load_state_dict({name: ours[name].reshape(shape).contiguous() for name, shape in shapes.items()}, assign=True)
    return rule
