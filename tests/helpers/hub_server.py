"""A small server with the endpoints of the Hugging Face Hub that an upload of a folder calls."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class HubServer:
    """State of the server. ``token`` is the only accepted one, and may create repositories of ``user``."""

    token: str
    user: str
    url: str = ""
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """Files by name, by repository."""
    private: dict[str, bool] = field(default_factory=dict)
    large_files: dict[str, bytes] = field(default_factory=dict)
    """Content by SHA-256."""
    requests: list[str] = field(default_factory=list)
    """Method and path of every request."""
    failing_path: str | None = None
    """Part of the paths that are answered with status 500, and a text with the request's token."""


class _Handler(BaseHTTPRequestHandler):
    state: HubServer

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing."""

    def do_GET(self) -> None:
        name = self.path.removeprefix("/api/models/")
        if not self._is_allowed():
            return
        if name not in self.state.repositories:
            self._answer(404, {"error": "Repository not found"})
            return
        files = [{"rfilename": file} for file in self.state.repositories[name]]
        self._answer(200, {"id": name, "private": self.state.private[name], "siblings": files})

    def do_PUT(self) -> None:
        content = self._read()
        if not self._is_allowed(needs_token=False):
            return
        self.state.large_files[hashlib.sha256(content).hexdigest()] = content
        self._answer(200, {})

    def do_POST(self) -> None:
        body = self._read()
        if not self._is_allowed():
            return
        if self.path == "/api/repos/create":
            self._create(json.loads(body))
        elif self.path == "/api/validate-yaml":
            self._answer(200, {"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            modes = {True: "lfs", False: "regular"}
            answers = [
                {
                    "path": file["path"],
                    "uploadMode": modes[file["path"].endswith(".safetensors")],
                    "shouldIgnore": False,
                }
                for file in files
            ]
            self._answer(200, {"files": answers})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            url = f"{self.state.url}/storage/"
            answers = [one | {"actions": {"upload": {"href": url + one["oid"]}}} for one in objects]
            self._answer(200, {"objects": answers})
        elif "/commit/" in self.path:
            self._commit(self.path.removeprefix("/api/models/").partition("/commit/")[0], body)
        else:
            self._answer(404, {"error": f"no endpoint {self.path}"})

    def _create(self, values: dict[str, Any]) -> None:
        name = f"{values['organization']}/{values['name']}"
        if values["organization"] != self.state.user:
            self._answer(403, {"error": "You don't have the rights to create a model under this namespace"})
        elif name in self.state.repositories:
            self._answer(409, {"error": "You already created this model repo"})
        else:
            self.state.repositories[name] = {".gitattributes": b""}
            self.state.private[name] = values.get("visibility") == "private"
            self._answer(200, {"url": f"{self.state.url}/{name}"})

    def _commit(self, name: str, body: bytes) -> None:
        files = self.state.repositories[name]
        for line in body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.state.large_files[value["oid"]]
        self._answer(200, {"commitUrl": f"{self.state.url}/{name}/commit/1", "commitOid": "1" * 40})

    def _is_allowed(self, *, needs_token: bool = True) -> bool:
        self.state.requests.append(f"{self.command} {self.path}")
        given = str(self.headers.get("Authorization"))
        if self.state.failing_path is not None and self.state.failing_path in self.path:
            self._answer(500, {"error": f"internal error with {given}"})
            return False
        if needs_token and given != f"Bearer {self.state.token}":
            self._answer(401, {"error": f"Invalid credentials: {given}"})
            return False
        return True

    def _read(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _answer(self, status: int, content: dict[str, Any]) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if "error" in content:
            self.send_header("X-Error-Message", str(content["error"]))
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def serve_hub(token: str, user: str) -> Iterator[HubServer]:
    """Run the server on a free port of this machine."""
    state = HubServer(token, user)
    handler = type("Handler", (_Handler,), {"state": state})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
