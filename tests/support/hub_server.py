"""A server that speaks the part of the Hugging Face Hub's API that downloads use, on 127.0.0.1.

`/api/models/OWNER/NAME[/revision/REVISION]` describes a repository, and `/OWNER/NAME/resolve/REVISION/FILE` answers
HEAD and GET as the Hub does: commit, ETag and size in headers, large files behind a redirect to another host, and parts
of them for Range. Source: huggingface_hub, and https://huggingface.co/docs/hub/api.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".bin", ".msgpack")
PIECE = 1 << 16


@dataclass
class Repository:
    """A repository: its revisions by commit, each files by name; branches; and how it behaves.

    `gated` lets only `token` read files; `private` hides it from others. `cut` is how many bytes of a file are sent
    before the connection ends, each time that it is sent, until the list is empty.
    """

    commits: dict[str, dict[str, bytes | Path]]
    branches: dict[str, str]
    gated: bool = False
    private: bool = False
    token: str = "hf_right"
    status: int = 200
    cut: dict[str, list[int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    """What was asked for, with the headers that matter."""

    method: str
    path: str
    token: str | None
    range: str | None


@dataclass
class Hub:
    """The server: its repositories by OWNER/NAME, and all requests so far."""

    url: str
    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)

    def add(self, name: str, files: dict[str, bytes | Path], **options: object) -> Repository:
        """A repository with one commit."""
        made = Repository({commit_of(files): files}, {"main": commit_of(files)}, **options)  # type: ignore[arg-type]
        self.repositories[name] = made
        return made

    def asked(self, method: str = "GET") -> list[str]:
        """The files that were asked for by that method, in order; those behind a redirect are counted once."""
        found = [re.fullmatch(r"/[^/]+/[^/]+/resolve/[^/]+/(.+)", r.path) for r in self.requests if r.method == method]
        return [match[1] for match in found if match]

    def touched(self) -> set[str]:
        """The files that were asked for, or about; one of the same content as another is only asked about."""
        return {*self.asked("HEAD"), *self.asked()}

    def ranges(self) -> list[str]:
        """What was asked for by Range, in order."""
        return [request.range for request in self.requests if request.range and request.path.startswith("/cdn/")]


def commit_of(files: dict[str, bytes | Path]) -> str:
    """Forty hexadecimal digits that depend on names and contents."""
    return hashlib.sha1(repr([(name, digest(read(file))) for name, file in files.items()]).encode()).hexdigest()


def read(file: bytes | Path) -> bytes:
    """What is in a file."""
    return file.read_bytes() if isinstance(file, Path) else file


def digest(content: bytes) -> str:
    """SHA-256, which is the ETag of a large file."""
    return hashlib.sha256(content).hexdigest()


def git_id(content: bytes) -> str:
    """What git calls the content, which is the ETag of a small file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def folder_files(folder: Path) -> dict[str, bytes | Path]:
    """The files of a folder, by their names in a repository."""
    return {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}


@contextmanager
def serve() -> Iterator[Hub]:
    """A Hub without repositories, until the block ends."""
    hub = Hub("")

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def log_message(self, *args: object) -> None:
            pass

        def answer(self) -> None:
            raw = urlsplit(self.path).path
            path = unquote(raw)
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
            hub.requests.append(Request(self.command, path, token, self.headers.get("Range")))
            parts = [unquote(part) for part in raw.strip("/").split("/")]  # a slash of a revision comes as %2F
            if parts[0] == "cdn":
                self.send_content("/".join(parts[1:3]), parts[3], "/".join(parts[4:]))
                return
            api = parts[:2] == ["api", "models"]
            name, rest = "/".join(parts[2:4] if api else parts[:2]), parts[4:] if api else parts[3:]
            repository = hub.repositories.get(name)
            if repository is None or (repository.private and token != repository.token):
                self.refuse(404 if token else 401, "RepoNotFound", "Repository not found")
            elif repository.status != 200:
                self.refuse(repository.status, "", "Something went wrong")
            elif api:
                revision = "/".join(rest[1:]) if rest else "main"
                self.describe(name, repository, repository.branches.get(revision, revision))
            elif repository.gated and token != repository.token:
                message = f"Access to model {name} is restricted."
                self.refuse(403 if token else 401, "GatedRepo", message)
            else:
                self.resolve(name, repository, repository.branches.get(rest[0], rest[0]), "/".join(rest[1:]))

        def describe(self, name: str, repository: Repository, commit: str) -> None:
            if commit not in repository.commits:
                self.refuse(404, "RevisionNotFound", "Invalid rev id")
                return
            siblings = []
            for file, held in repository.commits[commit].items():
                content = read(held)
                told: dict[str, object] = {"rfilename": file, "size": len(content), "blobId": git_id(content)}
                if file.endswith(LARGE):
                    told["lfs"] = {"sha256": digest(content), "size": len(content), "pointerSize": 135}
                siblings.append(told)
            body = json.dumps({"_id": "0", "id": name, "sha": commit, "siblings": siblings}).encode()
            self.reply(200, body, {"Content-Type": "application/json"})

        def resolve(self, name: str, repository: Repository, commit: str, file: str) -> None:
            if commit not in repository.commits:
                self.refuse(404, "RevisionNotFound", "Invalid rev id")
            elif file not in repository.commits[commit]:
                self.refuse(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit})
            elif file.endswith(LARGE):
                content = read(repository.commits[commit][file])
                headers = {"X-Linked-Etag": f'"{digest(content)}"', "X-Linked-Size": str(len(content))}
                other = hub.url.replace("127.0.0.1", "localhost")  # another host, which must not be told the token
                location = {"Location": f"{other}/cdn/{name}/{commit}/{file}", "X-Repo-Commit": commit}
                self.reply(302, b"", {**headers, **location})
            else:
                content = read(repository.commits[commit][file])
                self.reply(200, content, {"X-Repo-Commit": commit, "ETag": f'"{git_id(content)}"'})

        def send_content(self, name: str, commit: str, file: str) -> None:
            repository = hub.repositories[name]
            content, start = read(repository.commits[commit][file]), 0
            headers = {"Accept-Ranges": "bytes", "ETag": f'"{digest(content)}"'}
            if asked := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or ""):
                start = int(asked[1])
                headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            cuts = repository.cut.get(file, [])
            limit = cuts.pop(0) if cuts and self.command == "GET" else None
            self.reply(206 if asked else 200, content[start:], headers, limit)

        def refuse(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
            body = json.dumps({"error": message}).encode()
            self.reply(status, body, {"X-Error-Code": code, "X-Error-Message": message, **(headers or {})})

        def reply(self, status: int, body: bytes, headers: dict[str, str], limit: int | None = None) -> None:
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "HEAD":
                return
            with suppress(ConnectionError):  # who asked may have been interrupted
                self.wfile.write(body if limit is None else body[:limit])
            if limit is not None:
                self.close_connection = True

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
