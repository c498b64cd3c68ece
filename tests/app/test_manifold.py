"""Departures of a sampler from the forward process: none for the oracle, plain for a broken one."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.core.closed_forms import dct, gaussian_data, rings, transfer
from warm_diffusion import oracle, pretrained, schedules
from warm_diffusion.app.analyze import manifold
from warm_diffusion.denoiser import Prediction
from warm_diffusion.samplers import initial_noise, sample

SIZE, COUNT, STEPS = (6, 6, 1), 250, 16
DATA = gaussian_data(*SIZE)
SPECTRUM = DATA.spectrum[..., 0]
PATH = schedules.constant_bnr(1.0, beta_min=0.02, beta_max=40.0)
EXACT = oracle.gaussian(DATA.mean, DATA.spectrum)
LEVELS = manifold.levels_of(PATH, schedules.time_grid(PATH, STEPS))


def without_denoising(x, alpha, beta):
    """A sampler whose noise head takes nothing for noise: only the blur is undone."""
    return Prediction(x, EXACT(x, alpha, beta).residual)


def without_deblurring(x, alpha, beta):
    return Prediction(EXACT(x, alpha, beta).blurry, jnp.zeros_like(x))


def measured(denoise):
    """Spectral departures [steps, K] and distances [steps] of a sampler, and of forward states."""
    noise = initial_noise(np.arange(COUNT), SIZE)
    _, states = jax.jit(
        lambda noise: sample(denoise, noise, PATH, num_steps=STEPS, return_trajectory=True)
    )(noise)
    reference = DATA.draw(np.random.default_rng(0), 2 * COUNT).astype(np.float32)
    found = list(
        manifold.departures(
            np.asarray(states), LEVELS, SPECTRUM.astype(np.float32), reference, jax.random.key(1)
        )
    )
    return {name: np.array([step[name] for step in found]) for name in found[0]}


@pytest.fixture(scope="module")
def exact():
    return measured(EXACT)


@pytest.fixture(scope="module")
def broken():
    return measured(without_denoising)


def standard_errors():
    """Deviation of ln(a ring's mean power) over COUNT Gaussian states: [steps, K]."""
    ring = rings(*SIZE[:2])
    errors = []
    for alpha, beta in LEVELS:
        v = transfer(alpha, *SIZE[:2])[..., 0] ** 2 * SPECTRUM + beta**2
        errors.append(
            [
                math.sqrt(2 / COUNT * np.sum(v[ring == k] ** 2)) / np.sum(v[ring == k])
                for k in np.unique(ring)
            ]
        )
    return np.array(errors)


def test_the_oracle_does_not_depart_in_any_band_at_any_step(exact):
    # 0.01 for Heun's steps, and for the last one, which returns posterior means at beta_min.
    departure, errors = exact["spectral_departure"], standard_errors()
    assert departure.shape == errors.shape
    assert np.all(np.abs(departure) < 5 * errors + 0.01)


def test_forward_states_do_not_depart(exact):
    assert np.all(np.abs(exact["spectral_departure_of_forward"]) < 5 * standard_errors())


def test_a_sampler_without_its_noise_head_shows_in_both_departures(broken):
    assert np.abs(broken["spectral_departure"] / standard_errors()).max() > 25
    assert (broken["sliced_wasserstein"] / broken["sliced_wasserstein_of_forward"]).max() > 2


def test_contributions_of_the_heads_sum_to_the_step_and_the_oracle_is_consistent():
    # One image: with one coefficient a ring, |denoiser| and |deblurrer| are the parts' sizes. Typed
    # anew: (beta'/beta - 1)(x - D) + (m' - m) D, and (m' - m) R.
    x = np.random.default_rng(0).standard_normal((4, *SIZE)).astype(np.float32)
    start, end = (0.8, 0.6), (0.3, 0.25)
    found, prediction = manifold.heads(EXACT, x, start, end)
    blurry, residual = DATA.posterior_means(x, *start)
    np.testing.assert_allclose(prediction.blurry, blurry, atol=1e-5)
    change = transfer(end[0], *SIZE[:2]) - transfer(start[0], *SIZE[:2])
    one = (end[1] / start[1] - 1) * dct(x - blurry) + change * dct(blurry)
    ring = rings(*SIZE[:2])
    for name, part in (("denoiser", one), ("deblurrer", change * dct(residual))):
        power = np.mean(part**2, axis=(0, 3))
        expected = [power[ring == k].mean() for k in np.unique(ring)]
        np.testing.assert_allclose(found[name], expected, rtol=1e-3, atol=1e-9)
    assert found["consistency"] < 1e-10


def test_a_set_of_images_moved_by_a_vector_is_its_length_over_the_root_of_dimensions_away():
    # E (u . c)^2 = |c|^2 / D over the sphere, with variance 2 (D - 1) / (D^2 (D + 2)) |c|^4.
    x, move = np.random.default_rng(0).standard_normal((2, 20, 3, 4, 2)).astype(np.float32)
    moved = x[::-1] + move[:1]
    square = float(manifold.sliced_wasserstein(x, moved, jax.random.key(0), 4000)) ** 2
    expected = np.sum(move[:1] ** 2) / 24
    assert abs(square - expected) < 5 * expected * math.sqrt(2 * 23 / 26 / 4000)


# --- the job -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def analysis(app, trained, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("analysis")
    out, err = app.run(
        "--mode=analyze", f"--checkpoint={trained[0]}", f"--workdir={workdir}",
        "--config.analysis.num_images=12", tiny=False,
    )  # fmt: skip
    assert err == ""
    return workdir / "analysis", out


def test_a_checkpoints_sampling_is_analyzed_step_by_step(analysis):
    folder, out = analysis
    report = json.loads((folder / "sampling.json").read_text())
    # two steps of Heun, batches of 8: 16 images, compared with as many of 32 training images
    assert [round(step["beta"], 3) for step in report["steps"]] == [80.0, 0.002, 0.0]
    assert report["seeds"] == "0-15"
    assert report["reference"] == {"source": "digits", "held_out": False, "count": 32}
    assert "compared with training images" in out
    bands = len(report["frequency"])
    for step in report["steps"]:
        assert len(step["spectral_departure"]) == bands
        assert step["sliced_wasserstein"] > 0
    assert all(len(step["deblurrer"]) == bands for step in report["steps"][:-1])


def test_states_on_a_spectral_grid_are_compared_at_its_levels(app, trained, tmp_path):
    app.run(
        "--mode=analyze", f"--checkpoint={trained[0]}", f"--workdir={tmp_path}",
        "--config.analysis.num_images=8", "--solver=multistep", "--time_grid=spectral", tiny=False,
    )  # fmt: skip
    report = json.loads((tmp_path / "analysis" / "sampling.json").read_text())
    model = pretrained.load(trained[0])
    times = schedules.spectral_grid(model.schedule, model.spectrum, 2, "multistep")
    np.testing.assert_allclose([step["beta"] for step in report["steps"]], times, rtol=1e-5)
