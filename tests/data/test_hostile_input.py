"""Input that is odd or hostile: turned images, links, names that are no text, bombs, damage."""

import io
import os
import struct
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from PIL import Image

from warm_diffusion.data import files, load_dataset
from warm_diffusion.data.sources import open_source


@pytest.fixture
def load(tmp_path):
    return lambda source, **options: load_dataset(source, cache_dir=str(tmp_path / "c"), **options)


def encoded(array, kind="PNG", orientation=None):
    stream, exif = io.BytesIO(), Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    Image.fromarray(array).save(stream, kind, exif=exif)
    return stream.getvalue()


# What a viewer shows for each EXIF orientation, by its definition: where row 0 and column 0 of the
# stored pixels are (top left, top right, bottom right, bottom left; then the same transposed).
TURNED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a.swapaxes(0, 1)[:, ::-1],
    7: lambda a: a.swapaxes(0, 1)[::-1, ::-1],
    8: lambda a: a.swapaxes(0, 1)[::-1],
}


@pytest.mark.parametrize("orientation", TURNED)
def test_an_image_is_turned_as_its_exif_orientation_says(load, tmp_path, orientation):
    stored = np.arange(5 * 5 * 3, dtype=np.uint8).reshape(5, 5, 3)
    (tmp_path / "i").mkdir()
    (tmp_path / "i" / "a.png").write_bytes(encoded(stored, orientation=orientation))
    data = load(f"folder:{tmp_path / 'i'}")
    np.testing.assert_array_equal(data.images[0], TURNED[orientation](stored))


def test_class_folders_may_be_links(load, tmp_path):
    for name in ("cats", "dogs"):
        (tmp_path / "elsewhere" / name).mkdir(parents=True)
        image = encoded(np.zeros((4, 4), np.uint8))
        (tmp_path / "elsewhere" / name / "a.png").write_bytes(image)
    (tmp_path / "i").mkdir()
    for name in ("cats", "dogs"):
        (tmp_path / "i" / name).symlink_to(tmp_path / "elsewhere" / name)
    data = load(f"folder:{tmp_path / 'i'}")
    assert data.info["class_names"] == ["cats", "dogs"]
    assert len(data.images) == 2


def test_a_link_to_a_folder_above_is_refused(load, tmp_path):
    (tmp_path / "i" / "a").mkdir(parents=True)
    (tmp_path / "i" / "a" / "x.png").write_bytes(encoded(np.zeros((4, 4), np.uint8)))
    (tmp_path / "i" / "a" / "up").symlink_to(tmp_path / "i")
    with pytest.raises(ValueError, match=r"the link .*up leads to a folder that it lies in"):
        load(f"folder:{tmp_path / 'i'}")


def test_a_link_to_nothing_is_named(load, tmp_path):
    (tmp_path / "i").mkdir()
    (tmp_path / "i" / "x.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(ValueError, match=r"x\.png: No such file.*repair the link"):
        load(f"folder:{tmp_path / 'i'}")


def test_names_that_are_no_text_are_read_and_named_in_messages(load, tmp_path):
    folder = os.fsencode(tmp_path) + b"/i/caf\xe9"
    os.makedirs(folder)
    with open(folder + b"/\xff.png", "wb") as file:
        file.write(encoded(np.zeros((4, 4), np.uint8)))
    data = load(f"folder:{tmp_path / 'i'}")
    assert len(data.images) == 1
    assert data.info["class_names"] == [os.fsdecode(b"caf\xe9")]
    with pytest.raises(ValueError, match="images are smaller"):
        load(f"folder:{tmp_path / 'i'}", resolution=5)


def test_a_member_that_unpacks_to_gigabytes_is_refused_before_it_is_read(tmp_path):
    """In a process whose memory is measured: 2 MB of zip, 2 GB of zeros."""
    path = tmp_path / "bomb.zip"
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("a.png", "w", force_zip64=True) as member,
    ):
        for _ in range(300):
            member.write(bytes(2**20))
    assert path.stat().st_size < 3e6
    with pytest.raises(ValueError, match=r"a\.png has 314,572,800 bytes, expected at most"):
        open_source(f"zip:{path}")


def test_a_member_that_lies_about_its_size_unpacks_to_no_more_than_it_says(tmp_path):
    path = tmp_path / "liar.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", bytes(2**24))
    content = bytearray(path.read_bytes())
    directory = content.rindex(b"PK\x01\x02")
    struct.pack_into("<I", content, directory + 24, 1000)  # its uncompressed size
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.png: (cannot be read|not a readable)"):
        open_source(f"zip:{path}").load(0)


def test_a_file_that_is_too_large_for_an_image_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_MOST_BYTES", 10)
    (tmp_path / "a.png").write_bytes(encoded(np.zeros((4, 4), np.uint8)))
    with pytest.raises(ValueError, match=r"a\.png has .* bytes, expected at most 10"):
        open_source(f"folder:{tmp_path}")


@pytest.mark.parametrize("shape", [(0, 8, 8), (3, 0, 8), (3, 8, 0, 3)])
def test_an_array_without_pixels_is_refused(tmp_path, shape):
    np.save(tmp_path / "a.npy", np.zeros(shape, np.uint8))
    with pytest.raises(ValueError, match="no image in it, its shape is"):
        open_source(f"npy:{tmp_path}/a.npy")


@pytest.mark.parametrize(
    "header",
    [
        b"{'descr': '|u1', 'fortran_order': False, 'shape': (9999999999999999999, 8, 8), }",
        b"{'descr': '|u1', 'fortran_order': False, 'shape': (-3, 8, 8), }",
        b"{'descr': '|u1', 'fortran_order': False, 'shape': (3, 8",
        b"{'descr': ['x'] , 'fortran_order': False, 'shape': (3, 8, 8), }",
        b"(" * 300,
        b"\xff\xfe\x00",
    ],
)
def test_a_damaged_npy_header_is_one_line(tmp_path, header):
    path = tmp_path / "a.npy"
    path.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(192))
    with pytest.raises(ValueError, match=r"a\.npy: ") as caught:
        open_source(f"npy:{path}")
    assert "\n" not in str(caught.value)


def test_a_full_disk_ends_preparing_by_an_error_and_leaves_nothing(tmp_path):
    """Not by SIGBUS, as a memory-mapped array would; in a process whose files may not grow."""
    program = f"""
import resource
from warm_diffusion.data import load_dataset
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    load_dataset("digits", cache_dir={str(tmp_path / "c")!r})
except OSError as error:
    print(error.errno)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["27"]  # EFBIG
    assert list((tmp_path / "c").iterdir()) == []
