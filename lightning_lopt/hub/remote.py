"""Download from the Hugging Face Hub, and turn its errors into built-in ones that fit on a line and hide tokens.

A server is trusted as little as a file. huggingface_hub builds cache paths from the commit and the ETag that a server
sends, and writes whatever it receives. So we validate both names first, and stop a download that is longer than a rule
file can be.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from lightning_lopt.hub.bundle import list_pretrained
from lightning_lopt.hub.errors import clip, show
from lightning_lopt.hub.files import MAX_BYTES, check_size, library_version


def check_arguments(repo_id: str, refs: Mapping[str, str | None], token: object, endpoint: str | None) -> None:
    """Raise a ValueError for arguments that must not get into a URL, an HTTP header or a cache path."""
    word = "[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?"
    if len(repo_id) > 96 or not re.fullmatch(f"{word}/{word}", repo_id) or re.search(r"--|\.\.|\.git$", repo_id):
        raise ValueError(
            f"{show(repo_id)} is neither a directory nor a Hub repo id 'owner/name' (of letters, digits, '-', '_' and "
            f"'.'). Bundled rules are {list_pretrained()}."
        )
    for argument, ref in refs.items():
        if ref is not None and (not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.+@/-]{0,199}", ref) or ".." in ref):
            raise ValueError(f"{argument}={show(ref)} is not allowed: pass a branch, a tag or a commit sha.")
    if isinstance(token, str) and not re.fullmatch("[!-~]+", token):
        raise ValueError("token is not allowed: it is empty or has spaces or non-ASCII characters. Copy it again.")
    if endpoint is not None and not re.fullmatch("https?://[!-?A-~]+", endpoint):
        shown = "..." if "@" in endpoint else show(endpoint)  # it may contain a password before the @
        raise ValueError(
            f"endpoint={shown} is not allowed: pass one such as 'https://huggingface.co', without a user name."
        )


class Access(NamedTuple):
    """How to access the Hub: the arguments of `load_rule`."""

    token: str | bool | None
    cache_dir: str | Path | None
    local_files_only: bool
    endpoint: str | None


def fetch(repo_id: str, name: str, revision: str | None, access: Access) -> Path:
    """Return the cache path of one file, and download the file if necessary."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    token, cache_dir, local_files_only, endpoint = access
    cached = try_to_load_from_cache(repo_id, name, cache_dir=cache_dir, revision=revision)
    if isinstance(cached, str) and revision == Path(cached).parent.name:
        return Path(cached)  # the revision is a commit sha, whose files never change
    with hub_errors(repo_id, revision, endpoint, name):
        # hf_hub_download checks no size, so check the metadata first.
        if not local_files_only and not _check_metadata(repo_id, name, revision, access) and isinstance(cached, str):
            return Path(cached)  # the Hub cannot be reached; hf_hub_download would only wait for it again
        path = hf_hub_download(
            repo_id,
            name,
            revision=revision,
            library_name="lightning_lopt",
            library_version=library_version(),
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
            endpoint=endpoint,
            **_size_limit(name, f"{repo_id}/{name}"),
        )
    return Path(path)


def _check_metadata(repo_id: str, name: str, revision: str | None, access: Access) -> bool:
    """Raise an error if the Hub's metadata of a file are invalid or too large; False if the Hub cannot be reached."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.constants import HUGGINGFACE_HEADER_X_REPO_COMMIT as COMMIT
    from huggingface_hub.errors import HfHubHTTPError

    url = hf_hub_url(repo_id, name, revision=revision, endpoint=access.endpoint)
    try:
        answer = get_hf_file_metadata(
            url, token=access.token, library_name="lightning_lopt", library_version=library_version()
        )
    except HfHubHTTPError as error:
        _check_headers(url, {"commit": getattr(error.response, "headers", {}).get(COMMIT)})
        return True  # hf_hub_download will retry, use the cached copy, or raise
    except ValueError:  # the redirect's address cannot be parsed
        raise ConnectionError(f"The Hub at {_host(url)} sent an invalid redirect. Check endpoint=.") from None
    except Exception as error:
        if not _is_from_hub(error):
            raise
        return False
    _check_headers(url, {"commit": answer.commit_hash, "ETag": answer.etag, "redirect": answer.location})
    check_size(answer.size or 0, name, f"{repo_id}/{name}")
    return True


# The commit and the ETag become file names in the cache, and must not lead out of it.
_HEADERS = {
    "commit": "[0-9a-f]{40,64}",
    "ETag": r"(?!\.+$)[!-.0-\[\]-~]{1,150}",
    "redirect": r"https?://(\[[0-9a-fA-F:.]+\]|[^\[\]/?#@\s]+)([/?#]\S*)?",
}


def _check_headers(url: str, headers: Mapping[str, str | None]) -> None:
    """Raise a ConnectionError for an invalid commit, ETag or redirect."""
    for what, value in headers.items():
        if value is not None and not re.fullmatch(_HEADERS[what], value):
            raise ConnectionError(f"The Hub at {_host(url)} sent an invalid {what} {show(value)}. Check endpoint=.")


def _host(url: str) -> str:
    return show(url.split("/")[2].rpartition("@")[2])


def _size_limit(name: str, file: str) -> dict[str, Any]:
    """A progress bar, as an argument for hf_hub_download, that aborts a download at the largest allowed size."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import tqdm  # type: ignore[attr-defined,unused-ignore]

    class Meter(tqdm):  # type: ignore[misc,type-arg,unused-ignore]
        received = 0

        def update(self, n: float | None = 1) -> Any:
            self.received += int(n or 0)
            if self.received > MAX_BYTES[name]:  # a chunk gets here before it is written to disk
                self.close()
                check_size(self.received, name, file)
            return super().update(n)

    # huggingface_hub before 1.0 does not have this argument.
    return {"tqdm_class": Meter} if "tqdm_class" in inspect.signature(hf_hub_download).parameters else {}


@contextmanager
def hub_errors(repo_id: str, revision: str | None, endpoint: str | None, item: str = "upload") -> Iterator[None]:
    """Turn huggingface_hub's exceptions into built-in ones; `item` is what is being downloaded or created."""
    try:
        yield
    except Exception as error:  # also those of its HTTP client, whose classes change between versions
        if type(error) is ValueError:  # about a card, for example, over several lines
            raise ValueError(clip(str(error), 290)) from None
        if not _is_from_hub(error):
            raise
        # From None: the original exception has the request, and with it the token.
        raise _explain(error, repo_id, revision, endpoint, item) from None


def _is_from_hub(error: Exception) -> bool:
    """Whether an exception came from the Hub or its client, rather than from the disk, this module or a bug."""
    if type(error) in (OSError, RuntimeError):  # huggingface_hub raises these for interrupted transfers
        return not (isinstance(error, OSError) and error.errno is not None)
    return type(error).__module__ != "builtins"


def _explain(error: Exception, repo_id: str, revision: str | None, endpoint: str | None, item: str) -> Exception:
    """Translate an exception of huggingface_hub to a built-in one with a one-line message."""
    from huggingface_hub import constants
    from huggingface_hub import errors as hub

    while isinstance(error, (hub.LocalEntryNotFoundError, RuntimeError)) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # why the download failed says more than "not in the cache"
    where = f"Hub repo {repo_id!r} at {show(endpoint or constants.ENDPOINT)}"
    status = getattr(getattr(error, "response", None), "status_code", None)
    instead = f"bundled rules are {list_pretrained()}"
    if isinstance(error, hub.RepositoryNotFoundError) and not isinstance(error, hub.GatedRepoError):
        return FileNotFoundError(f"{where} does not exist or is private. Check the name, or pass token=; {instead}.")
    if isinstance(error, hub.RevisionNotFoundError):
        return FileNotFoundError(f"{where} has no revision {show(revision)}. Pass a branch, tag or full commit sha.")
    if isinstance(error, hub.LocalEntryNotFoundError):
        return FileNotFoundError(f"{where}: {item} is not in the cache. Load it without local_files_only; {instead}.")
    if isinstance(error, hub.EntryNotFoundError):
        return FileNotFoundError(f"{where} has no {item}, so it is not a rule. Check the name; {instead}.")
    if isinstance(error, hub.OfflineModeIsEnabled):
        return ConnectionError(f"{where} is not in the cache, and HF_HUB_OFFLINE is set. Unset it; {instead}.")
    if status in (401, 403) or isinstance(error, hub.LocalTokenNotFoundError):
        what = f"{where} refuses access{_answer(error)}"
        return PermissionError(f"{what}. Pass token= of an account with access, or run `hf auth login`; {instead}.")
    if status == 409:
        return FileExistsError(f"{where}: {item} already exists{_answer(error)}. Choose another name.")
    if isinstance(error, hub.BadRequestError):
        return ValueError(f"{where} refuses the request{_answer(error)}. Check the arguments and the card.")
    what = f"{item}: HTTP {status}" if status else f"{item}: {type(error).__name__}"
    return ConnectionError(f"{where} sent no usable answer ({what}). Check the network and try again; {instead}.")


def _answer(error: Exception) -> str:
    """The server's message in parentheses, without the token that it may quote."""
    if not (message := getattr(error, "server_message", None)):
        return ""
    secret = error.response.request.headers.get("authorization", "").removeprefix("Bearer ")  # type: ignore[attr-defined]
    return f" ({clip(message.replace(secret, '***') if secret else message, 100)})"
