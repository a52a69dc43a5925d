"""Import learned optimizers from other packages: PyLO's files on the Hub, and the authors' own JAX files.

PyLO (github.com/Belilovsky-Lab/pylo) publishes `config.json`, which has three numbers, and `model.safetensors`, the
layers of a torch MLP. The files leave out the decays and multipliers, which are arguments of PyLO's optimizers. We use
those of its AdafacLO, for which btherien/mulo was trained.

learned_optimization (Metz et al. 2022, and STAR's authors) writes `theta.state`: a tree of arrays that flax encodes as
msgpack. This module decodes only the part of msgpack that such a tree uses: maps with string keys, and arrays as
extension type 1. For VeLO, of both, see `velo_files`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_lopt.hub import velo_files
from lightning_lopt.hub.errors import clip, refusal, show
from lightning_lopt.rules import UpdateRule, make

THETA, PARAMS = "theta.state", "params"
MAX_TREE_BYTES = 4 << 20  # of all but VeLO's

# --- PyLO ---

_KEYS = {"hidden_layers", "hidden_size", "input_size"}
_OTHERS = {"feature_dims": "CELO2MLP"}
# Stored as offsets, as in our own files; an offset of 0 means the decays 0.9, 0.99, 0.999 and 0.999.
_ADAFAC_LO = {
    "momentum_decays": (0.15216392, 0.14245212, 0.06812963),
    "rms_decays": (0.01079706,),
    "adafactor_decays": (0.18621896, -0.10864615, -0.06185547),
}
LEFT_OUT = (
    "PyLO's format leaves out decays and multipliers, so those of its AdafacLO (btherien/mulo) are used. For a network "
    "of another optimizer, set them (rule.momentum_decays, ...; step_mult) and save the rule"
)


def pylo_values(spec: Mapping[str, Any], file: str) -> dict[str, Any] | None:
    """Translate PyLO's config.json to a configuration of kind "blackbox"; None if the file is not PyLO's."""
    for key, name in _OTHERS.items():
        if key in spec:
            raise refusal(
                file, f"describes PyLO's {name}", "Only its MetaMLP (AdafacLO, MuLO, ELO) and VeLO can be read."
            )
    if not _KEYS & set(spec):
        return None
    sizes = {key: spec.get(key) for key in sorted(_KEYS)}
    wrong = [key for key, size in sizes.items() if type(size) is not int or size < 0]
    if wrong or set(spec) != _KEYS or spec["input_size"] != 39:
        what = f"{show(dict(spec))} is not a configuration of PyLO's MetaMLP with input_size 39"
        raise refusal(file, what, f"It must have {', '.join(sorted(_KEYS))}, all integers.")
    layers = spec["hidden_layers"] + 1  # PyLO counts the matrices between hidden layers
    return {"hidden_size": spec["hidden_size"], "hidden_layers": layers, "step_mult": 0.01, "exp_mult": 0.001}


def pylo_names(rule: UpdateRule) -> dict[str, str]:
    """Map names of meta-parameters to names in PyLO's file, which has matrices transposed and lacks the decays."""
    last = sum(name.startswith("w") for name, _ in rule.named_parameters()) - 1
    places = ["input", *(f"linear_{layer}" for layer in range(last - 1)), "output"]
    suffixes = {"w": "weight", "b": "bias"}
    return {
        f"{letter}{layer}": f"network.{place}.{suffix}"
        for layer, place in enumerate(places)
        for letter, suffix in suffixes.items()
    }


def from_pylo(tensors: Mapping[str, Tensor], rule: UpdateRule) -> dict[str, Tensor]:
    """Convert PyLO's tensors to ours, and add the decays that its files leave out."""
    ours = {name: tensors[theirs].mT.contiguous() for name, theirs in pylo_names(rule).items() if name[0] == "w"}
    ours |= {name: tensors[theirs] for name, theirs in pylo_names(rule).items() if name[0] == "b"}
    return ours | {name: torch.tensor(offsets, dtype=ours["w0"].dtype) for name, offsets in _ADAFAC_LO.items()}


# --- learned_optimization ---

CONSTRUCTOR = (
    "theta.state leaves out the constructor's arguments, so the paper's (STAR) or learned_optimization's defaults "
    "(small_fc_lopt) are used. For others: rules.STAR.from_jax(hub.read_theta(path), **arguments)"
)


def from_theta(
    theta: Mapping[str, Tensor], file: str, arguments: Mapping[str, Any] | None = None
) -> tuple[UpdateRule, str | None]:
    """Build the rule of a theta.state, and say what the file left open.

    Its kind is "velo" where the modules are VeLO's; else "blackbox" with two network outputs, and "star" with four.

    Args:
        theta: as `parse_theta` gives it.
        file: its name in error messages.
        arguments: of the constructor, where they are known; for VeLO.
    """
    if velo_files.is_tree(theta):
        rule = velo_files.from_theta(theta, file, arguments or {})
        return rule, velo_files.CONSTRUCTOR if arguments is None else None
    return _small_network(theta, file), CONSTRUCTOR


def _small_network(theta: Mapping[str, Tensor], file: str) -> UpdateRule:
    layers = [name for name in theta if name.startswith("w")]
    first = theta.get("w0", torch.zeros(0))
    last = theta.get(f"w{len(layers) - 1}", torch.zeros(0))
    if first.dim() != 2 or last.dim() != 2 or last.shape[1] not in (2, 4):
        what = f"has no layers w0, w1, ... with 2 or 4 outputs; it has {clip(', '.join(sorted(theta)), 60)}"
        raise refusal(
            file, what, "Only small_fc_lopt (AdafacMLPLOpt), STAR (MLPNomLOpt) and VeLO (HyperV2) can be read."
        )
    kind = "blackbox" if last.shape[1] == 2 else "star"
    try:
        rule = make(kind, hidden_size=first.shape[1], hidden_layers=len(layers) - 1)
    except ValueError as error:
        raise refusal(file, str(error), "These are not the meta-parameters of such a rule.") from None
    expected = {name: tuple(p.shape) for name, p in rule.named_parameters()}
    found = {name: tuple(tensor.shape) for name, tensor in theta.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            what = f"array {show(name)} has shape {found.get(name)}, expected {expected.get(name)} (None: absent)"
            raise refusal(file, what, "Get another copy.")
    rule.load_state_dict(dict(theta), assign=True)
    return rule


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
