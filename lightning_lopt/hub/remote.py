"""The Hugging Face Hub: downloads, and its errors as built-in ones of one line that never show a token.

A Hub is believed as little as a file. huggingface_hub makes paths of its cache from the commit and the ETag that a
server names, and writes whatever the server sends: so both names are looked at first, and a download ends where it is
longer than a rule's file can be.
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
    """Refuse what has no business in a URL, a header or a path of the cache."""
    word = "[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?"
    if len(repo_id) > 96 or not re.fullmatch(f"{word}/{word}", repo_id) or re.search(r"--|\.\.|\.git$", repo_id):
        raise ValueError(
            f"{show(repo_id)} is neither a directory nor a Hub repo id 'owner/name' (of letters, digits, '-', '_' and "
            f"'.'). Bundled are {list_pretrained()}."
        )
    for argument, ref in refs.items():
        if ref is not None and (not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.+@/-]{0,199}", ref) or ".." in ref):
            raise ValueError(f"{argument}={show(ref)} is not allowed: pass a branch, a tag or a commit sha.")
    if isinstance(token, str) and not re.fullmatch("[!-~]+", token):
        raise ValueError("token is not allowed: it is empty or has spaces or non-ASCII characters. Copy it again.")
    if endpoint is not None and not re.fullmatch("https?://[!-?A-~]+", endpoint):
        shown = "..." if "@" in endpoint else show(endpoint)  # what is before an @ may be a password
        raise ValueError(
            f"endpoint={shown} is not allowed: pass one such as 'https://huggingface.co', without user name."
        )


class Access(NamedTuple):
    """How a caller wants the Hub asked; the arguments of `load_rule`."""

    token: str | bool | None
    cache_dir: str | Path | None
    local_files_only: bool
    endpoint: str | None


def fetch(repo_id: str, name: str, revision: str | None, access: Access) -> Path:
    """The path of one file in the cache, downloaded if need be."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    token, cache_dir, local_files_only, endpoint = access
    cached = try_to_load_from_cache(repo_id, name, cache_dir=cache_dir, revision=revision)
    if isinstance(cached, str) and revision == Path(cached).parent.name:
        return Path(cached)  # a commit does not change
    with hub_errors(repo_id, revision, endpoint, name):
        # hf_hub_download would fill the disk before it could be asked for the size.
        if not local_files_only and not _ask(repo_id, name, revision, access) and isinstance(cached, str):
            return Path(cached)  # the Hub is out of reach: do not wait for that a second time
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
            **_bounded(name, f"{repo_id}/{name}"),
        )
    return Path(path)


def _ask(repo_id: str, name: str, revision: str | None, access: Access) -> bool:
    """Refuse what the Hub says of a file if that cannot be true; False where the Hub cannot be reached."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.constants import HUGGINGFACE_HEADER_X_REPO_COMMIT as COMMIT
    from huggingface_hub.errors import HfHubHTTPError

    url = hf_hub_url(repo_id, name, revision=revision, endpoint=access.endpoint)
    try:
        answer = get_hf_file_metadata(
            url, token=access.token, library_name="lightning_lopt", library_version=library_version()
        )
    except HfHubHTTPError as error:
        _check_words(url, {"commit": getattr(error.response, "headers", {}).get(COMMIT)})
        return True  # it is for hf_hub_download to retry, to take the cached copy or to raise
    except ValueError:  # an address of a redirect that cannot be taken apart
        raise ConnectionError(f"The Hub at {_host(url)} gives a redirect to nowhere. Check endpoint=.") from None
    except Exception as error:
        if _is_ours(error):
            raise
        return False
    _check_words(url, {"commit": answer.commit_hash, "ETag": answer.etag, "redirect": answer.location})
    check_size(answer.size or 0, name, f"{repo_id}/{name}")
    return True


# The first two become names of files in the cache, and must stay in its folder.
_WORDS = {
    "commit": "[0-9a-f]{40,64}",
    "ETag": r"(?!\.+$)[!-.0-\[\]-~]{1,150}",
    "redirect": r"https?://(\[[0-9a-fA-F:.]+\]|[^\[\]/?#@\s]+)([/?#]\S*)?",
}


def _check_words(url: str, words: Mapping[str, str | None]) -> None:
    """Refuse a commit, an ETag and an address that are none."""
    for what, word in words.items():
        if word is not None and not re.fullmatch(_WORDS[what], word):
            raise ConnectionError(
                f"The Hub at {_host(url)} gives the {what} {show(word)}, which is none. Check endpoint=."
            )


def _host(url: str) -> str:
    return show(url.split("/")[2].rpartition("@")[2])


def _bounded(name: str, file: str) -> dict[str, Any]:
    """The argument by which hf_hub_download counts what comes, and stops at the largest size that is allowed."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import tqdm  # type: ignore[attr-defined,unused-ignore]

    class Meter(tqdm):  # type: ignore[misc,type-arg,unused-ignore]
        received = 0

        def update(self, n: float | None = 1) -> Any:
            self.received += int(n or 0)
            if self.received > MAX_BYTES[name]:  # chunks are shown here before they are written
                self.close()
                check_size(self.received, name, file)
            return super().update(n)

    # huggingface_hub of before 1.0 has no such argument.
    return {"tqdm_class": Meter} if "tqdm_class" in inspect.signature(hf_hub_download).parameters else {}


@contextmanager
def hub_errors(repo_id: str, revision: str | None, endpoint: str | None, item: str = "upload") -> Iterator[None]:
    """Turn what huggingface_hub raises within into built-in exceptions; `item` is what was being fetched or made."""
    try:
        yield
    except Exception as error:  # huggingface_hub lets its HTTP client's own classes through, which change over time
        if type(error) is ValueError:  # of a card, say, over several lines
            raise ValueError(clip(str(error), 290)) from None
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
    where = f"Hub repo {repo_id!r} at {show(endpoint or constants.ENDPOINT)}"
    status = getattr(getattr(error, "response", None), "status_code", None)
    instead = f"bundled are {list_pretrained()}"
    if isinstance(error, hub.RepositoryNotFoundError) and not isinstance(error, hub.GatedRepoError):
        return FileNotFoundError(f"{where} does not exist or is private. Check the name, or pass token=; {instead}.")
    if isinstance(error, hub.RevisionNotFoundError):
        return FileNotFoundError(f"{where} has no revision {show(revision)}. Pass a branch, tag or full commit sha.")
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
    return f" ({clip(message.replace(secret, '***') if secret else message, 100)})"
