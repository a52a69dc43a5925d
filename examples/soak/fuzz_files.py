"""Load damaged and hostile rule files many times, and count the results.

    python examples/soak/fuzz_files.py --cases 100000
    python examples/soak/fuzz_files.py --cases 100000 --atheris     # coverage-guided; pip install atheris

Covers our own files, PyLO's, learned_optimization's theta.state and Celo2's. Each case must load as a sound rule or
raise a one-line ValueError. Loading must not open other files, start processes, import modules or look up addresses,
and memory must not grow by 100 MB.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import itertools
import json
import os
import random
import resource
import struct
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

import lightning_lopt as lopt
from lightning_lopt.hub import files, importers, velo_files
from lightning_lopt.rules import REGISTRY, RuleConfig, celo2, velo_theta


def packed(value: Any) -> bytes:
    """Nested dicts of tensors in msgpack, as flax.serialization.to_bytes writes them."""
    if isinstance(value, dict):
        items = b"".join(packed(name) + packed(entry) for name, entry in value.items())
        head = bytes([0x80 + len(value)]) if len(value) < 16 else b"\xde" + struct.pack(">H", len(value))
        return head + items
    if isinstance(value, str):
        return bytes([0xA0 + len(value)]) + value.encode()
    if isinstance(value, Tensor):
        data = value.detach().reshape(-1).view(torch.uint8).numpy().tobytes()  # numpy has no bfloat16
        sizes = b"".join(bytes([n]) if n < 128 else b"\xcd" + struct.pack(">H", n) for n in value.shape)
        array = bytes([0x93, 0x90 + value.dim()]) + sizes + packed(str(value.dtype).removeprefix("torch."))
        array += sized(len(data), b"\xc4\xc5\xc6") + data
        return sized(len(array), b"\xc7\xc8\xc9") + b"\x01" + array
    return bytes([value])  # a small number


def sized(length: int, kinds: bytes) -> bytes:
    """The head of binary data: its kind, by the width of its length, and the length."""
    width = 0 if length < 1 << 8 else 1 if length < 1 << 16 else 2
    return kinds[width : width + 1] + struct.pack((">B", ">H", ">I")[width], length)


def theta_of(rule: Any) -> dict[str, Any]:
    """The tree that learned_optimization saves: the network's layers in a module without a name."""
    values = dict(rule.named_parameters())
    if isinstance(rule, lopt.rules.Celo2):
        blocks = values.pop("w0").split(celo2.WIDTHS)
        values |= {f"w0__{number}": block for number, block in enumerate(blocks)}
        return {"ff_mod_stack": {"~": {name: values[name] for name in sorted(values)}}}
    decays = {name: values[name] for name in ("momentum_decays", "rms_decays", "adafactor_decays")}
    return {**decays, "nn": {"~": {name: values[name] for name in sorted(values) if name not in decays}}}


def velo_tree(rule: Any) -> dict[str, Any]:
    """The tree that VeLO's authors save, without the layer that their code never uses."""
    values = dict(rule.named_parameters())
    found = {theirs: values[ours] for ours, theirs in velo_theta.NAMES.items()}
    found |= {name: array.unsqueeze(0) for name, array in found.items() if name.startswith("lstm_init_state")}
    found |= {name: array.unsqueeze(-1) for name, array in found.items() if "/step_size/" in name}
    blocks = values["w0"].split((1, 1, 1, 3, 1, 3, 1, 3, 1, 3, 3, 3, 3, 3), dim=1)
    found |= dict(zip(velo_theta.BLOCKS, blocks, strict=True))
    tree: dict[str, Any] = {}
    for path, array in found.items():
        root, *module, leaf = path.split("/")
        place = tree.setdefault(root, {})
        (place.setdefault("/".join(module), {}) if module else place)[leaf] = array
    return tree


def pylo_files(hidden_size: int = 32, hidden_layers: int = 1) -> dict[str, bytes]:
    """A MetaMLP as PyLO saves it."""
    sizes = [39, *[hidden_size] * (hidden_layers + 1), 2]
    places = ["input", *(f"linear_{n}" for n in range(hidden_layers)), "output"]
    layers = {place: torch.nn.Linear(*pair) for place, pair in zip(places, itertools.pairwise(sizes), strict=True)}
    tensors = {
        f"network.{place}.{n}": p.detach() for place, layer in layers.items() for n, p in layer.named_parameters()
    }
    spec = {"hidden_layers": hidden_layers, "hidden_size": hidden_size, "input_size": 39}
    weights = safetensors.torch.save(tensors)
    return {"config.json": json.dumps(spec, indent=2, sort_keys=True).encode(), "model.safetensors": weights}


def pylo_celo2_files(rule: Any) -> dict[str, bytes]:
    """A CELO2MLP as PyLO saves it."""
    blocks = rule.w0.detach().split(celo2.WIDTHS)
    tensors = {f"w0.{number}": block.clone() for number, block in enumerate(blocks)} | {"b0": rule.b0.detach()}
    for layer in (1, 2):
        tensors[f"dense_w.{layer - 1}"] = getattr(rule, f"w{layer}").detach()
        tensors[f"dense_b.{layer - 1}"] = getattr(rule, f"b{layer}").detach()
    spec = {"activation": "relu", "feature_dims": list(celo2.WIDTHS), "hidden_layers": 2, "hidden_size": len(rule.b0)}
    spec["output_size"] = 3
    weights = safetensors.torch.save(tensors)
    return {"config.json": json.dumps(spec, indent=2, sort_keys=True).encode(), "model.safetensors": weights}


def celo2_repo(rule: Any, optimizer: str = "celo2") -> dict[str, bytes]:
    """The files that Celo2's authors publish: the network, and the arguments of its meta-training."""
    spec = {"step_mult": 0.001, "weight_decay": 0.0, "trunc_length": 50, "optimizer": optimizer, "task": "fast_velo"}
    return {"config.json": json.dumps(spec, indent=4).encode(), "theta.state": packed(theta_of(rule))}


KINDS = sorted(REGISTRY)
SMALL = {"velo": {"lstm_hidden_size": 4, "param_inits": 2}}  # its published size is 9 MB
SOUND = {kind: files.serialize(lopt.rules.make(kind, **SMALL.get(kind, {}))) for kind in KINDS}
SOUND["PyLO"] = pylo_files()
SOUND["PyLO's Celo2"] = pylo_celo2_files(lopt.rules.make("celo2"))
THETAS = [packed(theta_of(lopt.rules.make(kind))) for kind in ("star", "blackbox", "celo2")]
THETAS += [packed(velo_tree(lopt.rules.make("velo", **SMALL["velo"])))]
CELO2 = celo2_repo(lopt.rules.make("celo2"))
PIECES = (
    b'"',
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b"-",
    b"9",
    b"0",
    b"1e9",
    b"1e999",
    b"null",
    b"true",
    b"NaN",
    b"\\u0000",
)
NUMBERS = (0, 1, -1, 2, 3, 5, 0.5, 1e-300, 1e300, -1e9, 10**9, 2**31, 2**63, 2**64, 10**18, 1e308, 0.999999)
WORDS = (
    "",
    "star",
    "os.system",
    "../../etc/passwd",
    "__class__",
    "max",
    "adam",
    "raw",
    "F32",
    "F64",
    "\n",
    "\x00",
    "é" * 99,
)
DTYPES = ("F16", "BF16", "F32", "F64", "I64", "BOOL", "F8_E4M3", "F31", "", None)


def any_value(rng: random.Random, depth: int = 0) -> Any:
    """A random JSON value, mostly one that a configuration or a header could contain."""
    choice = rng.randrange(9 if depth < 3 else 6)
    if choice < 3:
        return rng.choice(NUMBERS)
    if choice < 6:
        return rng.choice((None, True, False, *WORDS))
    if choice == 6:
        return [any_value(rng, depth + 1)] * rng.choice((0, 1, 2, 3, 4, 5 if depth else 500))
    if choice == 7:
        return [any_value(rng, depth + 1) for _ in range(rng.randrange(5))]
    return {rng.choice(WORDS): any_value(rng, depth + 1) for _ in range(rng.randrange(4))}


def mutated(rng: random.Random, sound: bytes) -> bytes:
    """Change bytes by a few replacements, insertions, deletions and swaps."""
    data = bytearray(sound)
    for _ in range(rng.randrange(1, 6)):
        at, size = rng.randrange(len(data) + 1), rng.randrange(12)
        piece = rng.choice(PIECES) if rng.random() < 0.5 else rng.randbytes(rng.randrange(9))
        if rng.random() < 0.2:
            other = rng.randrange(len(data) + 1)
            piece = bytes(data[other : other + size])
        data[at : at + size] = piece * rng.choice((1, 1, 1, 50))
    return bytes(data)


def config_values(rng: random.Random, config: bytes) -> bytes:
    """Put random values into some places of a config.json."""
    spec = json.loads(config)
    spec.pop("sha256", None)
    for _ in range(rng.randrange(1, 4)):
        inside = spec["config"] if isinstance(spec.get("config"), dict) and rng.random() < 0.8 else spec
        inside[rng.choice((*list(inside), *WORDS))] = any_value(rng)
    return json.dumps(spec).encode()


def header_values(rng: random.Random, weights: bytes) -> bytes:
    """Put random values into some places of a weights file's header."""
    length = struct.unpack("<Q", weights[:8])[0]
    data = weights[8 + length :]
    header = json.loads(weights[8 : 8 + length])
    for _ in range(rng.randrange(1, 4)):
        name = rng.choice([*header, *WORDS])
        entry, part = header.get(name), rng.choice(("dtype", "shape", "data_offsets"))
        if isinstance(entry, dict) and name != "__metadata__" and rng.random() < 0.8:
            old = entry.get(part)  # may no longer be a list if the same entry is drawn twice
            numbers = [n for n in old if isinstance(n, int)] if isinstance(old, list) else []
            near = [n + rng.choice((-1, 0, 0, 1, 8)) for n in numbers]
            entry[part] = rng.choice((any_value(rng), near, rng.choice(DTYPES)))
        else:
            header[name] = any_value(rng)
    text = json.dumps(header).encode() + b" " * rng.randrange(9)
    return struct.pack("<Q", len(text) + rng.choice((0, 0, 0, -1, 1))) + text + data


def large(rng: random.Random, size: int) -> bytes:
    """JSON of about this many bytes that makes a parser create as many objects as possible."""
    piece = rng.choice((b"[]", b"{}", b"1e9", b'"a"', b"123456789", b"[[[]]]", b'{"":{}}'))
    return b'{"a":[' + b",".join([piece] * (size // (len(piece) + 1))) + b"]}"


def case(rng: random.Random) -> tuple[str, dict[str, bytes]]:
    """Draw a case: its name and its files."""
    forms = ("config bytes", "config values", "weights bytes", "header bytes", "header values", "theta", "Celo2's")
    form = "large" if rng.random() < 0.01 else rng.choice(forms)
    if form == "theta":
        return form, {"theta.state": mutated(rng, rng.choice(THETAS))}
    if form == "Celo2's":
        config = rng.choice((mutated, config_values))(rng, CELO2["config.json"])
        changes = ({"config.json": config}, {"theta.state": mutated(rng, CELO2["theta.state"])})
        return form, {**CELO2, **rng.choice(changes)}
    kind = rng.choice((*KINDS, "PyLO", "PyLO's Celo2"))
    config, weights = SOUND[kind]["config.json"], SOUND[kind]["model.safetensors"]
    if rng.random() < 0.5:  # with the digest most changed weights would be refused
        spec = json.loads(config)
        spec.pop("sha256", None)
        config = json.dumps(spec).encode()
    if form == "config bytes":
        config = mutated(rng, config)
    elif form == "config values":
        config = config_values(rng, config)
    elif form == "weights bytes":
        weights = mutated(rng, weights)
    elif form == "header bytes":
        length = struct.unpack("<Q", weights[:8])[0]
        header = mutated(rng, weights[8 : 8 + length])
        weights = struct.pack("<Q", len(header)) + header + weights[8 + length :]
    elif form == "header values":
        weights = header_values(rng, weights)
    elif rng.random() < 0.5:
        config = large(rng, rng.choice((60_000, 70_000)))
    else:
        header = large(rng, rng.choice((1_000_000, 1_100_000)))
        weights = struct.pack("<Q", len(header)) + header + bytes(rng.choice((0, 15_000_000, 17_000_000)))
    return form, {"config.json": config, "model.safetensors": weights}


def attempt(folder: Path, contents: dict[str, bytes]) -> str:
    """Load the files; returns "loaded" or "refused" and raises for anything else."""
    for path in folder.iterdir():
        path.unlink()
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    with Watched(folder), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about what other formats leave out
        try:
            rule = lopt.load_rule(folder)
        except ValueError as error:
            message = str(error)
            assert message.isprintable(), message
            assert len(message) < 300, message
            assert any(f"{name}: " in message for name in contents), message
            return "refused"
    assert all(tensor.isfinite().all() for tensor in rule.state_dict().values())
    return "loaded"


FORBIDDEN = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "subprocess.Popen",
    "import",
    "exec",
    "compile",
    "pickle",
)
FORBIDDEN += ("socket", "ctypes.dlopen", "shutil", "os.remove", "os.rename", "os.mkdir", "os.symlink", "os.chmod")


class Watched:
    """Raises an AssertionError if the code inside does more than read the rule's files, by Python's audit hooks."""

    folder: Path | None = None
    installed = False

    def __init__(self, folder: Path) -> None:
        if not Watched.installed:
            Watched.installed = True
            sys.addaudithook(self._hook)
        self.inside = folder

    def __enter__(self) -> None:
        files.library_version()  # read once from the installed package, and named in refusals
        Watched.folder = self.inside

    def __exit__(self, *error: object) -> None:
        Watched.folder = None

    @staticmethod
    def _hook(event: str, arguments: tuple[Any, ...]) -> None:
        if (folder := Watched.folder) is None:
            return
        if event == "open":
            assert Path(str(arguments[0])).parent == folder, f"opens {arguments[0]}"
            assert arguments[1] in ("r", "rb", None), f"opens {arguments}"
        assert not event.startswith(FORBIDDEN), f"{event} {arguments}"


def run_random(cases: int, seed: int, folder: Path) -> Counter[str]:
    """Run cases drawn from (seed, number), so each can be repeated alone."""
    counts: Counter[str] = Counter()
    for number in range(cases):
        form, contents = case(random.Random(f"{seed} {number}"))
        try:
            counts[f"{form}: {attempt(folder, contents)}"] += 1
        except Exception as error:
            counts[f"{form}: FAILED"] += 1
            print(f"case {seed} {number} ({form}): {type(error).__name__}: {error}", flush=True)
    return counts


def run_atheris(cases: int, seed: int, folder: Path, counts: Counter[str]) -> None:
    """Run cases from libFuzzer, which looks for new branches in the code that reads the files; ends the process."""
    import atheris

    for place in (
        files,
        importers,
        importers._Tree,
        velo_files,
        RuleConfig,
        *{kind.rule.Config for kind in REGISTRY.values()},
    ):
        for value in list(vars(place).values()):
            function = getattr(value, "__func__", value)
            if inspect.isfunction(function) and function.__code__.co_filename == inspect.getfile(place):
                atheris.instrument_func(function)  # changes the function itself

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        """Mutate the JSON values too: changed bytes alone would rarely be valid JSON."""
        rng = random.Random(seed)
        with contextlib.suppress(ValueError, LookupError, TypeError, AttributeError, RecursionError, struct.error):
            made = config_values(rng, data) if data[:1] == b"{" else header_values(rng, data)
            if rng.random() < 0.5 and len(made) <= max_size:
                return made
        return bytes(atheris.Mutate(data, max_size))

    corpus = folder.parent / "corpus"
    corpus.mkdir()
    bare = {kind: json.loads(sound["config.json"]) for kind, sound in SOUND.items()}
    configs = {kind: json.dumps({k: v for k, v in spec.items() if k != "sha256"}) for kind, spec in bare.items()}
    for kind, sound in SOUND.items():
        (corpus / f"{kind}-config").write_text(configs[kind])
        (corpus / f"{kind}-weights").write_bytes(sound["model.safetensors"][:12_000])
    for number, theta in enumerate(THETAS):
        (corpus / f"theta-{number}").write_bytes(theta)

    def one(data: bytes) -> None:
        first = data[:1] or b"{"
        kind = "PyLO" if b"input" in data else "PyLO's Celo2" if b"feature" in data else "star"
        contents = {"config.json": configs[kind].encode(), "model.safetensors": SOUND[kind]["model.safetensors"]}
        if 0x80 <= first[0] <= 0x8F:  # a map in msgpack
            contents = {"theta.state": data}
        else:
            contents["config.json" if first in b"{[" else "model.safetensors"] = data
        try:
            counts[attempt(folder, contents)] += 1
        except BaseException as error:
            counts["FAILED"] += 1
            print(f"{data!r}: {type(error).__name__}: {error}", flush=True)
        if sum(counts.values()) >= cases:
            report(counts, STARTED)

    options = [f"-runs={cases + 10**6}", f"-seed={seed + 1}", "-max_len=12000", "-rss_limit_mb=4096", "-verbosity=0"]
    atheris.Setup([sys.argv[0], str(corpus), *options], one, custom_mutator=mutate)
    atheris.Fuzz()


STARTED: list[float] = []


def report(counts: Counter[str], started: list[float]) -> None:
    """Print the counts, and exit with 1 if anything failed."""
    for name, count in sorted(counts.items()):
        print(f"{count:8d}  {name}")
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - started[0]) / 1024
    failed = sum(count for name, count in counts.items() if "FAILED" in name)
    seconds = time.process_time()
    print(f"{sum(counts.values())} cases, {failed} failures, memory grew by {grown:.1f} MB, {seconds:.0f} s of CPU")
    sys.stdout.flush()

    os._exit(int(failed > 0 or grown > 100))  # libFuzzer would call this a crash


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--atheris", action="store_true", help="let coverage guide the search")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "rule")
        folder.mkdir()
        for sound in (*SOUND.values(), {"theta.state": THETAS[0]}):  # imports of the first load do not count
            assert attempt(folder, sound) == "loaded"
        STARTED.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        counts: Counter[str] = Counter()
        if arguments.atheris:
            run_atheris(arguments.cases, arguments.seed, folder, counts)
        else:
            counts = run_random(arguments.cases, arguments.seed, folder)
        report(counts, STARTED)


if __name__ == "__main__":
    main()
