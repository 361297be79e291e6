"""A Hugging Face hub on this machine with one public data set, for the real clients of the hub."""

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub(ThreadingHTTPServer):
    """Serves files of the data set `owner/photos`, and counts the bytes."""

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files, self.sent = files, 0
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeHub

    def log_message(self, *_):
        pass

    def do_GET(self):
        path, files = unquote(urlsplit(self.path).path), self.server.files
        if (found := re.fullmatch(r"/datasets/owner/photos/resolve/[^/]+/(.*)", path)) and found[1] in files:
            self._send_file(files[found[1]])
        elif re.fullmatch(r"/api/datasets/owner/photos(/revision/.*)?", path):
            siblings = [{"rfilename": name} for name in files]
            self._send_json({"id": "owner/photos", "sha": COMMIT, "siblings": siblings, "private": False, "tags": []})
        elif found := re.fullmatch(r"/api/datasets/owner/photos/tree/[^/]+/?(.*)", path):
            entries = {}
            for name in files:
                if name.startswith(start := f"{found[1]}/" if found[1] else ""):
                    below, *deeper = name.removeprefix(start).split("/")
                    size = {"type": "directory"} if deeper else {"type": "file", "size": len(files[name])}
                    entries[start + below] = {"path": start + below, "oid": "a" * 40, **size}
            self._send_json([*entries.values()])
        else:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound"})

    do_HEAD = do_GET  # noqa: N815

    def _send_json(self, value):
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send_file(self, content):
        start, stop, headers = 0, len(content), {"Accept-Ranges": "bytes", "ETag": '"a"', "X-Repo-Commit": COMMIT}
        if asked := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            start, stop = int(asked[1]), min(int(asked[2]) + 1, stop)
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        self.server.sent += stop - start
        self._send(206 if asked else 200, content[start:stop], headers)

    def _send(self, code, body, headers):
        self.send_response(code)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
