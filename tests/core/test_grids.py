"""Grids from the spectrum: a closed form, the minimum of a cost computed anew, and what they gain.

On Gaussian data a solver multiplies each DCT coefficient's deviation from the mean by a number,
here by running method section 3's steps (`closed_forms.py`) on deviations of 1.
"""

import itertools

import numpy as np
import pytest

from tests.core.closed_forms import (
    GaussianData,
    blur,
    dct,
    difference_step,
    edm_times,
    idct,
    natural_spectrum,
    rings,
    solve,
)
from warm_diffusion import schedules
from warm_diffusion.samplers import SOLVERS
from warm_diffusion.schedules import spectral_grid

pytestmark = pytest.mark.usefixtures("x64")

SIZE = (8, 6, 1)


def isotropic_spectrum():
    """Falls like that of natural images, equal on each ring of frequencies."""
    spectrum, ring = 4 * natural_spectrum(*SIZE[:2]), rings(*SIZE[:2])
    means = np.bincount(ring.ravel(), spectrum.ravel()) / np.bincount(ring.ravel())
    return means[ring]


SPECTRUM = isotropic_spectrum()
DATA = GaussianData(np.zeros(SIZE), SPECTRUM[:, :, None])
each_solver = pytest.mark.parametrize("solver", SOLVERS)


def heads(x, alpha, beta):
    return DATA.posterior_means(x, alpha, beta)


def end_over_start(solver, levels):
    """The factor of each coefficient from levels[0] to levels[-1], [H, W, C]."""
    return dct(solve(solver, heads, idct(np.ones((1, *SIZE))), levels))[0]


def deviation(level):
    """Standard deviation of the forward states, [H, W, C]."""
    return np.sqrt(DATA.marginal(*level)[1])


@pytest.mark.parametrize("steps", [1, 7])
def test_euler_on_one_frequency_without_blur_steps_evenly_in_the_arctangent(steps):
    # With beta = S^1/2 tan(a) a step's relative error is cos(a - a') - 1: the tangent law (Sun,
    # Poor, Zhang 2026, arXiv 2601.13602).
    path = schedules.hot(beta_min=1e-3, beta_max=30.0)
    grid = spectral_grid(path, np.array([[0.0, 4.0]]), steps, "euler", start=20.0)
    angles = np.linspace(np.arctan(20.0 / 2), 0.0, steps + 1)
    np.testing.assert_allclose(grid, 2 * np.tan(angles), rtol=0.01, atol=1e-9)


def cost(solver, times, bnr):
    """Squares of each step's error from exact states and what the start costs, summed."""
    levels = [(bnr * t, t) for t in times]
    ratio = DATA.marginal(*levels[0])[1] / levels[0][1] ** 2 - 1
    total = 0.1 * np.sum(ratio) ** 2 * np.sum(DATA.spectrum**1.5 * ratio)
    for i, (now, after) in enumerate(itertools.pairwise(levels)):
        if solver == "multistep" and i and after[1] > 0:
            moved = extrapolated(levels[i - 1], now, after)
        else:  # as in a grid of one step
            moved = end_over_start(solver, [now, after]) * deviation(now)
        error = moved / deviation(after) - 1
        total += np.sum(DATA.spectrum**1.5 * error**2)
    return float(total)


def extrapolated(before, now, after):
    """Where the multistep solver leads from the exact states at two levels, method section 3."""
    x, x_before = (idct(deviation(level)[None]) for level in (now, before))
    blurry, residual = heads(x, *now)
    change = blurry + residual - sum(heads(x_before, *before))
    ahead = change * np.log(now[1] / after[1]) / np.log(before[1] / now[1]) / 2
    moved = difference_step(x, blurry, residual, now, after)
    return dct(moved + blur(ahead, after[0]) - after[1] / now[1] * blur(ahead, now[0]))[0]


def goes_no_further(solver, times):
    """No step but the last beyond a decade, or three times the one before; the last: 200."""
    size = -np.diff(np.log(np.maximum(times, 1e-30)))
    inner, last = size[:-1], size[-1]
    short = np.all(inner <= np.log(10) + 1e-9) and np.all(inner[1:] <= 3 * inner[:-1] + 1e-9)
    return short and (solver != "multistep" or len(size) == 1 or last <= np.log(200) + 1e-9)


@pytest.mark.parametrize(
    ("solver", "bnr"), [("euler", 0.7), ("heun", 0.7), ("multistep", 0.0), ("multistep", 0.7)]
)
def test_no_other_time_for_a_level_costs_less(solver, bnr):
    # Three percent to either side, which the table's spacing of ten percent would not see.
    times = np.asarray(spectral_grid(schedules.constant_bnr(bnr), SPECTRUM, 5, solver))
    least = cost(solver, times, bnr)
    for i in range(5):
        for factor in (0.97, 1.03):
            other = times * np.where(np.arange(6) == i, factor, 1.0)
            if goes_no_further(solver, other):
                assert cost(solver, other, bnr) > 0.999 * least  # some valleys are flat


@each_solver
def test_the_grid_is_the_least_of_many_not_a_dip(solver):
    # 300 grids drawn at random around it, up to a factor of e.
    times = np.asarray(spectral_grid(schedules.constant_bnr(0.5), SPECTRUM, 4, solver))
    least, rng, tried = cost(solver, times, 0.5), np.random.default_rng(0), 0
    for _ in range(300):
        inner = np.sort(times[:4] * np.exp(rng.uniform(-1, 1, 4)))[::-1]
        other = np.array([*inner, times[-1]])
        if inner[-1] > times[-1] and goes_no_further(solver, other):
            tried += 1
            assert cost(solver, other, 0.5) >= least
    assert tried > 50


def distance(solver, times, bnr, from_data):
    """Wasserstein distance of the end's marginals to the data's, from noise or from the data's.

    Frequencies count as in the grid's cost, S^1/2 more than by squared error.
    """
    levels = [(bnr * t, t) for t in times]
    start = deviation(levels[0]) if from_data else levels[0][1]
    end = np.abs(end_over_start(solver, levels)) * start
    return np.sqrt(np.sum(np.sqrt(DATA.spectrum) * (end - np.sqrt(DATA.spectrum)) ** 2))


@pytest.mark.parametrize(("calls", "bnr"), [(3, 1.0), (9, 0.5), (18, 0.0), (35, 0.5)])
@each_solver
def test_it_is_nearer_to_gaussian_data_than_edms_grid(solver, calls, bnr):
    steps = (calls + 1) // 2 if solver == "heun" else calls
    times = spectral_grid(schedules.constant_bnr(bnr), SPECTRUM, steps, solver)
    edm = edm_times(0.002, 80.0, steps, 7.0)
    found = distance(solver, np.asarray(times), bnr, from_data=True)
    assert found < distance(solver, edm, bnr, from_data=False)


@pytest.mark.parametrize(("bnr", "quiet"), [(0.5, 1.0), (1.0, 1e-3)])
@each_solver
def test_the_grid_falls_by_steps_that_are_not_too_long_and_ends_where_the_solver_may(
    solver, bnr, quiet
):
    # Multistep stays at t_min, where noise is a quarter of a grey level: no call there.
    for steps in (1, 2, 4, 7):
        times = spectral_grid(schedules.constant_bnr(bnr), quiet * SPECTRUM, steps, solver)
        times = np.asarray(times)
        assert times.shape == (steps + 1,)
        assert times[0] <= 80
        assert np.all(np.diff(times) < 0)
        assert times[-1] == pytest.approx(0.002 if solver == "multistep" else 0.0)
        assert goes_no_further(solver, times)


@pytest.mark.parametrize("steps", [33, 100])
def test_many_steps_divide_the_grid_of_fewer(steps):
    times = np.asarray(spectral_grid(schedules.constant_bnr(0.5), SPECTRUM, steps, "heun"))
    assert times.shape == (steps + 1,)
    assert np.all(np.diff(times) < 0)


def test_noise_that_could_be_seen_is_removed():
    path = schedules.constant_bnr(0.5, beta_min=0.03)
    times = spectral_grid(path, SPECTRUM, 5, "multistep")
    assert float(times[-1]) == 0
    assert float(times[-2]) >= 0.03 * (1 - 1e-9)


@pytest.mark.parametrize("first", [80.0, 0.7])
def test_a_first_time_is_kept(first):
    times = spectral_grid(schedules.constant_bnr(0.5), SPECTRUM, 5, start=first)
    assert float(times[0]) == pytest.approx(first)
    assert np.all(np.diff(times) < 0)


@pytest.mark.parametrize(
    "path",
    [
        schedules.spectral(SPECTRUM),
        schedules.blurring_diffusion(),
    ],
    ids=["spectral", "blurring_diffusion"],
)
def test_every_path_whose_noise_rises_has_one(path):
    times = np.asarray(spectral_grid(path, SPECTRUM, 6))
    assert np.all(np.diff(times) < 0)
    assert path.t_max >= times[0]
    assert times[-2] > 0


def test_only_the_levels_matter_not_their_clock():
    slow, fast = (
        schedules.from_functions(
            lambda t, p=p: 0.5 * t**p, lambda t, p=p: t**p,
            t_min=0.002 ** (1 / p), t_max=80 ** (1 / p),
        )
        for p in (1, 3)
    )  # fmt: skip
    one, other = (np.asarray(spectral_grid(path, SPECTRUM, 6)) for path in (slow, fast))
    np.testing.assert_allclose(other**3, one, rtol=1e-3)
