"""An in-memory Hugging Face Hub on loopback, with the routes that huggingface_hub uses to push and load a model."""

import base64
import hashlib
import itertools
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_SecretTokenOfTheTests"
Files = dict[str, bytes]


@dataclass
class Repo:
    private: bool = False
    gated: bool = False
    commits: dict[str, Files] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: Files) -> str:
        """Commit files to a branch; as on the real Hub, the first commit creates the branch."""
        before = self.commits.get(self.branches.get(branch, ""), {})
        sha = hashlib.sha1(f"{branch} {len(self.commits)}".encode()).hexdigest()
        self.commits[sha] = {**before, **files}
        self.branches[branch] = sha
        return sha

    def resolve(self, revision: str) -> str | None:
        sha = self.branches.get(revision) or self.tags.get(revision) or revision
        return sha if sha in self.commits else None


class Hub:
    """The state of the server, which tests read and change."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}  # LFS objects by sha256
        self.requests: list[tuple[str, str, str]] = []  # method, path, User-Agent
        self.status: int | None = None  # answer with this HTTP status
        self.status_of = "/"  # what begins with this
        self.claimed_size: dict[str, int] = {}  # file name -> the size that the server claims
        self.lies: dict[str, dict[str, str]] = {}  # file name -> headers in place of the true ones
        self.sent_instead: dict[str, bytes] = {}  # file name or sha256 -> what is sent in place of the data
        self.authorized: list[tuple[str, str]] = []  # host and path of what came with a token
        self.url = ""

    def sent(self, method: str, ending: str) -> int:
        """Count the requests with this method whose path has this ending."""
        return sum(m == method and path.endswith(ending) for m, path, _ in self.requests)

    def create(self, repo_id: str, *, private: bool = False) -> Repo:
        repo = self.repos[repo_id] = Repo(private)
        repo.commit("main", {".gitattributes": b""})
        return repo


@contextmanager
def serve() -> Iterator[tuple[Hub, ThreadingHTTPServer]]:
    """A Hub and its server; `server.stop()` takes it off the network."""
    hub = Hub()
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub, server
    finally:
        server.stop()
        thread.join()


class _Server(ThreadingHTTPServer):
    _stopped = False

    def stop(self) -> None:
        if not self._stopped:
            self._stopped = True
            self.shutdown()
            self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that close the connection early."""


class _Answer(Exception):
    """An error that is sent to the client."""

    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


class _Handler(BaseHTTPRequestHandler):
    """Serve one request per connection (HTTP/1.0), so that no open connection outlives a stopped server."""

    hub: Hub
    _ids = itertools.count()

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._handle()

    do_HEAD = do_POST = do_PUT = do_GET

    def _handle(self) -> None:
        path = urlsplit(self.path).path
        self.hub.requests.append((self.command, path, self.headers.get("User-Agent", "")))
        if "Authorization" in self.headers:
            self.hub.authorized.append((self.headers.get("Host", "").partition(":")[0], path))
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        try:
            if self.hub.status is not None and path.startswith(self.hub.status_of):
                raise _Answer(self.hub.status)
            self._authorize()
            self._route(path, body)
        except _Answer as answer:
            lies = self.hub.lies.get(path.rpartition("/")[2], {})
            headers = {"X-Error-Code": answer.code, "X-Error-Message": answer.message, **lies}
            self._send(answer.status, b"", {name: value for name, value in headers.items() if value})

    def _authorize(self) -> None:
        sent = self.headers.get("Authorization")
        self.user = sent == f"Bearer {TOKEN}"
        if sent and not self.user:
            # The real Hub does not quote the token; a careless mirror might.
            raise _Answer(401, message="Invalid credentials in Authorization header" if "quoted" not in sent else sent)

    def _route(self, path: str, body: bytes) -> None:
        routes = (
            ("POST", r"/api/repos/create", self._create_repo),
            ("POST", r"/api/validate-yaml", self._validate_yaml),
            ("POST", r"/api/models/(.+/.+)/preupload/(.+)", self._preupload),
            ("POST", r"/api/models/(.+/.+)/commit/(.+)", self._commit),
            ("POST", r"/api/models/(.+/.+)/(branch|tag)/(.+)", self._ref),
            ("POST", r"/(.+/.+)\.git/info/lfs/objects/batch", self._lfs_batch),
            ("PUT", r"/_lfs/(.+)", self._lfs_put),
            ("GET", r"/_lfs/(.+)", self._lfs_get),
            ("GET", r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", self._info),
            ("HEAD|GET", r"/(.+/.+)/resolve/([^/]+)/(.+)", self._file),
        )
        for methods, pattern, handle in routes:
            if self.command in methods.split("|") and (match := re.fullmatch(pattern, path)):
                return handle(body, *(unquote(group) if group else group for group in match.groups()))
        raise _Answer(404)

    def _repo(self, repo_id: str, *, write: bool = False) -> Repo:
        repo = self.hub.repos.get(repo_id)
        if repo is None or (repo.private and not self.user):
            raise _Answer(404 if self.user else 401, "RepoNotFound")  # the real Hub, too, does not say which
        if repo.gated and not self.user:
            raise _Answer(403, "GatedRepo", "Access to this model is restricted")
        if write:
            self._require_user()
        return repo

    def _require_user(self, namespace: str = "") -> None:
        if not self.user:
            raise _Answer(401, message="Invalid username or password.")
        if namespace == "others":
            raise _Answer(403, message="You don't have the rights to create a model under the namespace others")

    # Writing

    def _create_repo(self, body: bytes) -> None:
        asked = json.loads(body)
        repo_id = f"{asked['organization']}/{asked['name']}"
        self._require_user(asked["organization"])
        exists = repo_id in self.hub.repos
        if not exists:
            self.hub.create(repo_id, private=asked.get("visibility") == "private" or asked.get("private", False))
        self._json({"url": f"{self.hub.url}/{repo_id}"}, 409 if exists else 200)

    def _validate_yaml(self, body: bytes) -> None:
        broken = "license: [" in json.loads(body)["content"]
        errors = [{"message": "unexpected end of the stream"}] if broken else []
        self._json({"errors": errors, "warnings": []}, 400 if broken else 200)

    def _preupload(self, body: bytes, repo_id: str, revision: str) -> None:
        repo = self._repo(repo_id, write=True)
        if revision not in repo.branches:
            raise _Answer(404, "RevisionNotFound")
        modes = [
            {
                "path": entry["path"],
                "uploadMode": "lfs" if entry["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for entry in json.loads(body)["files"]
        ]
        self._json({"files": modes})

    def _lfs_batch(self, body: bytes, repo_id: str) -> None:
        self._repo(repo_id, write=True)
        objects = [
            {**entry, "actions": {"upload": {"href": f"{self.hub.url}/_lfs/{entry['oid']}"}}}
            for entry in json.loads(body)["objects"]
        ]
        self._json({"transfer": "basic", "objects": objects})

    def _lfs_put(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            raise _Answer(400)
        self.hub.blobs[oid] = body
        self._json({})

    def _commit(self, body: bytes, repo_id: str, revision: str) -> None:
        repo = self._repo(repo_id, write=True)
        files: Files = {}
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
        sha = repo.commit(revision, files)
        self._json({"commitOid": sha, "commitUrl": f"{self.hub.url}/{repo_id}/commit/{sha}"})

    def _ref(self, body: bytes, repo_id: str, what: str, name: str) -> None:
        repo = self._repo(repo_id, write=True)
        asked = json.loads(body)
        name, at = (name, asked.get("startingPoint", "main")) if what == "branch" else (asked["tag"], name)
        refs = repo.branches if what == "branch" else repo.tags
        if name in refs:
            raise _Answer(409, message="Reference already exists")
        if (sha := repo.resolve(at)) is None:
            raise _Answer(404, "RevisionNotFound")
        refs[name] = sha
        self._json({})

    # Reading

    def _info(self, body: bytes, repo_id: str, revision: str | None) -> None:
        repo = self._repo(repo_id)
        if (sha := repo.resolve(revision or "main")) is None:
            raise _Answer(404, "RevisionNotFound")
        siblings = [{"rfilename": name} for name in repo.commits[sha]]
        self._json({"id": repo_id, "sha": sha, "private": repo.private, "tags": [], "siblings": siblings})

    def _file(self, body: bytes, repo_id: str, revision: str, name: str) -> None:
        repo = self._repo(repo_id)
        if (sha := repo.resolve(revision)) is None:
            raise _Answer(404, "RevisionNotFound")
        if (data := repo.commits[sha].get(name)) is None:
            raise _Answer(404, "EntryNotFound")
        etag = hashlib.sha256(data).hexdigest()
        lies = self.hub.lies.get(name, {})
        headers = {"X-Repo-Commit": sha, "ETag": f'"{etag}"', **lies}
        size = self.hub.claimed_size.get(name, len(data))
        if self.command == "GET" and name in self.hub.sent_instead:
            data = self.hub.sent_instead[name]
            return self._send(200, data, headers)
        if "Location" in lies:
            return self._send(302, b"", headers)
        if etag not in self.hub.blobs:
            return self._send(200, data, headers, size)
        # Redirect to another host, like the real Hub. On a redirect to the same host the client would lose the sha.
        location = f"{self.hub.url.replace('127.0.0.1', 'localhost')}/_lfs/{etag}"
        linked = {"X-Linked-ETag": f'"{etag}"', "X-Linked-Size": str(size), "Location": location}
        return self._send(302, b"", {**headers, **linked, **lies})

    def _lfs_get(self, body: bytes, oid: str) -> None:
        self._send(200, self.hub.sent_instead.get(oid, self.hub.blobs[oid]), {"ETag": f'"{oid}"'})

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, data: bytes, headers: dict[str, str], size: int | None = None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data) if size is None else size))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
