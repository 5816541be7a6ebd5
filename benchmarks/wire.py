"""A proxy between a process and its bucket, which counts the requests that pass."""

import os
import socket
import socketserver
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from urllib.parse import urlsplit

ENDPOINTS = ("AWS_ENDPOINT_URL", "STORAGE_EMULATOR_HOST")


@contextmanager
def counted() -> Iterator[tuple[dict[str, str], Counter[str]]]:
    """Yield variables that lead a process through the proxy, and how many requests have passed, by method.

    A GET that lists counts as `LIST`. The bucket's server is the one that the environment names by plain http; where
    it names none there is no proxy, and nothing is counted.
    """
    named = [name for name in ENDPOINTS if os.environ.get(name, "").startswith("http://")]
    if not named:
        yield {}, Counter()
        return
    server = urlsplit(os.environ[named[0]])
    counts, lock = Counter(), threading.Lock()

    class Connection(socketserver.StreamRequestHandler):
        disable_nagle_algorithm = True

        def handle(self) -> None:
            with suppress(OSError), socket.create_connection((server.hostname or "", server.port or 80)) as passed_on:
                passed_on.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                answers = threading.Thread(target=_pass_answers, args=(passed_on, self.connection), daemon=True)
                answers.start()
                while head := self._read_head():
                    with lock:
                        counts[_kind(head[0].decode())] += 1
                    passed_on.sendall(b"".join(head) + b"\r\n")
                    self._pass_body(head, passed_on)
                passed_on.shutdown(socket.SHUT_WR)
                answers.join()

        def _read_head(self) -> list[bytes]:
            """Return the lines of a request up to its empty one; none when the client has gone."""
            head = []
            while (line := self.rfile.readline()) not in (b"\r\n", b""):
                head.append(line)
            return head if line else []

        def _pass_body(self, head: list[bytes], passed_on: socket.socket) -> None:
            fields = dict(line.lower().split(b":", 1) for line in head[1:])
            if b"chunked" in fields.get(b"transfer-encoding", b""):
                size = -1
                while size != 0:
                    line = self.rfile.readline()
                    size = int(line.split(b";")[0], 16)
                    passed_on.sendall(line + self.rfile.read(size + 2))
            left = int(fields.get(b"content-length", 0))
            while left and (piece := self.rfile.read1(min(left, 1 << 18))):
                passed_on.sendall(piece)
                left -= len(piece)

    class Proxy(socketserver.ThreadingTCPServer):
        daemon_threads = True
        block_on_close = False
        request_queue_size = 256

    with Proxy(("127.0.0.1", 0), Connection) as proxy:
        thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield {named[0]: f"http://127.0.0.1:{proxy.server_address[1]}"}, counts
        finally:
            proxy.shutdown()
            thread.join()


def _pass_answers(server: socket.socket, client: socket.socket) -> None:
    with suppress(OSError):
        while piece := server.recv(1 << 18):
            client.sendall(piece)
        client.shutdown(socket.SHUT_RDWR)


def _kind(request: str) -> str:
    """Return the method of a request line, or `LIST`.

    >>> _kind("GET /bucket?list-type=2&prefix=runs HTTP/1.1")
    'LIST'
    """
    method, target, _ = request.split(" ", 2)
    query = target.partition("?")[2]
    lists = method == "GET" and ("list-type=" in query or "prefix=" in query)
    return "LIST" if lists else method
