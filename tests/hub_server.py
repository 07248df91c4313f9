"""A model hub and a web server on loopback: the few requests that huggingface_hub and vqpipe send, and their failures.

HEAD, GET  /OWNER/NAME/resolve/REVISION/FILE       a file of a repository, with ranges
GET        /api/models/OWNER/NAME[/revision/R]     the files of a repository, and so /tree/R[/FOLDER]
           The repositories of data sets have the name datasets/OWNER/NAME.
GET        /files/FILE                             a file of a web server, with ranges
POST       /api/repos/create, /api/models/OWNER/NAME/preupload/R, .../commit/R, /api/validate-yaml,
           /OWNER/NAME.git/info/lfs/objects/batch; PUT /lfs/OID    an upload
"""

import base64
import hashlib
import json
import re
import socket
import struct
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "c0ffee" + "0" * 34
TOKEN = "hf_loopback"


@dataclass
class Server:
    """What the server has and does. `address` is its URL."""

    address: str = ""
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """OWNER/NAME or datasets/OWNER/NAME -> path -> content."""
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
    faults: list[Any] = field(default_factory=list)
    """Of the next requests: an HTTP status, (status, headers), "stall", "reset" (no answer); "cut" (half a body),
    "short" (a whole answer of fewer bytes), "no range"."""
    fault: Any = ""
    """Of all requests after those."""
    stalled: threading.Event = field(default_factory=threading.Event)
    """Set once a request is stalled."""
    closing: threading.Event = field(default_factory=threading.Event)
    versioned: bool = True
    """Whether files under /files have an ETag."""
    mirror: str = ""
    """The end of their ETags."""
    modified: float | None = None
    """Their modification time, if they have one."""
    log: list[str] = field(default_factory=list)
    """`METHOD PATH [RANGE]` of every request."""
    requests: list[tuple[str, str, str]] = field(default_factory=list)
    """Path without query, Range and Authorization of every request."""
    stop: Callable[[], None] = lambda: None
    """End the server."""
    created: list[dict[str, Any]] = field(default_factory=list)
    commits: list[dict[str, Any]] = field(default_factory=list)
    objects: dict[str, bytes] = field(default_factory=dict)
    """Large files that were uploaded, by their sha256."""

    def bodies(self) -> list[str]:
        """The requests of the bodies of files."""
        return [line for line in self.log if line.startswith("GET") and ("/resolve/" in line or "/files/" in line)]


class QuietServer(ThreadingHTTPServer):
    """Prints no errors: clients that went away are expected."""

    daemon_threads = True

    def handle_error(self, *_: Any) -> None: ...


@contextmanager
def running() -> Iterator[Server]:
    """A running server."""
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # the body is not held back until the headers are acknowledged: 40 ms
        fault: Any = ""

        def log_message(self, *args: Any) -> None:
            pass

        def handle_any(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(length) if length else b""
            span = self.headers.get("Range", "")
            state.log.append(f"{self.command} {self.path} {span}".rstrip())
            path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path).strip("/")
            state.requests.append((path, span, self.headers.get("Authorization", "")))
            self.fault = state.faults.pop(0) if state.faults else state.fault
            try:
                if self.fault == "stall":
                    state.stalled.set()
                    state.closing.wait(60)
                    self.close_connection = True
                elif self.fault == "reset":
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    self.close_connection = True
                    self.connection.close()
                elif isinstance(self.fault, (int, tuple)):
                    status, headers = self.fault if isinstance(self.fault, tuple) else (self.fault, {})
                    self.reply(status, **headers)
                else:
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
            start, stop, status = 0, len(content), 200
            span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            version = etag or headers.get("Last_Modified")
            if span and self.headers.get("If-Range", version) == version and self.fault != "no range":
                start, status = int(span[1]), 206
                if "If-Range" in self.headers:  # RFC 9110, 15.3.7
                    headers.pop("Last_Modified", None)
                if start >= len(content):
                    return self.reply(416, Content_Range=f"bytes */{len(content)}")
                stop = min(int(span[2] or stop) + 1, stop)
                headers["Content_Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
            if etag:
                headers["ETag"] = etag
            whole = sent = content[start : stop - (self.fault == "short")]
            if self.fault == "cut":
                sent = sent[: len(sent) - len(sent) // 2]
            elif state.cut_at is not None and state.cuts > 0 and self.command == "GET":
                state.cuts -= 1
                sent = content[start : state.cut_at]
            self.close_connection = len(sent) < len(whole)
            self.reply(status, sent, Content_Length=str(len(whole)), **headers)
            return None

    def answer(request: Any, path: str, body: bytes) -> None:
        parts = path.split("/")
        if path == "":
            return request.reply(200)
        if parts[0] == "files":
            name = "/".join(parts[1:])
            if name not in state.files:
                return request.reply(404)
            content = state.files[name]
            etag = f'"{hashlib.sha256(content).hexdigest()}{state.mirror}"' if state.versioned else None
            headers = {"Content_Type": "text/html; charset=utf-8" if name in state.html else "application/octet-stream"}
            if state.modified is not None:
                headers["Last_Modified"] = formatdate(state.modified, usegmt=True)
            return request.file(content, etag, **headers)
        if parts[0] == "lfs" and request.command == "PUT":
            state.objects[parts[1]] = body
            return request.reply(200)
        if path == "api/repos/create":
            return create(request, json.loads(body))
        if path == "api/validate-yaml":
            return request.json({"errors": [], "warnings": []})
        if path.startswith(("api/models/", "api/datasets/")):
            first = 2 if parts[1] == "models" else 1
            return repository_facts(request, "/".join(parts[first:4]), parts[4:], body)
        if path.endswith(".git/info/lfs/objects/batch"):
            return request.json({"transfer": "basic", "objects": [large(each) for each in json.loads(body)["objects"]]})
        if "resolve" in parts[2:4]:
            place = parts.index("resolve", 2)
            return resolve(request, "/".join(parts[:place]), parts[place + 1], "/".join(parts[place + 2 :]))
        return request.reply(404)

    def allowed(request: Any, repository: str) -> bool:
        """Whether the repository may be read; else the answer has been sent."""
        known = request.headers.get("Authorization") == f"Bearer {TOKEN}"
        if repository in state.gated and not known:
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
        if asked.get("visibility", asked.get("private")) in ("private", True):
            state.private.add(name)
        return request.json({"url": f"{state.address}/{name}"})

    def large(asked: dict[str, Any]) -> dict[str, Any]:
        return {**asked, "actions": {"upload": {"href": f"{state.address}/lfs/{asked['oid']}"}}}

    def repository_facts(request: Any, repository: str, rest: list[str], body: bytes) -> None:
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
        if rest[:1] in (["tree"], ["revision"]) and rest[1] not in ("main", "v1", COMMIT):
            return request.reply(404, X_Error_Code="RevisionNotFound")
        if rest[:1] == ["tree"]:
            folder = "".join(f"{part}/" for part in rest[2:])
            inside = {path.removeprefix(folder): data for path, data in stored.items() if path.startswith(folder)}
            recursive = "recursive=true" in request.path.lower()
            return request.json([tree_entry(folder, path, data, recursive) for path, data in inside.items()])
        siblings = [{"rfilename": path} for path in stored]
        facts = {"id": repository, "modelId": repository, "sha": COMMIT, "siblings": siblings}
        return request.json({**facts, "private": repository in state.private, "tags": [], "downloads": 0})

    def tree_entry(folder: str, path: str, content: bytes, recursive: bool) -> dict[str, Any]:
        if "/" in path and not recursive:
            return {"type": "directory", "path": folder + path.partition("/")[0], "oid": "1"}
        oid = hashlib.sha1(content).hexdigest()
        return {"type": "file", "path": folder + path, "size": len(content), "oid": oid}

    server = QuietServer(("127.0.0.1", 0), Handler)
    state.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()

    def stop() -> None:
        state.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()

    state.stop = stop
    try:
        yield state
    finally:
        stop()
