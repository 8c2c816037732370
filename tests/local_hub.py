"""A stand-in for the hub's HTTP API, on this machine: one repository, kept in memory."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "a" * 40


class Hub(ThreadingHTTPServer):
    """Takes what is committed, and gives it again.

    Attributes:
        files: of the repository, by path. repository: its name; any other is not found.
    """

    daemon_threads = True

    def __init__(self, repository: str) -> None:
        super().__init__(("127.0.0.1", 0), _Request)
        self.repository = repository
        self.files: dict[str, bytes] = {}

    @property
    def url(self) -> str:
        """For `HF_ENDPOINT`."""
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def local_hub(repository: str) -> Iterator[Hub]:
    """Serve an empty repository inside."""
    with Hub(repository) as hub:
        thread = threading.Thread(target=hub.serve_forever, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()


class _Request(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Nothing."""

    def do_POST(self) -> None:
        body, hub = self._body(), self.server
        if self.path == "/api/repos/create":
            self._say({"url": f"{hub.url}/{hub.repository}"})
        elif self.path == "/api/validate-yaml":
            self._say({"errors": [], "warnings": []})
        elif self.path.startswith(f"/api/models/{hub.repository}/preupload/"):
            modes = {"uploadMode": "regular", "shouldIgnore": False}
            files = [{"path": each["path"], **modes} for each in json.loads(body)["files"]]
            self._say({"files": files})
        elif self.path.startswith(f"/api/models/{hub.repository}/commit/"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    hub.files[line["value"]["path"]] = content
            url = f"{hub.url}/{hub.repository}/commit/{COMMIT}"
            self._say({"commitUrl": url, "commitOid": COMMIT})
        else:
            self._refuse("RepoNotFound")

    def do_GET(self) -> None:
        hub = self.server
        api, resolve = f"/api/models/{hub.repository}", f"/{hub.repository}/resolve/"
        if self.path.startswith(resolve):
            name = self.path.removeprefix(resolve).partition("/")[2]
            content = hub.files.get(name)
            if content is None:
                self._refuse("EntryNotFound")
            else:
                tag = {"ETag": f'"{_digest(content)}"', "X-Repo-Commit": COMMIT}
                self._say(content, **tag)
        elif self.path.startswith(f"{api}/tree/"):
            self._say(
                [
                    {"type": "file", "path": name, "size": len(content), "oid": _digest(content)}
                    for name, content in hub.files.items()
                ]
            )
        elif self.path.startswith(api):
            siblings = [{"rfilename": name} for name in hub.files]
            self._say({"id": hub.repository, "sha": COMMIT, "siblings": siblings})
        else:
            self._refuse("RepoNotFound")

    do_HEAD = do_GET

    def _body(self) -> bytes:
        length = self.headers.get("Content-Length")
        if length is not None:
            return self.rfile.read(int(length))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _refuse(self, code: str) -> None:
        self._say({"error": code}, 404, **{"X-Error-Code": code})

    def _say(self, content: Any, status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _digest(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
