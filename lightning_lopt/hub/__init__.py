"""An update rule's files, and the Hugging Face Hub: load, save, push.

A rule is three files: `config.json` (kind and configuration), `model.safetensors` (meta-parameters) and `README.md`
(card). What is wrong with a file or an argument is a `ValueError` of one line; what is wrong with the way to the Hub is
a built-in `OSError`: `FileNotFoundError`, `PermissionError` or `ConnectionError`.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from pathlib import Path

from torch import Tensor

from lightning_lopt.hub import files, importers
from lightning_lopt.hub.bundle import bundled_dir, find_dir, list_pretrained
from lightning_lopt.hub.errors import clip, show
from lightning_lopt.hub.files import (
    CARD,
    CONFIG,
    WEIGHTS,
    build,
    library_version,
    model_card,
    read_config,
    replace_files,
    serialize,
)
from lightning_lopt.hub.remote import Access, check_arguments, fetch, hub_errors
from lightning_lopt.rules import Source, UpdateRule

__all__ = ["bundled_dir", "list_pretrained", "load_rule", "push_to_hub", "read_theta", "save_rule"]


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

    Files of two other formats are read too: PyLO's of small_fc_lopt networks (MetaMLP), and a directory with the
    `theta.state` of learned_optimization (small_fc_lopt, STAR). What these leave out is taken as their authors have it,
    with a warning; `save_rule` then keeps it.

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
    name, directory = os.fspath(name_or_path), find_dir(name_or_path)
    if directory is None:
        check_arguments(name, {"revision": revision}, token, endpoint)
        return _load_from_hub(name, revision, Access(token, cache_dir, local_files_only, endpoint))
    if revision is not None:
        raise ValueError(
            f"revision={show(revision)} is not allowed for {show(name)}: only Hub repos have revisions. Leave it out."
        )
    if not (directory / CONFIG).exists() and (directory / importers.THETA).is_file():
        file = f"{name}/{importers.THETA}"
        rule = importers.from_theta(files.read_theta(directory / importers.THETA, file), file)
        warnings.warn(f"{clip(file, 80)}: {importers.CONSTRUCTOR}.", stacklevel=2)
        rule.source = Source(name, None)
        return rule
    template = read_config(directory / CONFIG, f"{name}/{CONFIG}")
    return build(template, directory / WEIGHTS, f"{name}/{WEIGHTS}", Source(name, None))


def read_theta(path: str | Path) -> dict[str, Tensor]:
    """The arrays of a `theta.state` of learned_optimization, to be passed to `rules.STAR.from_jax` with its arguments.

    Args:
        path: the file.

    Raises:
        ValueError: for a file that is none, or too large.
    """
    return files.read_theta(Path(path), os.fspath(path))


def save_rule(rule: UpdateRule, directory: str | Path, *, card: str | None = None) -> Path:
    """Write a rule's three files into `directory`, all or none: after an error there is what was there before.

    Where the process is killed between two renames, `load_rule` refuses the mixture and names the folder in which the
    files of before are kept.

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
    contents = serialize(rule)
    contents[CARD] = model_card(rule, os.fspath(directory), card).encode()
    replace_files(Path(directory), contents)
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

    check_arguments(repo_id, {"revision": revision, "tag": tag}, token, endpoint)
    api = HfApi(endpoint=endpoint, token=token, library_name="lightning_lopt", library_version=library_version())
    with tempfile.TemporaryDirectory() as folder:
        contents = {**serialize(rule), CARD: model_card(rule, repo_id, card).encode()}
        replace_files(Path(folder), contents)  # what is wrong with the rule is found before anything is made on the Hub
        with hub_errors(repo_id, revision, api.endpoint):
            api.create_repo(repo_id, private=private, exist_ok=True)
            if private and not api.model_info(repo_id).private:
                raise ValueError(f"Hub repo {repo_id!r} exists and is public. Take another name, or private=False.")
            if revision is not None and not revision.startswith("refs/"):
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            message = f"{rule.kind} rule, lightning_lopt {library_version()}"
            commit = api.upload_folder(repo_id=repo_id, folder_path=folder, revision=revision, commit_message=message)
    if tag is not None:
        with hub_errors(repo_id, revision, api.endpoint, f"tag {tag!r} for commit {commit.oid}"):
            api.create_tag(repo_id, tag=tag, revision=commit.oid)
    return commit.oid


def _load_from_hub(repo_id: str, revision: str | None, access: Access) -> UpdateRule:
    path = fetch(repo_id, CONFIG, revision, access)
    sha = path.parent.name  # the cache keeps each commit's files in a folder of its name
    label = f"{repo_id}@{sha[:12]}"
    template = read_config(path, f"{label}/{CONFIG}")
    weights = fetch(repo_id, WEIGHTS, sha, access)  # of that commit, even if the branch has moved meanwhile
    return build(template, weights, f"{label}/{WEIGHTS}", Source(repo_id, sha))
