"""Loads damaged and hostile rule files, many times, and counts what happens.

    python examples/soak/fuzz_files.py --cases 100000
    python examples/soak/fuzz_files.py --cases 100000 --atheris     # coverage-guided; pip install atheris

A case must load as a sound rule or be refused by a ValueError of one line. No file beside the two may be opened, no
process started, nothing imported and no address looked up; memory may not grow by 100 MB.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import struct
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

import lightning_lopt as lopt
from lightning_lopt.hub import files
from lightning_lopt.rules import REGISTRY

KINDS = sorted(REGISTRY)
SOUND = {kind: files.serialize(lopt.rules.make(kind)) for kind in KINDS}
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
    """A JSON value, mostly one that a configuration or a header could hold."""
    choice = rng.randrange(9 if depth < 3 else 6)
    if choice < 3:
        return rng.choice(NUMBERS)
    if choice < 6:
        return rng.choice((None, True, False, *WORDS))
    if choice == 6:
        return [any_value(rng, depth + 1)] * rng.choice((0, 1, 2, 3, 4, 500))
    if choice == 7:
        return [any_value(rng, depth + 1) for _ in range(rng.randrange(5))]
    return {rng.choice(WORDS): any_value(rng, depth + 1) for _ in range(rng.randrange(4))}


def mutated(rng: random.Random, sound: bytes) -> bytes:
    """Bytes after a few replacements, insertions, deletions and swaps."""
    data = bytearray(sound)
    for _ in range(rng.randrange(1, 6)):
        at, size = rng.randrange(len(data) + 1), rng.randrange(12)
        piece = rng.choice(PIECES) if rng.random() < 0.5 else rng.randbytes(rng.randrange(9))
        if rng.random() < 0.2:
            other = rng.randrange(len(data) + 1)
            piece = bytes(data[other : other + size])
        data[at : at + size] = piece * rng.choice((1, 1, 1, 50))
    return bytes(data)


def config_values(rng: random.Random, kind: str) -> bytes:
    """A config.json whose values are any."""
    spec = json.loads(SOUND[kind]["config.json"])
    spec.pop("sha256")
    for _ in range(rng.randrange(1, 4)):
        inside = spec["config"] if isinstance(spec["config"], dict) and rng.random() < 0.8 else spec
        inside[rng.choice((*list(inside), *WORDS))] = any_value(rng)
    return json.dumps(spec).encode()


def header_values(rng: random.Random, kind: str) -> bytes:
    """A weights file with any values in its header."""
    length = struct.unpack("<Q", SOUND[kind]["model.safetensors"][:8])[0]
    data = SOUND[kind]["model.safetensors"][8 + length :]
    header = json.loads(SOUND[kind]["model.safetensors"][8 : 8 + length])
    for _ in range(rng.randrange(1, 4)):
        name = rng.choice([*header, *WORDS])
        entry, part = header.get(name), rng.choice(("dtype", "shape", "data_offsets"))
        if isinstance(entry, dict) and name != "__metadata__" and rng.random() < 0.8:
            old = entry.get(part)  # no list any more where the same entry is drawn twice
            numbers = [n for n in old if isinstance(n, int)] if isinstance(old, list) else []
            near = [n + rng.choice((-1, 0, 0, 1, 8)) for n in numbers]
            entry[part] = rng.choice((any_value(rng), near, rng.choice(DTYPES)))
        else:
            header[name] = any_value(rng)
    text = json.dumps(header).encode() + b" " * rng.randrange(9)
    return struct.pack("<Q", len(text) + rng.choice((0, 0, 0, -1, 1))) + text + data


def case(rng: random.Random) -> tuple[str, dict[str, bytes]]:
    """What is tried, and the two files."""
    kind = rng.choice(KINDS)
    config, weights = SOUND[kind]["config.json"], SOUND[kind]["model.safetensors"]
    if rng.random() < 0.5:  # else the digest refuses most changed weights
        spec = json.loads(config)
        spec.pop("sha256")
        config = json.dumps(spec).encode()
    form = rng.choice(("config bytes", "config values", "weights bytes", "header bytes", "header values"))
    if form == "config bytes":
        config = mutated(rng, config)
    elif form == "config values":
        config = config_values(rng, kind)
    elif form == "weights bytes":
        weights = mutated(rng, weights)
    elif form == "header bytes":
        length = struct.unpack("<Q", weights[:8])[0]
        header = mutated(rng, weights[8 : 8 + length])
        weights = struct.pack("<Q", len(header)) + header + weights[8 + length :]
    else:
        weights = header_values(rng, kind)
    return form, {"config.json": config, "model.safetensors": weights}


def attempt(folder: Path, contents: dict[str, bytes]) -> str:
    """ "loaded" or "refused"; an AssertionError, or whatever it was, for anything else."""
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    with Watched(folder):
        try:
            rule = lopt.load_rule(folder)
        except ValueError as error:
            message = str(error)
            assert message.isprintable(), message
            assert len(message) < 300, message
            assert "config.json: " in message or "model.safetensors: " in message, message
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
    """Raises an AssertionError where what runs inside does more than read the two files; Python's audit hooks tell."""

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
    """Cases drawn from (seed, number): any one can be had again alone."""
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
    """Bytes that libFuzzer makes, which seeks new branches in our modules; ends the process."""
    import atheris

    for name in ("lightning_lopt.hub.files", "lightning_lopt.rules.base"):
        module = sys.modules[name]
        for value in list(vars(module).values()):
            if callable(value) and getattr(value, "__module__", "") == name and hasattr(value, "__code__"):
                setattr(module, value.__name__, atheris.instrument_func(value))

    corpus = folder.parent / "corpus"
    corpus.mkdir()
    for kind in KINDS:
        bare = json.dumps({k: v for k, v in json.loads(SOUND[kind]["config.json"]).items() if k != "sha256"}).encode()
        for name, data in {"config.json": bare, "model.safetensors": SOUND[kind]["model.safetensors"][:4096]}.items():
            (corpus / f"{kind}-{name}").write_bytes(data)

    def one(data: bytes) -> None:
        contents = dict(SOUND["star"])
        contents["config.json"] = corpus.joinpath("star-config.json").read_bytes()
        contents["config.json" if data[:1] in (b"{", b"[") else "model.safetensors"] = data
        try:
            counts[attempt(folder, contents)] += 1
        except BaseException as error:
            counts["FAILED"] += 1
            print(f"{data!r}: {type(error).__name__}: {error}", flush=True)
        if sum(counts.values()) >= cases:
            report(counts, STARTED)

    options = [f"-runs={cases + 10**6}", f"-seed={seed + 1}", "-max_len=8192", "-rss_limit_mb=4096", "-verbosity=0"]
    atheris.Setup([sys.argv[0], str(corpus), *options], one)
    atheris.Fuzz()


STARTED: list[float] = []


def report(counts: Counter[str], started: list[float]) -> None:
    """Print what was counted, and end with status 1 if anything failed."""
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
        for kind in KINDS:  # what is imported and cached at the first load does not count
            attempt(folder, SOUND[kind])
        STARTED.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        counts: Counter[str] = Counter()
        if arguments.atheris:
            run_atheris(arguments.cases, arguments.seed, folder, counts)
        else:
            counts = run_random(arguments.cases, arguments.seed, folder)
        report(counts, STARTED)


if __name__ == "__main__":
    main()
