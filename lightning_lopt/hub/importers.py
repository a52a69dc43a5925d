"""Other people's weights of small_fc_lopt-type networks: PyLO's files on the Hub, and the authors' own, from JAX.

PyLO (github.com/Belilovsky-Lab/pylo) publishes `config.json`, three numbers, and `model.safetensors`, the layers of a
torch MLP. Its files leave out the decays and the multipliers, which are arguments of its optimizer: taken are those of
AdafacLO, for which btherien/mulo was trained.

learned_optimization (Metz et al. 2022, and STAR's authors) writes `theta.state`: a tree of arrays, as flax puts it into
msgpack. Of msgpack only what such a tree has is read here: maps of names, and arrays as extension type 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_lopt.hub.errors import clip, refusal, show
from lightning_lopt.rules import UpdateRule, make

THETA = "theta.state"

# --- PyLO ---

_KEYS = {"hidden_layers", "hidden_size", "input_size"}
_OTHERS = {"lstm_hidden_size": "VeLO_RNN", "param_inits": "VeLO_MLP", "feature_dims": "CELO2MLP"}
# Offsets, as in our own files; 0 are the decays .9, .99, .999 and .999.
_ADAFAC_LO = {
    "momentum_decays": (0.15216392, 0.14245212, 0.06812963),
    "rms_decays": (0.01079706,),
    "adafactor_decays": (0.18621896, -0.10864615, -0.06185547),
}
LEFT_OUT = (
    "PyLO's format leaves out decays and multipliers; taken are those of its AdafacLO (btherien/mulo). For a network "
    "of another optimizer set them (rule.momentum_decays, ...; step_mult), and save_rule it"
)


def pylo_values(spec: Mapping[str, Any], file: str) -> dict[str, Any] | None:
    """The configuration of kind "blackbox" that PyLO's config.json describes; None for a file that is not PyLO's."""
    for key, name in _OTHERS.items():
        if key in spec:
            raise refusal(file, f"describes PyLO's {name}", "Only its MetaMLP (AdafacLO, MuLO, ELO) can be read.")
    if not _KEYS & set(spec):
        return None
    sizes = {key: spec.get(key) for key in sorted(_KEYS)}
    wrong = [key for key, size in sizes.items() if type(size) is not int or size < 0]
    if wrong or set(spec) != _KEYS or spec["input_size"] != 39:
        what = f"{show(dict(spec))} is no configuration of PyLO's MetaMLP, of input_size 39"
        raise refusal(file, what, f"It has {', '.join(sorted(_KEYS))}, all integers.")
    layers = spec["hidden_layers"] + 1  # PyLO counts the products between hidden layers
    return {"hidden_size": spec["hidden_size"], "hidden_layers": layers, "step_mult": 0.01, "exp_mult": 0.001}


def pylo_names(rule: UpdateRule) -> dict[str, str]:
    """Name of a meta-parameter -> name in PyLO's file, where a matrix is transposed; the decays are in none."""
    last = sum(name.startswith("w") for name, _ in rule.named_parameters()) - 1
    places = ["input", *(f"linear_{layer}" for layer in range(last - 1)), "output"]
    parts = {"w": "weight", "b": "bias"}
    return {f"{letter}{n}": f"network.{place}.{parts[letter]}" for n, place in enumerate(places) for letter in parts}


def from_pylo(tensors: Mapping[str, Tensor], rule: UpdateRule) -> dict[str, Tensor]:
    """PyLO's tensors as our own, with the decays that its files leave out."""
    ours = {name: tensors[theirs].mT.contiguous() for name, theirs in pylo_names(rule).items() if name[0] == "w"}
    ours |= {name: tensors[theirs] for name, theirs in pylo_names(rule).items() if name[0] == "b"}
    return ours | {name: torch.tensor(offsets, dtype=ours["w0"].dtype) for name, offsets in _ADAFAC_LO.items()}


# --- learned_optimization ---

CONSTRUCTOR = (
    "theta.state leaves out the constructor's arguments; taken are the paper's for STAR, and learned_optimization's "
    "own for small_fc_lopt. For others: rules.STAR.from_jax(hub.read_theta(path), **arguments)"
)


def from_theta(theta: Mapping[str, Tensor], file: str) -> UpdateRule:
    """The rule of a theta.state: "blackbox" or "star", by the number of its heads."""
    layers = [name for name in theta if name.startswith("w")]
    last, first = theta.get(f"w{len(layers) - 1}", torch.zeros(0)), theta.get("w0", torch.zeros(0))
    if first.dim() != 2 or last.dim() != 2 or last.shape[1] not in (2, 4):
        what = f"has no layers w0, w1, ... with 2 or 4 outputs; it has {clip(', '.join(sorted(theta)), 60)}"
        raise refusal(file, what, "Only small_fc_lopt (AdafacMLPLOpt) and STAR (MLPNomLOpt) can be read.")
    kind, sizes = "blackbox" if last.shape[1] == 2 else "star", {"hidden_size": first.shape[1]}
    try:
        rule = make(kind, **sizes, hidden_layers=len(layers) - 1)
    except ValueError as error:
        raise refusal(file, str(error), "It is no theta of such a rule.") from None
    expected = {name: tuple(p.shape) for name, p in rule.named_parameters()}
    found = {name: tuple(tensor.shape) for name, tensor in theta.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            what = f"array {show(name)} has shape {found.get(name)}, expected {expected.get(name)} (None: absent)"
            raise refusal(file, what, "Take another copy.")
    rule.load_state_dict(dict(theta), assign=True)
    return rule


def parse_theta(data: bytes, file: str) -> dict[str, Tensor]:
    """The arrays of a theta.state by their names, without the modules that they are in."""
    try:
        tree = _Tree(data).read()
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:  # what torch makes of a shape
        raise refusal(file, f"is no tree of arrays in msgpack ({error})", "It is damaged; take another copy.") from None
    tree = tree["params"] if isinstance(tree.get("params"), dict) else tree  # of a checkpoint of meta-training
    leaves: dict[str, Tensor] = {}
    for path, tensor in _leaves(tree):
        if path[-1] in leaves:
            raise refusal(file, f"holds {show(path[-1])} twice", "It is no theta of one network.")
        if not (tensor.is_floating_point() and tensor.isfinite().all()):
            raise refusal(file, f"array {show(path[-1])} holds NaN, infinity or {tensor.dtype}", "Take another one.")
        leaves[path[-1]] = tensor
    return leaves


def _leaves(tree: Mapping[str, Any], path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Tensor]]:
    found = []
    for name, value in tree.items():
        if isinstance(value, Tensor):
            found.append(((*path, name), value))
        elif isinstance(value, dict):
            found += _leaves(value, (*path, name))
    return found


class _Tree:
    """Reads nested maps of arrays; a ValueError for anything else, and for more of it than a rule can have."""

    MAX_ENTRIES, MAX_DEPTH = 500, 6
    DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
    # first byte -> bytes of the length that follows
    MAPS, STRINGS = {0xDE: 2, 0xDF: 4}, {0xD9: 1, 0xDA: 2, 0xDB: 4, 0xC4: 1, 0xC5: 2, 0xC6: 4}
    EXTENSIONS, FIXED_EXTENSIONS = {0xC7: 1, 0xC8: 2, 0xC9: 4}, {0xD4: 1, 0xD5: 2, 0xD6: 4, 0xD7: 8, 0xD8: 16}
    UNSIGNED = {0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8}
    NUMBERS = {**UNSIGNED, 0xD0: 1, 0xD1: 2, 0xD2: 4, 0xD3: 8, 0xCA: 4, 0xCB: 8}

    def __init__(self, data: bytes) -> None:
        self.data, self.at, self.entries = data, 0, 0

    def read(self) -> dict[str, Any]:
        """The whole of the data."""
        tree = self._value(0)
        if not isinstance(tree, dict) or self.at != len(self.data):
            raise ValueError("it is no map, or more comes after it")
        return tree

    def _take(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            raise ValueError("it ends too early")
        self.at += count
        return self.data[self.at - count : self.at]

    def _integer(self, size: int) -> int:
        return int.from_bytes(self._take(size), "big")

    def _value(self, depth: int) -> Any:
        """A map, an array as a tensor, a string, or None for a number or flag."""
        first = self._integer(1)
        if 0x80 <= first <= 0x8F or first in self.MAPS:
            return self._map(first & 0x0F if first <= 0x8F else self._integer(self.MAPS[first]), depth)
        if 0xA0 <= first <= 0xBF or first in self.STRINGS:
            return self._take(first & 0x1F if first in range(0xA0, 0xC0) else self._integer(self.STRINGS[first]))
        if first in self.EXTENSIONS or first in self.FIXED_EXTENSIONS:
            size = self.FIXED_EXTENSIONS.get(first) or self._integer(self.EXTENSIONS[first])
            code = self._integer(1)
            return self._tensor(self._take(size)) if code in (1, 3) else None
        if first in self.NUMBERS:
            self._take(self.NUMBERS[first])
        elif not (first <= 0x7F or first >= 0xE0 or first in (0xC0, 0xC2, 0xC3)):
            raise ValueError(f"byte {first:#x} begins nothing that a tree of arrays has")
        return None

    def _map(self, length: int, depth: int) -> dict[str, Any]:
        self.entries += length
        if self.entries > self.MAX_ENTRIES or depth > self.MAX_DEPTH:
            raise ValueError(f"it has more than {self.MAX_ENTRIES} entries or {self.MAX_DEPTH} levels")
        tree: dict[str, Any] = {}
        for _ in range(length):
            key = self._value(depth + 1)
            if not isinstance(key, bytes):
                raise ValueError("a key is no string")
            name = key.decode()
            if name in tree:
                raise ValueError("a key comes twice")
            tree[name] = self._value(depth + 1)
        return tree

    def _tensor(self, data: bytes) -> Tensor:
        """An array: (shape, name of the dtype, bytes in C order), again in msgpack."""
        inside = _Tree(data)
        if inside._integer(1) != 0x93:
            raise ValueError("an array is not of three parts")
        shape, dtype, values = inside._shape(), inside._value(0), inside._value(0)
        if not isinstance(dtype, bytes) or not isinstance(values, bytes) or inside.at != len(data):
            raise ValueError("an array has other parts than shape, dtype and data")
        if (kind := self.DTYPES.get(dtype.decode())) is None:
            return torch.zeros(0, dtype=torch.int64)  # of no use to a rule, and refused where one is asked for
        if math.prod(shape) * kind.itemsize != len(values):
            raise ValueError(f"an array of shape {shape} has {len(values)} bytes")
        return torch.frombuffer(bytearray(values), dtype=kind).reshape(shape) if values else torch.zeros(shape)

    def _shape(self) -> tuple[int, ...]:
        first, shape = self._integer(1), []
        if not 0x90 <= first <= 0x98:
            raise ValueError("an array has no shape of at most 8 dims")
        for _ in range(first & 0x0F):
            size = self._integer(1)
            if size > 0x7F and size not in self.UNSIGNED:
                raise ValueError(f"byte {size:#x} is no size")
            shape.append(size if size <= 0x7F else self._integer(self.UNSIGNED[size]))
        return tuple(shape)
