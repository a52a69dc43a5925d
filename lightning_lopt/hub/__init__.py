"""Load and save update rules as files, and share them on the Hugging Face Hub.

A rule is three files: `config.json` (kind and configuration), `model.safetensors` (meta-parameters) and `README.md`
(the model card). A bad file or argument raises a `ValueError` with a one-line message. A failure to reach the Hub
raises a built-in `OSError`: `FileNotFoundError`, `PermissionError` or `ConnectionError`.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from lightning_lopt.hub import files, importers, velo_files
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
    """Load a rule by name; `rule.source` records where it came from.

    Foreign formats are read as well: PyLO's networks of small_fc_lopt (MetaMLP) and Celo2 (CELO2MLP), and its VeLO,
    whose two repos or directories "VeLO_RNN" and "VeLO_MLP" are loaded by the name of either; directories with a
    `theta.state` of learned_optimization (small_fc_lopt, STAR, Celo2, VeLO), or with the `params` and `config.gin` of
    its published VeLO; and the repos of Celo2's authors. Values that these formats leave out are set as their authors
    use them, with a warning; `save_rule` then stores them.

    Args:
        name_or_path: a bundled name ("star"), a directory ("./star"), or a Hub repo id ("owner/name"); tried in this
            order. A bundled name wins over a directory of that name in the working directory, so write "./star" for
            the directory. A `pathlib.Path` is always a directory.
        revision: branch, tag or commit sha of a Hub repo (default: its main branch). Branches move: pin a tag or a sha.
        token: Hub token (default: the one stored by `hf auth login`); False sends none.
        cache_dir: the Hub cache (default: huggingface_hub's own).
        local_files_only: read the Hub repo from the cache, without the network (default False). The cached copy is
            also used when the Hub cannot be reached.
        endpoint: address of the Hub (default: `HF_ENDPOINT`, or https://huggingface.co).

    Returns:
        The rule, in the dtype of its file, on the CPU. The global random state is not touched.

    Raises:
        ValueError: unknown name, a revision for a rule that is not on the Hub, or a file that is not a rule file.
        FileNotFoundError: the Hub (with `local_files_only`, the cache) has no such repo, revision or file.
        PermissionError: the Hub refuses the token, or access to the repo.
        ConnectionError: the Hub cannot be reached, and the cache has no copy.

    Example:
        >>> import tempfile, lightning_lopt as lopt
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = lopt.save_rule(lopt.rules.make("star"), folder)
        ...     lopt.load_rule(path).num_meta_params()
        207
    """
    name = os.fspath(name_or_path)
    directory = find_dir(name_or_path)
    if directory is None:
        check_arguments(name, {"revision": revision}, token, endpoint)
        return _load_from_hub(name, revision, Access(token, cache_dir, local_files_only, endpoint))
    if revision is not None:
        raise ValueError(
            f"revision={show(revision)} is not allowed for {show(name)}: only Hub repos have revisions. Leave it out."
        )
    if Path(name, CONFIG).is_file() and not directory.samefile(name):
        warnings.warn(
            f"{name!r} is the bundled rule, not the directory of that name. For the directory write {f'./{name}'!r}.",
            stacklevel=2,
        )
    for tree in (importers.THETA, importers.PARAMS):
        if not (directory / CONFIG).exists() and (directory / tree).is_file():
            return _load_theta(directory / tree, name)
    template = read_config(directory / CONFIG, f"{name}/{CONFIG}")
    if template.part is not None:
        return _load_velo_pair(name, template, lambda other, file: Path(other, file), None)
    return build(template, directory / template.weights, f"{name}/{template.weights}", Source(name, None))


def read_theta(path: str | Path) -> dict[str, Tensor]:
    """Read the arrays of learned_optimization's `theta.state`, for `rules.STAR.from_jax` or `rules.Celo2.from_jax`.

    Args:
        path: the file.

    Raises:
        ValueError: if the file is not a `theta.state`, or is too large.
    """
    return files.read_theta(Path(path), os.fspath(path))


def save_rule(rule: UpdateRule, directory: str | Path, *, card: str | None = None) -> Path:
    """Write a rule's three files into a directory, all or none: an error leaves the previous files in place.

    If the process is killed between two renames, `load_rule` refuses the mixed files and names the folder that still
    holds the previous ones.

    Args:
        rule: a rule of a registered kind, with finite floating-point meta-parameters. Their dtype is kept.
        directory: created if it does not exist. Other files in it are left alone; an old card is replaced.
        card: text of the model card in Markdown (default: kind, configuration and use). A text that begins with its own
            YAML front matter ("---") is written as it is; otherwise front matter is added.

    Returns:
        The directory.

    Raises:
        ValueError: if `load_rule` would refuse the rule.

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
    """Upload a rule's three files to a Hub repo in one commit, creating the repo if necessary.

    Args:
        rule: as for `save_rule`.
        repo_id: "owner/name".
        private: create the repo as a private one (default False). An existing public repo is then refused.
        revision: branch, created if it does not exist (default: the main branch).
        tag: tag for the commit, e.g. "v1" (default: none).
        token: Hub token with write access (default: the one stored by `hf auth login`). It is never written to a file.
        endpoint: address of the Hub (default: `HF_ENDPOINT`, or https://huggingface.co).
        card: as for `save_rule`.

    Returns:
        The commit's sha, which `load_rule` takes as `revision`.

    Raises:
        ValueError: if `load_rule` would refuse the rule, an argument is invalid, or the Hub refuses the card.
        PermissionError: if the token may not write to the repo.
        FileExistsError: if the tag exists; the commit was made, without the tag.
        ConnectionError: if the Hub cannot be reached.

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
        replace_files(Path(folder), contents)  # an invalid rule is refused here, before the Hub is touched
        with hub_errors(repo_id, revision, api.endpoint):
            api.create_repo(repo_id, private=private, exist_ok=True)
            if private and not api.model_info(repo_id).private:
                raise ValueError(f"Hub repo {repo_id!r} exists and is public. Use another name, or private=False.")
            if revision is not None and not revision.startswith("refs/"):
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            message = f"{rule.kind} rule, lightning_lopt {library_version()}"
            commit = api.upload_folder(repo_id=repo_id, folder_path=folder, revision=revision, commit_message=message)
    if tag is not None:
        with hub_errors(repo_id, revision, api.endpoint, f"tag {tag!r} for commit {commit.oid}"):
            api.create_tag(repo_id, tag=tag, revision=commit.oid)
    return commit.oid


def _load_from_hub(repo_id: str, revision: str | None, access: Access) -> UpdateRule:
    try:
        path = fetch(repo_id, CONFIG, revision, access)
    except FileNotFoundError:
        with contextlib.suppress(FileNotFoundError):
            return _load_theta(fetch(repo_id, importers.THETA, revision, access), repo_id)
        raise
    sha = path.parent.name  # the cache keeps the files of a commit in a folder named by its sha
    label = f"{repo_id}@{sha[:12]}"
    template = read_config(path, f"{label}/{CONFIG}", repo_id)
    if template.part is not None:
        commits = {repo_id: sha}

        def find(repo: str, file: str) -> Path:
            found = fetch(repo, file, commits.get(repo), access)
            commits[repo] = found.parent.name
            return found

        return _load_velo_pair(repo_id, template, find, sha)
    weights = fetch(repo_id, template.weights, sha, access)  # from the same commit, even if the branch has moved since
    return build(template, weights, f"{label}/{template.weights}", Source(repo_id, sha))


def _load_theta(path: Path, name: str) -> UpdateRule:
    """Load a tree of learned_optimization's, with the constructor's arguments from a config.gin beside it.

    Args:
        path: of the tree; in the Hub's cache, its folder is named by the commit.
        name: of the directory or Hub repo.
    """
    is_repo = not os.path.isdir(name)
    label = f"{name}@{path.parent.name[:12]}" if is_repo else name
    file = f"{label}/{path.name}"
    arguments = files.read_gin(path.parent / velo_files.GIN, f"{label}/{velo_files.GIN}")
    rule, left_out = importers.from_theta(files.read_theta(path, file), file, arguments)
    if left_out is not None:
        warnings.warn(f"{clip(file, 80)}: {left_out}.", stacklevel=4 if is_repo else 3)
    rule.source = Source(name, path.parent.name if is_repo else None)
    return rule


def _load_velo_pair(
    name: str, template: files.Template, find: Callable[[str, str], Path], revision: str | None
) -> UpdateRule:
    """Load PyLO's VeLO from the part that was named and its partner beside it.

    Args:
        name: of the directory or Hub repo.
        template: what its config.json describes.
        find: (directory or repo, file) -> the path of a file.
        revision: of the Hub repo.
    """
    assert template.part is not None
    other = velo_files.partner_name(name, template.part, f"{name}/{CONFIG}")
    parts = {template.part.name: (template.part, files.read_part(template, find(name, WEIGHTS), f"{name}/{WEIGHTS}"))}
    partner = read_config(find(other, CONFIG), f"{other}/{CONFIG}")
    if partner.part is None:
        raise ValueError(f"{clip(other, 80)}/{CONFIG} is not PyLO's {template.part.partner}. Get another copy.")
    parts[partner.part.name] = (partner.part, files.read_part(partner, find(other, WEIGHTS), f"{other}/{WEIGHTS}"))
    rule = velo_files.joined(parts, f"{name}/{CONFIG}")
    warnings.warn(f"{clip(name, 80)}: {velo_files.LEFT_OUT}.", stacklevel=4)
    rule.source = Source(name, revision)
    return rule
