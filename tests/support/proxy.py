"""A proxy in front of an S3 store that answers badly: errors, slow or half bodies, closed connections."""

import http.client
import http.server
import random
import threading
import time
from typing import Self

ERROR = "<?xml version='1.0'?><Error><Code>{code}</Code><Message>a drill</Message></Error>"
CODES = {500: "InternalError", 503: "SlowDown"}
KINDS = ("500", "503", "truncated", "reset", "slow")


class FaultyProxy:
    """Passes requests on to 127.0.0.1:`port`; the next `left` of them meet the fault `kind`, or a `share` of all."""

    def __init__(self, port: int, seed: int = 0) -> None:
        self.kinds: tuple[str, ...] = ()
        self.left, self.share, self.met = 0, 0.0, 0
        self._dice = random.Random(seed)
        proxy = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                fault = proxy._fault()
                if fault == "reset":
                    self.close_connection = True
                    return
                if fault in ("500", "503"):
                    self._send(int(fault), [], ERROR.format(code=CODES[int(fault)]).encode())
                    return
                upstream = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
                try:
                    upstream.request(self.command, self.path, body or None, dict(self.headers))
                    reply = upstream.getresponse()
                    content, headers = reply.read(), reply.getheaders()
                except OSError:  # the store is away
                    self.close_connection = True
                    return
                finally:
                    upstream.close()
                if fault == "slow":
                    time.sleep(0.5)
                self._send(reply.status, headers, content, cut=fault == "truncated")

            def _send(self, status: int, headers: list[tuple[str, str]], content: bytes, cut: bool = False) -> None:
                self.send_response(status)
                for name, value in headers:
                    if name.lower() not in ("connection", "transfer-encoding", "content-length", "date", "server"):
                        self.send_header(name, value)
                given = {name.lower(): value for name, value in headers}
                length = given.get("content-length", "0") if self.command == "HEAD" else str(len(content))
                self.send_header("Content-Length", length)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content[: len(content) // 2] if cut else content)
                self.close_connection = self.close_connection or cut

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = answer  # noqa: N815

            def log_message(self, *_: object) -> None: ...

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def meet(self, *kinds: str, left: int = 0, share: float = 0.0) -> None:
        """From now on, the next `left` requests, or a `share` of all, meet one of the faults."""
        self.kinds, self.left, self.share, self.met = kinds, left, share, 0

    def _fault(self) -> str:
        if not self.kinds or not (self.left > 0 or self._dice.random() < self.share):
            return ""
        self.left, self.met = max(0, self.left - 1), self.met + 1
        return self._dice.choice(self.kinds)

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
