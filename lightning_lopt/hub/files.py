"""Read and write the three files of a rule. Files are untrusted when read, and replaced all or none when written.

Nothing that is read is ever executed: there is no pickle, and a kind is looked up in `rules.REGISTRY`, never imported.
Sizes are bounded before anything is parsed, and the header of the weights must list exactly the tensors that the
configuration requires before their data are read. A bad file raises a `ValueError` with a one-line message.

Three files cannot be renamed atomically. A process killed between two renames leaves new weights beside an old
configuration, so config.json stores the sha256 of the weights that it belongs to.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import math
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from lightning_lopt.hub import importers, velo_files
from lightning_lopt.hub.errors import clip, refusal, show
from lightning_lopt.rules import REGISTRY, Source, UpdateRule

FORMAT_VERSION = 1
CONFIG, WEIGHTS, CARD = "config.json", importers.SAFETENSORS, "README.md"
MAX_BYTES = {  # loading needs about 5x the file size
    CONFIG: 64 << 10,
    WEIGHTS: 16 << 20,
    importers.THETA: velo_files.MAX_TREE_BYTES,  # `importers` has a lower limit for all but VeLO
    importers.PARAMS: velo_files.MAX_TREE_BYTES,
    velo_files.GIN: 64 << 10,
}
MAX_HEADER_BYTES = 1 << 20
DTYPES = ("F16", "BF16", "F32", "F64")
_STAGING = ".saving-"  # prefix of the temporary folder in which save_rule prepares its files


class Template(NamedTuple):
    """The rule that a config.json describes, without its weights."""

    rule: UpdateRule  # on the meta device: shapes without memory
    sha256: str | None  # of the weights file that belongs to it; None if the file does not say
    foreign: importers.Foreign | None = None  # for another package's file
    part: velo_files.Part | None = None  # of PyLO's VeLO, which has two files; the rule is empty then

    @property
    def weights(self) -> str:
        """The name of the file with the weights."""
        return WEIGHTS if self.foreign is None else self.foreign.weights


@functools.cache
def library_version() -> str:
    """Return the version of the installed package, for files and HTTP requests."""
    try:
        return importlib.metadata.version("lightning_lopt")
    except importlib.metadata.PackageNotFoundError:  # a checkout on sys.path that was never installed
        return "unknown"


@contextmanager
def _open(path: Path, file: str, name: str) -> Iterator[BinaryIO]:
    if not path.is_file():  # opening a named pipe would block forever
        todo = {WEIGHTS: "Only safetensors are read; check", CONFIG: "save_rule writes one; check"}.get(name, "Check")
        raise refusal(file, "is missing or is not a regular file", f"{todo} the directory.")
    with path.open("rb") as stream:
        check_size(os.fstat(stream.fileno()).st_size, name, file)
        yield stream


def check_size(size: int, name: str, file: str) -> None:
    """Raise a ValueError if a file is larger than a rule file of that name can be."""
    if size > MAX_BYTES[name]:
        raise refusal(file, f"has {size} bytes; at most {MAX_BYTES[name]} are allowed", "This is not a rule file.")


def read_config(path: Path, file: str, repo_id: str = "") -> Template:
    """Read a config.json; `file` is its name in error messages, `repo_id` the Hub repo that it is from."""
    with _open(path, file, CONFIG) as stream:
        return _parse_config(stream.read(), file, repo_id)


def _parse_config(data: bytes, file: str, repo_id: str = "") -> Template:
    spec = _parse_json(data, file)
    if "format_version" not in spec and (part := velo_files.part_of(spec, file)) is not None:
        return Template(UpdateRule(kind="velo"), None, part=part)
    if (foreign := importers.foreign_format(spec, file, repo_id)) is not None:
        return Template(_described(foreign.kind, foreign.values, file), None, foreign)
    version, kind, values, sha256 = (spec.get(key) for key in ("format_version", "kind", "config", "sha256"))
    if type(version) is not int or version < 1:
        raise refusal(file, f"format_version={show(version)}; allowed is {FORMAT_VERSION}", "This is not a rule file.")
    if version > FORMAT_VERSION:
        what = (
            f"format_version={version} is newer than {FORMAT_VERSION}, which lightning_lopt {library_version()} reads"
        )
        raise refusal(file, what, "Upgrade: pip install -U lightning_lopt.")
    if not isinstance(kind, str) or kind not in REGISTRY:
        what = f"kind={show(kind)} is unknown; known are {', '.join(sorted(REGISTRY))}"
        raise refusal(file, what, "Upgrade lightning_lopt, or register your own kind first.")
    if not isinstance(values, dict):
        raise refusal(file, f"config={show(values)} is not a JSON object", "This is not a rule file.")
    if sha256 is not None and not (isinstance(sha256, str) and re.fullmatch("[0-9a-f]{64}", sha256)):
        raise refusal(file, f"sha256={show(sha256)} is not 64 hexadecimal digits", "Get another copy.")
    return Template(_described(kind, values, file), sha256)


def _described(kind: str, values: dict[str, Any], file: str) -> UpdateRule:
    rule, defaults = REGISTRY[kind]
    try:
        return _make(kind, rule.Config.from_dict({**defaults, **values}), "meta")
    except Exception as error:  # the values are untrusted: any error that a rule's checks raise is the file's fault
        raise refusal(file, f"config of kind {kind!r}: {error}", "Correct or remove the key.") from error


def _make(kind: str, config: Any, device: str) -> UpdateRule:
    # The initial values are discarded, so drawing them must not advance the user's random state.
    with torch.random.fork_rng(devices=[]), torch.device(device):
        return REGISTRY[kind].rule(config, kind=kind)


def _parse_json(data: bytes, file: str) -> dict[str, Any]:
    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(result := dict(items)) < len(items):
            raise ValueError("a key occurs twice")
        return result

    def number(text: str) -> float:
        if not math.isfinite(value := float(text)):
            raise ValueError(f"{text[:20]} is not a finite number")
        return value

    def integer(text: str) -> int:
        if len(text) > 19:  # beyond 64 bits float() overflows, and beyond 4300 digits int() refuses
            raise ValueError(f"{text[:20]}... is too large")
        return int(text)

    try:
        value = json.loads(
            data.decode(), object_pairs_hook=pairs, parse_float=number, parse_constant=number, parse_int=integer
        )
    except (ValueError, RecursionError) as error:
        raise refusal(file, f"is not valid JSON ({error})", "The file is damaged; get another copy.") from None
    if not isinstance(value, dict):
        raise refusal(file, f"contains {show(value)}, not a JSON object", "This is not a rule file.")
    return value


def build(template: Template, weights: Path, file: str, source: Source) -> UpdateRule:
    """Build the rule that a template describes, with weights from a file that must contain exactly its tensors."""
    data = _read_weights(template, weights, file)
    mixed = template.sha256 is not None and hashlib.sha256(data).hexdigest() != template.sha256
    what = f"is not the file that {CONFIG} was saved with: its sha256 differs"
    if mixed and (previous := _previous_files(weights.parent)):
        raise refusal(file, what, f"A save was killed: copy the files in {previous} back, or save again.")
    tensors = _parse_weights(data, template, file)  # its errors are more precise than "the sha256 differs"
    if mixed:
        raise refusal(file, what, "Take both files from the same save, or save the rule again.")
    if template.foreign is not None:
        tensors = template.foreign.convert(tensors, template.rule)
        if template.foreign.left_out is not None:
            warnings.warn(f"{clip(file, 80)}: {template.foreign.left_out}.", stacklevel=3)
    rule = _make(template.rule.kind, template.rule.config, "cpu")
    rule.load_state_dict(tensors, strict=True, assign=True)  # assign: keep the file's dtype
    rule.source = source
    return rule


def read_part(template: Template, weights: Path, file: str) -> dict[str, Tensor]:
    """Read the tensors of one part of PyLO's VeLO."""
    assert template.part is not None
    tensors = _parse_weights(_read_weights(template, weights, file), template, file)
    return {name: tensors[name] for name in template.part.shapes}


def _read_weights(template: Template, weights: Path, file: str) -> bytes:
    with _open(weights, file, template.weights) as stream:
        data = stream.read(MAX_BYTES[template.weights] + 1)  # bounded even if the file grows meanwhile
    check_size(len(data), template.weights, file)
    return data


def _previous_files(directory: Path) -> str | None:
    """The folder in which a killed `replace_files` left the files that it was about to replace."""
    left = sorted(path.parent for path in directory.glob(f"{_STAGING}*/old/{CONFIG}"))
    return clip(left[-1].relative_to(directory).as_posix(), 60) if left else None


def read_theta(path: Path, file: str) -> dict[str, Tensor]:
    """Read the arrays of learned_optimization's theta.state, or of its `params`."""
    with _open(path, file, importers.THETA) as stream:
        return importers.parse_theta(stream.read(MAX_BYTES[importers.THETA]), file)


def read_gin(path: Path, file: str) -> dict[str, Any] | None:
    """Read the constructor's arguments from VeLO's config.gin; None if there is no such file."""
    if not path.exists():
        return None
    with _open(path, file, velo_files.GIN) as stream:
        return velo_files.parse_gin(stream.read(MAX_BYTES[velo_files.GIN]), file)


def _parse_weights(data: bytes, template: Template, file: str) -> dict[str, Tensor]:
    if template.weights == importers.THETA:
        theta = importers.parse_theta(data, file)
        importers.check_arrays(theta, _expected_shapes(template), file)
        return theta
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > min(MAX_HEADER_BYTES, len(data) - 8):
        what = "is truncated or not a safetensors file"
        raise refusal(file, what, "Only safetensors are read, not pickle, .bin or .pt.")
    _check_header(_parse_json(data[8 : 8 + length], file), template, file)
    try:
        tensors = safetensors.torch.load(data)
    except Exception as error:  # SafetensorError or one of torch's; they share no base class
        what = f"is not a valid safetensors file ({error})"
        raise refusal(file, what, "It is damaged; get another copy.") from error
    ignored = frozenset() if template.part is None else template.part.ignored
    for name, tensor in tensors.items():
        if name not in ignored and not tensor.isfinite().all():
            what = f"tensor {name!r} contains NaN or infinity"
            raise refusal(file, what, "Its meta-training diverged; use another rule.")
    return tensors


def _check_header(header: dict[str, Any], template: Template, file: str) -> None:
    """Raise a ValueError unless kind, names, shapes and dtypes are those of the rule."""
    metadata = header.pop("__metadata__", {})
    kind = template.rule.kind
    found_kind = metadata.get("lopt_kind", kind) if isinstance(metadata, dict) else metadata
    if found_kind != kind:
        what = f"is of kind {show(found_kind)}, but {CONFIG} is of kind {kind!r}"
        raise refusal(file, what, "Take both files from the same rule.")
    expected = _expected_shapes(template)
    if template.part is not None:
        header = {name: entry for name, entry in header.items() if name not in template.part.ignored}
    for problem, names in (
        ("missing", expected.keys() - header.keys()),
        ("unexpected", header.keys() - expected.keys()),
    ):
        if names:
            what = f"tensor {show(min(names))} is {problem}; the rule has {clip(', '.join(expected), 70)}"
            raise refusal(file, what, "Take both files from the same rule.")
    for name, shape in expected.items():
        entry = header[name] if isinstance(header[name], dict) else {}
        if entry.get("shape") != shape:
            what = f"tensor {name!r} has shape {show(entry.get('shape'))}, but {CONFIG} requires {shape}"
            raise refusal(file, what, "Take both files from the same rule.")
        if not isinstance(dtype := entry.get("dtype"), str) or dtype not in DTYPES:
            what = f"tensor {name!r} has dtype {show(dtype)}; allowed are {', '.join(DTYPES)}"
            raise refusal(file, what, "Convert it to F32.")


def _expected_shapes(template: Template) -> dict[str, list[int]]:
    if template.part is not None:
        return template.part.shapes
    if template.foreign is not None:
        return template.foreign.shapes(template.rule)
    return {name: list(tensor.shape) for name, tensor in template.rule.state_dict().items()}


def serialize(rule: UpdateRule) -> dict[str, bytes]:
    """Encode the weights and the configuration, and verify that they load again."""
    if rule.kind not in REGISTRY or REGISTRY[rule.kind].rule.__qualname__ != type(rule).__qualname__:
        known = ", ".join(sorted(REGISTRY))
        raise ValueError(
            f"{type(rule).__name__} of kind {rule.kind!r} is not registered; known are {known}. Register it first."
        )
    # Cloned, since safetensors refuses tensors that share memory.
    tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in rule.state_dict().items()}
    metadata = {"format": "pt", "lopt_kind": rule.kind, "format_version": str(FORMAT_VERSION)}
    weights = _sorted_header(safetensors.torch.save(tensors, metadata))
    spec = {"format_version": FORMAT_VERSION, "kind": rule.kind, "library_version": library_version()}
    spec |= {"config": rule.config.to_dict(), "sha256": hashlib.sha256(weights).hexdigest()}
    try:
        config = json.dumps(spec, indent=2, sort_keys=True, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{CONFIG}: the configuration cannot be written as JSON ({error}). Use numbers, strings and tuples."
        ) from error
    template = _parse_config(config.encode(), CONFIG)
    if template.rule.config != rule.config:
        raise ValueError(f"{CONFIG}: the configuration does not survive JSON. Use numbers, strings and flat tuples.")
    for name, data in ((CONFIG, config), (WEIGHTS, weights)):
        check_size(len(data), name, name)
    _parse_weights(weights, template, WEIGHTS)
    return {WEIGHTS: weights, CONFIG: config.encode()}


def _sorted_header(weights: bytes) -> bytes:
    """Sort the header. The library writes metadata in random order, but saving a rule twice must give equal bytes."""
    end = 8 + int.from_bytes(weights[:8], "little")
    header = json.dumps(json.loads(weights[8:end]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # the data must stay aligned to 8 bytes
    return len(header).to_bytes(8, "little") + header + weights[end:]


def replace_files(directory: Path, files: Mapping[str, bytes]) -> None:
    """Write all files to a temporary folder, then rename them into place; restore the old ones if that fails."""
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=_STAGING, dir=directory) as staging:
        new, old = Path(staging, "new"), Path(staging, "old")
        new.mkdir()
        old.mkdir()
        for name, data in files.items():
            with (new / name).open("wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            if (directory / name).is_file():
                shutil.copy2(directory / name, old / name)
        try:
            for name in files:
                os.replace(new / name, directory / name)
        except BaseException:
            for name in files:
                if (old / name).exists():
                    os.replace(old / name, directory / name)
                elif (directory / name).is_file():
                    (directory / name).unlink()
            raise


_FRONT_MATTER = """---
library_name: lightning_lopt
license: apache-2.0
tags:
- learned-optimizer
- meta-learning
- pytorch-lightning
- {kind}
---

"""

UNDOCUMENTED = "The author did not say how it was meta-trained and evaluated."  # marks a card that save_rule wrote
_BODY = """# A learned optimizer of kind `{kind}`

An update rule of lightning_lopt with {count} meta-parameters, for PyTorch \
Lightning and for plain PyTorch loops. {undocumented}

```python
import lightning as L
import lightning_lopt as lopt

trainer = L.Trainer(callbacks=[lopt.LearnedOptimizer.from_pretrained({name})])
```

## Configuration

```json
{config}
```
"""


def model_card(rule: UpdateRule, name: str, card: str | None) -> str:
    """Return the model card with its front matter; `card` as for `save_rule`, `name` for the card's loading example."""
    if card is not None and card.startswith("---\n"):
        return card
    if card is None:
        config = json.dumps(rule.config.to_dict(), indent=2, sort_keys=True)
        card = _BODY.format(
            kind=rule.kind,
            count=rule.num_meta_params(),
            undocumented=UNDOCUMENTED,
            name=json.dumps(name),
            config=config,
        )
    return _FRONT_MATTER.format(kind=rule.kind) + card
