"""A stand-in for the Hub: enough of its protocol, on this machine, for the real clients to load models and datasets.

Repositories are commits of files with branches and tags. Whatever is asked is on record, and a fault can be put in the
way of any request.
"""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

Files = dict[str, bytes]
API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+)(?:/(.*))?)?")
RESOLVE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
HANG, CUT = "hang", "cut"
GATED = (401, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to this repository is restricted."})


@dataclass
class Repository:
    """Files by commit, and the branches and tags that name commits."""

    commits: dict[str, Files] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def sha(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.refs.get(revision)


class Hub:
    """The server. ``faults`` are tried in order against "METHOD /path"; an answer is a status, a status with headers,
    ``HANG`` (never an answer) or ``CUT`` (nothing of the second half of a file)."""

    def __init__(self) -> None:
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.requests: list[str] = []
        self.faults: list[tuple[str, Any]] = []
        self.closing = threading.Event()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (_Handler,), {"hub": self}))
        self.server.daemon_threads = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def commit(self, kind: str, name: str, files: Files | Path, *refs: str) -> str:
        """Add a commit that ``refs`` (by default ``main``) point to; its id is that of its content."""
        if isinstance(files, Path):
            files = {str(p.relative_to(files)): p.read_bytes() for p in sorted(files.rglob("*")) if p.is_file()}
        sha = hashlib.sha1(b"".join(path.encode() + content for path, content in sorted(files.items()))).hexdigest()
        repository = self.repositories.setdefault((kind, name), Repository())
        repository.commits[sha] = files
        repository.refs |= dict.fromkeys(refs or ("main",), sha)
        return sha

    def fail(self, pattern: str, answer: Any) -> None:
        """Answer requests that match ``pattern`` with a fault from now on."""
        self.faults.append((pattern, answer))

    def asked(self, pattern: str) -> list[str]:
        """The requests so far that match."""
        return [request for request in self.requests if re.search(pattern, request)]


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub for the length of a ``with``."""
    hub = Hub()
    thread = threading.Thread(target=hub.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.closing.set()
        hub.server.shutdown()
        hub.server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests.append(f"{self.command} {unquote(self.path)}")
        path = urlsplit(self.path).path
        fault = next((a for p, a in self.hub.faults if re.search(p, f"{self.command} {unquote(path)}")), None)
        if fault == HANG:
            self.hub.closing.wait(120)
            self.close_connection = True
        elif fault is not None and fault != CUT:
            status, headers = fault if isinstance(fault, tuple) else (fault, {})
            self._send(status, b"", headers)
        elif match := API.fullmatch(path):
            self._api(*match.groups(), body)
        elif match := RESOLVE.fullmatch(path):
            self._resolve(*match.groups(), cut=fault == CUT)
        else:
            self._send(404, b"", {})

    def _find(self, kind: str, name: str, revision: str | None) -> tuple[str, Files] | None:
        """The commit and its files, or a refusal already sent."""
        repository = self.hub.repositories.get((kind.removesuffix("s"), name))
        if repository is None:  # the Hub does not tell strangers which private repositories exist
            self._send(401, b'{"error":"Invalid username or password."}', {"X-Error-Code": "RepoNotFound"})
            return None
        sha = repository.sha(unquote(revision or "main"))
        if sha is None:
            self._send(404, b"", {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"})
            return None
        return sha, repository.commits[sha]

    def _api(self, kind: str, name: str, what: str | None, revision: str | None, path: str | None, body: bytes) -> None:
        found = self._find(kind, name, revision)
        if found is None:
            return
        sha, files = found
        if what == "tree":
            below = f"{unquote(path)}/" if path else ""
            deep = parse_qs(urlsplit(self.path).query).get("recursive", ["false"])[0].lower() in ("true", "1")
            entries = _tree({p: c for p, c in files.items() if p.startswith(below)}, below, deep)
            self._json(entries)
        elif what == "paths-info":
            wanted = parse_qs(body.decode()).get("paths", [])
            every = {e["path"]: e for e in _tree(files, "", True)}
            self._json([every[p] for p in wanted if p in every])
        else:
            siblings = [{"rfilename": p} for p in files]
            info = {"_id": sha[:24], "id": name, "sha": sha, "private": False, "gated": False, "tags": []}
            self._json({**info, "downloads": 0, "likes": 0, "siblings": siblings})

    def _resolve(self, dataset: str | None, name: str, revision: str, path: str, cut: bool) -> None:
        found = self._find("datasets" if dataset else "models", name, revision)
        if found is None:
            return None
        sha, files = found
        content = files.get(unquote(path))
        if content is None:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
        headers = {"X-Repo-Commit": sha, "ETag": f'"{_oid(content)}"', "Accept-Ranges": "bytes"}
        status, part, first = 200, content, 0
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(match[1]), int(match[2] or len(content) - 1)
            if first >= len(content):
                return self._send(416, b"", headers)
            status, part = 206, content[first : last + 1]
            headers["Content-Range"] = f"bytes {first}-{first + len(part) - 1}/{len(content)}"
        return self._send(status, part, headers, max(len(content) // 2 - first, 0) if cut else None)

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str], cut: int | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(body[:cut])
        self.close_connection = self.close_connection or cut is not None


def _oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _tree(files: Files, below: str, deep: bool) -> list[dict[str, Any]]:
    """Entries as the Hub lists them: files, and the folders that hold them."""
    folders: dict[str, dict[str, Any]] = {}
    entries: list[dict[str, Any]] = []
    for path, content in files.items():
        parts = path.removeprefix(below).split("/")
        for depth in range(1, len(parts)):
            folder = below + "/".join(parts[:depth])
            if deep or depth == 1:
                folders[folder] = {"type": "directory", "path": folder, "oid": _oid(folder.encode()), "size": 0}
        if deep or len(parts) == 1:
            entries.append({"type": "file", "path": path, "oid": _oid(content), "size": len(content)})
    return [*folders.values(), *entries]
