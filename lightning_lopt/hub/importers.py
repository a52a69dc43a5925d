"""Import learned optimizers from other packages: PyLO's files on the Hub, and the authors' own JAX files.

PyLO (github.com/Belilovsky-Lab/pylo) publishes `config.json`, which has a few sizes, and `model.safetensors`, the
layers of small_fc_lopt's network (MetaMLP) or Celo2's (CELO2MLP). The files leave out the decays and multipliers, which
are arguments of PyLO's optimizers. We use those of its AdafacLO, for which btherien/mulo was trained, or of its ELO.

learned_optimization (Metz et al. 2022, and STAR's authors) writes `theta.state`: a tree of arrays that flax encodes as
msgpack. This module decodes only the part of msgpack that such a tree uses: maps with string keys, and arrays as
extension type 1. Celo2's authors publish such a file, with the arguments of their meta-training as `config.json`. For
VeLO, of both, see `velo_files`.

All of these were meta-trained in JAX, also those that PyLO publishes. Their rules have the layout "torch": they read
the dims of torch's tensors in the order of JAX.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_lopt.hub import velo_files
from lightning_lopt.hub.errors import clip, refusal, show
from lightning_lopt.rules import UpdateRule, celo2, make

THETA, PARAMS = "theta.state", "params"
SAFETENSORS = "model.safetensors"
MAX_TREE_BYTES = 4 << 20  # of all but VeLO's


class Foreign(NamedTuple):
    """How to read a rule that another package has saved."""

    kind: str
    values: dict[str, Any]  # of the configuration
    weights: str  # the file that has them
    shapes: Callable[[UpdateRule], dict[str, list[int]]]  # of the file's tensors, by their names there
    convert: Callable[[Mapping[str, Tensor], UpdateRule], dict[str, Tensor]]  # the file's tensors to the rule's
    left_out: str | None  # what a warning says; None if the file says it all


def foreign_format(spec: Mapping[str, Any], file: str, repo_id: str) -> Foreign | None:
    """Recognize another package's config.json; None if it is none of those.

    Args:
        spec: the JSON object.
        file: its name in error messages.
        repo_id: the Hub repo that it came from; "" for a directory.
    """
    if "format_version" in spec:
        return None
    if "feature_dims" in spec:
        return _pylo_celo2(spec, file)
    if _META_MLP & set(spec):
        return _pylo_meta_mlp(spec, file, repo_id)
    return _celo2_training(spec, file) if "optimizer" in spec else None


# --- PyLO's small_fc_lopt ---

_META_MLP = {"hidden_layers", "hidden_size", "input_size"}
# Stored as offsets, as in our own files; an offset of 0 means the decays 0.9, 0.99, 0.999 and 0.999.
_ADAFAC_LO = {
    "momentum_decays": (0.15216392, 0.14245212, 0.06812963),
    "rms_decays": (0.01079706,),
    "adafactor_decays": (0.18621896, -0.10864615, -0.06185547),
}
_ELO = {name: (0.0,) * len(offsets) for name, offsets in _ADAFAC_LO.items()}
_ELO_REPO = "DiamondXL/elo"  # by nothing else does it differ from AdafacLO's
_META_MLP_LEAVES_OUT = (
    "PyLO's format leaves out decays and multipliers, so those of its {optimizer} are used. For a network of another "
    "optimizer, set them (rule.momentum_decays, ...; step_mult; 0 and 1e-3 for ELO) and save the rule"
)


def _pylo_meta_mlp(spec: Mapping[str, Any], file: str, repo_id: str) -> Foreign:
    sizes = {key: spec.get(key) for key in sorted(_META_MLP)}
    wrong = [key for key, size in sizes.items() if type(size) is not int or size < 0]
    if wrong or set(spec) != _META_MLP or spec["input_size"] != 39:
        what = f"{show(dict(spec))} is not a configuration of PyLO's MetaMLP with input_size 39"
        raise refusal(file, what, f"It must have {', '.join(sorted(_META_MLP))}, all integers.")
    layers = spec["hidden_layers"] + 1  # PyLO counts the matrices between hidden layers
    is_elo = repo_id == _ELO_REPO
    offsets, step_mult = (_ELO, 0.001) if is_elo else (_ADAFAC_LO, 0.01)
    values = {"hidden_size": spec["hidden_size"], "hidden_layers": layers, "layout": "torch"}
    values |= {"step_mult": step_mult, "exp_mult": 0.001}

    def convert(tensors: Mapping[str, Tensor], rule: UpdateRule) -> dict[str, Tensor]:
        ours = {
            name: tensors[theirs].mT.contiguous() for name, theirs in _meta_mlp_names(rule).items() if name[0] == "w"
        }
        ours |= {name: tensors[theirs] for name, theirs in _meta_mlp_names(rule).items() if name[0] == "b"}
        return ours | {name: torch.tensor(values, dtype=ours["w0"].dtype) for name, values in offsets.items()}

    left_out = _META_MLP_LEAVES_OUT.format(optimizer="ELO" if is_elo else "AdafacLO (btherien/mulo)")
    return Foreign("blackbox", values, SAFETENSORS, _meta_mlp_shapes, convert, left_out)


def _meta_mlp_names(rule: UpdateRule) -> dict[str, str]:
    """Our names of the layers -> PyLO's."""
    last = sum(name.startswith("w") for name, _ in rule.named_parameters()) - 1
    places = ["input", *(f"linear_{layer}" for layer in range(last - 1)), "output"]
    suffixes = {"w": "weight", "b": "bias"}
    return {
        f"{letter}{layer}": f"network.{place}.{suffix}"
        for layer, place in enumerate(places)
        for letter, suffix in suffixes.items()
    }


def _meta_mlp_shapes(rule: UpdateRule) -> dict[str, list[int]]:
    """PyLO's matrices are transposed."""
    shapes = {name: list(tensor.shape) for name, tensor in rule.state_dict().items()}
    return {theirs: shapes[name][::-1] for name, theirs in _meta_mlp_names(rule).items()}


# --- Celo2 ---

_CELO2_MLP = {"activation": "relu", "feature_dims": list(celo2.WIDTHS), "hidden_layers": 2, "output_size": 3}
_CELO2_OPTIMIZERS = {"celo2": "celo2", "celo2base": "celo2_base"}  # in the authors' code -> our kind
_CELO2_IN_USE = {"adam_bias_correction": True}  # the authors use optax.adamw with the published weights
_PYLO_CELO2_LEAVES_OUT = (
    "PyLO's format leaves out everything but the network, so the published celo2's options are used. Tune lr "
    "and weight_decay"
)
_THETA_CELO2_LEAVES_OUT = (
    "theta.state leaves out which variant it is; celo2 (with Newton-Schulz, and AdamW for vectors and embeddings) is "
    "used. For the other: rules.Celo2.from_jax(hub.read_theta(path), kind='celo2_base')"
)


def _pylo_celo2(spec: Mapping[str, Any], file: str) -> Foreign:
    wrong = [key for key, value in _CELO2_MLP.items() if spec.get(key) != value]
    if wrong or set(spec) != {*_CELO2_MLP, "hidden_size"}:
        key = (wrong or sorted(set(spec) ^ {*_CELO2_MLP, "hidden_size"}))[0]
        what = f"{key}={show(spec.get(key))} is not that of PyLO's CELO2MLP"
        allowed = f"be {_CELO2_MLP[key]}" if key in _CELO2_MLP else f"have hidden_size, {', '.join(_CELO2_MLP)}"
        raise refusal(file, what, f"It must {allowed}.")
    values = {"hidden_size": spec["hidden_size"], **_CELO2_IN_USE}
    return Foreign("celo2", values, SAFETENSORS, _pylo_celo2_shapes, _from_pylo_celo2, _PYLO_CELO2_LEAVES_OUT)


def _celo2_training(spec: Mapping[str, Any], file: str) -> Foreign:
    """The arguments of Celo2's meta-training, which its authors publish beside theta.state."""
    optimizer = spec["optimizer"]
    if not isinstance(optimizer, str) or optimizer not in _CELO2_OPTIMIZERS:
        what = f"describes the meta-training of optimizer {show(optimizer)}"
        raise refusal(file, what, f"Only {' and '.join(_CELO2_OPTIMIZERS)} can be read.")
    values = {"lr": spec.get("step_mult", 0.001), "weight_decay": spec.get("weight_decay", 0.0)} | _CELO2_IN_USE
    return Foreign(_CELO2_OPTIMIZERS[optimizer], values, THETA, _celo2_shapes, _from_celo2, None)


def _celo2_shapes(rule: UpdateRule) -> dict[str, list[int]]:
    """The authors' arrays: w0 in blocks."""
    shapes = {name: list(tensor.shape) for name, tensor in rule.state_dict().items()}
    units = shapes.pop("w0")[1]
    return {f"w0__{block}": [width, units] for block, width in enumerate(celo2.WIDTHS)} | shapes


def _from_celo2(tensors: Mapping[str, Tensor], rule: UpdateRule) -> dict[str, Tensor]:
    first = torch.cat([tensors[f"w0__{block}"] for block in range(len(celo2.WIDTHS))])
    return {"w0": first, **{name: tensors[name] for name in rule.state_dict() if name != "w0"}}


def _pylo_celo2_names(rule: UpdateRule) -> dict[str, str]:
    """The authors' names of the arrays -> PyLO's, which have the same layout."""
    names = {name: name.replace("__", ".") for name in _celo2_shapes(rule)}
    return names | {f"{letter}{layer}": f"dense_{letter}.{layer - 1}" for letter in "wb" for layer in (1, 2)}


def _pylo_celo2_shapes(rule: UpdateRule) -> dict[str, list[int]]:
    shapes = _celo2_shapes(rule)
    return {theirs: shapes[name] for name, theirs in _pylo_celo2_names(rule).items()}


def _from_pylo_celo2(tensors: Mapping[str, Tensor], rule: UpdateRule) -> dict[str, Tensor]:
    return _from_celo2({name: tensors[theirs] for name, theirs in _pylo_celo2_names(rule).items()}, rule)


# --- learned_optimization ---

_THETA_LEAVES_OUT = (
    "theta.state leaves out the constructor's arguments, so the paper's (STAR) or learned_optimization's defaults "
    "(small_fc_lopt) are used. For others: rules.STAR.from_jax(hub.read_theta(path), layout='torch', **arguments)"
)


def from_theta(
    theta: Mapping[str, Tensor], file: str, arguments: Mapping[str, Any] | None = None
) -> tuple[UpdateRule, str | None]:
    """Build the rule of a theta.state without a config.json; also what a warning says, None if nothing is left out.

    VeLO is known by its modules, and Celo2 by its first layer in blocks. Else the kind is "blackbox" with two network
    outputs, and "star" with four.

    Args:
        theta: as `parse_theta` gives it.
        file: its name in error messages.
        arguments: of the constructor, where they are known; for VeLO.
    """
    if velo_files.is_tree(theta):
        velo = velo_files.from_theta(theta, file, arguments or {})
        return velo, velo_files.CONSTRUCTOR if arguments is None else None
    if any(name.startswith("w0__") for name in theta):
        rule = _made("celo2", {"hidden_size": theta.get("b0", torch.zeros(0)).numel() or 8, **_CELO2_IN_USE}, file)
        check_arrays(theta, _celo2_shapes(rule), file)
        rule.load_state_dict(_from_celo2(theta, rule), assign=True)
        return rule, _THETA_CELO2_LEAVES_OUT
    return _small_network(theta, file), _THETA_LEAVES_OUT


def _small_network(theta: Mapping[str, Tensor], file: str) -> UpdateRule:
    layers = [name for name in theta if name.startswith("w")]
    first = theta.get("w0", torch.zeros(0))
    last = theta.get(f"w{len(layers) - 1}", torch.zeros(0))
    if first.dim() != 2 or last.dim() != 2 or last.shape[1] not in (2, 4):
        what = f"has no layers w0, w1, ... with 2 or 4 outputs; it has {clip(', '.join(sorted(theta)), 60)}"
        allowed = "small_fc_lopt (AdafacMLPLOpt), STAR (MLPNomLOpt), Celo2 and VeLO (HyperV2)"
        raise refusal(file, what, f"Only {allowed} can be read.")
    kind = "blackbox" if last.shape[1] == 2 else "star"
    values = {"hidden_size": first.shape[1], "hidden_layers": len(layers) - 1, "layout": "torch"}
    rule = _made(kind, values, file)
    check_arrays(theta, {name: list(tensor.shape) for name, tensor in rule.state_dict().items()}, file)
    rule.load_state_dict(dict(theta), assign=True)
    return rule


def check_arrays(theta: Mapping[str, Tensor], expected: Mapping[str, list[int]], file: str) -> None:
    """Raise a ValueError that names the first array of a theta.state that is missing, unknown or of another shape."""
    for name in sorted(expected.keys() | theta.keys()):
        found = tuple(theta[name].shape) if name in theta else None
        wanted = tuple(expected[name]) if name in expected else None
        if found != wanted:
            what = f"array {show(name)} has shape {found}, expected {wanted} (None: absent)"
            raise refusal(file, what, "Get another copy.")


def _made(kind: str, values: dict[str, Any], file: str) -> UpdateRule:
    try:
        return make(kind, **values)
    except ValueError as error:
        raise refusal(file, str(error), "These are not the meta-parameters of such a rule.") from None


def parse_theta(data: bytes, file: str) -> dict[str, Tensor]:
    """Decode the arrays of a theta.state, or of a checkpoint of meta-training (`params`), by name.

    The names of the haiku modules around the arrays are dropped, but for VeLO's, which has arrays of the same name.
    """
    if not velo_files.may_be_tree(data):
        _check_size(data, file)
    try:
        tree = _Tree(data).read()
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:  # torch raises these for bad shapes
        what = f"is not a tree of arrays in msgpack ({error})"
        raise refusal(file, what, "It is damaged; get another copy.") from None
    # Checkpoints of meta-training have the arrays under "params".
    tree = tree["params"] if isinstance(tree.get("params"), dict) else tree
    is_velo = velo_files.is_tree(tree)
    if not is_velo:
        _check_size(data, file)
    leaves: dict[str, Tensor] = {}
    for name, tensor in velo_files.paths(tree) if is_velo else _leaves(tree):
        if name in leaves:
            raise refusal(file, f"contains {show(name)} twice", "It must have the arrays of one network.")
        if not (tensor.is_floating_point() and tensor.isfinite().all()):
            what = f"array {show(name)} contains NaN, infinity or {tensor.dtype}"
            raise refusal(file, what, "Use another file.")
        leaves[name] = tensor
    return leaves


def _check_size(data: bytes, file: str) -> None:
    if len(data) > MAX_TREE_BYTES:
        raise refusal(file, f"has {len(data)} bytes; at most {MAX_TREE_BYTES} are allowed", "This is not a rule file.")


def _leaves(tree: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    for name, value in tree.items():
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, dict):
            yield from _leaves(value)


class _Tree:
    """A decoder for nested maps of arrays in msgpack; a ValueError for anything else, or for more than a rule has.

    The first byte of each msgpack value says its type. Small sizes are part of that byte; for larger ones the tables
    below give the number of size bytes that follow (for fixed extensions and numbers: the size of the value).
    """

    MAX_ENTRIES = 500
    MAX_DEPTH = 6
    DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
    MAPS = {0xDE: 2, 0xDF: 4}
    STRINGS = {0xD9: 1, 0xDA: 2, 0xDB: 4, 0xC4: 1, 0xC5: 2, 0xC6: 4}
    EXTENSIONS = {0xC7: 1, 0xC8: 2, 0xC9: 4}
    FIXED_EXTENSIONS = {0xD4: 1, 0xD5: 2, 0xD6: 4, 0xD7: 8, 0xD8: 16}
    UNSIGNED = {0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8}
    NUMBERS = {**UNSIGNED, 0xD0: 1, 0xD1: 2, 0xD2: 4, 0xD3: 8, 0xCA: 4, 0xCB: 8}

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0  # position of the next byte
        self.entries = 0  # of all maps so far

    def read(self) -> dict[str, Any]:
        """Decode the data, which must be exactly one map."""
        tree = self._value(0)
        if not isinstance(tree, dict) or self.at != len(self.data):
            raise ValueError("it is not a map, or is followed by more data")
        return tree

    def _take(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            raise ValueError("it ends too early")
        self.at += count
        return self.data[self.at - count : self.at]

    def _integer(self, size: int) -> int:
        return int.from_bytes(self._take(size), "big")

    def _value(self, depth: int) -> Any:
        """A map as a dict, an array as a tensor, a string as bytes; None for a number, flag or nil."""
        first = self._integer(1)
        if 0x80 <= first <= 0x8F or first in self.MAPS:
            return self._map(first & 0x0F if first <= 0x8F else self._integer(self.MAPS[first]), depth)
        if 0xA0 <= first <= 0xBF or first in self.STRINGS:
            return self._take(first & 0x1F if 0xA0 <= first <= 0xBF else self._integer(self.STRINGS[first]))
        if first in self.EXTENSIONS or first in self.FIXED_EXTENSIONS:
            size = self.FIXED_EXTENSIONS.get(first) or self._integer(self.EXTENSIONS[first])
            code = self._integer(1)
            return self._tensor(self._take(size)) if code in (1, 3) else None  # flax: 1 an array, 3 a numpy scalar
        if first in self.NUMBERS:
            self._take(self.NUMBERS[first])
        elif not (first <= 0x7F or first >= 0xE0 or first in (0xC0, 0xC2, 0xC3)):
            raise ValueError(f"byte {first:#x} does not begin a value of a tree of arrays")
        return None

    def _map(self, length: int, depth: int) -> dict[str, Any]:
        self.entries += length
        if self.entries > self.MAX_ENTRIES or depth > self.MAX_DEPTH:
            raise ValueError(f"it has more than {self.MAX_ENTRIES} entries or {self.MAX_DEPTH} levels")
        tree: dict[str, Any] = {}
        for _ in range(length):
            key = self._value(depth + 1)
            if not isinstance(key, bytes):
                raise ValueError("a key is not a string")
            name = key.decode()
            if name in tree:
                raise ValueError("a key occurs twice")
            tree[name] = self._value(depth + 1)
        return tree

    def _tensor(self, data: bytes) -> Tensor:
        """An array, which flax stores as another msgpack list: (shape, name of the dtype, bytes in C order)."""
        inside = _Tree(data)
        if inside._integer(1) != 0x93:  # a list of three
            raise ValueError("an array does not have three fields")
        shape = inside._shape()
        dtype = inside._value(0)
        values = inside._value(0)
        if not isinstance(dtype, bytes) or not isinstance(values, bytes) or inside.at != len(data):
            raise ValueError("an array has other fields than shape, dtype and data")
        if (kind := self.DTYPES.get(dtype.decode())) is None:
            return torch.zeros(0, dtype=torch.int64)  # parse_theta refuses it by its dtype
        if math.prod(shape) * kind.itemsize != len(values):
            raise ValueError(f"an array of shape {shape} has {len(values)} bytes")
        return torch.frombuffer(bytearray(values), dtype=kind).reshape(shape) if values else torch.zeros(shape)

    def _shape(self) -> tuple[int, ...]:
        first = self._integer(1)
        if not 0x90 <= first <= 0x98:  # a list of at most 8
            raise ValueError("an array has more than 8 dims, or no shape")
        shape = []
        for _ in range(first & 0x0F):
            size = self._integer(1)
            if size > 0x7F and size not in self.UNSIGNED:
                raise ValueError(f"byte {size:#x} is not a size")
            shape.append(size if size <= 0x7F else self._integer(self.UNSIGNED[size]))
        return tuple(shape)
