"""A small S3 server in this process and in memory: starts at once, refuses on demand, and also acts as its own proxy.

It checks no signatures; `testing/s3/server.py` is a real server.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

MODIFIED = "Mon, 02 Nov 2026 10:00:00 GMT"


class SmallS3:
    """The stored objects, and the settings of the answers.

    Attributes:
        objects: content by `bucket/key`; buckets need not be created.
        refusal: (status, code, message) of every answer; None answers normally.
        host: when set, buckets are only served at `bucket.<host>`.
        requests: `METHOD URL` of every request; the URL is absolute if the request came through a proxy.
    """

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.refusal: tuple[int, str, str] | None = None
        self.host: str | None = None
        self.requests: list[str] = []
        self.port = 0

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@contextmanager
def small_s3() -> Iterator[SmallS3]:
    """Runs a server on loopback inside the context."""
    store = SmallS3()

    class Handler(_Handler):
        served = store

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    store.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield store
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    served: SmallS3

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def _answer(self) -> None:
        store, url = self.served, urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        store.requests.append(f"{self.command} {self.path}")
        if store.refusal is not None:
            return self._refuse(*store.refusal)
        place = unquote(url.path.lstrip("/"))
        if store.host is not None:
            bucket, dot, _ = self.headers["Host"].partition(f".{store.host}")
            if not dot:
                return self._refuse(403, "SecondLevelDomainForbidden", "Please use virtual hosted style to access.")
            place = f"{bucket}/{place}"
        if self.command == "PUT":
            store.objects[place] = body
            return self._reply(200, {"ETag": _etag(body)})
        if self.command == "GET" and "list-type" in url.query:
            return self._list(place.strip("/"), parse_qs(url.query).get("prefix", [""])[0])
        if place not in store.objects:
            return self._refuse(404, "NoSuchKey", "The specified key does not exist.")
        data = store.objects[place]
        status, headers = 200, {"ETag": _etag(data), "Last-Modified": MODIFIED, "Accept-Ranges": "bytes"}
        if (byte_range := self.headers.get("Range")) is not None and self.command == "GET":
            first, _, last = byte_range.removeprefix("bytes=").partition("-")
            start, end = int(first), min(int(last or len(data)), len(data) - 1)
            status, headers["Content-Range"] = 206, f"bytes {start}-{end}/{len(data)}"
            data = data[start : end + 1]
        return self._reply(status, headers, data)

    def _list(self, bucket: str, prefix: str) -> None:
        keys = sorted(place.removeprefix(f"{bucket}/") for place in self.served.objects if place.startswith(bucket))
        items = "".join(
            f"<Contents><Key>{key}</Key><LastModified>2026-11-02T10:00:00.000Z</LastModified>"
            f"<Size>{len(self.served.objects[f'{bucket}/{key}'])}</Size></Contents>"
            for key in keys
            if key.startswith(prefix)
        )
        text = f"<ListBucketResult><Name>{bucket}</Name><IsTruncated>false</IsTruncated>{items}</ListBucketResult>"
        self._reply(200, {"Content-Type": "application/xml"}, text.encode())

    def _refuse(self, status: int, code: str, message: str) -> None:
        text = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>"
        self._reply(status, {"Content-Type": "application/xml"}, text.encode())

    def _reply(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _etag(data: bytes) -> str:
    return f'"{hashlib.md5(data).hexdigest()}"'
