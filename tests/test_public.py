"""Public files: fetched only when asked, from mirror or origin, checked, and never half there."""

import concurrent.futures
import hashlib
import http.server
import pathlib
import threading
import time

import pytest

from configs import cifar10, default
from warm_diffusion import public
from warm_diffusion.app import build, settings

CONTENT = bytes(range(256)) * 8192  # 2 MB: more than one chunk


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves CONTENT as a plain server does, or as the server's `behaviour` says."""

    def do_GET(self):
        self.server.requests.append(self.path)
        behaviour, content = self.server.behaviour, CONTENT
        if behaviour == "slow":
            time.sleep(0.3)
        if behaviour == "missing":
            return self.send_error(404)
        if behaviour == "changed":
            content = CONTENT[::-1]
        start = 0
        if behaviour == "ranges" and "Range" in self.headers:
            start = int(self.headers["Range"].partition("=")[2].partition("-")[0])
        self.send_response(206 if start else 200)
        if behaviour == "ranges":
            self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start : len(content) // 2 if behaviour == "cut" else None])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    """A server at 127.0.0.1 that is the origin of the file `x`."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.behaviour, server.requests = "plain", []
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        server.url = f"http://127.0.0.1:{server.server_address[1]}"
        digest = hashlib.sha256(CONTENT).hexdigest()
        monkeypatch.setitem(
            public.FILES, "x", public.Public(f"{server.url}/a/x.bin", 2**21, digest, "CC0", "me")
        )
        monkeypatch.delenv("WARM_DIFFUSION_MIRROR", raising=False)
        yield server
        server.shutdown()
        thread.join()


def held(folder):
    """Files of a folder, except locks."""
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def test_without_download_one_line_says_what_from_where_and_where_to(server, tmp_path):
    with pytest.raises(ValueError, match="x is not there: fetch it with --download") as caught:
        public.obtain("x", tmp_path)
    for word in ("2.1 MB", "CC0", f"{server.url}/a/x.bin", str(tmp_path / "x.bin")):
        assert word in str(caught.value)
    assert server.requests == []


@pytest.mark.parametrize("behaviour", ["plain", "ranges"])
def test_a_file_is_announced_fetched_once_and_then_taken_from_the_cache(
    server, tmp_path, capsys, behaviour
):
    server.behaviour = behaviour
    for _ in range(2):
        path = public.obtain("x", tmp_path, download=True)
        assert path.read_bytes() == CONTENT
    assert public.obtain("x", tmp_path) == path
    assert server.requests == ["/a/x.bin"]
    out = capsys.readouterr().out
    assert all(word in out for word in (server.url, "2.1 MB", str(path), "CC0"))


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        ("cut", "cannot be fetched from|another SHA-256"),
        ("changed", "another SHA-256 than"),
        ("missing", "404"),
    ],
)
def test_a_failed_transfer_is_one_line_and_leaves_nothing(server, tmp_path, behaviour, message):
    server.behaviour = behaviour
    with pytest.raises(ValueError, match=message) as caught:
        public.obtain("x", tmp_path, download=True)
    assert "\n" not in str(caught.value)
    assert held(tmp_path) == []


def test_a_damaged_file_is_named_and_fetched_again(server, tmp_path):
    (tmp_path / "x.bin").write_bytes(CONTENT[:-1] + b"!")
    with pytest.raises(ValueError, match=r"x\.bin is damaged"):
        public.obtain("x", tmp_path)
    assert public.obtain("x", tmp_path, download=True).read_bytes() == CONTENT


def test_a_mirror_goes_before_the_origin(server, tmp_path, monkeypatch, capsys):
    mirror = tmp_path / "mirror"
    mirror.mkdir()
    (mirror / "x.bin").write_bytes(CONTENT)
    monkeypatch.setenv("WARM_DIFFUSION_MIRROR", str(mirror))
    assert public.obtain("x", tmp_path / "a", download=True).read_bytes() == CONTENT
    assert server.requests == []
    monkeypatch.setenv("WARM_DIFFUSION_MIRROR", f"{server.url}/mirrored/")
    public.obtain("x", tmp_path / "b", download=True)
    assert server.requests == ["/mirrored/x.bin"]
    (mirror / "x.bin").write_bytes(b"another")
    monkeypatch.setenv("WARM_DIFFUSION_MIRROR", str(mirror))
    with pytest.raises(ValueError, match="another SHA-256"):
        public.obtain("x", tmp_path / "d", download=True)


def test_of_several_at_once_one_fetches_and_the_others_wait(server, tmp_path):
    # Threads: the lock is one of the open file, which threads and processes meet alike.
    server.behaviour = "slow"
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        found = [pool.submit(public.obtain, "x", tmp_path, download=True) for _ in range(3)]
    assert {future.result() for future in found} == {tmp_path / "x.bin"}
    assert server.requests == ["/a/x.bin"]
    assert held(tmp_path) == ["x.bin"]


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"did you mean cifar-10-python\.tar\.gz"):
        public.obtain("cifar-10-pyton.tar.gz")


def test_the_command_lists_and_fetches_and_a_mistake_ends_with_2(server, tmp_path, capsys):
    public.main(["list"])
    listed = capsys.readouterr().out
    assert all(name in listed for name in public.FILES)
    public.main(["get", "x", f"--to={tmp_path}"])
    assert (tmp_path / "x.bin").read_bytes() == CONTENT
    with pytest.raises(SystemExit) as caught:
        public.main(["get", "y", f"--to={tmp_path}"])
    assert caught.value.code == 2
    assert "no public file is called 'y'" in capsys.readouterr().err.splitlines()[-1]


def test_names_of_public_files_become_paths_where_a_mode_needs_them(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(public, "obtain", lambda name, download: f"/{name}")

    def weights(mode, features, **changes):
        config = default.get_config()
        config.eval.features, config.data.channels = features, 3
        config.update_from_flattened_dict(changes)
        assert build.fetch_public(config, mode, "runs/x") == "runs/x"
        return config.eval.inception_weights

    inception = "/pt_inception-2015-12-05-6726825d.pth"
    assert inception[1:] in public.FILES
    assert weights("eval", "inception") == inception
    assert weights("train", "inception") == ""
    assert weights("eval", "inception", **{"eval.inception_weights": "mine"}) == "mine"
    assert weights("eval", "auto") == ""
    assert weights("eval", "auto", download=True) == inception
    assert weights("eval", "auto", download=True, **{"data.channels": 1}) == ""
    assert weights("eval", "auto", **{"eval.reference": "edm:cifar10-32x32"}) == inception
    (tmp_path / "warm_diffusion" / "public").mkdir(parents=True)
    (tmp_path / "warm_diffusion" / "public" / inception[1:]).write_bytes(b"")
    assert weights("eval", "auto") == inception
    config = default.get_config()
    config.eval.reference, config.init_from = "edm:cifar10-32x32", "edm:y"
    assert build.fetch_public(config, "train", "edm:x") == "/edm:x"
    assert (config.eval.reference, config.init_from) == ("/edm:cifar10-32x32", "/edm:y")


@pytest.mark.parametrize(("name", "classes"), [("uncond", 0), ("cond", 10)])
def test_edms_networks_come_with_their_configuration_and_protocol(name, classes):
    command = ["main.py", "--mode=eval", f"--checkpoint=edm:cifar10-32x32-{name}-vp"]
    argument = settings.resolve_config_argument(command, pathlib.Path("configs"))[1]
    assert argument.startswith("--config=configs/cifar10.py:")
    config = cifar10.get_config(argument.partition(":")[2])
    # Karras et al. 2022, table 7 (column VP, CIFAR-10) and appendix E: 18 steps, 50,000 images.
    assert (config.model.name, config.model.model_channels) == ("ddpmpp", 128)
    assert (config.model.channel_mult, config.model.num_blocks) == ((2, 2, 2), 4)
    assert config.model.attention_resolutions == (16,)
    assert config.model.num_classes == classes
    assert (config.schedule.name, config.denoiser.sigma_data) == ("hot", 0.5)
    assert (config.sampling.solver, config.sampling.num_steps) == ("heun", 18)
    assert config.eval.num_samples == 50_000
