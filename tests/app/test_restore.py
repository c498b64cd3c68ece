"""--mode=restore: photographs as people have them, in and out."""

import json

import numpy as np
import pytest
from PIL import Image

from warm_diffusion import dct, pretrained
from warm_diffusion.app.restore import page, photographs
from warm_diffusion.data.images import from_uint8, png, to_uint8
from warm_diffusion.evaluation import pairs

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
        + [f"{kind}/{name}.png" for name in names for kind in ("comparison", "mean")]
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
    assert list(scores) == ["input", "Wiener filter", "mean", "sample 0", "sample 1"]
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


def test_nothing_is_overwritten(app, trained, photos, restored):
    before = (restored / "mean" / "wide.png").read_bytes()
    told = refused(app, trained, restored, f"--input={photos / 'input'}")
    assert "is not empty" in told
    assert (restored / "mean" / "wide.png").read_bytes() == before


# --- photographs ---------------------------------------------------------------------------------

COLOURS = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)


def test_a_photograph_is_read_upright(tmp_path):
    path, image = tmp_path / "turned.png", Image.fromarray(COLOURS)
    exif = image.getexif()
    exif[0x0112] = 6  # the camera was turned: show rotated by 90 degrees clockwise
    image.save(path, exif=exif)
    expected = np.rot90(COLOURS, -1) / 127.5 - 1
    np.testing.assert_allclose(photographs.read(path, 3), expected, atol=1e-6)


def test_sixteen_bits_keep_their_depth(tmp_path):
    pixels = np.array([[0, 1, 65535], [256, 40000, 257]], np.uint16)
    Image.fromarray(pixels).save(tmp_path / "deep.png")
    found = photographs.read(tmp_path / "deep.png", 1)[:, :, 0]
    np.testing.assert_allclose(found, pixels / 32767.5 - 1, atol=1e-6)


def test_transparency_that_hides_nothing_is_dropped_and_other_is_refused(tmp_path):
    alpha = np.full((4, 6, 1), 255, np.uint8)
    Image.fromarray(np.concatenate([COLOURS, alpha], 2)).save(tmp_path / "opaque.png")
    found = photographs.read(tmp_path / "opaque.png", 3)
    np.testing.assert_allclose(found, COLOURS / 127.5 - 1, atol=1e-6)
    alpha[0, 0] = 254
    Image.fromarray(np.concatenate([COLOURS, alpha], 2)).save(tmp_path / "glass.png")
    with pytest.raises(ValueError, match=r"glass.png: has transparent pixels"):
        photographs.read(tmp_path / "glass.png", 3)


@pytest.mark.parametrize(
    ("mode", "channels", "message"),
    [
        ("L", 3, "is grey, and this network restores images that are in colour"),
        ("RGB", 1, "is in colour, and this network restores images that are grey"),
        ("I", 1, "has colours of kind I: convert it"),
    ],
)
def test_what_the_network_cannot_restore_is_refused(tmp_path, mode, channels, message):
    path = tmp_path / "image.tif"
    Image.fromarray(COLOURS).convert("L" if mode == "I" else "RGB").convert(mode).save(path)
    with pytest.raises(ValueError, match=message):
        photographs.read(path, channels)


def test_two_images_of_one_name_are_refused(tmp_path):
    for ending in ("png", "bmp"):
        Image.fromarray(COLOURS).save(tmp_path / f"one.{ending}")
    with pytest.raises(ValueError, match=r"one.bmp and one.png would have one name"):
        photographs.find(str(tmp_path), "--input")


# --- the page ------------------------------------------------------------------------------------


def content(figures):
    """The page of images by name and version."""
    return page(
        [
            (name, caption, {key: png(image) for key, image in versions.items()})
            for name, caption, versions in figures
        ]
    )


def test_the_page_holds_all_it_shows_and_names_are_text():
    text = content([("<b>a&b", "blur 1", {"input": COLOURS, "<i>": COLOURS})]).decode()
    assert text.count("data:image/png;base64,") == 2
    assert "http" not in text
    assert "&lt;b&gt;a&amp;b" in text
    assert "<b>" not in text
    assert "<i>" not in text
