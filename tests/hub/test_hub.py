"""Load and push rules with the real huggingface_hub client, over HTTP, against a local Hub server."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import safetensors.torch
import torch
from goldens import FIXTURES
from hub_server import TOKEN, Hub, serve

import lightning_lopt as lopt
from lightning_lopt import hub as lopt_hub
from lightning_lopt.hub import bundle
from lightning_lopt.rules import UpdateRule

REPO = "someone/my-star"

# A warning of huggingface_hub with the newest version of its HTTP client.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def hub_and_server() -> Iterator[tuple[Hub, Any]]:
    with serve() as hub_and_server:
        yield hub_and_server
    huggingface_hub.close_session()


@pytest.fixture
def hub(hub_and_server: tuple[Hub, Any]) -> Hub:
    return hub_and_server[0]


@pytest.fixture
def stop(hub_and_server: tuple[Hub, Any]) -> Callable[[], None]:
    return hub_and_server[1].stop


@pytest.fixture
def load(hub: Hub, tmp_path: Path) -> Callable[..., UpdateRule]:
    """load_rule on this Hub, with a cache for this test only."""

    def load(name: str = REPO, **arguments: Any) -> UpdateRule:
        return lopt.load_rule(name, **{"endpoint": hub.url, "cache_dir": tmp_path / "cache", **arguments})

    return load


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the pauses between the client's retries (23 s in total)."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)


@pytest.fixture(autouse=True)
def bundled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two bundled rules in place of those of the checkout."""
    folder = tmp_path / "bundled"
    for name, kind in (("star", "star"), ("tiny", "hyperparam")):
        lopt.save_rule(lopt.rules.make(kind), folder / name)
    (folder / "no-rule").mkdir()
    monkeypatch.setattr(bundle, "bundled_dir", lambda: folder)
    return folder


def push(hub: Hub, rule: UpdateRule | None = None, repo_id: str = REPO, **arguments: Any) -> str:
    rule = lopt.rules.make("star") if rule is None else rule
    return lopt.push_to_hub(rule, repo_id, **{"token": TOKEN, "endpoint": hub.url, **arguments})


def assert_equal(found: UpdateRule, expected: UpdateRule) -> None:
    assert (found.kind, found.config) == (expected.kind, expected.config)
    params = dict(expected.named_parameters())
    assert dict(found.named_parameters()).keys() == params.keys()
    for name, param in found.named_parameters():
        assert torch.equal(param, params[name])
        assert param.dtype == params[name].dtype
        assert param.requires_grad


def assert_teaches(error: BaseException, *parts: str) -> None:
    message = str(error)
    assert "\n" not in message
    assert len(message) < 400
    assert TOKEN not in message
    # A traceback must not show the client's exception, which has the request and with it the token.
    assert error.__cause__ is None
    assert error.__context__ is None or error.__suppress_context__
    for part in parts:
        assert part in message


# Names


def test_a_bundled_rule_is_loaded_by_its_name(bundled: Path) -> None:
    assert lopt.list_pretrained() == ["star", "tiny"]
    rule = lopt.load_rule("tiny")
    assert rule.kind == "hyperparam"
    assert rule.source == ("tiny", None)
    assert_equal(rule, lopt.load_rule(bundled / "tiny"))


def test_nothing_is_bundled_where_there_is_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "bundled_dir", lambda: tmp_path / "absent")
    assert lopt.list_pretrained() == []


def test_the_bundled_folder_is_the_installed_one_else_the_checkouts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    package = tmp_path / "site" / "lightning_lopt"
    package.mkdir(parents=True)
    monkeypatch.setattr(bundle, "__file__", str(package / "hub" / "bundle.py"))
    assert bundle.bundled_dir() == package / "pretrained"  # not site/pretrained, which would be someone else's
    (tmp_path / "site" / "pyproject.toml").touch()
    assert bundle.bundled_dir() == tmp_path / "site" / "pretrained"
    (package / "pretrained").mkdir()
    assert bundle.bundled_dir() == package / "pretrained"


@pytest.mark.parametrize("name", [REPO, "mine", "./star", Path("star")], ids=str)
def test_a_directory_comes_before_the_hub(
    name: str | Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: Hub
) -> None:
    monkeypatch.chdir(tmp_path)
    lopt.save_rule(lopt.rules.make("blackbox"), name)
    rule = lopt.load_rule(name, endpoint=hub.url)
    assert rule.kind == "blackbox"
    assert rule.source == (str(name), None)
    assert hub.requests == []


def test_a_bundled_name_wins_over_an_empty_folder_of_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders named after an optimizer are common: logs, checkpoints, figures."""
    monkeypatch.chdir(tmp_path)
    Path("star").mkdir()
    assert lopt.load_rule("star").kind == "star"
    lopt.LearnedOptimizer.from_pretrained("star")


def test_a_bundled_name_wins_over_a_saved_rule_of_that_name_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lopt.save_rule(lopt.rules.make("blackbox"), "star")
    with pytest.warns(UserWarning, match=r"'star' is the bundled rule, not the directory.*write '\./star'"):
        assert lopt.load_rule("star").kind == "star"


def test_a_bundled_name_within_the_bundled_folder_is_not_ambiguous(
    bundled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(bundled)
    assert lopt.load_rule("star").source == ("star", None)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("nope", id="unknown"),
        pytest.param("", id="empty"),
        pytest.param("no-rule", id="bundled folder without a config"),
        pytest.param("..", id="a directory without files"),
        pytest.param("../bundled", id="relative"),
        pytest.param("a/b/c", id="two slashes"),
        pytest.param("/absent/folder", id="absolute"),
        pytest.param("../x", id="dots as owner"),
        pytest.param("x/..", id="dots as name"),
        pytest.param("owner/na..me", id="dots in name"),
        pytest.param("owner/na me", id="space"),
        pytest.param("owner/name\n", id="line break"),
        pytest.param("owner/na\0me", id="NUL"),
        pytest.param("ownér/name", id="non-ASCII"),
        pytest.param("owner/name?x=1", id="query"),
        pytest.param("owner\\name", id="backslash"),
        pytest.param("owner/" + "n" * 5000, id="long"),
        pytest.param(Path("star"), id="a Path is a directory"),
    ],
)
def test_a_bad_name_is_refused_without_a_request(
    name: str | Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty = tmp_path / "empty" / "folder"
    empty.mkdir(parents=True)
    monkeypatch.chdir(empty)
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the messages differ; each is checked to be one line
        lopt.load_rule(name, endpoint=hub.url)
    assert_teaches(caught.value)
    assert hub.requests == []


def test_the_error_for_an_unknown_name_lists_the_bundled_ones() -> None:
    with pytest.raises(ValueError, match=r"Unknown rule 'nope'.*\['star', 'tiny'\]"):
        lopt.load_rule("nope")


def test_a_name_of_another_type_is_refused() -> None:
    with pytest.raises(TypeError):
        lopt.load_rule(3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        pytest.param({"revision": "../../x"}, "revision", id="revision with dots"),
        pytest.param({"revision": "a/../../x"}, "revision", id="revision with dots inside"),
        pytest.param({"revision": "/etc"}, "revision", id="absolute revision"),
        pytest.param({"revision": "-x"}, "revision", id="revision like an option"),
        pytest.param({"revision": ""}, "revision", id="empty revision"),
        pytest.param({"revision": "a b"}, "revision", id="revision with a space"),
        pytest.param({"token": TOKEN + "\n"}, "token", id="token with a line break"),
        pytest.param({"token": TOKEN + "é"}, "token", id="non-ASCII token"),
        pytest.param({"token": ""}, "token", id="empty token"),
        pytest.param({"endpoint": "huggingface.co"}, "endpoint", id="endpoint without scheme"),
        pytest.param({"endpoint": "file:///etc"}, "endpoint", id="endpoint of another scheme"),
        pytest.param({"endpoint": "http://me:secret@host"}, "endpoint", id="endpoint with a password"),
    ],
)
def test_a_bad_argument_is_refused_without_a_request(
    arguments: dict[str, Any], part: str, load: Callable[..., UpdateRule], hub: Hub
) -> None:
    with pytest.raises(ValueError, match=part) as caught:
        load(**arguments)
    assert_teaches(caught.value)
    assert "secret" not in str(caught.value)
    assert hub.requests == []


@pytest.mark.parametrize("kind_of_name", ["bundled", "directory"])
def test_a_revision_is_for_hub_repos_only(kind_of_name: str, bundled: Path) -> None:
    name = "star" if kind_of_name == "bundled" else bundled / "star"
    with pytest.raises(ValueError, match="revision='v1' is not allowed.*only Hub repos"):
        lopt.load_rule(name, revision="v1")


# Push and load


def test_push_then_load(hub: Hub, load: Callable[..., UpdateRule]) -> None:
    rule = lopt.rules.make("star", nominal_stepsize=1e-2).double()
    sha = push(hub, rule)
    assert re.fullmatch("[0-9a-f]{40}", sha)
    loaded = load()
    assert_equal(loaded, rule)
    assert loaded.source == (REPO, sha)
    assert hub.repos[REPO].commits[sha].keys() == {".gitattributes", "config.json", "model.safetensors", "README.md"}
    assert hub.sent("POST", "/commit/main") == 1
    assert not hub.repos[REPO].private


def test_one_rule_is_the_same_files_each_time(hub: Hub) -> None:
    rule = lopt.rules.make("star")
    first, second = push(hub, rule), push(hub, rule)
    files = hub.repos[REPO].commits
    assert files[first] == files[second]


def test_load_by_branch_tag_and_sha(hub: Hub, load: Callable[..., UpdateRule]) -> None:
    kinds = ["star", "hyperparam", "blackbox"]
    old, new, other = (lopt.rules.make(kind) for kind in kinds)
    old_sha, new_sha = push(hub, old, tag="v1"), push(hub, new)
    other_sha = push(hub, other, revision="experiment/2", tag="v2")
    assert len({old_sha, new_sha, other_sha}) == 3
    for revision, rule, sha in (
        (None, new, new_sha),
        ("main", new, new_sha),
        ("v1", old, old_sha),
        (old_sha, old, old_sha),
        ("experiment/2", other, other_sha),
        ("v2", other, other_sha),
    ):
        loaded = load(revision=revision)
        assert_equal(loaded, rule)
        assert loaded.source == (REPO, sha)
    assert_equal(load(revision="experiment/2"), other)  # a second push to an existing branch
    push(hub, old, revision="experiment/2")
    assert_equal(load(revision="experiment/2"), old)


def test_both_files_come_from_one_commit(
    hub: Hub, load: Callable[..., UpdateRule], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if the branch moves between the two downloads."""
    first = lopt.rules.make("star")
    sha = push(hub, first)
    original = lopt_hub.read_config

    def read_config_then_move_the_branch(*arguments: Any) -> UpdateRule:
        push(hub, lopt.rules.make("star"))
        return original(*arguments)

    monkeypatch.setattr(lopt_hub, "read_config", read_config_then_move_the_branch)
    loaded = load()
    assert loaded.source == (REPO, sha)
    assert_equal(loaded, first)


def test_the_client_says_who_it_is(hub: Hub, load: Callable[..., UpdateRule]) -> None:
    push(hub)
    start = len(hub.requests)
    assert all("lightning_lopt/" in agent for _, path, agent in hub.requests if path.startswith("/api/"))
    load()
    downloads = [agent for _, path, agent in hub.requests[start:] if "/resolve/" in path]
    assert downloads
    assert all(f"lightning_lopt/{lopt.__version__}" in agent for agent in downloads)


def test_a_commit_in_the_cache_is_loaded_without_a_request(hub: Hub, load: Callable[..., UpdateRule]) -> None:
    sha = push(hub)
    load(revision=sha)
    hub.requests.clear()
    assert load(revision=sha).source == (REPO, sha)
    assert hub.requests == []


def test_loading_leaves_the_random_state_alone(hub: Hub, load: Callable[..., UpdateRule]) -> None:
    push(hub)
    before = torch.get_rng_state()
    load()
    assert torch.equal(torch.get_rng_state(), before)


def test_the_default_card(hub: Hub) -> None:
    sha = push(hub)
    card = huggingface_hub.ModelCard(hub.repos[REPO].commits[sha]["README.md"].decode())
    assert card.data.library_name == "lightning_lopt"
    assert card.data.license == "apache-2.0"
    assert {"learned-optimizer", "pytorch-lightning", "star"} <= set(card.data.tags)
    assert f'from_pretrained("{REPO}")' in card.text
    assert "207 meta-parameters" in card.text


def test_a_custom_card(hub: Hub, tmp_path: Path) -> None:
    sha = push(hub, card="# My rule\n\nTrained on {braces}.")
    card = huggingface_hub.ModelCard(hub.repos[REPO].commits[sha]["README.md"].decode())
    assert card.data.library_name == "lightning_lopt"
    assert card.text.strip() == "# My rule\n\nTrained on {braces}."
    whole = "---\nlibrary_name: lightning_lopt\nlicense: mit\n---\n# Mine\n"
    lopt.save_rule(lopt.rules.make("star"), tmp_path / "whole", card=whole)
    assert (tmp_path / "whole" / "README.md").read_text() == whole


def test_a_card_that_the_hub_refuses(hub: Hub) -> None:
    with pytest.raises(ValueError, match="Invalid metadata in README.md") as caught:
        push(hub, card="---\nlicense: [\n---\n")
    assert_teaches(caught.value)


def test_a_private_repo(hub: Hub, load: Callable[..., UpdateRule]) -> None:
    push(hub, private=True)
    assert hub.repos[REPO].private
    load(token=TOKEN)
    hub.requests.clear()
    with pytest.raises(FileNotFoundError, match="does not exist or is private") as caught:
        load(cache_dir=None, token=False)
    assert_teaches(caught.value)


def test_an_existing_public_repo_is_not_taken_for_a_private_one(hub: Hub) -> None:
    sha = push(hub)
    with pytest.raises(ValueError, match="exists and is public") as caught:
        push(hub, lopt.rules.make("blackbox"), private=True)
    assert_teaches(caught.value)
    assert hub.repos[REPO].branches["main"] == sha


def test_a_taken_tag_is_refused_and_the_commit_named(hub: Hub) -> None:
    push(hub, tag="v1")
    with pytest.raises(FileExistsError, match="tag 'v1'.*already exists") as caught:
        push(hub, lopt.rules.make("blackbox"), tag="v1")
    assert_teaches(caught.value, hub.repos[REPO].branches["main"])


def test_a_rule_that_would_not_load_reaches_no_hub(hub: Hub) -> None:
    rule = lopt.rules.make("star")
    torch.nn.init.constant_(rule.w0, torch.nan)
    with pytest.raises(ValueError, match="'w0' contains NaN"):
        push(hub, rule)
    assert hub.requests == []


def test_the_token_is_in_no_file(hub: Hub, load: Callable[..., UpdateRule], tmp_path: Path) -> None:
    push(hub, private=True)
    load(token=TOKEN)
    pushed = [data for repo in hub.repos.values() for files in repo.commits.values() for data in files.values()]
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(pushed) > 3
    assert len(written) > 3
    assert not any(TOKEN.encode() in data for data in pushed + written)


# Without the Hub


def test_the_cached_copy_is_taken_when_the_hub_is_down(
    hub: Hub, stop: Callable[[], None], load: Callable[..., UpdateRule]
) -> None:
    sha = push(hub, tag="v1")
    expected = load()
    load(revision="v1")
    stop()
    for revision in (None, "main", "v1", sha):
        loaded = load(revision=revision)
        assert_equal(loaded, expected)
        assert loaded.source == (REPO, sha)


def test_the_cached_copy_is_taken_when_the_hub_is_ill(hub: Hub, load: Callable[..., UpdateRule]) -> None:
    sha = push(hub)
    load()
    hub.status = 503
    assert load().source == (REPO, sha)


def test_local_files_only(hub: Hub, load: Callable[..., UpdateRule]) -> None:
    sha = push(hub)
    with pytest.raises(FileNotFoundError, match=r"config.json is not in the cache.*\['star', 'tiny'\]") as caught:
        load(local_files_only=True)
    assert_teaches(caught.value)
    load()
    hub.requests.clear()
    assert load(local_files_only=True).source == (REPO, sha)
    assert hub.requests == []


def test_no_hub_and_no_cache(
    stop: Callable[[], None], load: Callable[..., UpdateRule], hub: Hub, no_waiting: None
) -> None:
    stop()
    with pytest.raises(ConnectionError, match="sent no usable answer.*ConnectError") as caught:
        load(token=TOKEN)
    assert_teaches(caught.value, hub.url, REPO, "star")
    with pytest.raises(ConnectionError) as caught:
        push(hub)
    assert_teaches(caught.value, hub.url)


def test_an_ill_hub_and_no_cache(hub: Hub, load: Callable[..., UpdateRule], no_waiting: None) -> None:
    hub.status = 503
    with pytest.raises(ConnectionError, match="HTTP 503") as caught:
        load()
    assert_teaches(caught.value, hub.url)
    with pytest.raises(ConnectionError, match="HTTP 503"):
        push(hub)


@pytest.mark.parametrize(
    ("path", "status", "error"),
    [
        ("/_lfs/", 500, ConnectionError),
        ("/_lfs/", 403, PermissionError),
        (f"/api/models/{REPO}/commit/", 500, ConnectionError),
        (f"/api/models/{REPO}/commit/", 400, ValueError),
        (f"/api/models/{REPO}/branch/", 500, ConnectionError),
    ],
)
def test_a_push_that_fails_on_the_way_changes_nothing(
    path: str, status: int, error: type[Exception], hub: Hub, no_waiting: None
) -> None:
    sha = push(hub)
    hub.status, hub.status_of = status, path
    with pytest.raises(error) as caught:
        push(hub, revision="branch" if "/branch/" in path else None)
    assert_teaches(caught.value, REPO)
    assert hub.repos[REPO].branches == {"main": sha}


def test_a_tag_that_fails_names_the_commit(hub: Hub) -> None:
    hub.status, hub.status_of = 500, f"/api/models/{REPO}/tag/"
    with pytest.raises(ConnectionError, match="tag 'v1' for commit") as caught:
        push(hub, tag="v1")
    assert_teaches(caught.value, hub.repos[REPO].branches["main"])


def test_a_download_that_is_cut_short(hub: Hub, load: Callable[..., UpdateRule], no_waiting: None) -> None:
    push(hub)
    hub.claimed_size["config.json"] = 10_000
    with pytest.raises(ConnectionError, match="sent no usable answer") as caught:
        load()
    assert_teaches(caught.value)


def test_offline_mode(hub: Hub, load: Callable[..., UpdateRule], monkeypatch: pytest.MonkeyPatch) -> None:
    push(hub)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()
    with pytest.raises(ConnectionError, match="HF_HUB_OFFLINE is set") as caught:
        load()
    assert_teaches(caught.value)
    monkeypatch.undo()


# Refusals


@pytest.mark.parametrize("action", ["load", "push"])
def test_a_bad_token(action: str, hub: Hub, load: Callable[..., UpdateRule]) -> None:
    push(hub)
    bad = "hf_quotedWrongToken"
    with pytest.raises(PermissionError, match="refuses access.*Pass token=") as caught:
        load(token=bad) if action == "load" else push(hub, token=bad)
    assert_teaches(caught.value)
    assert bad not in str(caught.value)  # even though the server quotes it


def test_push_without_a_token(hub: Hub) -> None:
    with pytest.raises(PermissionError, match="Invalid username or password") as caught:
        push(hub, token=False)
    assert_teaches(caught.value)


def test_a_token_that_is_asked_for_and_missing(load: Callable[..., UpdateRule]) -> None:
    with pytest.raises(PermissionError, match="hf auth login") as caught:
        load(token=True)
    assert_teaches(caught.value)


def test_push_to_someone_elses_namespace(hub: Hub) -> None:
    with pytest.raises(PermissionError, match="don't have the rights") as caught:
        push(hub, repo_id="others/star")
    assert_teaches(caught.value)


def test_a_gated_repo(hub: Hub, load: Callable[..., UpdateRule]) -> None:
    push(hub)
    hub.repos[REPO].gated = True
    with pytest.raises(PermissionError, match="Access to this model is restricted") as caught:
        load(token=False)
    assert_teaches(caught.value)
    load(token=TOKEN)


def test_a_missing_repo(load: Callable[..., UpdateRule]) -> None:
    for token in (TOKEN, False):
        with pytest.raises(FileNotFoundError, match=r"'someone/else'.*does not exist or is private.*'tiny'") as caught:
            load("someone/else", token=token)
        assert_teaches(caught.value)


def test_a_missing_revision(hub: Hub, load: Callable[..., UpdateRule]) -> None:
    push(hub)
    with pytest.raises(FileNotFoundError, match="has no revision 'v9'") as caught:
        load(revision="v9")
    assert_teaches(caught.value)
    with pytest.raises(FileNotFoundError, match="has no revision"):
        load(revision="0" * 40)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file(name: str, hub: Hub, load: Callable[..., UpdateRule]) -> None:
    sha = push(hub)
    del hub.repos[REPO].commits[sha][name]
    with pytest.raises(FileNotFoundError, match=f"has no {name}") as caught:
        load()
    assert_teaches(caught.value)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_huge_file_is_not_downloaded(name: str, hub: Hub, load: Callable[..., UpdateRule]) -> None:
    push(hub)
    hub.claimed_size[name] = 1 << 40
    with pytest.raises(ValueError, match=f"{name}: has 1099511627776 bytes") as caught:
        load()
    assert_teaches(caught.value)
    assert hub.sent("GET", f"/{name}") == 0
    assert name == "config.json" or hub.sent("GET", "/_lfs/") == 0


def test_a_damaged_file_is_named_with_its_commit(hub: Hub, load: Callable[..., UpdateRule]) -> None:
    sha = push(hub)
    hub.repos[REPO].commits[sha]["config.json"] = json.dumps({"format_version": 99}).encode()
    with pytest.raises(ValueError, match=f"{REPO}@{sha[:12]}/config.json: format_version=99 is newer.*Upgrade"):
        load()


# Other packages' repos


def test_a_repo_of_celo2s_authors(hub: Hub, load: Callable[..., UpdateRule]) -> None:
    theta = (FIXTURES / "celo2_theta.state").read_bytes()
    spec = {"optimizer": "celo2base", "task": "fast_velo", "step_mult": 0.001, "weight_decay": 0.0}
    sha = hub.create("amoudgl/celo2-base").commit(
        "main", {"config.json": json.dumps(spec).encode(), "theta.state": theta}
    )
    rule = load("amoudgl/celo2-base")
    assert rule.source == ("amoudgl/celo2-base", sha)
    arrays = lopt_hub.read_theta(FIXTURES / "celo2_theta.state")
    assert_equal(rule, lopt.rules.Celo2.from_jax(arrays, kind="celo2_base", adam_bias_correction=True))


@pytest.mark.parametrize(
    ("repo_id", "momenta", "step_mult"),
    [("DiamondXL/elo", (0.9, 0.99, 0.999), 0.001), ("btherien/mulo", (0.54203, 0.95844, 0.99802), 0.01)],
)
def test_pylos_elo_is_known_by_its_name_alone(
    hub: Hub, load: Callable[..., UpdateRule], repo_id: str, momenta: tuple[float, ...], step_mult: float
) -> None:
    """Its files are like those of AdafacLO, but it was trained with the decays as they are."""
    sizes = {"input": (32, 39), "linear_0": (32, 32), "output": (2, 32)}
    tensors = {f"network.{place}.weight": torch.randn(shape) for place, shape in sizes.items()}
    tensors |= {f"network.{place}.bias": torch.zeros(shape[0]) for place, shape in sizes.items()}
    spec = {"hidden_layers": 1, "hidden_size": 32, "input_size": 39}
    files = {"config.json": json.dumps(spec).encode(), "model.safetensors": safetensors.torch.save(tensors)}
    hub.create(repo_id).commit("main", files)
    with pytest.warns(UserWarning, match="leaves out decays"):
        rule = load(repo_id)
    assert isinstance(rule, lopt.rules.STAR)
    assert rule.config.step_mult == step_mult
    assert rule.config.layout == "torch"
    assert rule.decays(rule.meta_params()).momentum.tolist() == pytest.approx(momenta, abs=6e-6)


def test_an_endpoint_that_is_not_a_hub(hub: Hub, load: Callable[..., UpdateRule], no_waiting: None) -> None:
    hub.status = 204
    with pytest.raises(ConnectionError, match="sent no usable answer") as caught:
        load()
    assert_teaches(caught.value)
