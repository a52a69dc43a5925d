"""A rule's files: round trips, hostile files, and errors in the middle of saving."""

import dataclasses
import hashlib
import json
import math
import os
import pickle
import signal
import struct
import tempfile
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lightning_lopt as lopt
from lightning_lopt.hub import files
from lightning_lopt.rules import REGISTRY, RuleConfig, UpdateRule

KINDS = sorted(REGISTRY)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The directory of a valid rule, for tests to damage."""
    return lopt.save_rule(lopt.rules.make("star"), tmp_path / "rule")


def refusal(path: Path) -> str:
    """Load the directory, which must fail, and return the one-line error message."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the callers look at the message
        lopt.load_rule(path)
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 300
    return message


# Round trips


def assert_equal(found: UpdateRule, expected: UpdateRule) -> None:
    assert type(found) is type(expected)
    assert (found.kind, found.config) == (expected.kind, expected.config)
    tensors = expected.state_dict()
    assert found.state_dict().keys() == tensors.keys()
    for name, tensor in found.state_dict().items():
        assert tensor.dtype == tensors[name].dtype
        assert torch.equal(tensor, tensors[name])


DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}


def test_every_dtype_that_is_allowed_is_tested() -> None:
    assert set(files.DTYPES) == set(DTYPES)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_the_digest_tells_weights_of_every_dtype_apart(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = lopt.save_rule(lopt.rules.make("star").to(dtype), tmp_path / "one")
    other = lopt.rules.make("star").to(dtype)
    with torch.no_grad():
        other.w0[0, 0] += 1
    (folder / "model.safetensors").write_bytes(files.serialize(other)["model.safetensors"])
    assert "its sha256 differs" in refusal(folder)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_comes_back_as_it_was(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    small = {"velo": {"lstm_hidden_size": 8}}  # at its published size, files are for float32
    rule = lopt.rules.make(kind, **small.get(kind, {})).to(dtype)
    loaded = lopt.load_rule(lopt.save_rule(rule, tmp_path))
    assert_equal(loaded, rule)
    assert loaded.source == (str(tmp_path), None)
    assert all(param.requires_grad and param.is_leaf for param in loaded.parameters())


finite = st.floats(0, 1e300)
decay = st.floats(0, math.nextafter(1.0, 0.0))
star_configs = st.fixed_dictionaries(
    {},
    optional={
        "nominal_stepsize": finite,
        "step_mult": finite,
        "weight_decay": finite,
        "exp_mult": st.tuples(finite, finite, finite),
        "nominal_grad_estimator": st.sampled_from(["SGD", "SGDM", "AggMo", "Adam", "AdamAggMo"]),
        "normalize_blackbox": st.booleans(),
        "aggregate_magnitude": st.booleans(),
        "selfnormalize_blackbox": st.booleans(),
        "hidden_size": st.integers(1, 12),
        "hidden_layers": st.integers(1, 4),
        "initial_momentum_decays": st.tuples(decay, decay, decay),
    },
)


@given(kind=st.sampled_from(["star", "hyperparam", "blackbox"]), config=star_configs, seed=st.integers(0, 2**32))
@settings(max_examples=60)
def test_any_legal_configuration_comes_back_as_it_was(kind: str, config: dict[str, Any], seed: int) -> None:
    torch.manual_seed(seed)
    rule = lopt.rules.make(kind, **config)
    with tempfile.TemporaryDirectory() as directory:
        assert_equal(lopt.load_rule(lopt.save_rule(rule, directory)), rule)


def test_from_jax_comes_back_as_it_was(tmp_path: Path) -> None:
    theta = {name: param.detach().numpy() for name, param in lopt.rules.make("blackbox").named_parameters()}
    rule = lopt.rules.STAR.from_jax(theta, exp_mult=0.1)
    assert_equal(lopt.load_rule(lopt.save_rule(rule, tmp_path)), rule)


def test_the_files_that_are_written(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    text = (folder / "config.json").read_text()
    config = json.loads(text)
    assert config.keys() == {"format_version", "kind", "config", "library_version", "sha256"}
    assert config["sha256"] == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert (config["format_version"], config["kind"]) == (1, "star")
    assert config["library_version"] == lopt.__version__
    assert config["config"].keys() == {field.name for field in dataclasses.fields(lopt.rules.STARConfig)}
    assert text == json.dumps(config, indent=2, sort_keys=True) + "\n"
    with safetensors.safe_open(folder / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "lopt_kind": "star", "format_version": "1"}
    if os.name == "posix":
        os.umask(umask := os.umask(0))
        assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o666 & ~umask}


def test_two_saves_of_one_rule_are_the_same_bytes(tmp_path: Path) -> None:
    rule = lopt.rules.make("star")
    one, two = (lopt.save_rule(rule, tmp_path / name, card="x") for name in ("one", "two"))
    assert all((one / path.name).read_bytes() == path.read_bytes() for path in two.iterdir())


def test_a_configuration_written_by_hand_takes_the_kinds_defaults(tmp_path: Path) -> None:
    lopt.save_rule(rule := lopt.rules.make("blackbox"), tmp_path)
    (tmp_path / "config.json").write_text('{"format_version": 1, "kind": "blackbox", "config": {}, "note": "mine"}')
    assert_equal(lopt.load_rule(tmp_path), rule)


def test_loading_moves_neither_the_random_state_nor_the_rule_to_the_default_device(folder: Path) -> None:
    before = torch.get_rng_state()
    with torch.device("meta"):
        rule = lopt.load_rule(folder)
    assert torch.equal(torch.get_rng_state(), before)
    assert {param.device.type for param in rule.parameters()} == {"cpu"}


# Custom kinds


@dataclasses.dataclass(frozen=True)
class OwnConfig(RuleConfig):
    size: int = 2
    nested: Any = ()


class OwnRule(UpdateRule):
    """A rule with shared memory, a submodule, a persistent buffer and a non-persistent one."""

    Config = OwnConfig
    config: OwnConfig

    def __init__(self, config: OwnConfig | None = None, *, kind: str = "own") -> None:
        super().__init__(config, kind=kind)
        self.inner = nn.Linear(self.config.size, self.config.size)
        self.tied = self.inner.weight
        self.register_buffer("mean", torch.ones(()))
        self.register_buffer("scales", torch.arange(3.0), persistent=False)


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(REGISTRY, "own", REGISTRY["star"]._replace(rule=OwnRule, defaults={}))


@pytest.mark.usefixtures("own")
def test_a_custom_kind_comes_back_as_it_was(tmp_path: Path) -> None:
    rule = lopt.rules.make("own", size=3)
    loaded = lopt.load_rule(lopt.save_rule(rule, tmp_path))
    assert_equal(loaded, rule)
    assert torch.equal(loaded.scales, torch.arange(3.0))  # built on the meta device it would be lost


def test_a_rule_without_meta_parameters_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Plain(UpdateRule):
        def __init__(self, config: RuleConfig | None = None, *, kind: str = "plain") -> None:
            super().__init__(config, kind=kind)

    monkeypatch.setitem(REGISTRY, "plain", REGISTRY["star"]._replace(rule=Plain, defaults={}))
    assert_equal(lopt.load_rule(lopt.save_rule(lopt.rules.make("plain"), tmp_path)), lopt.rules.make("plain"))


# Rules that cannot be saved


def damaged(change: Callable[[UpdateRule], object]) -> UpdateRule:
    rule = lopt.rules.make("star")
    change(rule)
    return rule


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda rule: nn.init.constant_(rule.b1, math.nan), "'b1' contains NaN"),
        (lambda rule: nn.init.constant_(rule.w0, -math.inf), "'w0' contains NaN or infinity"),
        (lambda rule: setattr(rule, "kind", "unregistered"), "not registered"),
        (lambda rule: setattr(rule, "kind", ""), "not registered"),
        (lambda rule: setattr(rule, "b1", nn.Parameter(torch.zeros(5))), "'b1' has shape"),
        (lambda rule: rule.register_parameter("extra", nn.Parameter(torch.zeros(1))), "'extra' is unexpected"),
        (lambda rule: rule.register_buffer("count", torch.zeros((), dtype=torch.int64)), "'count' is unexpected"),
        (lambda rule: setattr(rule, "b1", nn.Parameter(torch.zeros(4, dtype=torch.cfloat))), "dtype"),
    ],
)
def test_a_rule_that_would_not_load_is_not_saved(
    change: Callable[[UpdateRule], object], part: str, folder: Path
) -> None:
    before = contents(folder)
    with pytest.raises(ValueError, match=part) as caught:
        lopt.save_rule(damaged(change), folder)
    assert "\n" not in str(caught.value)
    assert contents(folder) == before


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize("value", [object(), math.nan, ((1, 2), (3,)), {1: 2}, 10**40])
def test_a_configuration_that_json_does_not_give_back_is_not_saved(value: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="config.json"):
        lopt.save_rule(lopt.rules.make("own", nested=value), tmp_path / "rule")
    assert not (tmp_path / "rule").exists()


# Errors in the middle of saving


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("function", ["os.fsync", "os.replace"])
@pytest.mark.parametrize("call", [0, 1, 2])
@pytest.mark.parametrize("fresh", [False, True])
def test_an_error_while_saving_leaves_what_was_there(
    error: BaseException, function: str, call: int, fresh: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = folder.parent / "fresh" if fresh else folder
    before = contents(target)
    original, calls = getattr(os, function.removeprefix("os.")), iter(range(99))

    def fail_once(*arguments: Any) -> Any:
        if next(calls) == call:
            raise error
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(function, fail_once)
        with pytest.raises(type(error)):
            lopt.save_rule(lopt.rules.make("blackbox"), target)
    assert contents(target) == before
    assert [path.name for path in target.iterdir() if path.is_dir()] == []
    if not fresh:
        assert lopt.load_rule(target).kind == "star"


def test_a_directory_in_the_place_of_a_file_leaves_what_was_there(folder: Path) -> None:
    (folder / "README.md").unlink()
    (folder / "README.md").mkdir()
    before = contents(folder)
    with pytest.raises(OSError, match=r"README\.md"):
        lopt.save_rule(lopt.rules.make("blackbox"), folder)
    assert contents(folder) == before


def save_and_be_killed(rule: UpdateRule, folder: Path, kill_at: int) -> int:
    """Save in a process that is killed just before its system call number `kill_at`; return its exit code."""
    if (child := os.fork()) == 0:
        count = iter(range(99))

        def killing(call: Callable[..., Any], *arguments: Any, **more: Any) -> Any:
            if next(count) == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **more)

        for name in ("mkdir", "fsync", "replace"):
            setattr(os, name, partial(killing, getattr(os, name)))
        lopt.save_rule(rule, folder)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def old_new_or_refused(folder: Path, old: UpdateRule, new: UpdateRule) -> str:
    try:
        loaded = lopt.load_rule(folder)
    except ValueError as error:
        return str(error)
    is_old = torch.equal(loaded.state_dict()["w0"], old.state_dict()["w0"])
    assert_equal(loaded, old if is_old else new)
    return "old" if is_old else "new"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("kind", ["star", "blackbox"])
def test_a_kill_at_any_point_of_saving_leaves_no_mixture_that_loads(kind: str, tmp_path: Path) -> None:
    old, new = lopt.rules.make("star"), lopt.rules.make(kind, step_mult=0.5)
    found = []
    for kill_at in range(99):
        folder = lopt.save_rule(old, tmp_path / str(kill_at))
        ending = save_and_be_killed(new, folder, kill_at)
        found.append(old_new_or_refused(folder, old, new))
        if ending == 0:
            break
        assert ending == -signal.SIGKILL
        if found[-1] not in ("old", "new"):
            (before,) = folder.glob(".saving-*/old")
            assert f"A save was killed: copy the files in {before.relative_to(folder)} back, or" in found[-1]
            for path in before.iterdir():
                os.replace(path, folder / path.name)
            assert old_new_or_refused(folder, old, new) == "old"
    # Before the first rename the old rule loads, between the first and the second neither, then the new one.
    assert kill_at == 10
    assert found[:8] == ["old"] * 8
    assert found[8] not in ("old", "new")
    assert found[9:] == ["new"] * 2


def test_files_without_a_digest_load(folder: Path) -> None:
    expected = lopt.load_rule(folder)
    config = json.loads((folder / "config.json").read_text())
    del config["sha256"]
    (folder / "config.json").write_text(json.dumps(config))
    assert_equal(lopt.load_rule(folder), expected)
    (folder / "model.safetensors").write_bytes(SOUND)
    lopt.load_rule(folder)


def test_other_weights_than_those_of_the_configuration_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(SOUND)
    assert "is not the file that config.json was saved with" in refusal(folder)


@pytest.mark.parametrize("digest", ["", "0" * 63, "G" * 64, "0" * 64 + "\n", 1, ["0" * 64], {"a": 1}], ids=str)
def test_an_invalid_digest_is_refused(digest: Any, folder: Path) -> None:
    (folder / "config.json").write_bytes(config_with(sha256=digest))
    assert "not 64 hexadecimal digits" in refusal(folder)


def test_other_files_are_left_alone(folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")
    lopt.save_rule(lopt.rules.make("blackbox"), folder)
    assert (folder / "notes.txt").read_text() == "mine"
    assert lopt.load_rule(folder).kind == "blackbox"


# Hostile configurations


def config_with(**changes: Any) -> bytes:
    """A valid config.json of kind star with changed top-level values; a value of None removes the key."""
    spec = {"format_version": 1, "kind": "star", "config": {}, "library_version": "0.1.0", **changes}
    return json.dumps({key: value for key, value in spec.items() if value is not None}).encode()


def star(**config: Any) -> bytes:
    return config_with(config=config)


HOSTILE_CONFIGS = {
    "empty": (b"", "is not valid JSON"),
    "not JSON": (b"kind: star", "is not valid JSON"),
    "cut off": (config_with()[:-3], "is not valid JSON"),
    "not UTF-8": (b"\xff\xfe" + config_with(), "is not valid JSON"),
    "a byte order mark": (b"\xef\xbb\xbf" + config_with(), "is not valid JSON"),
    "bytes that are no text": (bytes(range(256)), "is not valid JSON"),
    "a list": (b"[1, 2]", "not a JSON object"),
    "null": (b"null", "not a JSON object"),
    "a long string": (json.dumps("x" * 60000).encode(), "not a JSON object"),
    "duplicate keys": (b'{"kind": "star", "kind": "blackbox"}', "a key occurs twice"),
    "duplicate keys inside": (b'{"config": {"step_mult": 1, "step_mult": 2}}', "a key occurs twice"),
    "deep nesting": (b"[" * 60000, "is not valid JSON"),
    "deep objects": (b'{"a":' * 10000 + b"1" + b"}" * 10000, "is not valid JSON"),
    "deep nesting in a value": (star(exp_mult=0).replace(b"0}", b"[" * 400 + b"]" * 400 + b"}"), "exp_mult"),
    "too large": (config_with() + b" " * (64 << 10), "at most 65536"),
    "no version": (config_with(format_version=None), "format_version=None"),
    "future version": (config_with(format_version=2), "newer than 1.*Upgrade"),
    "version zero": (config_with(format_version=0), "format_version=0; allowed is 1"),
    "version as a string": (config_with(format_version="1"), "format_version='1'"),
    "version as a bool": (config_with(format_version=True), "format_version=True"),
    "version as a float": (config_with(format_version=1.0), "format_version=1.0"),
    "version too large for an int": (b'{"format_version": 1' + b"0" * 5000 + b"}", "too large"),
    "no kind": (config_with(kind=None), "kind=None is unknown"),
    "unknown kind": (config_with(kind="nope"), "kind='nope' is unknown; known are blackbox"),
    "kind that is an import path": (config_with(kind="os.system"), "unknown"),
    "kind that is a class": (config_with(kind="lightning_lopt.rules.star.STAR"), "unknown"),
    "kind that is a path": (config_with(kind="../../etc/passwd"), "unknown"),
    "kind that is a dunder": (config_with(kind="__class__"), "unknown"),
    "kind with line breaks": (config_with(kind="a\nb\x1b[31m"), "unknown"),
    "kind that is long": (config_with(kind="k" * 50000), "unknown"),
    "kind that is a list": (config_with(kind=["star"]), "unknown"),
    "kind that is an object": (config_with(kind={"star": 1}), "unknown"),
    "no config": (config_with(config=None), "config=None is not a JSON object"),
    "config that is a list": (config_with(config=[1]), "not a JSON object"),
    "unknown config key": (star(learning_rate=1), "Unknown config key 'learning_rate'"),
    "config key kind": (star(kind="star"), "Unknown config key 'kind'"),
    "config key self": (star(self=1), "Unknown config key 'self'"),
    "config key with line breaks": (star(**{"a\nb" * 500: 1}), "Unknown config key"),
    "hidden_size 10**9": (star(hidden_size=10**9), "hidden_size=1000000000 is not allowed"),
    "hidden_layers 10**6": (star(hidden_layers=10**6), "hidden_layers=1000000 is not allowed"),
    "hidden_size 10**30": (star(hidden_size=10**30), "too large"),
    "hidden_size -1": (star(hidden_size=-1), "hidden_size=-1"),
    "hidden_size 0": (star(hidden_size=0), "hidden_size=0"),
    "hidden_size 4.0": (star(hidden_size=4.0), "hidden_size=4.0"),
    "hidden_size true": (star(hidden_size=True), "hidden_size=True"),
    "hidden_size '4'": (star(hidden_size="4"), "hidden_size='4'"),
    "hidden_size null": (star(hidden_size=None), "hidden_size=None"),
    "hidden_size [4]": (star(hidden_size=[4]), "hidden_size="),
    "step_mult '1e-3'": (star(step_mult="1e-3"), "step_mult='1e-3'"),
    "step_mult negative": (star(step_mult=-1), "step_mult=-1"),
    "step_mult true": (star(step_mult=True), "step_mult=True"),
    "step_mult 1e999": (star(step_mult=0).replace(b"0}", b"1e999}"), "not a finite number"),
    "step_mult NaN": (star(step_mult=math.nan), "not a finite number"),
    "step_mult -Infinity": (star(step_mult=-math.inf), "not a finite number"),
    "step_mult 10**400": (star(step_mult=10**400), "too large"),
    "exp_mult too short": (star(exp_mult=[1, 2]), "exp_mult"),
    "exp_mult of strings": (star(exp_mult=["1", "2", "3"]), "exp_mult"),
    "exp_mult of 1e308": (star(exp_mult=[1e308] * 3, initial_rms_decays=[1e308]), "initial_rms_decays"),
    "exp_mult an object": (star(exp_mult={"a": 1}), "exp_mult"),
    "estimator a list": (star(nominal_grad_estimator=[[1]]), "config of kind 'star'"),
    "estimator an object": (star(nominal_grad_estimator={"a": 1}), "config of kind 'star'"),
    "estimator unknown": (star(nominal_grad_estimator="x" * 9999), "nominal_grad_estimator"),
    "flag as an int": (star(normalize_blackbox=1), "normalize_blackbox=1"),
    "num_heads 3": (star(num_heads=3), "num_heads=3"),
    "num_heads a list": (star(num_heads=[4]), "num_heads"),
    "decay of one": (star(initial_rms_decays=[1.0]), "initial_rms_decays"),
    "another shape": (star(hidden_size=5), "model.safetensors: tensor 'w0' has shape"),
    "largest shape": (star(hidden_size=1024, hidden_layers=16), "model.safetensors: tensor 'b10' is missing"),
    "another kind": (
        config_with(kind="hyperparam"),
        "is of kind 'star', but config.json is of kind",
    ),
}


@pytest.mark.parametrize("case", HOSTILE_CONFIGS)
def test_a_hostile_configuration_is_refused(case: str, folder: Path) -> None:
    data, part = HOSTILE_CONFIGS[case]
    (folder / "config.json").write_bytes(data)
    assert_match(refusal(folder), part)


def assert_match(message: str, part: str) -> None:
    with pytest.raises(ValueError, match=part):
        raise ValueError(message)


# Hostile weights

SOUND = safetensors.torch.save(
    {name: torch.zeros(p.shape) for name, p in lopt.rules.make("star").named_parameters()}, {"format": "pt"}
)


def with_tensors(**changes: Tensor | None) -> bytes:
    """A valid weights file with changed tensors; None removes one."""
    tensors = {**safetensors.torch.load(SOUND), **changes}
    return safetensors.torch.save({name: tensor for name, tensor in tensors.items() if tensor is not None})


def with_header(change: Callable[[dict[str, Any]], object]) -> bytes:
    """A valid weights file with a changed header."""
    length = int.from_bytes(SOUND[:8], "little")
    header = json.loads(SOUND[8 : 8 + length])
    change(header)
    return with_header_bytes(json.dumps(header).encode())


def with_header_bytes(header: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + SOUND[8 + int.from_bytes(SOUND[:8], "little") :]


def filled(value: float) -> Tensor:
    return torch.tensor([0.0, value, 0.0, 0.0])


def swap_offsets(header: dict[str, Any]) -> None:
    header["b0"]["data_offsets"], header["b1"]["data_offsets"] = [0, 16], [0, 16]


HOSTILE_WEIGHTS = {
    "empty": (b"", "truncated or not a safetensors file. Only safetensors are read"),
    "seven bytes": (SOUND[:7], "truncated"),
    "header cut off": (SOUND[:100], "truncated"),
    "data cut off": (SOUND[:-1], "not a valid safetensors file"),
    "data missing": (SOUND[: 8 + int.from_bytes(SOUND[:8], "little")], "not a valid safetensors file"),
    "a byte too many": (SOUND + b"\0", "not a valid safetensors file"),
    "appended zip": (SOUND + b"PK\x05\x06" + b"\0" * 18, "not a valid safetensors file"),
    "header length 2**64 - 1": (b"\xff" * 8 + SOUND[8:], "truncated"),
    "header length 2**63": (struct.pack("<Q", 1 << 63) + SOUND[8:], "truncated"),
    "header length of the whole file": (struct.pack("<Q", len(SOUND)) + SOUND[8:], "truncated"),
    "header length zero": (bytes(8) + SOUND[8:], "is not valid JSON"),
    "header above 1 MiB": (with_header_bytes(b" " * (1 << 20) + b"{}"), "truncated"),
    "header not JSON": (with_header_bytes(b"x" * 64), "is not valid JSON"),
    "header not UTF-8": (with_header_bytes(b"\xff" * 64), "is not valid JSON"),
    "header a list": (with_header_bytes(b"[]"), "not a JSON object"),
    "header deeply nested": (with_header_bytes(b"[" * 100000), "is not valid JSON"),
    "header with duplicate names": (with_header_bytes(b'{"w0": {}, "w0": {}}'), "a key occurs twice"),
    "header with a huge integer": (with_header_bytes(b'{"w0": 1' + b"0" * 9999 + b"}"), "too large"),
    "header without tensors": (with_header_bytes(b"{}"), "'adafactor_decays' is missing"),
    "entry that is a list": (with_header(lambda h: h.update(w0=[])), "'w0' has shape None"),
    "entry without shape": (with_header(lambda h: h["w0"].pop("shape")), "'w0' has shape None"),
    "entry without dtype": (with_header(lambda h: h["w0"].pop("dtype")), "'w0' has dtype None"),
    "entry without offsets": (with_header(lambda h: h["w0"].pop("data_offsets")), "not a valid safetensors file"),
    "dtype that is a list": (with_header(lambda h: h["w0"].update(dtype=[])), "'w0' has dtype"),
    "dtype that is unknown": (with_header(lambda h: h["w0"].update(dtype="F31\n")), "'w0' has dtype"),
    "dtype of another size": (with_header(lambda h: h["w0"].update(dtype="F64")), "not a valid safetensors file"),
    "shape negative": (with_header(lambda h: h["w0"].update(shape=[-39, -4])), "'w0' has shape"),
    "shape huge": (with_header(lambda h: h["w0"].update(shape=[10**9, 10**9])), "'w0' has shape"),
    "shape of floats": (with_header(lambda h: h["w0"].update(shape=[39.0, 4.0])), "not a valid safetensors file"),
    "shape transposed": (with_header(lambda h: h["w0"].update(shape=[4, 39])), "'w0' has shape"),
    "offsets that overlap": (with_header(swap_offsets), "not a valid safetensors file"),
    "offsets out of range": (
        with_header(lambda h: h["w0"].update(data_offsets=[10**9, 10**9 + 624])),
        "not a valid safetensors file",
    ),
    "offsets negative": (with_header(lambda h: h["w0"].update(data_offsets=[-624, 0])), "not a valid safetensors file"),
    "offsets reversed": (with_header(lambda h: h["w0"]["data_offsets"].reverse()), "not a valid safetensors file"),
    "offsets that are strings": (
        with_header(lambda h: h["w0"].update(data_offsets=["0", "624"])),
        "not a valid safetensors file",
    ),
    "metadata of another kind": (
        with_header(lambda h: h.update(__metadata__={"lopt_kind": "x\n" * 99})),
        "but config.json is of kind 'star'",
    ),
    "metadata that is a list": (with_header(lambda h: h.update(__metadata__=[])), "but config.json is of kind 'star'"),
    "metadata of numbers": (with_header(lambda h: h.update(__metadata__={"a": 1})), "not a valid safetensors file"),
    "wrong shape": (with_tensors(b1=torch.zeros(5)), r"'b1' has shape \[5\], but config.json requires \[4\]"),
    "wrong rank": (with_tensors(b1=torch.zeros(4, 1)), "'b1' has shape"),
    "missing tensor": (with_tensors(momentum_decays=None), "'momentum_decays' is missing"),
    "extra tensor": (with_tensors(zz=torch.zeros(1)), "'zz' is unexpected"),
    "extra tensor with a long name": (with_tensors(**{"a\n" * 999: torch.zeros(1)}), "unexpected"),
    "NaN": (with_tensors(b1=filled(math.nan)), "'b1' contains NaN or infinity"),
    "infinity": (with_tensors(b1=filled(math.inf)), "'b1' contains NaN or infinity"),
    "minus infinity": (with_tensors(b1=filled(-math.inf)), "'b1' contains NaN or infinity"),
    "int64": (with_tensors(b1=torch.zeros(4, dtype=torch.int64)), "'b1' has dtype 'I64'; allowed are F16"),
    "bool": (with_tensors(b1=torch.zeros(4, dtype=torch.bool)), "'b1' has dtype 'BOOL'"),
    "float8": (with_tensors(b1=torch.zeros(4).to(torch.float8_e4m3fn)), "'b1' has dtype 'F8_E4M3'"),
    "text": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "truncated or not a safetensors"),
}


@pytest.mark.parametrize("case", HOSTILE_WEIGHTS)
def test_a_hostile_weights_file_is_refused(case: str, folder: Path) -> None:
    data, part = HOSTILE_WEIGHTS[case]
    (folder / "model.safetensors").write_bytes(data)
    assert_match(refusal(folder), part)


def test_weights_above_16_mib_are_not_read(folder: Path) -> None:
    with (folder / "model.safetensors").open("wb") as file:
        file.truncate((16 << 20) + 1)  # a sparse file
    assert "at most 16777216 are allowed" in refusal(folder)


class Payload:
    """An object that creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("where", ["model.safetensors", "pytorch_model.bin", "config.json"])
@pytest.mark.parametrize("form", ["pickle", "pickle in a header", "torch.save", "zip"])
def test_nothing_is_unpickled(form: str, where: str, folder: Path) -> None:
    executed = folder.parent / "executed"
    payload = pickle.dumps(Payload(executed))
    (folder / "model.safetensors").unlink()
    target = folder / where
    if form == "torch.save":
        torch.save({"w0": Payload(executed)}, target)
    elif form == "zip":
        with zipfile.ZipFile(target, "w") as archive:
            archive.writestr("archive/data.pkl", payload)
    else:
        target.write_bytes(payload if form == "pickle" else with_header_bytes(payload))
    message = refusal(folder)
    assert "Only safetensors are read" in message or form == "pickle in a header" or where == "config.json"
    assert not executed.exists()
    pickle.loads(payload)  # the payload is a live one
    assert executed.exists()


# Directories


def test_a_directory_without_files_is_refused(tmp_path: Path) -> None:
    assert "config.json: is missing" in refusal(tmp_path)


def test_a_directory_without_weights_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "model.safetensors: is missing" in refusal(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_directory_in_the_place_of_a_file_is_refused(name: str, folder: Path) -> None:
    (folder / name).unlink()
    (folder / name).mkdir()
    assert f"{name}: is missing or is not a regular file" in refusal(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
def test_a_named_pipe_does_not_block(name: str, folder: Path) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)
    assert "not a regular file" in refusal(folder)


def test_a_message_stays_short_in_a_deep_directory(tmp_path: Path) -> None:
    deep = tmp_path.joinpath(*["d" * 50] * 10)
    deep.mkdir(parents=True)
    assert "config.json: is missing" in refusal(deep)
