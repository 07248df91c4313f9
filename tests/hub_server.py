"""A model hub and a web server on loopback: the few requests that huggingface_hub and vqpipe send, and their failures.

HEAD, GET  /OWNER/NAME/resolve/REVISION/FILE       a file of a repository, with ranges
GET        /api/models/OWNER/NAME[/revision/R]     the files of a repository, and so /tree/R
GET        /files/FILE                             a file of a web server, with ranges
POST       /api/repos/create, /api/models/OWNER/NAME/preupload/R, .../commit/R, /api/validate-yaml,
           /OWNER/NAME.git/info/lfs/objects/batch; PUT /lfs/OID    an upload
"""

import base64
import hashlib
import json
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "c0ffee" + "0" * 34
TOKEN = "hf_loopback"


@dataclass
class Server:
    """What the server has and does. `address` is its URL."""

    address: str = ""
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """OWNER/NAME -> path -> content."""
    gated: set[str] = field(default_factory=set)
    private: set[str] = field(default_factory=set)
    """Repositories that only requests with TOKEN see."""
    files: dict[str, bytes] = field(default_factory=dict)
    """Name -> content of what is under /files."""
    html: set[str] = field(default_factory=set)
    """Names under /files that are sent as web pages."""
    states: dict[str, str] = field(default_factory=dict)
    """Path -> the hash that the server promises in place of the true one."""
    cut_at: int | None = None
    """Connections that send a body end before this byte of the file."""
    cuts: int = 10**9
    """How many connections are cut."""
    fails_with: int | None = None
    """Status of every answer about a file."""
    versioned: bool = True
    """Whether files under /files have an ETag."""
    log: list[str] = field(default_factory=list)
    """`METHOD PATH [RANGE]` of every request."""
    created: list[dict[str, Any]] = field(default_factory=list)
    commits: list[dict[str, Any]] = field(default_factory=list)
    objects: dict[str, bytes] = field(default_factory=dict)
    """Large files that were uploaded, by their sha256."""

    def bodies(self) -> list[str]:
        """The requests of the bodies of files."""
        return [line for line in self.log if line.startswith("GET") and ("/resolve/" in line or "/files/" in line)]


@contextmanager
def running() -> Iterator[Server]:
    """A running server."""
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any) -> None:
            pass

        def handle_any(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(length) if length else b""
            span = self.headers.get("Range")
            state.log.append(f"{self.command} {self.path}" + (f" {span}" if span else ""))
            path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path).strip("/")
            try:
                answer(self, path, body)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True

        do_HEAD = do_GET = do_POST = do_PUT = handle_any

        def reply(self, status: int, content: bytes = b"", **headers: str) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            if "Content_Length" not in headers:
                self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def json(self, value: Any, status: int = 200) -> None:
            self.reply(status, json.dumps(value).encode(), Content_Type="application/json")

        def file(self, content: bytes, etag: str | None, **headers: str) -> None:
            """Send a file, or the range of it that was asked for, and end the connection early if it is to be cut."""
            start, status = 0, 200
            span = self.headers.get("Range")
            if span and self.headers.get("If-Range", etag) == etag:
                start, status = int(span.removeprefix("bytes=").split("-")[0]), 206
                if start >= len(content):
                    return self.reply(416, Content_Range=f"bytes */{len(content)}")
                headers["Content_Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            if etag:
                headers["ETag"] = etag
            sent = content[start:]
            if state.cut_at is not None and state.cuts > 0 and self.command == "GET":
                state.cuts -= 1
                sent = content[start : state.cut_at] if start < state.cut_at else b""
                self.close_connection = True
            self.reply(status, sent, Content_Length=str(len(content) - start), **headers)
            return None

    def answer(request: Any, path: str, body: bytes) -> None:
        parts = path.split("/")
        if path == "":
            return request.reply(200)
        if parts[0] == "files":
            name = "/".join(parts[1:])
            if state.fails_with or name not in state.files:
                return request.reply(state.fails_with or 404)
            content = state.files[name]
            etag = f'"{hashlib.sha256(content).hexdigest()}"' if state.versioned else None
            kind = "text/html; charset=utf-8" if name in state.html else "application/octet-stream"
            return request.file(content, etag, Content_Type=kind)
        if parts[0] == "lfs" and request.command == "PUT":
            state.objects[parts[1]] = body
            return request.reply(200)
        if path == "api/repos/create":
            return create(request, json.loads(body))
        if path == "api/validate-yaml":
            return request.json({"errors": [], "warnings": []})
        if path.startswith("api/models/"):
            return model(request, parts[2:], body)
        if path.endswith(".git/info/lfs/objects/batch"):
            return request.json({"transfer": "basic", "objects": [large(each) for each in json.loads(body)["objects"]]})
        if len(parts) > 4 and parts[2] == "resolve":
            return resolve(request, "/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        return request.reply(404)

    def allowed(request: Any, repository: str) -> bool:
        """Whether the repository may be read; else the answer has been sent."""
        known = request.headers.get("Authorization") == f"Bearer {TOKEN}"
        if state.fails_with:
            request.reply(state.fails_with)
        elif repository in state.gated and not known:
            request.reply(401, X_Error_Code="GatedRepo")
        elif repository not in state.repositories or (repository in state.private and not known):
            request.reply(404 if known else 401, X_Error_Code="RepoNotFound")
        else:
            return True
        return False

    def resolve(request: Any, repository: str, revision: str, path: str) -> None:
        if not allowed(request, repository):
            return None
        if revision not in ("main", "v1", COMMIT):
            return request.reply(404, X_Error_Code="RevisionNotFound")
        content = state.repositories[repository].get(path)
        if content is None:
            return request.reply(404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
        digest = state.states.get(path, hashlib.sha256(content).hexdigest())
        return request.file(content, f'"{digest}"', X_Repo_Commit=COMMIT, X_Linked_Size=str(len(content)))

    def create(request: Any, asked: dict[str, Any]) -> None:
        if request.headers.get("Authorization") != f"Bearer {TOKEN}":
            return request.json({"error": "Invalid username or password."}, 401)
        name = f"{asked['organization']}/{asked['name']}"
        state.created.append(asked)
        if name in state.repositories:
            return request.json({"error": "You already created this", "url": f"{state.address}/{name}"}, 409)
        state.repositories[name] = {}
        return request.json({"url": f"{state.address}/{name}"})

    def large(asked: dict[str, Any]) -> dict[str, Any]:
        return {**asked, "actions": {"upload": {"href": f"{state.address}/lfs/{asked['oid']}"}}}

    def model(request: Any, parts: list[str], body: bytes) -> None:
        repository, rest = "/".join(parts[:2]), parts[2:]
        if not allowed(request, repository):
            return None
        stored = state.repositories[repository]
        if rest[:1] == ["preupload"]:
            asked = json.loads(body)["files"]
            modes = [("lfs" if each["path"].endswith(".safetensors") else "regular") for each in asked]
            pairs = zip(asked, modes, strict=True)
            return request.json(
                {"files": [{"path": each["path"], "uploadMode": mode, "shouldIgnore": False} for each, mode in pairs]}
            )
        if rest[:1] == ["commit"]:
            lines = [json.loads(line) for line in body.splitlines()]
            for line in lines[1:]:
                value = line["value"]
                own = base64.b64decode(value["content"]) if line["key"] == "file" else state.objects[value["oid"]]
                stored[value["path"]] = own
            state.commits.append(lines[0]["value"])
            return request.json({"commitUrl": f"{state.address}/{repository}/commit/{COMMIT}", "commitOid": COMMIT})
        if rest[:1] == ["tree"]:
            return request.json([tree_entry(path, content) for path, content in stored.items()])
        if rest[:1] == ["revision"] and rest[1] not in ("main", "v1", COMMIT):
            return request.reply(404, X_Error_Code="RevisionNotFound")
        siblings = [{"rfilename": path} for path in stored]
        return request.json({"id": repository, "modelId": repository, "sha": COMMIT, "siblings": siblings})

    def tree_entry(path: str, content: bytes) -> dict[str, Any]:
        return {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    state.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
