"""STAR's and the LSTM's steps on a GPU beside AdamW's: time, launches, memory; nothing is timed without a GPU.

    python examples/benchmarks/gpu.py                      # tables on the terminal, and gpu.csv
    python examples/benchmarks/gpu.py --rounds 15 --only gpt2
    python examples/benchmarks/gpu.py --compile            # for sm_90, without a GPU: registers, spills, wide loads

All optimizers of a row run interleaved, round by round, on the same shapes and gradients; a figure is the median over
rounds, a ratio the median of the rounds' ratios to AdamW (fused). Shapes are those of the networks named, no network is
built, and nothing is downloaded. Memory is what the allocator counts: state per parameter, and the peak above what is
held during a step.
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
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lightning_lopt as lopt
from lightning_lopt.kernels import WorkItem

Shapes = list[tuple[int, ...]]


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
    """A kernel by itself, for what an optimizer has no argument for."""

    def __init__(self, params: list[Tensor], rule: lopt.UpdateRule, **options: Any) -> None:
        from lightning_lopt.kernels.cuda import lstm as triton_lstm
        from lightning_lopt.kernels.cuda import star as triton_star

        module = triton_star if isinstance(rule, lopt.rules.STAR) else triton_lstm
        self.kernel, self.params = module.make(rule, **options), params
        self.meta_params = {name: value.detach() for name, value in rule.meta_params().items()}
        new = torch.zeros((), device=params[0].device)
        self.states = [{"step": new.clone(), **rule.init_state(param)._asdict()} for param in params]

    def step(self) -> None:
        parts = [WorkItem(p, p.grad, s, 1.0, 0.0, False) for p, s in zip(self.params, self.states, strict=True)]
        self.kernel.step(parts, self.meta_params, None, safeguard=False, measure=False)


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


def contenders(name: str, params: list[Tensor]) -> Iterator[tuple[str, Callable[[], Any]]]:
    star = lopt.rules.make("star").to(params[0].device)
    yield "AdamW (fused)", lambda: torch.optim.AdamW(params, fused=True)
    yield "AdamW (foreach)", lambda: torch.optim.AdamW(params, foreach=True)
    yield "AdamW (for-loop)", lambda: torch.optim.AdamW(params, foreach=False)
    yield "SGD, momentum (fused)", lambda: torch.optim.SGD(params, 1e-3, momentum=0.9, fused=True)
    yield "STAR, reference", lambda: lopt.RuleOptimizer(params, star, backend="reference")
    yield "STAR, fused", lambda: lopt.RuleOptimizer(params, star, backend="fused")
    yield "STAR, fused, safeguard", lambda: lopt.RuleOptimizer(params, star, backend="fused", safeguard=True)
    yield "STAR, kernel", lambda: KernelRun(params, star)
    yield "STAR, kernel in a graph", lambda: Captured(KernelRun(params, star))
    yield "STAR, kernel, bf16 state", lambda: KernelRun(params, star, state_dtype=torch.bfloat16)
    if name in SMALL:
        lstm = lopt.rules.make("lstm").to(params[0].device)
        yield "LSTM, reference", lambda: lopt.RuleOptimizer(params, lstm, backend="reference")
        yield "LSTM, kernel", lambda: KernelRun(params, lstm)
        yield "LSTM, kernel, bf16 state", lambda: KernelRun(params, lstm, state_dtype=torch.bfloat16)


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
    return sum(e.device_type == torch.autograd.DeviceType.CUDA and "mem" not in e.name for e in profile.events())


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


def disassembled(binary: bytes, option: str) -> str:
    import triton

    tool = next(Path(triton.__file__).parent.rglob("cuobjdump"))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        return subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout


def compile_all() -> None:
    """Each kernel in its usual form for an H100 or H200, by the assembler that comes with Triton; no GPU is needed."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from lightning_lopt.kernels.cuda import lstm as triton_lstm
    from lightning_lopt.kernels.cuda import star as triton_star
    from lightning_lopt.kernels.cuda import star_factored as triton_star_factored
    from lightning_lopt.kernels.cuda import star_step as triton_star_step

    star, lstm = lopt.rules.make("star"), lopt.rules.make("lstm")
    usual = {"PARAMS": 0, "GRADS": 0, "BF16": False, "SAFE": False, "CHECK": False, "MEASURE": False}
    usual |= {"BLACKBOX": True, "NORMALIZE": star.config.normalize_blackbox, "ESTIMATOR": 5, "CONTROL": True}
    usual |= {"SHRINK": 0, "NETWORK": True}
    of_lstm = {"SIZE": lstm.config.hidden_size, "UNITS": 32, "LAYERS": 2, "FORM": 1, "ESTIMATOR": 0, "CONTROL": False}
    of_lstm |= {"NORMALIZE": False, "PRECISION": "tf32x3"}
    integers = {"addresses": "*i64", "sizes": "*i64", "vectors": "*i64", "tiles": "*i32", "blocks": "*i32"}
    integers |= {"bad": "*i32", "num_tiles": "i32", "num_blocks": "i32", "num_entries": "i32"}
    factored, step = triton_star_factored, triton_star_step
    of_star, plain = (
        {"num_warps": triton_star.WARPS, "maxnreg": triton_star.REGISTERS},
        {"num_warps": triton_lstm.WARPS},
    )
    todo: list[tuple[Any, dict[str, Any], dict[str, int]]] = [
        *((getattr(factored, n), {}, of_star) for n in ("gradient_squares", "clip", "vector_sums", "vector_features")),
        *((getattr(step, n), {}, of_star) for n in ("channel_sums", "effective_weights", "update")),
        (step.update, {"SAFE": True, "CHECK": True}, of_star),
        (step.channel_sums, {"BF16": True}, of_star),
        (step.update, {"BF16": True}, of_star),
        (triton_lstm.lstm, of_lstm, plain),
        (triton_lstm.lstm, {**of_lstm, "BF16": True}, plain),
    ]
    print(f"Triton {triton.__version__}, sm_90; nothing was run and nothing was timed")
    print(f"{'kernel':40} warps registers stack  LDG.128  STG.128  instructions  seconds")
    for kernel, changes, options in todo:
        constants = {name: value for name, value in {**usual, **changes}.items() if name in kernel.arg_names}
        types = {n: "constexpr" if n in constants else integers.get(n, "*fp32") for n in kernel.arg_names}
        aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(types) if types[n].startswith("*")}
        start = time.perf_counter()
        source = ASTSource(kernel, types, constexprs=constants, attrs=aligned)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        seconds = time.perf_counter() - start
        usage, code = (disassembled(compiled.asm["cubin"], option) for option in ("-res-usage", "-sass"))
        registers, stack = re.findall(r"REG:(\d+) STACK:(\d+)", usage)[0]
        counts = [len(re.findall(form, code)) for form in (r"LDG\.E\.128", r"STG\.E\.128", r"/\*[0-9a-f]{4,5}\*/")]
        label = " ".join([kernel.fn.__name__, *(f"{k}={v}" for k, v in changes.items() if k in usual)])
        wide = f"{counts[0]:8} {counts[1]:8}"
        print(
            f"{label[:40]:40} {options['num_warps']:5} {registers:>9} {stack:>5} {wide} {counts[2]:13} {seconds:8.0f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", action="store_true", help="compile for sm_90 instead; needs no GPU")
    parser.add_argument("--only", choices=list(NETWORKS), nargs="*", help="networks; default all")
    parser.add_argument("--rounds", type=int, default=7, help="interleaved rounds, at least 5")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--csv", type=Path, default=Path("gpu.csv"))
    options = parser.parse_args()
    if options.compile:
        return compile_all()
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
    with options.csv.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["device", *rows[0]])
        writer.writeheader()
        writer.writerows({"device": torch.cuda.get_device_name(), **row} for row in rows)
    return None


if __name__ == "__main__":
    main()
