"""A hub of its own on this machine, as far as an upload of small files asks it, and what it was asked."""

from __future__ import annotations

import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread


class Hub(ThreadingHTTPServer):
    """Answers on a port of this machine. private: of its one repository, None: there is none so far.

    asked: method, path and body of each request, with the token in its header.
    """

    def __init__(self, private: bool | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.private = private
        self.asked: list[tuple[str, str, bytes, str]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> Hub:
        Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def committed(self) -> dict[str, bytes]:
        """The contents of the files that were committed, in base64, by name."""
        [body] = [body for method, path, body, _ in self.asked if method == "POST" and "/commit/" in path]
        lines = [json.loads(line) for line in body.splitlines()]
        return {line["value"]["path"]: line["value"]["content"] for line in lines if line["key"] == "file"}


class Answers(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.answer("GET", b"")

    def do_POST(self) -> None:
        self.answer("POST", self.rfile.read(int(self.headers.get("Content-Length") or 0)))

    def answer(self, method: str, body: bytes) -> None:
        hub = self.server
        hub.asked.append((method, self.path, body, self.headers.get("Authorization", "")))
        if self.path.endswith("/repos/create"):
            if hub.private is not None:
                return self.give(409, {"error": "You already created this model repo", "url": f"{hub.url}/me/mine"})
            hub.private = json.loads(body)["visibility"] == "private"
            return self.give(200, {"url": f"{hub.url}/me/mine", "name": "me/mine", "id": "1"})
        if "/preupload/" in self.path:
            files = json.loads(body)["files"]
            return self.give(
                200, {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
            )
        if "/commit/" in self.path:
            return self.give(200, {"success": True, "commitOid": "0" * 40, "commitUrl": f"{hub.url}/me/mine/commit/0"})
        return self.give(200, {"_id": "1", "id": "me/mine", "private": hub.private, "sha": "0" * 40, "siblings": []})

    def give(self, status: int, content: dict) -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)
