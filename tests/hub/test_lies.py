"""A malicious Hub, with false sizes, commits, ETags, contents and redirects.

Nothing may be written outside the cache, and no token may leak.
"""

import contextlib
import copy
import hashlib
import logging

import huggingface_hub
import pytest
import torch
from hub_server import TOKEN, serve

import lightning_lopt as lopt

REPO = "someone/my-star"
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture(scope="module")
def served():
    with serve() as (hub, _):
        lopt.push_to_hub(lopt.rules.make("star"), REPO, token=TOKEN, endpoint=hub.url)
        yield hub
    huggingface_hub.close_session()


@pytest.fixture
def hub(served, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client's retries without the pauses
    for record in (served.requests, served.authorized, served.lies, served.sent_instead):
        record.clear()
    monkeypatch.setattr(served, "repos", copy.deepcopy(served.repos))
    monkeypatch.setattr(served, "status", None)
    return served


def files(path):
    return {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()}


def refused(hub, tmp_path, kind=(ValueError, OSError), **arguments):
    """Load from this Hub, which must fail, and check that nothing was written outside the cache."""
    cache = tmp_path / "a" / "b" / "c" / "d" / "cache"
    cache.mkdir(parents=True, exist_ok=True)
    with pytest.raises(kind) as caught:
        lopt.load_rule(REPO, endpoint=hub.url, cache_dir=cache, **arguments)
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 400
    assert TOKEN not in message
    assert all(name.startswith("a/b/c/d/cache/") for name in files(tmp_path))
    return message


PATHS = ["../" * 9 + "tmp/x", "..", ".", "../x", "/etc/passwd", "a/b", "a\\b", "x" * 300, "\x01", "é", ""]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("header", ["ETag", "X-Repo-Commit"])
@pytest.mark.parametrize("value", PATHS, ids=ascii)
def test_names_that_would_be_paths(name, header, value, hub, tmp_path):
    hub.lies[name] = {header: value, "X-Linked-ETag": value} if header == "ETag" else {header: value}
    message = refused(hub, tmp_path)
    assert "sent an invalid" in message or value == ""
    assert hub.sent("GET", f"/{name}") == 0


def test_a_missing_file_of_a_commit_that_would_be_a_path(hub, tmp_path):
    """huggingface_hub records in its cache that the file is missing, under the name of the commit."""
    for commit in hub.repos[REPO].commits.values():
        commit.pop("config.json", None)
    assert "has no config.json" in refused(hub, tmp_path, FileNotFoundError)
    hub.lies["config.json"] = {"X-Repo-Commit": "../" * 6 + "x"}
    assert "sent an invalid commit" in refused(hub, tmp_path, ConnectionError)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_more_than_was_announced_is_not_written(name, hub, tmp_path):
    (sha,) = [s for s in hub.repos[REPO].commits if name in hub.repos[REPO].commits[s]]
    flood = b"x" * (40 << 20)
    hub.sent_instead[name] = hub.sent_instead[hashlib.sha256(hub.repos[REPO].commits[sha][name]).hexdigest()] = flood
    limit = {"config.json": 65536, "model.safetensors": 16777216}[name]
    assert f"at most {limit} are allowed" in refused(hub, tmp_path, ValueError)
    sizes = [path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()]
    assert max(sizes) <= 16 << 20


@pytest.mark.parametrize("size", ["-1", "abc", "9" * 30, ""])
def test_invalid_sizes(size, hub, tmp_path):
    hub.lies["model.safetensors"] = {"X-Linked-Size": size}
    arguments = {"endpoint": hub.url, "cache_dir": tmp_path}
    with contextlib.suppress(ValueError, OSError):
        assert lopt.load_rule(REPO, **arguments).kind == "star"


def test_other_weights_than_the_configuration_names(hub, tmp_path):
    """The Hub sends the weights of another rule under the right ETag."""
    rule = lopt.rules.make("star", step_mult=1.0)
    torch.nn.init.ones_(rule.w0)  # whatever the seed was: not the weights of the true one
    other = lopt.save_rule(rule, tmp_path / "a" / "b" / "c" / "d" / "cache" / "x")
    for oid in hub.blobs:
        hub.sent_instead[oid] = (other / "model.safetensors").read_bytes()
    assert "is not the file that config.json was saved with" in refused(hub, tmp_path, ValueError)


@pytest.mark.parametrize(
    "location",
    [
        "file:///etc/passwd",
        "ftp://127.0.0.1/x",
        "//",
        "javascript:1",
        "http://127.0.0.1:1/x",
        "\x01",
        "http://[bad/",
        "x",
    ],
)
def test_redirects_to_nowhere(location, hub, tmp_path):
    hub.lies["config.json"] = {"Location": location}
    refused(hub, tmp_path, (ConnectionError, FileNotFoundError))


def test_a_redirect_in_a_circle(hub, tmp_path):
    hub.lies["config.json"] = {"Location": f"{hub.url}/{REPO}/resolve/main/config.json"}
    refused(hub, tmp_path, ConnectionError)


def test_the_token_goes_to_the_hub_alone(hub, tmp_path):
    """As on the real Hub, weights are stored on another host."""
    lopt.load_rule(REPO, endpoint=hub.url, cache_dir=tmp_path, token=TOKEN)
    assert hub.sent("GET", "/model.safetensors") == 0
    assert any(path.startswith("/_lfs/") for _, path, _ in hub.requests)
    assert hub.authorized
    assert {host for host, _ in hub.authorized} == {"127.0.0.1"}
    assert not any(path.startswith("/_lfs/") for _, path in hub.authorized)


@pytest.mark.parametrize("status", [None, 401, 403, 500, 503])
def test_a_token_is_neither_logged_nor_written(status, hub, tmp_path, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    hub.status = status
    try:
        lopt.load_rule(REPO, endpoint=hub.url, cache_dir=tmp_path, token=TOKEN)
    except (ValueError, OSError) as error:
        shown = error
        while shown is not None and not shown.__suppress_context__:
            assert TOKEN not in repr(shown)
            shown = shown.__cause__ or shown.__context__
    out, err = capfd.readouterr()
    assert TOKEN not in out + err + caplog.text
    assert not any(TOKEN.encode() in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert hub.authorized  # it was used
