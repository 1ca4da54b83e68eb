"""The hub's protocol, as much of it as a download needs, on this machine: no test asks the real hub."""

import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager

COMMIT = "0123456789abcdef0123456789abcdef01234567"


REFUSALS = {  # part of an address, status, headers
    **dict.fromkeys(["/no/", "/models/lab/countdown", "/datasets/lab/model"], (404, {"X-Error-Code": "RepoNotFound"})),
    "/gated/": (403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "\x1b[31mask first"}),
    "/revision/v9": (404, {"X-Error-Code": "RevisionNotFound"}),
}


class Answers(http.server.BaseHTTPRequestHandler):
    """The model lab/model and the data set lab/countdown hold the server's files."""

    def reply(self, status: int, headers: dict[str, str], body: bytes = b"{}") -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        refusals = [refusal for part, refusal in REFUSALS.items() if part in path]
        if refusals:
            self.reply(*refusals[0])
        elif "/revision/" in path:
            self.reply(200, {}, json.dumps({"id": "lab/any", "sha": COMMIT, "siblings": []}).encode())
        elif "/tree/" in path:
            sizes = {name: len(body) for name, body in self.server.files.items()}
            listing = [{"type": "file", "path": name, "size": size, "oid": "0" * 40} for name, size in sizes.items()]
            self.reply(200, {}, json.dumps(listing).encode())
        else:
            name = path.partition(f"/resolve/{COMMIT}/")[2]
            self.reply(200, {"ETag": f'"{name}"', "X-Repo-Commit": COMMIT}, self.server.files[name])

    do_HEAD = do_GET

    def log_message(self, *args: object) -> None:
        """Keep the test's output clean."""


@contextmanager
def small_hub(files: dict[str, bytes]) -> Iterator[str]:
    """Serves `files`; yields the address for HF_ENDPOINT."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    server.files = files
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
