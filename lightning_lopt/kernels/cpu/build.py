"""C++ compiled once with the system's compiler into the user's cache, and called through ctypes.

A library's name is a hash of all that went into it: source, flags, compiler and the processor's features. It is
compiled in a folder of its own inside the cache and then renamed, so that several processes may do so at once and none
ever sees half a file. Nothing is written anywhere else.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

COMPILERS = ("c++", "g++", "clang++")
NATIVE = ("-mcpu=native",) if platform.machine() in ("arm64", "aarch64") else ("-march=native",)
# No -ffast-math: the safeguard looks for NaN and inf. -fopenmp-simd takes `omp simd` and needs no library.
FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd", "-shared", "-fPIC", "-pthread")
SECONDS = 300  # for one compilation


def library(source: Path, *defines: str) -> ctypes.CDLL | str:
    """The compiled library of a source file, or why there is none.

    Args:
        source: a C++17 file that includes nothing but the standard library and headers beside it.
        defines: "NAME=value" macros.
    """
    if os.name == "nt":
        return "C++ kernels are not built on Windows"
    command = tuple(shlex.split(os.environ.get("CXX", "")))
    program = shutil.which(command[0]) if command else next(filter(None, map(shutil.which, COMPILERS)), None)
    if program is None:
        looked = command[:1] or COMPILERS
        return f"no C++ compiler was found (looked for {', '.join(looked)}); install one, or set CXX to one"
    return _library(source, (program, *command[1:]), defines, cache_folder())


def cache_folder() -> Path:
    """Where libraries are kept: lightning_lopt in $XDG_CACHE_HOME, or in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lightning_lopt"


@functools.cache  # a process compiles once, and fails once
def _library(source: Path, compiler: Sequence[str], defines: Sequence[str], folder: Path) -> ctypes.CDLL | str:
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        target = folder / f"{source.stem}-{_key(source, compiler, defines)}.so"
        if target.exists():
            try:
                return ctypes.CDLL(str(target))
            except OSError:  # damaged: made anew
                target.unlink(missing_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{source.stem}-", dir=folder) as place:
            made = Path(place) / target.name
            macros = [f"-D{define}" for define in defines]
            for native in (NATIVE, ()):  # not every compiler knows its machine
                command = [*compiler, *FLAGS, *native, *macros, "-o", str(made), str(source)]
                ran = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, cwd=place, check=False)
                if ran.returncode == 0:
                    os.replace(made, target)
                    return ctypes.CDLL(str(target))
        said = (ran.stderr.strip().splitlines() or [f"exit status {ran.returncode}"])[0]
        return f"{compiler[0]} could not compile {source.name} ({said}); set CXX to another compiler"
    except subprocess.TimeoutExpired:
        return f"{compiler[0]} took more than {SECONDS} s to compile {source.name}; set CXX to another compiler"
    except OSError as error:
        return f"the kernel could not be built in {folder} ({error}); set XDG_CACHE_HOME to a folder to write to"


def _key(source: Path, compiler: Sequence[str], defines: Sequence[str]) -> str:
    program = Path(compiler[0]).resolve()
    stat = program.stat()  # its size and time, for asking it for its version would start it every time
    parts = (*compiler, program, stat.st_size, stat.st_mtime_ns, *FLAGS, *NATIVE, *defines, _processor())
    files = [source, *sorted(source.parent.glob("*.h"))]
    code = b"".join(file.read_bytes() for file in files)
    return hashlib.sha256(code + "\n".join(map(str, parts)).encode()).hexdigest()[:20]


def _processor() -> str:
    """What the processor can do: a home folder may be shared by different machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    features = sorted({line for line in lines if line.lower().startswith(("flags", "features", "model name"))})
    return "\n".join([platform.platform(), platform.machine(), platform.processor(), *features])
