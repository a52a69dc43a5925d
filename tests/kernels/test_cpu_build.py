"""C++ kernels are compiled once and loaded from a cache that nobody else could have written; else the rule runs."""

import errno
import os
import pwd
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from optimizer_cases import parameters, run, snapshot

from lightning_lopt import RuleOptimizer, kernels
from lightning_lopt.kernels.cpu import build
from lightning_lopt.rules import make

needs_compiler = pytest.mark.skipif(not any(map(shutil.which, build.COMPILERS)), reason="no C++ compiler")


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    path = tmp_path / "five.cpp"
    # A text of its own: a process does not read a library again that has the name of one that it has loaded
    path.write_text(f'// {tmp_path}\nextern "C" int five() {{ return FIVE; }}\n')
    return path


@pytest.fixture
def folder(tmp_path):
    """The cache folder of `source`, private as the package would make it."""
    path = tmp_path / "cache" / "lightning_lopt"
    path.mkdir(mode=0o700, parents=True)
    return path


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def name_of(source):
    """The file that `build.library(source, "FIVE=5")` looks for."""
    return f"{source.stem}-{build._key(source, build._compiler(), ('FIVE=5',))}.so"


def plant(source, path, value=666):
    """A library at `path` that returns a value, by default as another user would put it there."""
    command = [build._compiler()[0], "-shared", "-fPIC", f"-DFIVE={value}", "-o", str(path), str(source)]
    subprocess.run(command, check=True)
    path.chmod(0o700)


@needs_compiler
def test_a_library_is_built_once_and_in_the_cache_alone(source, tmp_path):
    assert build.library(source, "FIVE=5").five() == 5
    (built,) = set(files(tmp_path)) - {"five.cpp"}
    assert built.startswith("cache/lightning_lopt/five-")
    written = (tmp_path / built).stat().st_ino
    build._library.cache_clear()  # as a new process
    assert build.library(source, "FIVE=5").five() == 5
    assert (tmp_path / built).stat().st_ino == written
    assert build.library(source, "FIVE=6").five() == 6
    source.write_text('extern "C" int five() { return FIVE + 10; }\n')
    build._library.cache_clear()
    assert build.library(source, "FIVE=5").five() == 15
    assert len(files(tmp_path)) == 4


@needs_compiler
def test_a_damaged_library_is_built_anew(source, folder):
    damaged = folder / name_of(source)
    damaged.write_bytes(b"\x7fELF")
    damaged.chmod(0o700)
    assert build.library(source, "FIVE=5").five() == 5
    assert damaged.stat().st_size > 1000


SCRIPT = """
import pathlib, runpy, sys
print(runpy.run_path(sys.argv[1])["library"](pathlib.Path(sys.argv[2]), "FIVE=5").five())
"""


def process(source, **environment):
    """Another process that builds; without torch, so that it starts at once."""
    command = [sys.executable, "-c", SCRIPT, build.__file__, str(source)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, **pipes, text=True, env={**os.environ, **environment})


@needs_compiler
def test_processes_that_build_at_once(source, tmp_path):
    started = [process(source, LOCAL_RANK=str(rank)) for rank in range(3)]
    said = [each.communicate() for each in started]
    assert [out.strip() for out, _ in said] == ["5"] * 3
    assert len(files(tmp_path)) == 2
    assert [err for _, err in said[1:]] == ["", ""]  # the first speaks for all


@needs_compiler
def test_compiling_is_announced_and_loading_is_not(source):
    """On stderr, by a program that has configured no logging."""
    first, second = process(source).communicate(), process(source).communicate()
    assert first[0] == second[0] == "5\n"
    assert re.fullmatch(r"lightning_lopt is compiling five.cpp with /.*\. This takes up to a minute.*\n", first[1])
    assert second[1] == ""


@needs_compiler
def test_old_libraries_are_removed_when_a_new_one_is_built(source, folder):
    now = time.time()
    mine = folder / "notes-on-kernels.so"  # a folder of this name may hold anything
    ages = {mine: 1000, folder / f"star-{'a' * 20}.so": 100, folder / f"star-{'b' * 20}.so": 80}
    for path, days in ages.items():
        path.touch()
        os.utime(path, (now - days * 86400,) * 2)
    build.library(source, "FIVE=5")
    assert files(folder) == sorted([mine.name, name_of(source), f"star-{'b' * 20}.so"])
    os.utime(folder / name_of(source), (0, 0))
    build._library.cache_clear()
    build.library(source, "FIVE=5")
    assert (folder / name_of(source)).stat().st_mtime > now - 60  # it is in use


def test_a_new_release_of_the_operating_system_needs_no_new_library(source, monkeypatch):
    before = name_of(source)
    monkeypatch.setattr("platform.release", lambda: "99.0")
    monkeypatch.setattr("platform.platform", lambda *_, **__: "Linux-99.0")
    assert name_of(source) == before
    monkeypatch.setattr("platform.libc_ver", lambda *_, **__: ("glibc", "99"))
    assert name_of(source) != before


# --- What another user could have written ---


def open_to_a_group(folder):
    folder.chmod(0o770)


def open_to_all(folder):
    folder.chmod(0o707)


def link_to_an_open_one(folder):
    target = folder.rename(folder.parent / "elsewhere")
    folder.symlink_to(target)
    target.chmod(0o777)


@needs_compiler
@pytest.mark.parametrize("changed", [open_to_a_group, open_to_all, link_to_an_open_one])
def test_a_folder_that_others_may_write_to_is_refused(source, folder, changed):
    plant(source, folder / name_of(source))
    changed(folder)
    found = build.library(source, "FIVE=5")
    assert isinstance(found, str)
    assert re.search(r"lightning_lopt belongs to another user, or other users may write.*set XDG_CACHE_HOME", found)


@needs_compiler
def test_a_folder_of_another_user_is_refused(source, folder, monkeypatch):
    plant(source, folder / name_of(source))
    owner = folder.stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    assert "belongs to another user" in build.library(source, "FIVE=5")


@needs_compiler
@pytest.mark.parametrize("how", ["open to a group", "open to all", "a link", "of another user"])
def test_a_file_that_others_could_have_written_is_replaced(source, folder, tmp_path, monkeypatch, how):
    planted = folder / name_of(source)
    plant(source, planted)
    if how == "a link":
        target = planted.rename(tmp_path / "planted.so")
        planted.symlink_to(target)
    elif how == "of another user":
        if os.geteuid():
            pytest.skip("only root can give files away")
        os.chown(planted, 54321, -1)
    else:
        planted.chmod({"open to a group": 0o770, "open to all": 0o707}[how])
    assert build.library(source, "FIVE=5").five() == 5
    assert planted.stat().st_uid == os.geteuid()
    assert planted.lstat().st_mode & 0o170777 == 0o100700


@needs_compiler
@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="no /proc")
def test_a_folder_that_is_swapped_after_its_file_was_looked_at(source, folder, monkeypatch):
    """As whoever may rename the parent's entries can do."""
    plant(source, folder / name_of(source), 5)
    looks = build._is_private

    def swap(status):
        if stat.S_ISREG(status.st_mode):
            folder.rename(folder.with_name("before"))
            folder.mkdir()
            plant(source, folder / name_of(source))
        return looks(status)

    monkeypatch.setattr(build, "_is_private", swap)
    assert build.library(source, "FIVE=5").five() == 5


@needs_compiler
def test_what_is_made_is_private(source, tmp_path):
    """Also under the umask of systems that give each user a group."""
    before = os.umask(0o002)
    try:
        build.library(source, "FIVE=5")
    finally:
        os.umask(before)
    made = [tmp_path / "cache", tmp_path / "cache" / "lightning_lopt", *(tmp_path / "cache").rglob("*.so")]
    assert [oct(path.stat().st_mode & 0o777) for path in made] == ["0o700"] * 3


# --- Where no library can be had ---

WITHOUT = {
    "no compiler": (
        {"PATH": "", "CXX": ""},
        r"no C\+\+ compiler was found \(looked for c\+\+, g\+\+, clang\+\+\); install",
    ),
    "another one that is missing": ({"CXX": "nowhere-c++ -O1"}, r"looked for nowhere-c\+\+"),
    "a name in another encoding": ({"CXX": "/nowhere/\udcfc++"}, r"looked for /nowhere/\udcfc\+\+"),
    "a folder": ({"CXX": "/"}, "looked for /.*set CXX"),
    "an empty word": ({"CXX": "''"}, r"looked for \)"),
    "a quote that is not closed": (
        {"CXX": 'g++ "'},
        "CXX='g.. \"' is not a valid command .No closing quotation.*set CXX",
    ),
    "one that fails": ({"CXX": "false"}, "could not compile five.cpp .exit status 1.*set CXX"),
    "one that writes nothing": ({"CXX": "true"}, "could not compile five.cpp .it wrote no file.*set CXX"),
    "a cache that is a file": ({"XDG_CACHE_HOME": __file__}, "could not be built in .*set XDG_CACHE_HOME"),
}


@pytest.mark.parametrize(("environment", "why"), WITHOUT.values(), ids=WITHOUT)
def test_why_there_is_no_library(source, monkeypatch, environment, why):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    found = build.library(source, "FIVE=5")
    assert isinstance(found, str)
    assert re.search(why, found)


COMPILERS = {
    "latin-1": (b"#!/bin/sh\nprintf 'Fehler: ung\\374ltige Option\\n' >&2\nexit 1\n", "Fehler: ung\ufffdltige Option"),
    "the error after a note": (b"#!/bin/sh\nprintf 'In file\\nx.h: error: no\\n' >&2\nexit 1\n", "x.h: error: no"),
    "killed": (b"#!/bin/sh\nkill -KILL $$\n", "stopped by signal 9, Killed"),
    "not a program": (b"\x00\x01", "could not compile five.cpp .*Exec format error"),
    "waits": (b"#!/bin/sh\nexec sleep 30\n", "took more than 0.2 s"),
}


@pytest.mark.parametrize(("script", "why"), COMPILERS.values(), ids=COMPILERS)
def test_a_compiler_that_misbehaves(source, tmp_path, monkeypatch, script, why):
    compiler = tmp_path / "compiler"
    compiler.write_bytes(script)
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setattr(build, "TIMEOUT_SECONDS", 0.2 if why.startswith("took") else 60)
    found = build.library(source, "FIVE=5")
    assert isinstance(found, str)
    assert re.search(f"{why}.*; set CXX to another compiler", found)
    assert files(tmp_path / "cache") == []


@needs_compiler
@pytest.mark.parametrize("name", ["g++", "g\udcfc++"], ids=["relative", "another encoding"])
def test_a_compiler_with_a_relative_path_or_in_another_encoding(source, tmp_path, monkeypatch, name):
    (tmp_path / name).symlink_to(build._compiler()[0])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CXX", f"./{name}")
    assert build.library(source, "FIVE=5").five() == 5


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
def test_a_full_or_read_only_cache(source, monkeypatch, number):
    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    assert re.search(f"{os.strerror(number)}.*set XDG_CACHE_HOME", build.library(source, "FIVE=5"))


@needs_compiler
def test_a_read_only_cache_that_has_the_library(source, folder, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    build.library(source, "FIVE=5")
    build._library.cache_clear()
    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    monkeypatch.setattr(os, "utime", refuse)
    assert build.library(source, "FIVE=5").five() == 5


@pytest.mark.skipif(not hasattr(os, "ST_NOEXEC"), reason="not on this system")
def test_a_file_system_without_libraries_is_refused_before_compiling(source, monkeypatch):
    class Status:
        f_flag = os.ST_NOEXEC if hasattr(os, "ST_NOEXEC") else 0

    monkeypatch.setattr(os, "fstatvfs", lambda _: Status)
    monkeypatch.setattr(build, "_compile", None)
    assert re.search("mounted noexec.*set XDG_CACHE_HOME", build.library(source, "FIVE=5"))


# --- Where the cache is ---


def test_the_cache_is_the_users_own(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert build.cache_folder() == Path("/somewhere/lightning_lopt")
    monkeypatch.setenv("HOME", "/home/me")
    for ignored in ("", "relative", "~/.cache"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert build.cache_folder() == Path("/home/me/.cache/lightning_lopt")


@pytest.mark.parametrize("home", [None, "relative"])
def test_a_user_without_a_home_takes_eager_pytorch(source, monkeypatch, home):
    """As under `docker run --user 54321`."""

    def unknown(uid):
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME") if home is None else monkeypatch.setenv("HOME", home)
    assert re.search("no home folder.*set XDG_CACHE_HOME to the absolute path", build.library(source, "FIVE=5"))
    monkeypatch.setenv("CXX", shutil.which("true"))
    monkeypatch.setattr(kernels, "_WARNED", set())
    optimizer = RuleOptimizer(parameters(), make("scheduled"))
    with pytest.warns(UserWarning, match="eager PyTorch.*no home folder"):
        run(optimizer, 1)
    assert optimizer.backend == "reference"


def test_without_a_compiler_eager_pytorch_runs_and_this_is_said_once(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(kernels, "_WARNED", set())
    reference, auto = (
        RuleOptimizer(parameters(), make("scheduled"), backend=b, safeguard=True) for b in ("reference", "auto")
    )
    with pytest.warns(UserWarning, match=r"eager PyTorch.*no C\+\+ compiler.*backend='reference'") as caught:
        run(auto, 3)
    assert len(caught) == 1
    assert auto.backend == "reference"
    run(reference, 3)
    for a, b in zip(snapshot(reference), snapshot(auto), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"'fused' is missing.*no C\+\+ compiler.*install one"):
        RuleOptimizer(parameters(), make("scheduled"), backend="fused")
