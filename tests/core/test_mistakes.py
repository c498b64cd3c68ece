"""Mistakes of a user of the core: each is a ValueError that names what was got and the way out."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from warm_diffusion import (
    dct,
    denoiser,
    losses,
    oracle,
    process,
    restoration,
    samplers,
    schedules,
    spectra,
)

SHAPE = (5, 4, 2)
X = np.random.default_rng(0).uniform(-1, 1, (3, *SHAPE)).astype(np.float32)
ONE = X[:1]
SPECTRUM = np.ones(SHAPE[:2])
KEY = jax.random.key(0)
PATH = schedules.constant_bnr(0.5)
EXACT = oracle.mixture(X)
HALVES = denoiser.Prediction(X, X)
LEVELS = r"a scalar or shape \(3,\), got \(2,\)"
two = np.ones(2)


def split(x, *_):
    """A network with two heads."""
    return jnp.concatenate([x, x], axis=-1)


def narrow():
    """A denoiser of data with a small standard deviation."""
    return denoiser.precondition(split, sigma_data=0.2)


def wrapped(network, parameterization="divide"):
    return denoiser.precondition(network, parameterization=parameterization)(X, 0.5, 0.5)


def loss(denoise=EXACT, key=KEY, x0=X, schedule=PATH, **options):
    return losses.score_matching_loss(denoise, key, x0, schedule, **options)


def sample(noise=X, schedule=PATH, **options):
    return samplers.sample(EXACT, noise, schedule, **options)


def solve(times, path=PATH, **options):
    return samplers.solve(EXACT, X, path, times, **options)


def restore(denoise=EXACT, images=X, alpha=0.5, beta=0.5, **options):
    return restoration.restore(denoise, images, alpha, beta, **options)


def grid(path=PATH, spectrum=SPECTRUM, num_steps=4, **options):
    return schedules.spectral_grid(path, spectrum, num_steps, **options)


def functions(alpha=jnp.sqrt, beta=jnp.sqrt, t_min=0.1, t_max=8.0, **options):
    return schedules.from_functions(alpha, beta, t_min=t_min, t_max=t_max, **options)


def lonely():
    """One coefficient of its ring of five varies: no blur removes more than a fifth of it."""
    spectrum = np.zeros((8, 8))
    spectrum[0, 3] = 1.0
    return spectrum


MISTAKES = [
    # data
    (lambda: dct.dct(X[0, 0]), r"\[B, \*spatial, C\], got \(4, 2\)"),
    (lambda: dct.idct(X.astype(np.uint8)), r"floats, got uint8: .* x / 127.5 - 1"),
    (lambda: dct.blur([X[0]], 1.0), "one array .* a list: numpy.stack joins"),
    (
        lambda: loss(residual_weight=lambda alpha, x: alpha[:, None]),
        r"one number per image, \(3,\), got shape \(3, 1\)",
    ),
    (lambda: denoiser.precondition(split, sigma_data=0.0), "sigma_data must be > 0, got 0.0"),
    (lambda: loss(residual_weight="flow"), "residual_weight must be a number, or .* got 'flow'"),
    (lambda: dct.check_images(X[..., 0]), r"\[B, H, W, C\], got .* grey .*one image .*signals"),
    (lambda: dct.check_images(np.zeros((2, 3, 8, 7))), "look like channels first"),
    (lambda: dct.check_images(0 * X + 255.0), r"values up to 255: x / 127.5 - 1"),
    (lambda: spectra.power_spectrum(X[0, 0]), r"images must be \[B, \*spatial, C\]"),
    (lambda: process.perturb(X, ONE, 0.5, 0.5), r"same shape, got \(3, .*\), \(1"),
    (lambda: process.score(X, ONE, 0.5), r"same shape, got \(3, .*\), \(1"),
    # one level per image
    (lambda: process.perturb(X, X, two, 0.5), LEVELS),
    (lambda: process.transition(X, X, (two, 0.1), (9.0, 9.0)), LEVELS),
    (lambda: process.score(X, X, two), LEVELS),
    (lambda: process.velocity(X, HALVES, PATH, two), LEVELS),
    (lambda: denoiser.precondition(split)(X, two, 0.5), LEVELS),
    (lambda: restoration.estimate_levels(X, SPECTRUM, alpha=two), LEVELS),
    (lambda: restore(alpha=two), LEVELS),
    # networks and denoisers
    (lambda: denoiser.precondition(split, parameterization="x"), "divide, clean, score, got 'x'"),
    (lambda: wrapped(lambda x, *_: x), r"must return \(3, 5, 4, 4\) .*got \(3, 5, 4, 2\)"),
    (lambda: wrapped(split, "clean"), r"must return \(3, 5, 4, 2\) .*got \(3, 5, 4, 4\)"),
    (
        lambda: denoiser.precondition(lambda x, *_: X)(X[..., 0], 0.5, 0.5),
        r"grey images .* x\[..., None\], one image .* x\[None\]",
    ),
    (lambda: wrapped(lambda x, *_: None), r"return \(3, 5, 4, 4\) .*, got NoneType"),
    (
        lambda: denoiser.precondition(lambda x, *_: x)(np.zeros((2, 4, 8, 8)), 0.5, 0.5),
        r"got \(2, 4, 8, 8\); if the data are \[B, C, H, W\], x.transpose\(0, 2, 3, 1\)",
    ),
    (lambda: wrapped(lambda x, *_: (x, {})), r"one array .*, got a tuple: .* has_aux=True"),
    (lambda: restore(lambda x, *_: x), "must return a denoiser.Prediction"),
    (lambda: oracle.gaussian(np.zeros(3), np.zeros(3)), r"mean \[\*spatial, C\]"),
    (lambda: oracle.gaussian(X[0], np.ones((5, 5))), r"got \(5, 4, 2\) and \(5, 5\)"),
    (lambda: oracle.gaussian(X[0, 1:], SPECTRUM[1:])(X, 0.1, 0.1), r"like the mean \(4, 4, 2\)"),
    # losses
    (lambda: loss(x0=X[0, 0]), r"x0 must be \[B, \*spatial, C\], got \(4, 2\)"),
    (lambda: loss(x0=0 * X + 255.0), r"values up to 255, .*sigma_data = 0.5: .*127.5 - 1"),
    (lambda: loss(x0=12 * X), "the standard deviation of the data, sigma_data="),
    (lambda: loss(key=0), r"key must be a JAX PRNG key, such as jax.random.key\(0\), got 0"),
    (lambda: loss(schedule=0.5), r"a path, such as schedules.constant_bnr\(0.5\), got 0.5"),
    (lambda: loss(schedule=schedules.constant_bnr), "got constant_bnr: call it"),
    (lambda: loss(split), "wrap the network: denoiser.prec"),
    (lambda: loss(lambda x, *_: (x, x)), "Prediction, got tuple"),
    (
        lambda: loss(narrow(), sigma_data=0.5),
        "sigma_data must be that of the denoiser, 0.2, got 0.5",
    ),
    (
        lambda: loss(functools.partial(narrow()), sigma_data=0.5),
        "sigma_data must be that of the denoiser, 0.2, got 0.5",
    ),
    # samplers
    (lambda: sample(solver="rk4"), "one of euler, heun, multistep, got 'rk4'"),
    (lambda: sample(X[0, 0]), r"noise must be \[B, \*spatial, C\]"),
    (lambda: sample(X.shape), "noise must be one array .* a tuple"),
    (lambda: sample(churn=1.0), "pass key="),
    (lambda: sample(churn=1.0, key=0), "key must be a JAX PRNG key, .* got 0"),
    (lambda: sample(churn=-1.0, key=KEY), "s_churn >= 0, got -1"),
    (lambda: sample(churn=1.0, solver="multistep", key=KEY), "not multistep"),
    (lambda: sample(churn=1.0, key=jax.random.split(KEY, 2)), r"one key or 3, got \(2,"),
    (lambda: sample(schedule=schedules.constant_bnr), "got constant_bnr: call it"),
    (
        lambda: sample(schedule=schedules.time_grid(PATH, 4)),
        r"got an array \(5,\): times go to samplers.solve",
    ),
    (lambda: sample(schedule=schedules.cold()), "does not hide the data: take samplers.solve"),
    (lambda: jax.jit(lambda path: sample(schedule=path))(schedules.cold()), "does not hide"),
    (lambda: solve([3.0]), r"times must be two or more, \[n \+ 1\] or .* got \(1,\)"),
    (lambda: solve([[3.0, 1.0], [2.0, 0.0]]), r"got \(2, 2\)"),
    (lambda: solve([3.0, 1.0, 1.0]), "times must fall from at most t_max = 80.0 to at least 0"),
    (lambda: solve([81.0, 1.0]), "times must fall"),
    (lambda: solve([3.0, np.nan, 1.0]), "times must fall"),
    (
        lambda: solve([9.0, 1.0], schedules.cold(), solver="multistep"),
        "noise level that falls at every step",
    ),
    (
        lambda: jax.jit(lambda _: solve([9.0, 1.0], schedules.cold(), solver="multistep"))(0),
        "noise level that falls at every step",
    ),
    *(
        (lambda seeds=seeds, door=door: door(seeds), message)
        for door in (samplers._seeds, lambda seeds: samplers.initial_noise(seeds, SHAPE))
        for seeds, message in [
            (np.zeros(3), r"integers \[B\], got float64 \(3,\)"),
            (7, r"got int64 \(\)"),
            ([-1], "between 0 and 2\\^32 - 1, got -1 to -1"),
            ([2**64], "got 18446744073709551616"),
            (["a"], "integers"),
        ]
    ),
    # restoration
    (lambda: restore(images=X[0, 0]), r"images must be \[B, \*spatial, C\], got \(4, 2\)"),
    (lambda: restore(beta=np.array([0.1, 0.0, 0.1])), "beta must be finite and > 0, got 0; 8 bits"),
    (lambda: restore(alpha=-1.0), "alpha must be finite and >= 0, got -1"),
    (lambda: restore(stochastic=1.5), "stochastic must lie between 0 .* and 1 .*, got 1.5"),
    (lambda: restore(stochastic=0.5), "pass key="),
    (lambda: restoration.estimate_levels(X, X[0]), r"a spectrum of 2 axes, got \(5, 4, 2\)"),
    (
        lambda: restoration.estimate_levels(X, SPECTRUM, np.zeros((5, 4, 3))),
        r"mean image must be \(5, 4, 2\).*leave it out",
    ),
    # paths
    *(
        (lambda bnr=bnr: schedules.constant_bnr(bnr), rf"between 0 and 1e.06, got {shown}")
        for bnr, shown in [(-0.1, "-0.1"), (math.inf, "inf"), (math.nan, "nan"), (1e30, "1e.30")]
    ),
    *(
        (lambda name=name, value=value: schedules.hot(**{name: value}), rf"{name} must .* {value}")
        for name, value in [("p_mean", math.nan), ("p_mean", 21), ("p_std", -1), ("p_std", 9)]
    ),
    (lambda: functions(p_mean=math.nan), "p_mean must lie between -20 and 20, got nan"),
    (lambda: schedules.hot(beta_min=0.0), r"1e-06 <= beta_min < beta_max .* got beta_min=0.0"),
    (lambda: schedules.hot(beta_min=2.0, beta_max=1.0), "got beta_min=2.0, beta_max=1.0"),
    (lambda: schedules.hot(beta_max=1e30), r"beta_max <= 1e\+06, got .*beta_max=1e\+30"),
    (lambda: schedules.cold(alpha_min=-1.0), "<= alpha_min < alpha_max <= .* got alpha_min=-1"),
    (lambda: schedules.cold(beta=0.0), "beta must lie between 1e-06 and .*got 0.0"),
    (lambda: schedules.blurring_diffusion(sigma_blur_max=-1.0), "sigma_blur_max .* got -1.0"),
    (lambda: schedules.blurring_diffusion(log_snr_max=0.0), "log_snr_max .* and 40, got 0.0"),
    (lambda: schedules.blurring_diffusion(t_min=1.0), "got t_min=1.0, t_max=1.0"),
    (lambda: schedules.spectral(SPECTRUM, 1.0), "between 0 and 1, got 1.0"),
    (lambda: schedules.any_bnr(bnr_range=(0.0, 1.0)), r"got bnr_range\[0\]=0.0"),
    (lambda: schedules.any_bnr(hot_share=1.5), "hot_share .* got 1.5"),
    (lambda: functions(t_min=0.0), "got t_min=0.0"),
    (lambda: functions(0.3), "alpha must be a function of t, got 0.3: lambda t: 0.3"),
    (lambda: functions(lambda t: 9 - t), "alpha must never fall as t rises, got"),
    (lambda: functions(lambda t: jnp.where(t > 7, 6.9993, 7.0)), "never fall"),
    (lambda: functions(lambda t: -t), "alpha must be finite and >= 0"),
    (lambda: jax.jit(lambda t: functions(lambda t: -t).alpha(t))(1.0), "finite and >= 0"),
    (lambda: functions(beta=lambda t: 2 - t / 8), "beta must never fall .* then"),
    (lambda: functions(beta=lambda t: jnp.minimum(t, 1.0)), "must be > 0 and rise .* sample_time="),
    (lambda: functions(sample_time=lambda key, shape: jnp.ones(())), "8 finite times > 0, got 1.0"),
    (lambda: functions(sample_time=lambda key, shape: jnp.zeros(shape)), r"times > 0, got \[0. 0."),
    # grids
    (lambda: schedules.time_grid(PATH, 0), "num_steps must be an integer >= 1, got 0"),
    (lambda: schedules.time_grid(PATH, 4, 0.5), "rho must lie between 1 and inf, got 0.5"),
    (lambda: grid(start=81.0), "above t_min = 0.002, up to t_max = 80, got 81"),
    (lambda: grid(schedules.cold()), "a path whose noise rises with time all the way"),
    # spectra
    (lambda: spectra.recommend_bnr(SPECTRUM, 0.0), "between 0 and 1, got 0.0"),
    (lambda: spectra.recommend_bnr(-SPECTRUM), r"finite spectrum \[\*spatial\] >= 0, got shape"),
    (lambda: spectra.recommend_bnr(np.nan * SPECTRUM), "finite spectrum"),
    (lambda: spectra.recommend_bnr(np.eye(1, 16).reshape(4, 4)), "no detail to blur"),
    (lambda: spectra.recommend_bnr(lonely(), 0.5), r"no blur removes more than 0\.5 of any band"),
    (lambda: spectra.spectrum_at(X[0], 8, 8), r"a spectrum of 2 axes, got \(5, 4, 2\)"),
]


@pytest.mark.parametrize(("mistake", "message"), MISTAKES, ids=[m[:40] for _, m in MISTAKES])
def test_a_mistake_is_refused(mistake, message):
    with pytest.raises(ValueError, match=message):
        mistake()


def test_what_is_right_is_not_refused():
    for images in (0 * X + 9.0, np.zeros((2, 1, 7, 3)), np.zeros((2, 3, 4, 4))):
        np.testing.assert_array_equal(dct.check_images(images), images)
    loss(x0=12 * X, sigma_data=6.0)  # latents of a larger scale
    functions(lambda t: jnp.where(t > 7, 7 * (1 - 1e-6), 7.0))  # a fall by rounding is none
