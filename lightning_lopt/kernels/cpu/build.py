"""Compiles C++ kernels with the system's compiler, once per machine, and loads them through ctypes.

Libraries are kept in the user's cache folder. A library's name contains a hash of everything that went into it: source,
headers, flags, macros, compiler, C library and the processor's features. It is compiled in a temporary folder inside
the cache and then renamed, so several processes may compile at once and none ever loads half a file.

Loading a library runs its code. A cache may lie on a file system that other users write to, so a library is loaded only
from a folder, and as a file, that belongs to this user and that nobody else may write to.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

COMPILERS = ("c++", "g++", "clang++")
NATIVE = ("-mcpu=native",) if platform.machine() in ("arm64", "aarch64") else ("-march=native",)
# No -ffast-math: the safeguard looks for NaN and inf. -fopenmp-simd takes `omp simd` and needs no library.
FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd", "-shared", "-fPIC", "-pthread")
TIMEOUT_SECONDS = 300  # for one compilation
UNUSED_SECONDS = 90 * 24 * 3600  # after which a cached library is removed
KEY_LENGTH = 20  # hexadecimal digits in a library's name

_log = logging.getLogger("lightning_lopt")


def library(source: Path, *defines: str) -> ctypes.CDLL | str:
    """The compiled library of a source file, or why there is none.

    Args:
        source: a C++17 file that includes only the standard library and headers in its own folder.
        defines: "NAME=value" macros.
    """
    if os.name == "nt":
        return "C++ kernels are not built on Windows"
    compiler = _compiler()
    if isinstance(compiler, str):
        return compiler
    folder = cache_folder()
    if isinstance(folder, str):
        return folder
    return _library(source, compiler, defines, folder)


def cache_folder() -> Path | str:
    """Where libraries are kept, or why there is no such folder: lightning_lopt in $XDG_CACHE_HOME, or in ~/.cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not cache.is_absolute():  # the XDG standard: "If an implementation encounters a relative path [...] ignore it."
        with contextlib.suppress(RuntimeError):  # neither $HOME nor an entry in the password database
            cache = Path.home() / ".cache"
    if not cache.is_absolute():
        return (
            "this user has no home folder to keep compiled kernels in; set XDG_CACHE_HOME to the absolute path of a "
            "folder of your own"
        )
    return cache / "lightning_lopt"


def _compiler() -> tuple[str, ...] | str:
    """The compiler's absolute path and its arguments, or why there is none."""
    words = os.environ.get("CXX", "")
    try:
        command = shlex.split(words)
    except ValueError as error:
        return f"CXX={words!r} is not a valid command ({error}); set CXX to a C++ compiler, or unset it"
    names = command[:1] or COMPILERS
    program = next(filter(None, map(shutil.which, names)), None)
    if program is None:
        return f"no C++ compiler was found (looked for {', '.join(names)}); install one, or set CXX to one"
    return (os.path.abspath(program), *command[1:])


@functools.cache  # a process compiles once, and fails once
def _library(source: Path, compiler: tuple[str, ...], defines: tuple[str, ...], folder: Path) -> ctypes.CDLL | str:
    try:
        with _opened(folder) as directory:
            if why := _distrust(directory, folder):
                return why
            name = f"{source.stem}-{_key(source, compiler, defines)}.so"
            with contextlib.suppress(OSError):  # missing, damaged, or not a file of ours: compile it
                return _load(directory, folder, name)
            if why := _compile(source, compiler, defines, folder / name):
                return why
            return _load(directory, folder, name)
    except subprocess.TimeoutExpired:
        program = _printable(compiler[0])
        return f"{program} took more than {TIMEOUT_SECONDS} s to compile {source.name}; set CXX to another compiler"
    except OSError as error:
        return (
            f"the kernel could not be built in {folder} or loaded from it ({error}); set XDG_CACHE_HOME to a folder of "
            "your own with free space"
        )


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[int]:
    """A descriptor of the cache folder, which is created if it is missing."""
    folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    directory = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield directory
    finally:
        os.close(directory)


def _distrust(directory: int, folder: Path) -> str | None:
    """Why libraries in an open folder must not, or cannot, be loaded; None if they may."""
    advice = "set XDG_CACHE_HOME to a folder of your own"
    if not _is_private(os.fstat(directory)):
        return f"{folder} belongs to another user, or other users may write to it; {advice}"
    if os.fstatvfs(directory).f_flag & getattr(os, "ST_NOEXEC", 0):  # or every process would compile in vain
        return f"{folder} is on a file system mounted noexec, from which no library can be loaded; {advice} elsewhere"
    return None


def _is_private(status: os.stat_result) -> bool:
    others_write = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return status.st_uid == os.geteuid() and not others_write


def _load(directory: int, folder: Path, name: str) -> ctypes.CDLL:
    """Load a library of an open folder.

    Raises:
        OSError: it is missing, damaged or not a private file of this user.
    """
    status = os.stat(name, dir_fd=directory, follow_symlinks=False)
    if not (stat.S_ISREG(status.st_mode) and _is_private(status)):
        raise PermissionError(f"{folder / name} is not a private file of this user")
    # Where others may rename the parents of the folder, its path can lead elsewhere by now; the open folder cannot.
    # Only this user may change what is in it, so the file is still the one that was looked at.
    same = Path(f"/proc/self/fd/{directory}")
    loaded = ctypes.CDLL(str((same if same.exists() else folder) / name))
    with contextlib.suppress(OSError):  # a read-only cache
        os.utime(name, dir_fd=directory)  # used today, see _remove_unused
    return loaded


def _compile(source: Path, compiler: tuple[str, ...], defines: tuple[str, ...], target: Path) -> str | None:
    """Compile a library; returns why that failed, None if it did not."""
    with tempfile.TemporaryDirectory(prefix=f"{source.stem}-", dir=target.parent) as place:
        _announce(source, compiler)
        made = Path(place) / target.name
        macros = [f"-D{define}" for define in defines]
        for native in (NATIVE, ()):  # not every compiler knows its machine
            why = _run([*compiler, *FLAGS, *native, *macros, "-o", str(made), str(source)], place)
            if why is None and made.exists():
                made.chmod(0o700)  # also where the umask lets a group write
                made.replace(target)
                _remove_unused(target.parent)
                return None
    program = _printable(compiler[0])
    return f"{program} could not compile {source.name} ({why or 'it wrote no file'}); set CXX to another compiler"


def _printable(path: str) -> str:
    """A path as text that every stream can print: Python keeps bytes that are not UTF-8 as surrogates."""
    return os.fsencode(path).decode(errors="replace")


def _announce(source: Path, compiler: tuple[str, ...]) -> None:
    """Say what the program waits for, once for all processes of a machine, which start at the same time."""
    if all(os.environ.get(name, "0") == "0" for name in ("LOCAL_RANK", "SLURM_LOCALID")):
        # A warning, because Python drops `info` unless the program has configured logging.
        _log.warning(
            f"lightning_lopt is compiling {source.name} with {_printable(compiler[0])}. This takes up to a minute, and "
            "happens once on this machine."
        )


def _run(command: list[str], folder: str) -> str | None:
    """Run a compiler in a folder; returns why it failed, None if it did not.

    Raises:
        subprocess.TimeoutExpired: it took too long.
    """
    try:
        ran = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",  # compilers speak any language in any encoding
            cwd=folder,
            timeout=TIMEOUT_SECONDS,
            check=False,
        )
    except OSError as error:
        return str(error)
    if ran.returncode == 0:
        return None
    if ran.returncode < 0:  # for instance by the kernel, when memory is short
        return f"stopped by signal {-ran.returncode}, {signal.strsignal(-ran.returncode)}"
    lines = ran.stderr.strip().splitlines() or [f"exit status {ran.returncode}"]
    return next((line for line in lines if "error" in line), lines[0])


def _remove_unused(folder: Path) -> None:
    """Remove the libraries that no process has loaded for long, such as those of older versions."""
    for path in folder.glob(f"*-{KEY_LENGTH * '[0-9a-f]'}.so"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > UNUSED_SECONDS:
                path.unlink()


def _key(source: Path, compiler: tuple[str, ...], defines: tuple[str, ...]) -> str:
    program = Path(compiler[0]).resolve()
    status = program.stat()  # its size and time: asking for its version would start it in every process
    parts = (*compiler, program, status.st_size, status.st_mtime_ns, *FLAGS, *NATIVE, *defines, *_machine())
    files = [source, *sorted(source.parent.glob("*.h"))]
    code = b"".join(file.read_bytes() for file in files)
    return hashlib.sha256(code + os.fsencode("\n".join(map(str, parts)))).hexdigest()[:KEY_LENGTH]


def _machine() -> tuple[str, ...]:
    """What a library depends on besides the compiler: different machines may share a home folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    features = sorted({line for line in lines if line.lower().startswith(("flags", "features", "model name"))})
    return (platform.system(), platform.machine(), *platform.libc_ver(), *features)
