"""Serve models as the hub does, on this machine."""

from __future__ import annotations

import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


class Hub:
    """Serve folders as the hub does, and count what is asked for."""

    def __init__(self) -> None:
        self.models: dict[str, dict[str, Path]] = {}  # id → revision → folder
        self.asked: list[str] = []
        self.broken = 0
        owner = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None: ...

            def do_HEAD(self) -> None:
                owner.answer(self, body=False)

            def do_GET(self) -> None:
                owner.answer(self, body=True)

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def answer(self, request: Any, *, body: bool) -> None:
        path = request.path.partition("?")[0].strip("/")
        self.asked.append(f"{request.command} {path}")
        parts = path.split("/")
        if self.broken:
            return self.reply(request, self.broken, b"", {})
        if parts[0] == "api":
            model, revision = "/".join(parts[2:4]), "/".join(parts[5:]) or "main"
        else:
            model, revision = "/".join(parts[:2]), parts[3]
        revisions = self.models.get(model)
        if revisions is None:
            return self.reply(request, 404, b"", {"X-Error-Code": "RepoNotFound"})
        if revision not in revisions:
            return self.reply(request, 404, b"", {"X-Error-Code": "RevisionNotFound"})
        folder = revisions[revision]
        commit = next(c for c, f in revisions.items() if f == folder and len(c) == 40)
        if parts[0] == "api":
            return self.reply(request, 200, self.listing(parts[4], folder, commit, model), {})
        if not folder.joinpath(*parts[4:]).is_file():
            headers = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}
            return self.reply(request, 404, b"", headers)
        data = folder.joinpath(*parts[4:]).read_bytes()
        headers = {
            "ETag": f'"{hashlib.sha1(data).hexdigest()}"',
            "X-Repo-Commit": commit,
            "Content-Length": str(len(data)),
        }
        return self.reply(request, 200, data if body else b"", headers)

    def listing(self, kind: str, folder: Path, commit: str, model: str) -> bytes:
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        if kind == "tree":
            document: Any = [
                {
                    "type": "file",
                    "path": path.relative_to(folder).as_posix(),
                    "size": path.stat().st_size,
                    "oid": hashlib.sha1(path.read_bytes()).hexdigest(),
                }
                for path in files
            ]
        else:
            names = [path.relative_to(folder).as_posix() for path in files]
            siblings = [{"rfilename": name} for name in names]
            document = {"id": model, "modelId": model, "sha": commit, "siblings": siblings}
        return json.dumps(document).encode()

    def reply(self, request: Any, status: int, data: bytes, headers: dict[str, str]) -> None:
        request.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            request.send_header(name, value)
        request.end_headers()
        request.wfile.write(data)


@contextmanager
def served_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Let huggingface_hub find a hub here, and nowhere else."""
    from huggingface_hub import constants

    served = Hub()
    thread = threading.Thread(target=served.server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    template = served.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", served.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    yield served
    served.server.shutdown()
    thread.join()
    served.server.server_close()
