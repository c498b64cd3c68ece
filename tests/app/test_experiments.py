"""Experiments behind configuration keys: the flow-weighted loss, spectral preconditioning."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.fft

from configs import default
from warm_diffusion import denoiser
from warm_diffusion.app import build
from warm_diffusion.training.state import Batch


def small_config():
    config = default.get_config()
    config.data.source = "digits"
    config.model.model_channels = 8
    config.model.channel_mult = (1,)
    config.model.attention_resolutions = ()
    return config


@pytest.mark.long
def test_a_run_with_both_trains_and_samples(app, tmp_path):
    out, _ = app.run(
        f"--workdir={tmp_path}", "--config.training.num_steps=2",
        "--config.model.preconditioning=spectral", "--config.loss.residual_weight=flow",
        "--config.loss.residual_floor=0.05",
    )  # fmt: skip
    assert "step 2/2" in out
    app.run("--mode=sample", f"--workdir={tmp_path}", "--seeds=0-1", tiny=False)
    assert len(list((tmp_path / "generated").rglob("0*.png"))) == 2


@pytest.mark.long
def test_spectral_preconditioning_uses_the_mean_squares_of_the_data():
    # scipy's DCT of scikit-learn's own digits, rounded to uint8 as the data set is.
    from sklearn.datasets import load_digits

    config, x = small_config(), np.random.default_rng(0).standard_normal((2, 8, 8, 1))
    config.model.preconditioning = "spectral"
    built = build.architecture(config, (8, 8, 1))
    params = built.init_params(jax.random.key(0))
    pixels = np.rint(load_digits().images * (255 / 16)) / 127.5 - 1
    squares = np.mean(scipy.fft.dctn(pixels, norm="ortho", axes=(1, 2)) ** 2, axis=0)
    expected = denoiser.precondition(
        lambda *inputs: built.network.apply({"params": params}, *inputs), spectrum=squares
    )(jnp.asarray(x, jnp.float32), 0.4, 0.8)
    # jitted, as in training: the spectrum must not be traced
    denoise = jax.jit(lambda *inputs: built.denoiser(params)(*inputs))
    for part, other in zip(denoise(x, 0.4, 0.8), expected, strict=True):
        np.testing.assert_allclose(part, other, atol=2e-5)


def test_the_flow_weight_reaches_the_loss():
    config = small_config()
    built = build.architecture(config, (8, 8, 1))
    params = built.init_params(jax.random.key(0))
    images = np.asarray(build.dataset(config).images[:16])
    deblur = []
    for weight, floor in ((1.0, 0.0), ("flow", 0.0), ("flow", 1.0)):
        config.loss.residual_weight, config.loss.residual_floor = weight, floor
        loss = build.loss(config, built)
        keys = jax.random.split(jax.random.key(0), 16)
        deblur.append(np.asarray(loss(params, keys, Batch(images, None)).deblur))
    plain, flow, floored = deblur
    assert np.all(flow < plain)  # w^2 is at most 0.54
    np.testing.assert_allclose(floored, plain + flow, rtol=1e-4)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        (
            "--config.loss.residual_weight=flwo",
            "loss.residual_weight must be a number of at least 0 or flow, got",
        ),
        ("--config.loss.residual_floor=0.1", "goes with residual_weight=flow, not 1.0"),
        ("--config.model.preconditioning=edn", "preconditioning must be one of edm, spectral"),
    ],
)
def test_a_mistake_is_found_before_anything_is_written(app, tmp_path, flag, message):
    _, err = app.run(f"--workdir={tmp_path}", flag, tiny=False, status=2)
    assert message in err
    assert not list(tmp_path.iterdir())
