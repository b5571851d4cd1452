"""A hub on this machine: the HTTP endpoints that huggingface_hub calls for downloads, uploads (LFS, basic) and commits."""

import base64
import contextlib
import hashlib
import json
import re
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

from huggingface_hub import constants

WRITER, READER = "hf_writer", "hf_reader"  # tokens
Tree = dict[str, bytes]


@dataclass
class Repository:
    """commits: sha -> files; branches: name -> sha"""

    commits: dict[str, Tree] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    private: bool = False
    gated: bool = False

    def commit(self, files: Tree, branch: str = "main") -> str:
        text = f"{len(self.commits)} {branch} {sorted((name, hashlib.sha256(data).hexdigest()) for name, data in files.items())}"
        sha = hashlib.sha1(text.encode()).hexdigest()
        self.commits[sha], self.branches[branch] = dict(files), sha
        return sha

    def sha(self, revision: str) -> str | None:
        return self.branches.get(revision) or (revision if revision in self.commits else None)

    @property
    def files(self) -> Tree:
        return self.commits[self.branches["main"]]


class Hub(ThreadingHTTPServer):
    """seen: "METHOD path" of every request; fail: patterns of requests that are broken off, each once"""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Repository] = {}
        self.large: Tree = {}
        self.seen: list[str] = []
        self.fail: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address) -> None:
        """A client that goes away is no news."""


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments) -> None:
        pass

    def answer(self, data: object = None, status: int = 200, error: str = "", message: str = "", **headers: str) -> None:
        body = data if isinstance(data, bytes) else json.dumps({"error": message} if error or message else data).encode()
        self.send_response(status)
        for name, value in {"X-Error-Code": error, "X-Error-Message": message, **headers}.items():
            if value:
                self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", headers.get("length") or str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self) -> None:
        self.route()

    do_GET = do_POST = do_PUT = do_HEAD  # noqa: N815 (the names of http.server)

    def route(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.seen.append(f"{self.command} {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        for pattern in self.server.fail:
            if re.search(pattern, self.server.seen[-1]):
                self.server.fail.remove(pattern)
                self.close_connection = True
                return self.connection.shutdown(socket.SHUT_RDWR)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token not in ("", WRITER, READER):
            return self.answer(status=401, message="Invalid credentials in Authorization header")
        if self.command in ("POST", "PUT") and token != WRITER and "/lfs/" not in path and "validate-yaml" not in path:
            return self.answer(status=403, message="you may not write here")
        for pattern, method in ROUTES:
            found = re.fullmatch(pattern, path)
            if found:
                return method(self, body, token, **found.groupdict())
        return self.answer(status=404, message="no such endpoint")

    def repository(self, repo: str, token: str) -> Repository | None:
        found = self.server.repositories.get(repo)
        if found is None or (found.private and not token):
            self.answer(status=404, error="RepoNotFound", message="Repository not found")
            return None
        return found

    def tree_of(self, repo: str, revision: str, token: str) -> tuple[str, Tree] | None:
        found = self.repository(repo, token)
        if found is None:
            return None
        sha = found.sha(revision)
        if sha is None:
            self.answer(status=404, error="RevisionNotFound", message="Invalid rev id")
            return None
        return sha, found.commits[sha]

    def resolve(self, body: bytes, token: str, repo: str, revision: str, name: str) -> None:
        found = self.tree_of(repo, revision, token)
        if found is None:
            return None
        sha, files = found
        if self.server.repositories[repo].gated:
            return self.answer(status=403, error="GatedRepo", message="Access is restricted")
        if name not in files:
            return self.answer(status=404, error="EntryNotFound", message="Entry not found", X_Repo_Commit=sha)
        data, begin = files[name], int(re.sub(r"\D", "", (self.headers.get("Range") or "0").partition("-")[0]) or 0)
        etag = f'"{hashlib.sha256(data).hexdigest()}"'
        return self.answer(data[begin:], status=206 if begin else 200, ETag=etag, X_Repo_Commit=sha, length=str(len(data) - begin))

    def info(self, body: bytes, token: str, repo: str, revision: str = "main") -> None:
        found = self.tree_of(repo, revision, token)
        if found is not None:
            self.answer({"id": repo, "sha": found[0], "private": False, "siblings": [{"rfilename": name} for name in found[1]]})

    def tree(self, body: bytes, token: str, repo: str, revision: str) -> None:
        found = self.tree_of(repo, revision, token)
        if found is not None:
            entries = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()} for name, data in found[1].items()
            ]
            self.answer(entries)

    def create(self, body: bytes, token: str) -> None:
        asked = json.loads(body)
        repo = "/".join(filter(None, (asked.get("organization"), asked["name"])))
        if repo in self.server.repositories:
            return self.answer({"url": f"{self.server.url}/{repo}"}, status=409)
        made = self.server.repositories[repo] = Repository(private=bool(asked.get("private")) or asked.get("visibility") == "private")
        made.commit({".gitattributes": b""})
        return self.answer({"url": f"{self.server.url}/{repo}", "id": repo})

    def yaml(self, body: bytes, token: str) -> None:
        self.answer({"errors": [], "warnings": []})

    def preupload(self, body: bytes, token: str, repo: str, revision: str) -> None:
        if self.tree_of(repo, revision, token) is None:
            return
        files = json.loads(body)["files"]
        modes = [
            {"path": file["path"], "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular", "shouldIgnore": False} for file in files
        ]
        self.answer({"files": modes})

    def batch(self, body: bytes, token: str, repo: str) -> None:
        objects = json.loads(body)["objects"]
        for one in objects:
            if one["oid"] not in self.server.large:
                one["actions"] = {"upload": {"href": f"{self.server.url}/lfs/{one['oid']}"}}
        self.answer({"transfer": "basic", "objects": objects})

    def upload(self, body: bytes, token: str, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            return self.answer(status=400, message="another hash")
        self.server.large[oid] = body
        return self.answer({})

    def commit(self, body: bytes, token: str, repo: str, revision: str) -> None:
        found = self.tree_of(repo, revision, token)
        if found is None:
            return
        files = dict(found[1])
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.large[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        sha = self.server.repositories[repo].commit(files, revision)
        self.answer({"success": True, "commitOid": sha, "commitUrl": f"{self.server.url}/{repo}/commit/{sha}"})


REPO, REVISION = r"(?P<repo>[\w.-]+/[\w.-]+)", r"(?P<revision>.+?)"
ROUTES = [
    ("/api/repos/create", Handler.create),
    ("/api/validate-yaml", Handler.yaml),
    (rf"/api/models/{REPO}", Handler.info),
    (rf"/api/models/{REPO}/revision/{REVISION}", Handler.info),
    (rf"/api/models/{REPO}/tree/(?P<revision>[^/]+)", Handler.tree),
    (rf"/api/models/{REPO}/preupload/{REVISION}", Handler.preupload),
    (rf"/api/models/{REPO}/commit/{REVISION}", Handler.commit),
    (rf"/{REPO}\.git/info/lfs/objects/batch", Handler.batch),
    (r"/lfs/(?P<oid>\w+)", Handler.upload),
    (rf"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<name>.+)", Handler.resolve),
]


@contextlib.contextmanager
def hub(monkeypatch, cache):
    """Inside the context, huggingface_hub talks to a hub of this process, as a user who may write. cache: where its downloads go"""
    server = Hub()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # uploads by LFS
    monkeypatch.setenv("HF_TOKEN", WRITER)
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
