"""The hub's protocol, as much of it as a download needs, on this machine: no test asks the real hub."""

import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REFUSALS = {  # part of an address, status, headers
    "/no/": (404, {"X-Error-Code": "RepoNotFound"}),
    "/gated/": (403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "\x1b[31mask first"}),
    "/revision/v9": (404, {"X-Error-Code": "RevisionNotFound"}),
}


class Answers(http.server.BaseHTTPRequestHandler):
    """Every other model and data set holds the server's files."""

    def do_GET(self) -> None:
        path, files = self.path.split("?")[0], self.server.files
        status, headers = next((refusal for part, refusal in REFUSALS.items() if part in path), (200, {}))
        body = json.dumps({"id": "lab/any", "sha": COMMIT, "siblings": []}).encode()
        if "/tree/" in path:
            entries = [{"path": name, "size": len(content)} for name, content in files.items()]
            body = json.dumps([{"type": "file", "oid": "0" * 40, **entry} for entry in entries]).encode()
        elif name := path.partition(f"/resolve/{COMMIT}/")[2]:
            body, headers = files[name], {"ETag": f'"{name}"', "X-Repo-Commit": COMMIT}
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body if self.command == "GET" else b"")

    do_HEAD = do_GET

    def log_message(self, *args: object) -> None: ...


@contextmanager
def small_hub(files: dict[str, bytes]) -> Iterator[str]:
    """Serves `files`; yields the address for HF_ENDPOINT."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        server.files = files
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
