"""A web server on loopback with one file: ranges and versions as S3 has them, and what can go wrong on the way."""

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Web:
    """Serves `content` at `url`, in a context.

    ranges: whether it takes Range and If-Range; tagged: whether it says which version it has; sized: whether it says
    how long an answer is. cuts: after how many bytes each of the next answers ends; statuses: what the next requests
    are answered with instead; skips: how many bytes too late the next ranges begin. requests: (status, headers) of all
    that came.
    """

    def __init__(self, content, ranges=True, tagged=True, sized=True):
        self.content, self.ranges, self.tagged, self.sized = content, ranges, tagged, sized
        self.cuts, self.statuses, self.skips, self.requests = [], [], [], []

    def __enter__(self):
        web = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                status, body = web.answer(self)
                if body is not None and web.cuts:
                    body = body[: web.cuts.pop(0)]
                self.wfile.write(body or b"")

            def log_message(self, *args):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/eval_bundle.zip"
        return self

    def __exit__(self, *exception):
        self._server.shutdown()
        self._server.server_close()

    def answer(self, request):
        """Sends the head of an answer; returns (status, the body that belongs to it, None for none)."""
        tag = f'"{hashlib.md5(self.content).hexdigest()}"'
        wanted, start, status, body = request.headers.get("Range"), 0, 200, self.content
        if self.ranges and wanted and request.headers.get("If-Range", tag) == tag:
            start = int(wanted.removeprefix("bytes=").removesuffix("-")) + (self.skips.pop(0) if self.skips else 0)
            status, body = (206, self.content[start:]) if start < len(self.content) else (416, None)
        if self.statuses:
            status, body = self.statuses.pop(0), None
        self.requests.append((status, dict(request.headers)))
        request.send_response(status)
        if self.sized:
            request.send_header("Content-Length", str(len(body or b"")))
        if status == 206:
            end = len(self.content) - 1
            request.send_header("Content-Range", f"bytes {start}-{end}/{len(self.content)}")
        if self.tagged:
            request.send_header("ETag", tag)
        request.end_headers()
        return status, body
