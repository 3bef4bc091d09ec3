"""A small Hugging Face Hub on this machine: datasets, commits, tags, LFS, on 127.0.0.1 and in memory.

    python -m tests.hub_server        # prints the settings with which every command publishes to it

It speaks the part of the Hub's HTTP interface that the genuine huggingface_hub client and `datasets` use for
datasets, without Xet. Content is addressed by its hash, a commit is checked against its parent under a lock,
and large files are served by a second origin (localhost) which refuses a token. `LoopbackHub.fault` breaks
answers on demand. It does not import huggingface_hub, which reads HF_ENDPOINT when it is imported.
"""

import argparse
import base64
import contextlib
import hashlib
import json
import os
import re
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote

TOKENS = {"hf_alice": "alice", "hf_bob": "bob", "hf_reader": "alice"}  # the last may only read
NAMESPACES = {"alice": ["alice", "org"], "bob": ["bob"]}
LARGE = (".safetensors", ".parquet", ".png")
DATE = "2026-01-01T00:00:00.000Z"


@dataclass(frozen=True)
class Blob:
    content: bytes
    large: bool

    @property
    def oid(self) -> str:
        """The git object: of the content, or of the LFS pointer to it."""
        content = self.pointer if self.large else self.content
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def pointer(self) -> bytes:
        version = "version https://git-lfs.github.com/spec/v1"
        return f"{version}\noid sha256:{self.sha256}\nsize {len(self.content)}\n".encode()


@dataclass(frozen=True)
class Commit:
    oid: str
    title: str
    tree: dict[str, Blob]
    parent: "Commit | None" = None

    @classmethod
    def of(cls, title: str, tree: dict[str, Blob], parent: "Commit | None") -> "Commit":
        files = sorted((path, blob.oid) for path, blob in tree.items())
        identity = json.dumps([title, files, parent and parent.oid, time.time_ns()])
        return cls(hashlib.sha1(identity.encode()).hexdigest(), title, tree, parent)


@dataclass
class Repository:
    id: str
    private: bool = False
    gated: str | bool = False
    refs: dict[str, Commit] = field(default_factory=dict)  # "refs/heads/main", "refs/tags/v1", "refs/pr/1"

    def find(self, revision: str) -> Commit | None:
        for name in (f"refs/heads/{revision}", f"refs/tags/{revision}", revision):
            if name in self.refs:
                return self.refs[name]
        return next((commit for commit in self.history() if commit.oid == revision), None)

    def history(self) -> list[Commit]:
        seen: dict[str, Commit] = {}
        for head in self.refs.values():
            commit: Commit | None = head
            while commit is not None and commit.oid not in seen:
                seen[commit.oid] = commit
                commit = commit.parent
        return list(seen.values())


@dataclass
class Fault:
    match: str  # searched in "METHOD /path"
    kind: str  # see `Handler.answer` and `Handler.send`
    value: Any = 0  # HTTP status, seconds, offset of a byte, bytes, milliseconds, process id or function
    times: int = 1  # how many requests it hits
    skip: int = 0  # how many it lets pass before


class RefusedError(Exception):
    def __init__(self, status: int, message: str, code: str = "", headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status, self.code, self.headers = status, code, headers or {}


@dataclass
class Reply:
    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


class LoopbackHub:
    """The state of the Hub and its server; a context manager. `requests` logs (method, path, token)."""

    def __init__(self, port: int = 0):
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}  # by sha256
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str, str | None]] = []
        self.lock = threading.RLock()
        self.server = ThreadingHTTPServer(("127.0.0.1", port), type("Bound", (Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.content_url = f"http://localhost:{self.server.server_port}"

    def __enter__(self) -> "LoopbackHub":
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def fault(self, match: str, kind: str, value: Any = 0, *, times: int = 1, skip: int = 0) -> None:
        self.faults.append(Fault(match, kind, value, times, skip))

    def take_fault(self, request: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if re.search(fault.match, request):
                    if fault.skip:
                        fault.skip -= 1
                    elif fault.times:
                        fault.times -= 1
                        return fault
        return None

    def head(self, repo_id: str, revision: str = "main") -> Commit:
        commit = self.repositories[repo_id].find(revision)
        assert commit is not None
        return commit

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        return {path: blob.content for path, blob in self.head(repo_id, revision).tree.items()}

    def put(self, repo_id: str, path: str, content: bytes) -> None:
        """One more commit on main, as if somebody had edited `path` on the site."""
        repository = self.repositories[repo_id]
        head, blob = self.head(repo_id), Blob(content, path.endswith(LARGE))
        if blob.large:
            self.large[blob.sha256] = content
        repository.refs["refs/heads/main"] = Commit.of("edit", head.tree | {path: blob}, head)

    def remove(self, repo_id: str, path: str) -> None:
        """One more commit on main, as if somebody had removed `path` on the site."""
        head = self.head(repo_id)
        tree = {name: blob for name, blob in head.tree.items() if name != path}
        self.repositories[repo_id].refs["refs/heads/main"] = Commit.of("edit", tree, head)


class Handler(BaseHTTPRequestHandler):
    disable_nagle_algorithm = True  # or each answer waits 40 ms for the acknowledgement of its headers
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def answer(self) -> None:
        hub = self.hub
        self.raw_path, _, query = self.path.partition("?")
        self.query = parse_qs(query, keep_blank_values=True)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        with hub.lock:
            hub.requests.append((self.command, self.raw_path, token))
        fault = hub.take_fault(f"{self.command} {self.raw_path}")
        if fault and fault.kind == "do":
            fault.value()
        try:
            self.body = self.read_body()
            if fault and fault.kind == "hang":
                time.sleep(fault.value)
                return
            if fault and fault.kind == "status":
                raise RefusedError(fault.value, "a fault of the test")
            if fault and fault.kind == "hide":
                raise RefusedError(404, "Repository not found", "RepoNotFound")
            if fault and fault.kind == "pause":
                raise RefusedError(429, "too many requests", headers={"Retry-After": str(fault.value)})
            reply = self.route(token)
            if fault and fault.kind == "kill":  # who asked does not learn that it was done
                os.kill(fault.value, signal.SIGKILL)
            if fault and fault.kind == "status-after":
                raise RefusedError(fault.value, "a fault of the test, after the fact")
        except RefusedError as refusal:
            headers = {"X-Error-Message": str(refusal), **refusal.headers}
            if refusal.code:
                headers["X-Error-Code"] = refusal.code
            reply = Reply(json.dumps({"error": str(refusal)}).encode(), refusal.status, headers)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.send(reply, fault)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer  # noqa: N815

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def send(self, reply: Reply, fault: Fault | None) -> None:
        body, headers = reply.body, {"Content-Type": "application/json"} | reply.headers
        kind = fault.kind if fault else ""
        value = fault.value if fault else 0
        if kind == "flip":
            body = body[:value] + bytes([body[value] ^ 1]) + body[value + 1 :]
        if kind == "truncate":
            body = body[:value]
        self.send_response(reply.status)
        for name, text in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, text)
        self.end_headers()
        if self.command == "HEAD":
            return
        if kind == "cut":
            self.wfile.write(body[:value])
            self.close_connection = True
        elif kind == "slow":
            step = max(1, len(body) // 20)
            for start in range(0, len(body), step):
                self.wfile.write(body[start : start + step])
                time.sleep(value / 1000 / 20)
        else:
            self.wfile.write(body)

    def route(self, token: str | None) -> Reply:
        request = f"{self.command} {self.raw_path}"
        for pattern, method in ROUTES:
            if match := re.fullmatch(pattern, request):
                groups = {name: unquote(text or "") for name, text in match.groupdict().items()}
                if pattern.startswith(("(GET|HEAD) /cdn", "PUT /lfs")):  # another origin, signed links
                    if token:
                        raise RefusedError(400, "a token was sent to the content origin")
                    return method(self, **groups)
                if token and token not in TOKENS:
                    raise RefusedError(401, "Invalid credentials in Authorization header")
                self.user = TOKENS.get(token or "")
                return method(self, **groups)
        raise RefusedError(404, f"no such route: {request}")

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    def repository(self, id: str, *, write: bool = False, contents: bool = False) -> Repository:
        repository = self.hub.repositories.get(id)
        member = id.split("/")[0] in NAMESPACES.get(self.user or "", ())
        if repository is None or (repository.private and not member):
            raise RefusedError(404 if self.user else 401, "Repository not found", "RepoNotFound")
        if write and not member:
            raise RefusedError(403, "You don't have the rights to write to this repository")
        if contents and repository.gated and not member:
            message = f"Access to dataset {id} is restricted"
            raise RefusedError(403 if self.user else 401, message, "GatedRepo")
        return repository

    def commit_at(self, repository: Repository, revision: str) -> Commit:
        commit = repository.find(revision or "main")
        if commit is None:
            raise RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    # Accounts and repositories

    def whoami(self) -> Reply:
        if self.user is None:
            raise RefusedError(401, "Unauthorized")
        organisations = [{"name": name} for name in NAMESPACES[self.user] if name != self.user]
        role = "read" if "hf_reader" in self.headers["Authorization"] else "write"
        auth = {"type": "access_token", "accessToken": {"role": role}}
        return answer({"type": "user", "name": self.user, "orgs": organisations, "auth": auth})

    def create(self) -> Reply:
        if self.user is None:
            raise RefusedError(401, "Unauthorized")
        content = self.json
        namespace = content.get("organization") or self.user
        id = f"{namespace}/{content['name']}"
        if namespace not in NAMESPACES[self.user]:
            raise RefusedError(
                403, f"You don't have the rights to create a dataset under the namespace {namespace!r}"
            )
        with self.hub.lock:
            if id in self.hub.repositories:
                body = json.dumps({"error": "exists", "url": f"{self.hub.url}/datasets/{id}"}).encode()
                return Reply(body, 409, {"X-Error-Message": "You already created this dataset repo"})
            private = content.get("visibility") == "private" or bool(content.get("private"))
            attributes = Blob(b"*.parquet filter=lfs diff=lfs merge=lfs -text\n", large=False)
            first = Commit.of("initial commit", {".gitattributes": attributes}, None)
            self.hub.repositories[id] = Repository(id, private, refs={"refs/heads/main": first})
        return answer({"url": f"{self.hub.url}/datasets/{id}"})

    def settings(self, id: str) -> Reply:
        repository, content = self.repository(id, write=True), self.json
        repository.gated = content.get("gated", repository.gated)
        if "visibility" in content or "private" in content:
            repository.private = content.get("visibility") == "private" or bool(content.get("private"))
        return answer({})

    def auth_check(self, id: str, write: str) -> Reply:
        self.repository(id, write=bool(write), contents=True)
        return answer({})

    def validate_yaml(self) -> Reply:
        return answer({"errors": [], "warnings": []})

    # Reading

    def info(self, id: str, revision: str = "") -> Reply:
        repository = self.repository(id)
        commit = self.commit_at(repository, revision)
        siblings = [
            {"rfilename": path} | ({"size": len(blob.content)} if "blobs" in self.query else {})
            for path, blob in sorted(commit.tree.items())
        ]
        return answer(
            {"id": id, "sha": commit.oid, "private": repository.private, "gated": repository.gated,
             "lastModified": DATE, "createdAt": DATE, "tags": [], "downloads": 0, "likes": 0,
             "disabled": False, "siblings": siblings}
        )  # fmt: skip

    def tree(self, id: str, revision: str, path: str = "") -> Reply:
        commit = self.commit_at(self.repository(id, contents=True), revision)
        under = f"{path}/" if path else ""
        rows: dict[str, dict] = {}
        for name, blob in sorted(commit.tree.items()):
            if name.startswith(under):
                folders = name[len(under) :].split("/")[:-1]
                for depth in range(len(folders)):
                    folder = under + "/".join(folders[: depth + 1])
                    rows[folder] = {"type": "directory", "path": folder, "oid": "0" * 40, "size": 0}
                rows[name] = row(name, blob)
        if path and not rows:
            raise RefusedError(404, f"{path} does not exist", "EntryNotFound")
        deep = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        shown = [r for name, r in rows.items() if deep or "/" not in name[len(under) :]]
        return answer([r | last_commit(commit) if "expand" in self.query else r for r in shown])

    def paths_info(self, id: str, revision: str) -> Reply:
        commit = self.commit_at(self.repository(id, contents=True), revision)
        rows = []
        for path in parse_qs(self.body.decode()).get("paths", []):
            if path in commit.tree:
                rows.append(row(path, commit.tree[path]) | last_commit(commit))
            elif any(name.startswith(f"{path}/") for name in commit.tree):
                folder = {"type": "directory", "path": path, "oid": "0" * 40, "size": 0}
                rows.append(folder | last_commit(commit))
        return answer(rows)

    def refs(self, id: str) -> Reply:
        kinds: dict[str, list] = {"heads": [], "tags": [], "pr": []}
        for name, commit in self.repository(id).refs.items():
            _, kind, short = name.split("/", 2)
            kinds[kind].append({"name": short, "ref": name, "targetCommit": commit.oid})
        return answer(
            {"branches": kinds["heads"], "tags": kinds["tags"], "pullRequests": kinds["pr"], "converts": []}
        )

    def commits(self, id: str, revision: str) -> Reply:
        commit: Commit | None = self.commit_at(self.repository(id), revision)
        rows = []
        while commit is not None:
            rows.append({"id": commit.oid, "title": commit.title, "message": "", "authors": [], "date": DATE})
            commit = commit.parent
        return answer(rows)

    def resolve(self, id: str, revision: str, path: str) -> Reply:
        repository = self.repository(id, contents=True)
        commit = self.commit_at(repository, revision)
        headers = {"X-Repo-Commit": commit.oid}
        if path not in commit.tree:
            raise RefusedError(404, "Entry not found", "EntryNotFound", headers)
        blob = commit.tree[path]
        if not blob.large:
            return self.content(blob.content, headers | {"ETag": f'"{blob.oid}"'})
        headers |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(len(blob.content))}
        headers |= {"Location": f"{self.hub.content_url}/cdn/{blob.sha256}?signature=of-the-hub"}
        return Reply(b"", 302, headers | {"ETag": f'"{blob.oid}"'})

    def cdn(self, sha256: str) -> Reply:
        if "signature" not in self.query or sha256 not in self.hub.large:
            raise RefusedError(403, "AccessDenied")
        return self.content(self.hub.large[sha256], {"ETag": f'"{sha256}"'})

    def content(self, content: bytes, headers: dict[str, str]) -> Reply:
        headers = headers | {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted is None:
            return Reply(content, 200, headers)
        start, end = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
        if start >= len(content):
            raise RefusedError(416, "range", headers={"Content-Range": f"bytes */{len(content)}"})
        headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
        return Reply(content[start : end + 1], 206, headers)

    # Writing

    def preupload(self, id: str, revision: str) -> Reply:
        repository = self.repository(id, write="create_pr" not in self.query)
        tree = self.commit_at(repository, revision).tree
        rows = []
        for file in self.json["files"]:
            large = file["path"].endswith(LARGE) or file["size"] > 10_000_000
            known = tree.get(file["path"])
            entry = {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            if known is not None:
                entry["oid"] = known.sha256 if known.large else known.oid
            rows.append(entry)
        return answer({"files": rows})

    def lfs_batch(self, id: str) -> Reply:
        self.repository(id)
        objects = []
        for item in self.json["objects"]:
            entry = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.hub.large:
                href = f"{self.hub.content_url}/lfs/{item['oid']}?signature=of-the-hub"
                verify = f"{self.hub.url}/datasets/{id}.git/verify"
                entry["actions"] = {"upload": {"href": href}, "verify": {"href": verify}}
            objects.append(entry)
        return answer({"transfer": "basic", "objects": objects})

    def lfs_put(self, sha256: str) -> Reply:
        if hashlib.sha256(self.body).hexdigest() != sha256:
            raise RefusedError(400, "the content does not have the announced hash")
        self.hub.large[sha256] = self.body
        return Reply()

    def lfs_verify(self, id: str) -> Reply:
        known = self.hub.large.get(self.json["oid"])
        if known is None or len(known) != self.json["size"]:
            raise RefusedError(404, "no such object")
        return answer({})

    def commit(self, id: str, revision: str) -> Reply:
        pull_request = "create_pr" in self.query
        repository = self.repository(id, write=not pull_request)
        header, changes = {}, {}
        for line in filter(None, self.body.splitlines()):
            entry = json.loads(line)
            value = entry["value"]
            match entry["key"]:
                case "header":
                    header = value
                case "file":
                    changes[value["path"]] = Blob(base64.b64decode(value["content"]), large=False)
                case "lfsFile":
                    if value["oid"] not in self.hub.large:
                        raise RefusedError(400, f"LFS pointer to an unknown object {value['oid']}")
                    changes[value["path"]] = Blob(self.hub.large[value["oid"]], large=True)
                case "deletedFile":
                    changes[value["path"]] = None
                case other:
                    raise RefusedError(400, f"unknown operation {other}")
        with self.hub.lock:
            head = self.commit_at(repository, revision)
            if header.get("parentCommit", head.oid) != head.oid:
                raise RefusedError(412, "A commit has happened since. Please refresh and try again.")
            missing = [path for path, blob in changes.items() if blob is None and path not in head.tree]
            if missing:
                raise RefusedError(404, "A file with this name doesn't exist", "EntryNotFound")
            tree = {path: blob for path, blob in (head.tree | changes).items() if blob is not None}
            commit = Commit.of(header["summary"], tree, head)
            number = 1 + sum(name.startswith("refs/pr/") for name in repository.refs)
            name = f"refs/pr/{number}" if pull_request else f"refs/heads/{revision}"
            repository.refs[name] = commit
        content = {"commitOid": commit.oid, "commitUrl": f"{self.hub.url}/datasets/{id}/commit/{commit.oid}"}
        if pull_request:
            content["pullRequestUrl"] = f"{self.hub.url}/datasets/{id}/discussions/{number}"
        return answer(content)

    def tag(self, id: str, revision: str) -> Reply:
        repository = self.repository(id, write=True)
        with self.hub.lock:
            if self.command == "DELETE":
                if repository.refs.pop(f"refs/tags/{revision}", None) is None:
                    raise RefusedError(404, "no such tag", "RevisionNotFound")
                return answer({})
            commit, name = self.commit_at(repository, revision), f"refs/tags/{self.json['tag']}"
            if name in repository.refs:
                raise RefusedError(409, "Tag reference exists already")
            repository.refs[name] = commit
        return answer({})


def answer(content: object) -> Reply:
    return Reply(json.dumps(content).encode())


def row(path: str, blob: Blob) -> dict:
    size = len(blob.content)
    lfs = {"oid": blob.sha256, "size": size, "pointerSize": len(blob.pointer)}
    entry = {"type": "file", "path": path, "oid": blob.oid, "size": size}
    return entry | ({"lfs": lfs} if blob.large else {})


def last_commit(commit: Commit) -> dict:
    return {"lastCommit": {"id": commit.oid, "title": commit.title, "date": DATE}}


_ID = r"(?P<id>[^/]+/[^/]+?)"
_REVISION = r"(?P<revision>[^/]+)"
ROUTES: list[tuple[str, Callable[..., Reply]]] = [
    ("GET /api/whoami-v2", Handler.whoami),
    ("POST /api/repos/create", Handler.create),
    ("POST /api/validate-yaml", Handler.validate_yaml),
    (f"PUT /api/datasets/{_ID}/settings", Handler.settings),
    (f"GET /api/datasets/{_ID}/auth-check(?P<write>/write)?", Handler.auth_check),
    (f"GET /api/datasets/{_ID}(/revision/{_REVISION})?", Handler.info),
    (f"GET /api/datasets/{_ID}/tree/{_REVISION}(/(?P<path>.+))?", Handler.tree),
    (f"POST /api/datasets/{_ID}/paths-info/{_REVISION}", Handler.paths_info),
    (f"GET /api/datasets/{_ID}/refs", Handler.refs),
    (f"GET /api/datasets/{_ID}/commits/{_REVISION}", Handler.commits),
    (f"(GET|HEAD) /datasets/{_ID}/resolve/{_REVISION}/(?P<path>.+)", Handler.resolve),
    (r"(GET|HEAD) /cdn/(?P<sha256>\w+)", Handler.cdn),
    (f"POST /api/datasets/{_ID}/preupload/{_REVISION}", Handler.preupload),
    (rf"POST /datasets/{_ID}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    (r"PUT /lfs/(?P<sha256>\w+)", Handler.lfs_put),
    (rf"POST /datasets/{_ID}\.git/verify", Handler.lfs_verify),
    (f"POST /api/datasets/{_ID}/commit/{_REVISION}", Handler.commit),
    (f"(POST|DELETE) /api/datasets/{_ID}/tag/{_REVISION}", Handler.tag),
]


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m tests.hub_server", description=__doc__, formatter_class=raw)
    parser.add_argument("--port", type=int, default=8732, help="(default: 8732; 0: any that is free)")
    port = parser.parse_args().port
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # SIGINT is ignored in the background of a shell
    with contextlib.ExitStack() as stack:
        try:
            hub = stack.enter_context(LoopbackHub(port=port))
        except OSError as error:
            sys.exit(f"error: port {port}: {error.strerror}. Choose another with --port.")
        home = stack.enter_context(tempfile.TemporaryDirectory(prefix="hub-"))  # no cache of real sets
        print(f"export HF_ENDPOINT={hub.url} HF_TOKEN=hf_alice HF_HUB_DISABLE_XET=1 HF_HOME={home}")
        print(
            "Publish to alice/NAME or org/NAME. Everything is forgotten when this ends: Ctrl-C.", flush=True
        )
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()


if __name__ == "__main__":
    main()
