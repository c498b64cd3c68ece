"""--mode=restore: photographs as people have them, in and out."""

import errno
import io
import json
import os
import shutil
import struct
import types
import weakref
import zlib

import numpy as np
import pytest
import scipy.ndimage
import tifffile
from PIL import Image
from sklearn.datasets import load_sample_image

from tests.app.conftest import REPOSITORY
from warm_diffusion import dct, pretrained, schedules
from warm_diffusion.app import restore as mode
from warm_diffusion.app.restore import levels, page, photographs
from warm_diffusion.data.images import from_uint8, to_uint8
from warm_diffusion.evaluation import pairs
from warm_diffusion.runtime import storage

LEVELS = (0.5, 20.0)  # pixels, grey levels


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Digits of two sizes, clean and with blur and noise."""
    from sklearn.datasets import load_digits

    folder = tmp_path_factory.mktemp("photos")
    digits = np.rint(load_digits().images * (255 / 16)).astype(np.uint8)
    clean = {"small": digits[0], "wide": np.hstack(digits[1:3])}
    for name, image in clean.items():
        x = np.asarray(from_uint8(image[None, :, :, None]))
        noise = np.random.default_rng(0).standard_normal(x.shape) * LEVELS[1] / 127.5
        y = np.asarray(dct.blur(x, LEVELS[0])) + noise
        for kind, pixels in (("clean", x), ("input", y)):
            (folder / kind).mkdir(exist_ok=True)
            Image.fromarray(to_uint8(pixels)[0, :, :, 0]).save(folder / kind / f"{name}.png")
    return folder


@pytest.fixture(scope="module")
def restored(app, trained, photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("out") / "restored"
    out, _ = app.run(
        "--mode=restore", f"--checkpoint={trained[0]}", f"--input={photos / 'input'}",
        f"--reference={photos / 'clean'}", "--noise=20", "--samples=2", f"--workdir={folder}",
        "--steps=3", tiny=False,
    )  # fmt: skip
    assert "levels   wide: blur" in out
    return folder


def test_every_image_gets_its_mean_samples_and_picture(restored):
    found = sorted(str(p.relative_to(restored)) for p in restored.rglob("*") if p.is_file())
    names = ("small", "wide")
    assert found == sorted(
        ["index.html", "restoration.json"]
        + [
            f"{kind}/{name}.png"
            for name in names
            for kind in ("comparison", "input", "mean", "wiener")
        ]
        + [f"samples/{name}_{i}.png" for name in names for i in range(2)]
    )


def test_the_mean_is_the_denoisers(trained, photos, restored):
    # The network itself, at the levels in the report: one known, one estimated.
    told = json.loads((restored / "restoration.json").read_text())["images"]["wide"]
    assert (told["noise"], told["noise_error"]) == (pytest.approx(20.0), None)
    assert told["blur_error"] > 0
    pixels = np.asarray(Image.open(photos / "input" / "wide.png"))
    y = np.asarray(from_uint8(pixels[None, :, :, None]))
    clean = pretrained.load(trained[0]).denoise(y, told["blur"], told["noise"] / 127.5).clean
    found = np.asarray(Image.open(restored / "mean" / "wide.png")).astype(int)
    assert np.abs(found - to_uint8(clean)[0, :, :, 0]).max() <= 1


def test_scores_are_those_of_the_images_written(photos, restored):
    scores = json.loads((restored / "restoration.json").read_text())["images"]["wide"]["scores"]
    assert list(scores) == ["input", "mean", "Wiener filter", "sample 0", "sample 1"]
    images = [
        np.asarray(from_uint8(np.asarray(Image.open(path))[:, :, None]))
        for path in (restored / "samples" / "wide_1.png", photos / "clean" / "wide.png")
    ]
    assert scores["sample 1"]["psnr"] == pytest.approx(pairs.psnr(*images), abs=0.1)
    assert scores["sample 0"] != scores["sample 1"]


def test_a_score_that_is_not_finite_is_null_and_the_report_stays(app, trained, photos, tmp_path):
    # An image that equals its reference has no finite PSNR.
    out, _ = app.run(
        "--mode=restore", f"--checkpoint={trained[0]}", f"--input={photos / 'clean/small.png'}",
        f"--reference={photos / 'clean'}", "--blur=0.5", "--noise=20",
        f"--workdir={tmp_path / 'out'}", tiny=False,
    )  # fmt: skip
    scores = json.loads((tmp_path / "out/restoration.json").read_text())["images"]["small"][
        "scores"
    ]
    assert scores["input"]["psnr"] is None
    assert scores["mean"]["psnr"] > 0
    assert "psnr of input is not finite" in out


def refused(app, trained, workdir, *flags):
    _, err = app.run(
        "--mode=restore", f"--checkpoint={trained[0]}", f"--workdir={workdir}", *flags,
        status=2, tiny=False,
    )  # fmt: skip
    assert len(err.strip().splitlines()) == 1
    return err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "needs --input=FILE_OR_FOLDER"),
        (("--input={photos}/nowhere",), "there is no file or folder"),
        (("--input={photos}/input", "--noise=-1"), r"--noise must lie in [0, 256), got -1"),
        (
            ("--input={photos}/input", "--reference={photos}/clean/small.png"),
            "has no image named wide",
        ),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_written(
    app, trained, photos, tmp_path, flags, message
):
    workdir = tmp_path / "out"
    flags = [flag.format(photos=photos) for flag in flags]
    assert message in refused(app, trained, workdir, *flags)
    assert not workdir.exists()


def restoring(photos, trained, folder, *flags):
    return (
        "--mode=restore", f"--checkpoint={trained[0]}", f"--input={photos / 'input'}",
        "--blur=0.5", "--noise=20", f"--workdir={folder}", *flags,
    )  # fmt: skip


def test_after_a_full_disk_the_same_command_goes_on(app, trained, photos, tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    app.run(*restoring(photos, trained, whole), tiny=False)
    write, written = storage.write_bytes, []

    def fail_at_times(where, content):
        written.append(where)
        if len(written) in (1, 3, 9):  # the first report, an image, the report of the first image
            raise OSError(errno.ENOSPC, "No space left on device", str(where))
        write(where, content)

    monkeypatch.setattr(storage, "write_bytes", fail_at_times)
    for _ in range(3):
        app.run(*restoring(photos, trained, parts), tiny=False, status=74)
    app.run(*restoring(photos, trained, parts), tiny=False)
    found = {str(p.relative_to(parts)): p.read_bytes() for p in parts.rglob("*.*") if p.is_file()}
    for name, content in found.items():
        assert content == (whole / name).read_bytes()
    assert len(found) == len([p for p in whole.rglob("*.*") if p.is_file()])


def test_an_image_with_neither_blur_nor_noise_comes_back_bit_for_bit(
    app, trained, photos, tmp_path
):
    out, _ = app.run(
        *restoring(photos, trained, tmp_path / "out", "--blur=0", "--noise=0"), tiny=False
    )
    assert "note     wide: it is unchanged" in out
    for name in ("small", "wide"):
        before, after = (
            np.asarray(Image.open(folder / f"{name}.png"))
            for folder in (photos / "input", tmp_path / "out" / "mean")
        )
        np.testing.assert_array_equal(before, after)


def test_only_if_sure_leaves_a_jpeg_as_it_is_and_a_strange_name_harms_nothing(
    app, trained, photos, tmp_path
):
    folder = tmp_path / "in"
    folder.mkdir()
    long = "n" * 250
    Image.open(photos / "input" / "wide.png").save(folder / f"{long}.jpg", quality=30)
    strange = os.fsdecode(b"\xff#<b>?.png")
    (folder / strange).write_bytes((photos / "input" / "small.png").read_bytes())
    app.run(
        "--mode=restore", f"--checkpoint={trained[0]}", f"--input={folder}", "--blur=0.5",
        "--noise=20", f"--workdir={tmp_path / 'out'}", "--only_if_sure", tiny=False,
    )  # fmt: skip
    report = json.loads((tmp_path / "out" / "restoration.json").read_text())["images"]
    (jpeg,) = (name for name in report if name.startswith("nnn"))
    (other,) = report.keys() - {jpeg}
    assert report[jpeg]["left_as_it_is"]
    assert "JPEG of quality 30" in report[jpeg]["note"]
    assert "JPEG" not in report[other]["note"]
    for name in (jpeg, other):
        assert (tmp_path / "out" / "mean" / f"{name}.png").is_file()
    assert (tmp_path / "out" / "index.html").is_file()


def test_no_more_than_two_photographs_are_in_memory(app, trained, photos, tmp_path, monkeypatch):
    read, alive, most = photographs.read, weakref.WeakValueDictionary(), []

    def counted(path, channels):
        found = read(path, channels)
        alive[len(most)] = found.pixels
        most.append(len(alive))
        return found

    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(5):
        (folder / f"{i}.png").write_bytes((photos / "input" / "small.png").read_bytes())
    monkeypatch.setattr(photographs, "read", counted)
    app.run(
        "--mode=restore", f"--checkpoint={trained[0]}", f"--input={folder}", "--blur=0",
        "--noise=0", f"--workdir={tmp_path / 'out'}", tiny=False,
    )  # fmt: skip
    assert len(most) == 10  # checked, then restored
    assert max(most) <= 2


def test_nothing_is_overwritten(app, trained, photos, restored):
    before = (restored / "mean" / "wide.png").read_bytes()
    told = refused(app, trained, restored, f"--input={photos / 'input'}")
    assert "is not empty" in told
    assert (restored / "mean" / "wide.png").read_bytes() == before


@pytest.mark.parametrize("content", ["[]", '{"images": []}', "{}"])
def test_a_folder_with_a_foreign_report_is_refused(app, trained, photos, tmp_path, content):
    (tmp_path / "restoration.json").write_text(content)
    assert "is not empty" in refused(app, trained, tmp_path, f"--input={photos / 'input'}")
    assert (tmp_path / "restoration.json").read_text() == content


@pytest.mark.parametrize("changed", ["input", "clean"])
def test_an_image_is_restored_again_where_it_or_its_reference_changed(
    app, trained, photos, tmp_path, monkeypatch, changed
):
    # The digit is replaced by the other part of the wide one, under the same name.
    shutil.copytree(photos, tmp_path / "photos")
    restored, restore = [], mode._Image.restore

    def noted(image, *arguments):
        restored.append(image.name)
        return restore(image, *arguments)

    monkeypatch.setattr(mode._Image, "restore", noted)
    for names in (["small", "wide"], [], ["small"]):
        if names == ["small"]:
            wide = Image.open(photos / changed / "wide.png")
            wide.crop((0, 0, 8, 8)).save(tmp_path / "photos" / changed / "small.png")
        app.run(
            *restoring(tmp_path / "photos", trained, tmp_path / "out", "--noise=0", "--blur=0"),
            f"--reference={tmp_path / 'photos' / 'clean'}", tiny=False,
        )  # fmt: skip
        assert restored == names
        restored.clear()


# --- photographs ---------------------------------------------------------------------------------

COLOURS = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)


def test_a_photograph_is_read_upright(tmp_path):
    path, image = tmp_path / "turned.png", Image.fromarray(COLOURS)
    exif = image.getexif()
    exif[0x0112] = 6  # the camera was turned: show rotated by 90 degrees clockwise
    image.save(path, exif=exif)
    expected = np.rot90(COLOURS, -1) / 127.5 - 1
    np.testing.assert_allclose(photographs.read(path, 3).pixels, expected, atol=1e-6)


def test_sixteen_bits_keep_their_depth(tmp_path):
    pixels = np.array([[0, 1, 65535], [256, 40000, 257]], np.uint16)
    Image.fromarray(pixels).save(tmp_path / "deep.png")
    found = photographs.read(tmp_path / "deep.png", 1).pixels[:, :, 0]
    np.testing.assert_allclose(found, pixels / 32767.5 - 1, atol=1e-6)


def test_a_tiff_whose_white_is_zero_is_no_negative(tmp_path):
    for kind in (np.uint8, np.uint16):
        pixels = np.linspace(0, np.iinfo(kind).max, 64).astype(kind).reshape(8, 8)
        tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="miniswhite")
        found = photographs.read(tmp_path / "a.tif", 1).pixels[:, :, 0]
        np.testing.assert_allclose(found, 1 - pixels * (2 / np.iinfo(kind).max), atol=1e-6)


DEEP = np.random.default_rng(1).integers(0, 65536, (5, 7, 3), np.uint16)


def pixels_of_48_bits(content):
    """What a PNG file of 16 bits per channel holds, by the format's rules for filters 0 and 2."""
    data, chunks = content[8:], {}
    while data:
        size, kind = int.from_bytes(data[:4]), data[4:8]
        assert zlib.crc32(data[4 : 8 + size]) == int.from_bytes(data[8 + size : 12 + size])
        chunks[kind], data = data[8 : 8 + size], data[12 + size :]
    height = int.from_bytes(chunks[b"IHDR"][4:8])
    rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, -1)
    assert set(rows[:, 0]) <= {2}
    rows = np.cumsum(rows[:, 1:], axis=0, dtype=np.uint8)
    return rows.view(">u2").reshape(height, -1, 3)


@pytest.mark.parametrize("byteorder", ["<", ">"])
def test_sixteen_bits_a_colour_and_the_profile_come_back(tmp_path, byteorder):
    path = tmp_path / "deep.tif"
    profile = b"a profile"
    tags = [(34675, 7, len(profile), profile, True)]
    tifffile.imwrite(path, DEEP, byteorder=byteorder, photometric="rgb", extratags=tags)
    photograph = photographs.read(path, 3)
    np.testing.assert_allclose(photograph.pixels, DEEP / 32767.5 - 1, atol=1e-6)
    written = photograph.png(photograph.pixels)
    np.testing.assert_array_equal(pixels_of_48_bits(written), DEEP)
    assert Image.open(io.BytesIO(written)).info["icc_profile"] == profile
    (tmp_path / "deep.png").write_bytes(written)
    again = photographs.read(tmp_path / "deep.png", 3)
    np.testing.assert_array_equal(again.pixels, photograph.pixels)


def test_eight_bits_and_their_profile_come_back(tmp_path):
    Image.fromarray(COLOURS).save(tmp_path / "a.png", icc_profile=b"a profile")
    photograph = photographs.read(tmp_path / "a.png", 3)
    written = Image.open(io.BytesIO(photograph.png(photograph.pixels)))
    np.testing.assert_array_equal(np.asarray(written), COLOURS)
    assert written.info["icc_profile"] == b"a profile"


@pytest.mark.parametrize("quality", [30, 50, 75, 95])
def test_the_quality_of_a_jpeg_is_read_off_its_tables(tmp_path, quality):
    Image.fromarray(COLOURS).save(tmp_path / "a.jpg", quality=quality)
    assert abs(photographs.read(tmp_path / "a.jpg", 3).quality - quality) <= 1


def test_transparency_that_hides_nothing_is_dropped_and_other_is_refused(tmp_path):
    alpha = np.full((4, 6, 1), 255, np.uint8)
    Image.fromarray(np.concatenate([COLOURS, alpha], 2)).save(tmp_path / "opaque.png")
    found = photographs.read(tmp_path / "opaque.png", 3).pixels
    np.testing.assert_allclose(found, COLOURS / 127.5 - 1, atol=1e-6)
    alpha[0, 0] = 254
    Image.fromarray(np.concatenate([COLOURS, alpha], 2)).save(tmp_path / "glass.png")
    with pytest.raises(ValueError, match=r"glass.png: has transparent pixels"):
        photographs.read(tmp_path / "glass.png", 3)


@pytest.mark.parametrize(
    ("mode", "channels", "message"),
    [
        ("L", 3, "is grey, but this network restores images that are in colour"),
        ("RGB", 1, "is in colour, but this network restores images that are grey"),
        ("I", 1, "has colours of kind I: convert it"),
    ],
)
def test_what_the_network_cannot_restore_is_refused(tmp_path, mode, channels, message):
    path = tmp_path / "image.tif"
    Image.fromarray(COLOURS).convert("L" if mode == "I" else "RGB").convert(mode).save(path)
    with pytest.raises(ValueError, match=message):
        photographs.read(path, channels)


def test_what_cannot_be_read_is_refused_by_name(tmp_path):
    Image.fromarray(COLOURS[:1, :1]).save(tmp_path / "one.png")
    with pytest.raises(ValueError, match=r"one.png: has one pixel, expected at least two"):
        photographs.read(tmp_path / "one.png", 3)
    planes = {"photometric": "rgb", "planarconfig": "separate"}
    for compression in (None, "zlib"):
        path = tmp_path / "planes.tif"
        tifffile.imwrite(path, np.moveaxis(DEEP, -1, 0), compression=compression, **planes)
        with pytest.raises(ValueError, match=r"planes.tif: has 16 bits per channel in separate"):
            photographs.read(path, 3)


def test_deep_grey_with_transparency_keeps_8_bits(tmp_path):
    pixels = np.stack([DEEP[:, :, 0], np.full((5, 7), 65535)], 2).astype(">u2")
    rows = np.pad(pixels.view(np.uint8).reshape(5, -1), ((0, 0), (1, 0)))
    header = struct.pack(">IIBBBBB", 7, 5, 16, 4, 0, 0, 0)  # 16 bits of grey and transparency
    content = b"\x89PNG\r\n\x1a\n"
    for kind, body in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        crc = struct.pack(">I", zlib.crc32(kind + body))
        content += struct.pack(">I", len(body)) + kind + body + crc
    (tmp_path / "a.png").write_bytes(content)
    found = photographs.read(tmp_path / "a.png", 1)
    assert found.bits == 8
    expected = (DEEP[:, :, :1] >> 8) / 127.5 - 1
    np.testing.assert_allclose(found.pixels, expected, atol=1e-6)


def test_two_images_of_one_name_are_refused(tmp_path):
    for ending in ("png", "bmp"):
        Image.fromarray(COLOURS).save(tmp_path / f"one.{ending}")
    with pytest.raises(ValueError, match=r"one.bmp and one.png would have one name"):
        photographs.find(str(tmp_path), "--input")


# --- the judgement -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def judged():
    """Levels as the mode reads them, of flower.jpg at half size, after blur and noise."""
    model = pretrained.load(REPOSITORY / "pretrained" / "photos")
    image = Image.fromarray(load_sample_image("flower.jpg")).resize((320, 213), Image.LANCZOS)
    clean = np.asarray(from_uint8(np.asarray(image)[58:154, 96:224]))
    noise = np.random.default_rng(0).standard_normal(clean.shape)

    def judge(blur, noise_level, quality=None):
        y = np.asarray(blur(clean) if callable(blur) else dct.blur(clean[None], blur)[0])
        y = y + noise_level / 127.5 * noise
        y = np.asarray(from_uint8(to_uint8(y)))
        return levels.read(model, y, quality, None, None)

    return judge


def test_an_untouched_photograph_is_found_to_have_neither(judged):
    found = judged(0.0, 0.0)
    assert not found["found"]
    assert found["noise"] <= 1.001 * found["quiet_noise"]  # texture does not pass for noise


def test_a_flat_image_says_nothing_about_its_blur():
    model = pretrained.load(REPOSITORY / "pretrained" / "photos")
    noise = np.random.default_rng(0).standard_normal((96, 128, 3))
    flat = levels.read(model, np.full((96, 128, 3), 0.1, np.float32), None, None, None)
    noisy = levels.read(model, (0.1 + 0.05 * noise).astype(np.float32), None, None, None)
    assert not flat["found"]
    assert flat["doubts"] == []  # the network is not used, so its ranges do not matter
    assert [found["blur_error"] for found in (flat, noisy)] == [None, None]
    assert noisy["found"]
    assert noisy["blur"] == 0
    assert abs(noisy["noise"] - 0.05 * 127.5) < 0.3


def spectral_model():
    """A network's record of images of 64 x 64 with power 0.1 / (1 + i^2 + j^2) and its images."""
    frequency = np.sum(np.square(np.mgrid[:64, :64]), axis=0)
    spectrum = (6.4 / (1 + frequency)).astype(np.float32)
    ranges = schedules.any_bnr(0.5)
    return types.SimpleNamespace(
        spectrum=spectrum, mean=np.zeros((64, 64, 1)), image_shape=(64, 64, 1), schedule=ranges
    )


def test_levels_that_were_read_off_are_called_estimated():
    report = {"blur": 0.0, "blur_error": None, "blur_given": False}
    report |= {"noise": 5.0, "noise_error": None, "noise_given": True}
    assert levels.caption(report) == "blur 0.00 pixels (estimated), noise 5.00 grey levels"


@pytest.mark.parametrize("blur", [0.0, None])
def test_strong_noise_is_found_where_the_blur_is_given_or_does_not_show(blur):
    # At alpha = 0 this spectrum's blur is the same change as less noise.
    model, rng = spectral_model(), np.random.default_rng(2)
    scale = np.sqrt(model.spectrum)[None, :, :, None]
    clean = np.asarray(dct.idct(rng.standard_normal(scale.shape) * scale)[0], np.float32)
    noise = 0.4 * rng.standard_normal(clean.shape).astype(np.float32)
    assert not levels.read(model, clean, None, blur, None)["found"]
    found = levels.read(model, clean + noise, None, blur, None)
    assert found["found"]
    assert abs(found["noise"] - 51.0) < 2 * found["noise_error"]


def test_a_blur_that_is_given_leaves_the_noise_less_uncertain():
    model = spectral_model()
    noise = np.random.default_rng(1).standard_normal((2, 64, 64, 1))
    image = dct.idct(noise[:1] * np.sqrt(model.spectrum)[None, :, :, None])[0] + 0.05 * noise[1]
    image = np.asarray(image, np.float32)
    free = levels.read(model, image, None, None, None)
    given = levels.read(model, image, None, free["blur"], None)
    assert given["noise"] == pytest.approx(free["noise"], rel=1e-3)
    assert given["noise_error"] < 0.9 * free["noise_error"]


def test_blur_and_noise_are_found_within_their_errors(judged):
    found = judged(1.0, 10.0, quality=30)
    assert found["found"]
    assert abs(found["blur"] - 1.0) < 2 * found["blur_error"]
    assert abs(found["noise"] - 10.0) < 1.0  # it is clipped at black
    assert found["doubts"] == ["it is a JPEG of quality 30, which alters noise and blur"]


def test_defocus_is_doubted(judged):
    disc = np.hypot(*np.mgrid[-3:4, -3:4])[..., None] <= 3
    kernel = disc / disc.sum()
    found = judged(lambda clean: scipy.ndimage.convolve(clean, kernel, mode="reflect"), 2.0)
    (doubt,) = found["doubts"]
    assert doubt.startswith("it does not have Gaussian blur and white noise")


# --- the page ------------------------------------------------------------------------------------


def figures(name="<b>a&b#"):
    """What the page shows of an image and its restoration."""
    files = {version: f"{version}/{name}.png" for version in ("input", "mean")}
    report = {"blur": 1.0, "blur_error": 0.1, "blur_given": False}
    report |= {"noise": 5.0, "noise_error": None, "noise_given": True}
    scores = {"input": {"psnr": 20.0, "ssim": None}}
    report |= {"files": files, "scores": scores, "note": "it is <i>odd</i>"}
    return mode._figures({name: report})


def test_the_page_links_the_images_and_names_are_text():
    text = page(figures()).decode()
    assert 'src="mean/%3Cb%3Ea%26b%23.png"' in text
    assert "http" not in text
    assert "&lt;b&gt;a&amp;b" in text
    assert "<b>" not in text
    assert "<i>" not in text
    assert "it is &lt;i&gt;odd" in text
    assert "input 20.00 dB" in text
