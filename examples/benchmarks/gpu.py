"""Steps of the bundled star on a GPU beside AdamW's: time, launches, memory.

    python examples/benchmarks/gpu.py                      # tables on the terminal, and gpu.csv
    python examples/benchmarks/gpu.py --rounds 15 --only gpt2
    python examples/benchmarks/gpu.py --compile 80 90      # for these architectures, without a GPU: registers, spills

All optimizers of a row run interleaved, round by round, on the same shapes and gradients; a figure is the median over
rounds, a ratio the median of the rounds' ratios to AdamW (fused). Shapes are those of the networks named; no network is
built, and nothing is downloaded. Memory is what the allocator counts: state per parameter, and the peak above what is
held during a step. Without a GPU nothing is timed.
"""

from __future__ import annotations

import argparse
import csv
import platform
import re
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lightning_lopt as lopt
from lightning_lopt import kernels

Shapes = list[tuple[int, ...]]
COUNTERS = ("skipped", "skipped_in_row")


def mlp() -> Shapes:
    return [(784, 128), (128,), (128, 128), (128,), (128, 10), (10,)]


def resnet20() -> Shapes:
    widths = [16] * 6 + [32] * 6 + [64] * 6
    convolutions = [(16, 3, 3, 3)] + [(b, a, 3, 3) for a, b in zip([16, *widths[:-1]], widths, strict=True)]
    return [*convolutions, *[(shape[0],) for shape in convolutions for _ in range(2)], (10, 64), (10,)]


def resnet50() -> Shapes:
    shapes: Shapes = [(64, 3, 7, 7)]
    width = 64
    for inner, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += [(inner, width, 1, 1), (inner, inner, 3, 3), (4 * inner, inner, 1, 1)]
            shapes += [(4 * inner, width, 1, 1)] if block == 0 else []
            width = 4 * inner
    return [*shapes, *[(shape[0],) for shape in shapes for _ in range(2)], (1000, 2048), (1000,)]


def transformer(width: int, layers: int, *others: tuple[int, ...]) -> Shapes:
    matrices = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]
    vectors = [(shape[0],) for shape in matrices] + [(width,)] * 4
    return [*others, *(matrices + vectors) * layers, (width,), (width,)]


NETWORKS: dict[str, Callable[[], Shapes]] = {
    "mlp": mlp,
    "resnet20": resnet20,
    "resnet50": resnet50,
    "vit_b": lambda: transformer(768, 12, (768, 3, 16, 16), (1, 197, 768), (1000, 768), (1000,)),
    "gpt2": lambda: transformer(768, 12, (50257, 768), (1024, 768)),
    "matrices_1000": lambda: [(100, 100)] * 1000,
    "matrix_100m": lambda: [(10_000, 10_000)],
}
SMALL = ("mlp", "resnet20")  # whose LSTM state is not beyond reason: 320 bytes a parameter


class KernelRun:
    """A rule's kernel by itself, without the optimizer around it."""

    def __init__(self, params: list[Tensor], rule: lopt.UpdateRule, roles: list[str | None]) -> None:
        found = kernels.find(rule, "cuda")
        if isinstance(found, str):
            raise RuntimeError(found)
        self.kernel = found
        self.meta_params = {name: value.detach() for name, value in rule.meta_params().items()}
        self.items = []
        for param, role in zip(params, roles, strict=True):
            counters = {name: torch.zeros((), dtype=torch.int64, device=param.device) for name in COUNTERS}
            step = torch.zeros((), dtype=torch.int64, device=param.device)
            state = {"step": step, **rule.init_state(param.detach().float())._asdict(), **counters}
            assert param.grad is not None
            self.items.append(kernels.WorkItem(param, param.grad, state, 1.0, 0.0, False, role))

    def step(self, *, safeguard: bool = False, measure: bool = False) -> None:
        self.kernel.step(self.items, self.meta_params, 1000, len(self.items), safeguard=safeguard, measure=measure)


class Captured:
    """Steps of a kernel as a CUDA graph, which leaves the host out."""

    def __init__(self, run: KernelRun) -> None:
        self.run, self.graph = run, torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                run.step()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(self.graph):
            run.step()

    def step(self) -> None:
        self.graph.replay()


def role_of(param: Tensor) -> str:
    """The role of a tensor of `NETWORKS`: those with more than 10,000 rows are embeddings."""
    return "embedding" if param.dim() > 1 and param.shape[0] > 10_000 else "hidden"


def contenders(name: str, params: list[Tensor]) -> Iterator[tuple[str, Callable[[], Any]]]:
    device, roles = params[0].device, list(map(role_of, params))
    yield "AdamW (fused)", lambda: torch.optim.AdamW(params, fused=True)
    yield "AdamW (foreach)", lambda: torch.optim.AdamW(params, foreach=True)
    yield "AdamW (for-loop)", lambda: torch.optim.AdamW(params, foreach=False)
    yield "SGD, momentum (fused)", lambda: torch.optim.SGD(params, 1e-3, momentum=0.9, fused=True)
    for label, rule in {"star": lopt.load_rule("star")}.items():
        groups = [{"params": [p for p in params if role_of(p) == role], "role": role} for role in sorted(set(roles))]
        own = partial(lopt.RuleOptimizer, groups, rule.to(device), num_steps=1000)
        yield f"{label}, reference", partial(own, backend="reference")
        yield f"{label}, fused", partial(own, backend="fused")
        yield f"{label}, fused, safeguard", partial(own, backend="fused", safeguard=True)
        yield f"{label}, kernel", partial(KernelRun, params, rule, roles)
        yield f"{label}, kernel in a graph", partial(lambda rule: Captured(KernelRun(params, rule, roles)), rule)


def new_params(shapes: Shapes, seed: int) -> list[Tensor]:
    generator = torch.Generator("cuda").manual_seed(seed)
    params = [torch.nn.Parameter(0.02 * torch.randn(s, device="cuda", generator=generator)) for s in shapes]
    for param in params:
        param.grad = 1e-3 * torch.randn(param.shape, device="cuda", generator=generator)
    return params


def milliseconds(step: Callable[[], Any], repeats: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / repeats


def num_launches(step: Callable[[], Any]) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    return sum(
        e.device_type == torch.autograd.DeviceType.CUDA and "mem" not in e.name.lower() for e in profile.events()
    )


def measure(name: str, rounds: int, seed: int) -> list[dict[str, Any]]:
    """One row a contender; all of them move the same parameters."""
    runs, rows = {}, {}
    for label, make in ((label, make) for label, make in contenders(name, new_params(NETWORKS[name](), seed))):
        held = torch.cuda.memory_allocated()
        run = make()
        for _ in range(3):
            run.step()
        torch.cuda.synchronize()
        state = torch.cuda.memory_allocated() - held
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run.step()
        torch.cuda.synchronize()
        rows[label] = {"state bytes": state, "peak bytes": torch.cuda.max_memory_allocated() - before}
        rows[label]["launches"] = num_launches(run.step)
        runs[label] = run
    repeats = {label: max(1, min(50, int(20 / max(milliseconds(run.step, 2), 1e-3)))) for label, run in runs.items()}
    times: dict[str, list[float]] = {label: [] for label in runs}
    for _ in range(rounds):
        for label, run in runs.items():
            times[label].append(milliseconds(run.step, repeats[label]))
    size = sum(torch.Size(shape).numel() for shape in NETWORKS[name]())
    base = times["AdamW (fused)"]
    for label, row in rows.items():
        ratios = sorted(a / b for a, b in zip(times[label], base, strict=True))
        row |= {"ms": statistics.median(times[label]), "ratio": statistics.median(ratios)}
        row |= {"ratio low": ratios[0], "ratio high": ratios[-1], "rounds": rounds, "seed": seed}
        row |= {"state bytes": row["state bytes"] / size, "peak bytes": row["peak bytes"] / size}
    return [{"network": name, "parameters": size, "optimizer": label, **row} for label, row in rows.items()]


# What `--compile` has steps taken of: dtypes of the parameters, safeguard, measure, the parameters' role, and the dtype
# of the products of hidden matrices.
MIXED = [torch.float32, torch.bfloat16, torch.float16]
COMPILED = [
    ([torch.float32], True, False, None, None),
    ([torch.float32], False, False, None, None),
    ([torch.float32], True, True, None, None),
    (MIXED, True, False, None, None),
    ([torch.float32], True, False, "hidden", torch.bfloat16),
    ([torch.float32], False, False, "hidden", torch.bfloat16),
    ([torch.float32], True, True, "hidden", torch.float32),
    (MIXED, True, False, "hidden", torch.bfloat16),
]


class NoDevice:
    """Has Triton compile for an architecture that is not there."""

    def __init__(self, architecture: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", architecture, 32)

    def get_current_device(self) -> int:
        return int(self.target.arch)  # Triton keeps what it compiled by the number of the device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self.target


def disassembled(binary: bytes, option: str) -> str:
    import triton

    tool = next(Path(triton.__file__).parent.rglob("cuobjdump"))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        return subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout


def compiled(architecture: int, kinds: list[str]) -> Iterator[dict[str, Any]]:
    """A row for each variant of each kernel that the steps of `COMPILED` would launch; nothing is run."""
    from triton.runtime import driver
    from triton.runtime.jit import KernelInterface

    seen: set[str] = set()
    found: list[dict[str, Any]] = []

    def compile_launch(kernel: Any, grid: Any, **arguments: Any) -> None:
        start = time.perf_counter()
        result = kernel.warmup(grid=grid, **arguments)
        if result.hash in seen:
            return
        seen.add(result.hash)
        usage, code = (disassembled(result.asm["cubin"], option) for option in ("-res-usage", "-sass"))
        registers, stack = re.findall(r"REG:(\d+) STACK:(\d+)", usage)[0]
        constants = [f"{name}={value}" for name, value in arguments.items() if name.isupper()]
        counts = {"spills": r"\b(?:LDL|STL)", "wide loads": r"LDG\.E\.128", "wide stores": r"STG\.E\.128"}
        row = {
            "architecture": architecture,
            "kernel": kernel.fn.__name__,
            "variant": " ".join(constants),
            "registers": int(registers),
            "stack": int(stack),
            "64-bit divisions": len(re.findall(r"\b(?:div|rem)\.[su]64", result.asm["ptx"])),
            **{name: len(re.findall(form, code)) for name, form in counts.items()},
            "seconds": round(time.perf_counter() - start, 1),
        }
        found.append(row)

    driver.set_active(NoDevice(architecture))
    KernelInterface.__getitem__ = lambda kernel, grid: partial(compile_launch, kernel, grid)
    for kind in kinds:
        rule = lopt.rules.make(kind, centering_start=1.0, orthogonal_start=1.0)  # nothing is left out
        for dtypes, safeguard, measure, role, products in COMPILED:
            params = [torch.ones(64, 64, dtype=dtype) for dtype in dtypes]
            for param in params:
                param.grad = torch.ones_like(param)
            run = KernelRun(params, rule, [role] * len(params))
            run.kernel.product_dtype = products
            run.step(safeguard=safeguard, measure=measure)
            yield from found
            found.clear()


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def compile_all(architectures: list[int], kinds: list[str], path: Path) -> None:
    import triton

    print(f"Triton {triton.__version__}; nothing was run and nothing was timed on a GPU")
    rows: list[dict[str, Any]] = []
    for architecture in architectures:
        for row in compiled(architecture, kinds):
            rows.append(row)
            print(", ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    write(path, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", type=int, nargs="+", metavar="SM", help="compile instead; needs no GPU")
    parser.add_argument("--kinds", nargs="*", default=["scheduled"], help="of the rules to compile")
    parser.add_argument("--only", choices=list(NETWORKS), nargs="*", help="networks; default all")
    parser.add_argument("--rounds", type=int, default=7, help="interleaved rounds, at least 5")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--csv", type=Path, default=Path("gpu.csv"))
    options = parser.parse_args()
    if options.compile:
        return compile_all(options.compile, options.kinds, options.csv)
    if not torch.cuda.is_available():
        print("There is no CUDA device here: nothing was timed, and no figure is given. See --compile.")
        return None
    if options.rounds < 5:
        parser.error(f"--rounds {options.rounds}: medians of fewer than 5 rounds say little")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Python {platform.python_version()}")
    rows: list[dict[str, Any]] = []
    for name in options.only or NETWORKS:
        rows += (found := measure(name, options.rounds, options.seed))
        print(f"\n{name}, {found[0]['parameters']:,} parameters")
        print(f"{'':28}       ms  / AdamW fused   launches  state, peak B/param")
        for row in found:
            spread = f"{row['ratio']:.2f} ({row['ratio low']:.2f}-{row['ratio high']:.2f})"
            memory = f"{row['state bytes']:.1f}, {row['peak bytes']:.1f}"
            print(f"{row['optimizer']:28} {row['ms']:8.3f}  {spread:18} {row['launches']:6}  {memory}")
        torch.cuda.empty_cache()
    write(options.csv, [{"device": torch.cuda.get_device_name(), **row} for row in rows])
    return None


if __name__ == "__main__":
    main()
