"""An update rule's files, and the Hugging Face Hub: load, save, push.

A rule is three files: `config.json` (kind and configuration), `model.safetensors` (meta-parameters) and
`README.md` (card). What is read is untrusted. Nothing in it is ever executed: no pickle, and a kind is looked up in
`rules.REGISTRY`, never imported. Sizes are bounded before anything is parsed, and the header of the weights must name
exactly the tensors that the configuration asks for before their data is read. What is wrong with a file is a
`ValueError` of one line; what is wrong with the way to the Hub is a built-in `OSError`: `FileNotFoundError`,
`PermissionError` or `ConnectionError`.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
import reprlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from lightning_lopt import __version__
from lightning_lopt.rules import REGISTRY, UpdateRule

FORMAT_VERSION = 1
CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
MAX_BYTES = {CONFIG: 64 << 10, WEIGHTS: 64 << 20}
MAX_HEADER_BYTES = 1 << 20
DTYPES = ("F16", "BF16", "F32", "F64")


class Source(NamedTuple):
    """Where a rule was loaded from: `rule.source`."""

    name: str  # bundled name, directory or Hub repo id
    revision: str | None  # commit sha, for a Hub repo


def bundled_dir() -> Path:
    """The folder of the bundled rules: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).parent
    # The checkout is recognised by its pyproject.toml: a folder of that name in site-packages would be someone else's.
    in_checkout = not (package / "pretrained").is_dir() and (package.parent / "pyproject.toml").is_file()
    return (package.parent if in_checkout else package) / "pretrained"


def list_pretrained() -> list[str]:
    """The names of the bundled rules, sorted.

    Example:
        >>> import lightning_lopt as lopt
        >>> all(lopt.load_rule(name).source.name == name for name in lopt.list_pretrained())
        True
    """
    return sorted(path.parent.name for path in bundled_dir().glob(f"*/{CONFIG}"))


def load_rule(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    endpoint: str | None = None,
) -> UpdateRule:
    """Load a rule; `rule.source` tells from where.

    Args:
        name_or_path: an existing directory, a bundled name, or a Hub repo id `owner/name`; tried in this order. A
            `pathlib.Path` is always a directory.
        revision: branch, tag or commit sha of a Hub repo (default: its main branch). Branches move: pin a tag or a sha.
        token: Hub token (default: the one of `hf auth login`); False sends none.
        cache_dir: the Hub cache (default: huggingface_hub's own).
        local_files_only: take the Hub repo from the cache and use no network (default False). Without it too, the
            cached copy is taken when the Hub cannot be reached.
        endpoint: address of the Hub (default: `HF_ENDPOINT`, or https://huggingface.co).

    Returns:
        The rule, in the dtype of its file, on the CPU. The global random state is not touched.

    Raises:
        ValueError: unknown name, a revision for something that is not on the Hub, or a file that is no rule's.
        FileNotFoundError: the Hub has no such repo, revision or file; or, with `local_files_only`, the cache.
        PermissionError: the Hub refuses the token, or access to the repo.
        ConnectionError: the Hub cannot be reached, and the cache has no copy.

    Example:
        >>> import tempfile, lightning_lopt as lopt
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = lopt.save_rule(lopt.rules.make("star"), folder)
        ...     lopt.load_rule(path).num_meta_params()
        207
    """
    name, directory = os.fspath(name_or_path), _find_dir(name_or_path)
    if directory is None:
        _check_arguments(name, {"revision": revision}, token, endpoint)
        return _load_from_hub(name, revision, _Access(token, cache_dir, local_files_only, endpoint))
    if revision is not None:
        raise ValueError(
            f"revision={_show(revision)} is not allowed for {_show(name)}: only Hub repos have revisions. Leave it out."
        )
    template = _read_config(directory / CONFIG, f"{name}/{CONFIG}")
    return _build(template, directory / WEIGHTS, f"{name}/{WEIGHTS}", Source(name, None))


def save_rule(rule: UpdateRule, directory: str | Path, *, card: str | None = None) -> Path:
    """Write a rule's three files into `directory`, all or none: after an error there is what was there before.

    Args:
        rule: a rule of a registered kind, with finite floating-point meta-parameters. Their dtype is kept.
        directory: made if it does not exist; other files in it are left alone, an old card is replaced.
        card: text of the model card, Markdown (default: kind, configuration and use). With a YAML front matter of its
            own ("---" first) it is taken as it is, else one is put before it.

    Returns:
        The directory.

    Raises:
        ValueError: for a rule that `load_rule` would refuse.

    Example:
        >>> import tempfile, lightning_lopt as lopt
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     sorted(path.name for path in lopt.save_rule(lopt.rules.make("star"), folder).iterdir())
        ['README.md', 'config.json', 'model.safetensors']
    """
    files = _serialize(rule)
    files[CARD] = _card(rule, os.fspath(directory), card).encode()
    _replace_files(Path(directory), files)
    return Path(directory)


def push_to_hub(
    rule: UpdateRule,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    tag: str | None = None,
    token: str | bool | None = None,
    endpoint: str | None = None,
    card: str | None = None,
) -> str:
    """Put a rule's three files into a Hub repo, in one commit; the repo is made if it does not exist.

    Args:
        rule: as for `save_rule`.
        repo_id: "owner/name".
        private: make the repo a private one (default False). An existing public repo is then refused.
        revision: branch, made if it does not exist (default: the main branch).
        tag: name to give to the commit (default: none), e.g. "v1".
        token: Hub token with write access (default: the one of `hf auth login`). It is never written to a file.
        endpoint: address of the Hub (default: `HF_ENDPOINT`, or https://huggingface.co).
        card: as for `save_rule`.

    Returns:
        The commit's sha, to be given as `revision` to `load_rule`.

    Raises:
        ValueError: for a rule that `load_rule` would refuse, a bad argument, or a card that the Hub refuses.
        PermissionError: without a token that may write there.
        FileExistsError: the tag is taken; the commit was made, without a tag.
        ConnectionError: the Hub cannot be reached.

    Example:
        >>> import lightning_lopt as lopt
        >>> lopt.push_to_hub(lopt.rules.make("star"), "me/my-star", tag="v1")  # doctest: +SKIP
        '0f4dd1e5a9c7b0e3b8a8f3d2f0b6f7c1d9e2a345'
    """
    from huggingface_hub import HfApi

    _check_arguments(repo_id, {"revision": revision, "tag": tag}, token, endpoint)
    api = HfApi(endpoint=endpoint, token=token, library_name="lightning_lopt", library_version=__version__)
    with tempfile.TemporaryDirectory() as folder:
        files = {**_serialize(rule), CARD: _card(rule, repo_id, card).encode()}
        _replace_files(Path(folder), files)  # what is wrong with the rule is found before anything is made on the Hub
        with _hub_errors(repo_id, revision, api.endpoint):
            api.create_repo(repo_id, private=private, exist_ok=True)
            if private and not api.model_info(repo_id).private:
                raise ValueError(f"Hub repo {repo_id!r} exists and is public. Take another name, or private=False.")
            if revision is not None and not revision.startswith("refs/"):
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            message = f"{rule.kind} rule, lightning_lopt {__version__}"
            commit = api.upload_folder(repo_id=repo_id, folder_path=folder, revision=revision, commit_message=message)
    if tag is not None:
        with _hub_errors(repo_id, revision, api.endpoint, f"tag {tag!r} for commit {commit.oid}"):
            api.create_tag(repo_id, tag=tag, revision=commit.oid)
    return commit.oid


# --- Names ---


def _find_dir(name_or_path: str | Path) -> Path | None:
    """The directory that is meant, or None for a Hub repo id."""
    name, bundled = os.fspath(name_or_path), list_pretrained()
    if os.path.isdir(name):
        if name in bundled and not Path(name, CONFIG).exists():
            raise ValueError(f"The directory {name!r} hides the bundled rule and has no {CONFIG}. Rename it.")
        return Path(name)
    if isinstance(name_or_path, Path):
        raise ValueError(f"{_show(name)} is no directory. Pass one that save_rule wrote, or a name as str: {bundled}.")
    if "/" in name:
        return None
    if name in bundled:
        return bundled_dir() / name
    raise ValueError(
        f"Unknown rule {_show(name)}: it is no directory, and bundled are {bundled}. Pass one of these, a directory "
        "that save_rule wrote, or a Hub repo 'owner/name'."
    )


def _check_arguments(repo_id: str, refs: Mapping[str, str | None], token: object, endpoint: str | None) -> None:
    """Refuse what has no business in a URL, a header or a path of the cache."""
    word = "[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?"
    if len(repo_id) > 96 or not re.fullmatch(f"{word}/{word}", repo_id) or re.search(r"--|\.\.|\.git$", repo_id):
        raise ValueError(
            f"{_show(repo_id)} is neither a directory nor a Hub repo id 'owner/name' (of letters, digits, '-', '_' and "
            f"'.'). Bundled are {list_pretrained()}."
        )
    for argument, ref in refs.items():
        if ref is not None and (not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.+@/-]{0,199}", ref) or ".." in ref):
            raise ValueError(f"{argument}={_show(ref)} is not allowed: pass a branch, a tag or a commit sha.")
    if isinstance(token, str) and not re.fullmatch("[!-~]+", token):
        raise ValueError("token is not allowed: it is empty or has spaces or non-ASCII characters. Copy it again.")
    if endpoint is not None and not re.fullmatch("https?://[!-?A-~]+", endpoint):
        shown = "..." if "@" in endpoint else _show(endpoint)  # what is before an @ may be a password
        raise ValueError(
            f"endpoint={shown} is not allowed: pass one such as 'https://huggingface.co', without user name."
        )


# --- Reading ---


@contextmanager
def _open(path: Path, file: str) -> Iterator[BinaryIO]:
    if not path.is_file():  # a named pipe would block for ever
        todo = "Only safetensors are read" if path.name == WEIGHTS else "save_rule writes one"
        raise _refusal(file, "is missing or is no regular file", f"{todo}; check the directory.")
    with path.open("rb") as stream:
        _check_size(os.fstat(stream.fileno()).st_size, path.name, file)
        yield stream


def _check_size(size: int, name: str, file: str) -> None:
    if size > MAX_BYTES[name]:
        raise _refusal(file, f"has {size} bytes; at most {MAX_BYTES[name]} are allowed", "It is no rule's file.")


def _read_config(path: Path, file: str) -> UpdateRule:
    with _open(path, file) as stream:
        return _parse_config(stream.read(), file)


def _parse_config(data: bytes, file: str) -> UpdateRule:
    """The rule on the meta device: its kind, its configuration and its tensors' shapes, at no memory."""
    spec = _parse_json(data, file)
    version, kind, values = (spec.get(key) for key in ("format_version", "kind", "config"))
    if type(version) is not int or version < 1:
        raise _refusal(file, f"format_version={_show(version)}; allowed is {FORMAT_VERSION}", "It is no rule's file.")
    if version > FORMAT_VERSION:
        what = f"format_version={version} is newer than {FORMAT_VERSION}, which lightning_lopt {__version__} reads"
        raise _refusal(file, what, "Upgrade: pip install -U lightning_lopt.")
    if not isinstance(kind, str) or kind not in REGISTRY:
        what = f"kind={_show(kind)} is unknown; known are {', '.join(sorted(REGISTRY))}"
        raise _refusal(file, what, "Upgrade lightning_lopt, or register your own kind first.")
    if not isinstance(values, dict):
        raise _refusal(file, f"config={_show(values)}; allowed is an object", "It is no rule's file.")
    rule, defaults = REGISTRY[kind]
    try:
        return _make(kind, rule.Config.from_dict({**defaults, **values}), "meta")
    except Exception as error:  # the values are untrusted: whatever a rule's own checks trip over is the file's fault
        raise _refusal(file, f"config of kind {kind!r}: {error}", "Correct or remove the key.") from error


def _make(kind: str, config: Any, device: str) -> UpdateRule:
    # The initial values are thrown away, so they must not move the user's random state either.
    with torch.random.fork_rng(devices=[]), torch.device(device):
        return REGISTRY[kind].rule(config, kind=kind)


def _parse_json(data: bytes, file: str) -> dict[str, Any]:
    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(result := dict(items)) < len(items):
            raise ValueError("a key comes twice")
        return result

    def number(text: str) -> float:
        if not math.isfinite(value := float(text)):
            raise ValueError(f"{text[:20]} is no finite number")
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
        raise _refusal(file, f"is no valid JSON ({error})", "The file is damaged; take another copy.") from None
    if not isinstance(value, dict):
        raise _refusal(file, f"holds {_show(value)}; allowed is a JSON object", "It is no rule's file.")
    return value


def _build(template: UpdateRule, weights: Path, file: str, source: Source) -> UpdateRule:
    with _open(weights, file) as stream:
        tensors = _read_weights(stream, os.fstat(stream.fileno()).st_size, template, file)
    rule = _make(template.kind, template.config, "cpu")
    rule.load_state_dict(tensors, strict=True, assign=True)  # assign: keep the file's dtype
    rule.source = source  # type: ignore[assignment]  # nn.Module declares its attributes as tensors or modules
    return rule


def _read_weights(stream: BinaryIO, size: int, template: UpdateRule, file: str) -> dict[str, Tensor]:
    prefix = stream.read(8)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length > min(MAX_HEADER_BYTES, size - 8):
        raise _refusal(
            file, "is truncated or no safetensors file", "Only safetensors are read, no pickle, .bin or .pt."
        )
    header = stream.read(length)
    _check_header(_parse_json(header, file), template, file)
    try:
        tensors = safetensors.torch.load(prefix + header + stream.read(size - 8 - length))
    except Exception as error:  # SafetensorError, or what torch makes of the file; the library names no common class
        raise _refusal(file, f"is no valid safetensors file ({error})", "It is damaged; take another copy.") from error
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise _refusal(
                file, f"tensor {name!r} holds NaN or infinity", "Its meta-training diverged; take another one."
            )
    return tensors


def _check_header(header: dict[str, Any], template: UpdateRule, file: str) -> None:
    """Compare kind, names, shapes and dtypes with the rule's."""
    metadata = header.pop("__metadata__", {})
    found_kind = metadata.get("lopt_kind", template.kind) if isinstance(metadata, dict) else metadata
    if found_kind != template.kind:
        what = f"is of kind {_show(found_kind)}, {CONFIG} of kind {template.kind!r}"
        raise _refusal(file, what, "Take both files from the same rule.")
    expected = {name: list(tensor.shape) for name, tensor in template.state_dict().items()}
    for problem, names in (
        ("missing", expected.keys() - header.keys()),
        ("unexpected", header.keys() - expected.keys()),
    ):
        if names:
            what = f"tensor {_show(min(names))} is {problem}; the rule has {_clip(', '.join(expected), 70)}"
            raise _refusal(file, what, "Take both files from the same rule.")
    for name, shape in expected.items():
        entry = header[name] if isinstance(header[name], dict) else {}
        if entry.get("shape") != shape:
            what = f"tensor {name!r} has shape {_show(entry.get('shape'))}, {CONFIG} asks for {shape}"
            raise _refusal(file, what, "Take both files from the same rule.")
        if not isinstance(dtype := entry.get("dtype"), str) or dtype not in DTYPES:
            what = f"tensor {name!r} has dtype {_show(dtype)}; allowed are {', '.join(DTYPES)}"
            raise _refusal(file, what, "Convert it to F32.")


def _show(value: object) -> str:
    return _clip(reprlib.repr(value), 60)


def _clip(text: str, limit: int) -> str:
    """One printable line of at most `limit` characters: part of it may come from a file or a server."""
    line = "".join(char if char.isprintable() else " " for char in text)
    return line if len(line) <= limit else line[: limit - 3] + "..."


def _refusal(file: str, what: str, todo: str) -> ValueError:
    place = file if len(file) <= 80 else "..." + file[-77:]
    return ValueError(f"{_clip(place, 80)}: {_clip(what, 140)}. {todo}")


# --- Writing ---


def _serialize(rule: UpdateRule) -> dict[str, bytes]:
    """The contents of the weights and the configuration, proven to load."""
    if rule.kind not in REGISTRY or REGISTRY[rule.kind].rule.__qualname__ != type(rule).__qualname__:
        known = ", ".join(sorted(REGISTRY))
        raise ValueError(
            f"{type(rule).__name__} of kind {rule.kind!r} is not registered; known are {known}. Register it first."
        )
    spec = {"format_version": FORMAT_VERSION, "kind": rule.kind, "library_version": __version__}
    # Cloned, since safetensors refuses tensors that share memory.
    tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in rule.state_dict().items()}
    metadata = {"format": "pt", "lopt_kind": rule.kind, "format_version": str(FORMAT_VERSION)}
    try:
        config = json.dumps({**spec, "config": rule.config.to_dict()}, indent=2, sort_keys=True, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{CONFIG}: the configuration is no JSON ({error}). Use numbers, strings and tuples."
        ) from error
    weights = _sorted_header(safetensors.torch.save(tensors, metadata))
    template = _parse_config(config.encode(), CONFIG)
    if template.config != rule.config:
        raise ValueError(f"{CONFIG}: JSON does not give the configuration back. Use numbers, strings and flat tuples.")
    for name, data in ((CONFIG, config), (WEIGHTS, weights)):
        _check_size(len(data), name, name)
    _read_weights(io.BytesIO(weights), len(weights), template, WEIGHTS)
    return {WEIGHTS: weights, CONFIG: config.encode()}


def _sorted_header(weights: bytes) -> bytes:
    """The library writes its metadata in random order; one rule is to be the same bytes each time, and one commit."""
    end = 8 + int.from_bytes(weights[:8], "little")
    header = json.dumps(json.loads(weights[8:end]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # data are aligned to 8 bytes
    return len(header).to_bytes(8, "little") + header + weights[end:]


def _replace_files(directory: Path, files: Mapping[str, bytes]) -> None:
    """Write all files beside their places first, then move them there; put the old ones back if that fails."""
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=directory) as staging:
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

_BODY = """# A learned optimizer of kind `{kind}`

An update rule of [lightning_lopt](https://pypi.org/project/lightning_lopt/) with {count} meta-parameters, for PyTorch \
Lightning and for plain PyTorch loops. How it was meta-trained and evaluated was not said when it was saved.

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


def _card(rule: UpdateRule, name: str, card: str | None) -> str:
    if card is not None and card.startswith("---\n"):
        return card
    config = json.dumps(rule.config.to_dict(), indent=2, sort_keys=True)
    body = (
        _BODY.format(kind=rule.kind, count=rule.num_meta_params(), name=json.dumps(name), config=config)
        if card is None
        else card
    )
    return _FRONT_MATTER.format(kind=rule.kind) + body


# --- The Hub ---


class _Access(NamedTuple):
    token: str | bool | None
    cache_dir: str | Path | None
    local_files_only: bool
    endpoint: str | None


def _load_from_hub(repo_id: str, revision: str | None, access: _Access) -> UpdateRule:
    path = _fetch(repo_id, CONFIG, revision, access)
    sha = path.parent.name  # the cache keeps each commit's files in a folder of its name
    label = f"{repo_id}@{sha[:12]}"
    template = _read_config(path, f"{label}/{CONFIG}")
    weights = _fetch(repo_id, WEIGHTS, sha, access)  # of that commit, even if the branch has moved meanwhile
    return _build(template, weights, f"{label}/{WEIGHTS}", Source(repo_id, sha))


def _fetch(repo_id: str, name: str, revision: str | None, access: _Access) -> Path:
    """The path of one file in the cache, downloaded if need be."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    token, cache_dir, local_files_only, endpoint = access
    cached = try_to_load_from_cache(repo_id, name, cache_dir=cache_dir, revision=revision)
    if isinstance(cached, str) and revision == Path(cached).parent.name:
        return Path(cached)  # a commit does not change
    with _hub_errors(repo_id, revision, endpoint, name):
        # hf_hub_download would fill the disk before it could be asked for the size.
        if not local_files_only and not _ask_size(repo_id, name, revision, access) and isinstance(cached, str):
            return Path(cached)  # the Hub is out of reach: do not wait for that a second time
        path = hf_hub_download(
            repo_id,
            name,
            revision=revision,
            library_name="lightning_lopt",
            library_version=__version__,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
            endpoint=endpoint,
        )
    return Path(path)


def _ask_size(repo_id: str, name: str, revision: str | None, access: _Access) -> bool:
    """Refuse a file that the Hub says is too large; False where the Hub cannot be reached."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError

    url = hf_hub_url(repo_id, name, revision=revision, endpoint=access.endpoint)
    try:
        size = get_hf_file_metadata(
            url, token=access.token, library_name="lightning_lopt", library_version=__version__
        ).size
    except HfHubHTTPError:
        return True  # it is for hf_hub_download to retry, to take the cached copy or to raise
    except Exception as error:
        if _is_ours(error):
            raise
        return False
    _check_size(size or 0, name, f"{repo_id}/{name}")
    return True


@contextmanager
def _hub_errors(repo_id: str, revision: str | None, endpoint: str | None, item: str = "upload") -> Iterator[None]:
    try:
        yield
    except Exception as error:  # huggingface_hub lets its HTTP client's own classes through, which change over time
        if type(error) is ValueError:  # of a card, say, over several lines
            raise ValueError(_clip(str(error), 290)) from None
        if _is_ours(error):
            raise
        # From None: the request, with its authorization, hangs on the original.
        raise _explain(error, repo_id, revision, endpoint, item) from None


def _is_ours(error: Exception) -> bool:
    """Whether it is no word of the Hub's: a full disk, a refusal of this module, a bug."""
    if type(error) in (OSError, RuntimeError):  # of huggingface_hub: a download cut short, a failed upload
        return isinstance(error, OSError) and error.errno is not None
    return type(error).__module__ == "builtins"


def _explain(error: Exception, repo_id: str, revision: str | None, endpoint: str | None, item: str) -> Exception:
    """What huggingface_hub raised, as a built-in exception of one line."""
    from huggingface_hub import constants
    from huggingface_hub import errors as hub

    while isinstance(error, (hub.LocalEntryNotFoundError, RuntimeError)) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # "not in the cache" says less than why the Hub did not give it
    where = f"Hub repo {repo_id!r} at {_show(endpoint or constants.ENDPOINT)}"
    status = getattr(getattr(error, "response", None), "status_code", None)
    instead = f"bundled are {list_pretrained()}"
    if isinstance(error, hub.RepositoryNotFoundError) and not isinstance(error, hub.GatedRepoError):
        return FileNotFoundError(f"{where} does not exist or is private. Check the name, or pass token=; {instead}.")
    if isinstance(error, hub.RevisionNotFoundError):
        return FileNotFoundError(f"{where} has no revision {_show(revision)}. Pass a branch, tag or full commit sha.")
    if isinstance(error, hub.LocalEntryNotFoundError):
        return FileNotFoundError(f"{where}: {item} is not in the cache. Load it without local_files_only; {instead}.")
    if isinstance(error, hub.EntryNotFoundError):
        return FileNotFoundError(f"{where} has no {item}, so it holds no rule. Check the name; {instead}.")
    if isinstance(error, hub.OfflineModeIsEnabled):
        return ConnectionError(f"{where} is not in the cache, and HF_HUB_OFFLINE is set. Unset it; {instead}.")
    if status in (401, 403) or isinstance(error, hub.LocalTokenNotFoundError):
        what = f"{where} refuses access{_answer(error)}"
        return PermissionError(f"{what}. Pass token= of an account that has it, or run `hf auth login`; {instead}.")
    if status == 409:
        return FileExistsError(f"{where}: {item} exists already{_answer(error)}. Choose another name.")
    if isinstance(error, hub.BadRequestError):
        return ValueError(f"{where} refuses the request{_answer(error)}. Check the arguments and the card.")
    what = f"{item}: HTTP {status}" if status else f"{item}: {type(error).__name__}"
    return ConnectionError(f"{where} gives no usable answer ({what}). Check the network and try again; {instead}.")


def _answer(error: Exception) -> str:
    """The server's own words, in parentheses, without the token that it may quote."""
    if not (message := getattr(error, "server_message", None)):
        return ""
    secret = error.response.request.headers.get("authorization", "").removeprefix("Bearer ")  # type: ignore[attr-defined]
    return f" ({_clip(message.replace(secret, '***') if secret else message, 100)})"
