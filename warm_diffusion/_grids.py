"""The times of `schedules.spectral_grid`: the shortest path through the noise levels (ours).

On Gaussian data both
heads are linear per frequency around the mean, D = d x and D + R = c x with v = m^2 S + beta^2,
d = m^2 S / v, c = m S / v (`oracle.py`), so a step of any solver multiplies the deviation x by a
number, and the exact flow by (v' / v)^1/2. From the exact state (multistep: and the exact state
before) a step from (alpha, beta) to (alpha', beta') makes the relative error

    (1)  e = (1 + g) (v / v')^1/2 - 1,     g = (m' - m) c + (beta' / beta - 1) (1 - d)    euler
    (2) heun        g is the mean of that and of
                     ((m' - m) c' + (1 - beta / beta') (1 - d')) (1 + g)
    (3) multistep   g + (m' - (beta' / beta) m) w (c - c_prev (v_prev / v)^1/2),
                     w = ln(beta / beta') / (2 ln(beta_prev / beta))

which ends as e S^1/2 in the image. A grid costs

    (4) sum over steps of sum_k S_k^3/2 e_k^2  +  0.1 s^2 sum_k S_k^3/2 s_k  at its first level,
         s_k = m_k^2 S_k / beta^2,  s = sum_k s_k

the latter standing for what starting from Gaussian data costs: to lowest order in s the flow of
other data departs by their third cumulants, which for each frequency add up over all pairs of
frequencies, hence s^2. Squares are summed step by step: with a network the errors of different
steps do not cancel as they may on Gaussian data. The weight S^3/2 (S would be the image's squared
error) and the 0.1 were chosen by samples of two trained networks (docs/results_all.md).

A step's cost depends on its two ends and the level before, so the best grid is found by dynamic
programming over a table of levels, refined between its entries. A network is not the Gaussian
denoiser, whose flow one step may follow however far, so no step goes further than a decade of
noise, or three times as far as the one before, except the last, which goes to a clean image, or,
extrapolated, over a factor of 200. Multistep, which extrapolates, goes to t_min and stays there if
the noise left is below half a grey level, and saves the call that would remove it; the other
solvers end at 0. Known for noise alone, by other criteria: Benita et al. 2025 (arXiv 2502.00180);
Sun, Poor, Zhang 2026 (arXiv 2601.13602).
"""

import itertools
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from warm_diffusion import dct as _dct
from warm_diffusion import spectra as _spectra

_TABLE = 97  # levels among which the path is searched for
_DIRECT = 32  # steps; of more the grid of so many is divided
_NARROWER = (2.0, 1.0, 0.5, 0.25, 0.1)  # around a path: half widths of searches, in entries
_HALF_GREY = 1 / 255  # in [-1, 1]
_EXPONENT, _START = 1.5, 0.1  # of eq. (4)
_FURTHEST, _LAST = np.log(10), np.log(200)  # in ln beta: a step, the last one
_LONGER = 3.0  # than the step before


def best_times(levels: "Levels", num_steps: int, solver: str, keeps_top: bool) -> np.ndarray:
    """Times [num_steps + 1] of least cost, eq. (4), the first one free unless the top is kept."""
    stays = solver == "multistep" and float(levels.at(np.full(1, levels.end)).beta[0]) < _HALF_GREY
    path = _shortest_path(levels, min(num_steps, _DIRECT), solver, keeps_top, stays)
    if num_steps > _DIRECT:
        steps = np.linspace(0, len(path) - 1, num_steps + stays)
        path = np.interp(steps, np.arange(len(path)), path)
    times = levels.times(path)
    return times if stays else np.append(times, 0.0)


class Levels:
    """Levels of a path by position: 0 at the top, `end` at t_min, evenly in ln beta; inf: clean."""

    end = _TABLE - 1

    def __init__(self, alpha, beta, times: tuple[float, float], spectrum: np.ndarray):
        self._alpha, self._beta = alpha, beta
        self._log_t = np.linspace(*np.log(times[::-1]), 4097)
        self._log_beta = np.log(self._value(self._beta, np.exp(self._log_t)))
        if not np.all(np.diff(self._log_beta) < 0):
            raise ValueError(
                "a spectral grid needs a path whose noise rises with time all the way: take "
                "schedules.time_grid for this one"
            )
        # One frequency a ring: the blur is the same there, and so are natural images.
        ring, _ = _spectra._rings(*spectrum.shape)
        eigen = _dct._eigenvalues(*spectrum.shape)
        count, eigen, power = (
            np.bincount(ring.ravel(), weights=values.ravel())
            for values in (np.ones(ring.shape), eigen, spectrum)
        )
        varies = power > 0
        self.count = count[varies]
        self._eigen, self.spectrum = eigen[varies] / self.count, power[varies] / self.count
        self.weight = self.count * self.spectrum**_EXPONENT

    @staticmethod
    def _value(level, t: np.ndarray) -> np.ndarray:
        return np.asarray(level(jnp.asarray(t, dtype=float)), np.float64)

    def times(self, position: np.ndarray) -> np.ndarray:
        """Times [P] of positions [P] that are not inf."""
        wanted = np.interp(position, (0, self.end), self._log_beta[[0, -1]])
        log_t = np.interp(-wanted, -self._log_beta, self._log_t)
        return np.exp(log_t)

    def at(self, position: np.ndarray) -> "_Level":
        """The levels at positions [P]."""
        clean = np.isinf(position)
        t = self.times(np.where(clean, self.end, position))
        alpha, beta = (np.where(clean, 0.0, self._value(f, t)) for f in (self._alpha, self._beta))
        m = np.exp(-self._eigen * alpha[:, None] ** 2 / 2)
        return _Level(position, beta, m, m**2 * self.spectrum + beta[:, None] ** 2)


class _Level(NamedTuple):
    position: np.ndarray  # [P]
    beta: np.ndarray  # [P]
    m: np.ndarray  # [P, K]
    v: np.ndarray  # [P, K]

    def part(self, axis: int) -> "_Level":
        """With its positions along one of two axes, the frequencies behind both."""
        return _Level(*(np.expand_dims(a, (1 - axis, 2)[: 3 - a.ndim]) for a in self))


def _step_costs(
    levels: Levels, solver: str, steps: tuple[_Level | None, _Level, _Level], last: bool
) -> np.ndarray:
    """Eq. (4)'s term of steps from `now` to `after` [now, after, before or 1]; inf: refused."""
    before, now, after = steps
    spectrum, weight = levels.spectrum, levels.weight
    start, end = now.part(0), after.part(1)
    with np.errstate(divide="ignore", invalid="ignore"):  # in steps that do not fall
        c, d = (start.m**power * spectrum / start.v for power in (1, 2))
        g = (end.m - start.m) * c + (end.beta / start.beta - 1) * (1 - d)
        if solver == "heun":
            c_end, d_end = (end.m**power * spectrum / end.v for power in (1, 2))
            shrink = (end.beta - start.beta) / end.beta * (1 - d_end)
            second = ((end.m - start.m) * c_end + shrink) * (1 + g)
            g = np.where(end.beta > 0, (g + second) / 2, g)
        scale = np.sqrt(start.v / end.v)
        error = (1 + g) * scale - 1
        cost = np.sum(weight * error**2, -1)[..., None]
        step = np.log(start.beta / end.beta)  # to a clean image, infinite
        falls = start.position < end.position
        if before is None:
            return np.where(falls & (last | (step <= _FURTHEST)), cost, np.inf)
        size = np.log(before.beta / now.beta[:, None])[:, None]
        near = (
            (step <= _LAST) | (end.beta == 0)
            if last
            else step <= np.minimum(_FURTHEST, _LONGER * size)
        )
        allowed = falls & near & (size > 0)
        if solver == "multistep":
            gain = scale * (end.m - end.beta / start.beta * start.m)
            clean, clean_before = (a.m * spectrum / a.v for a in (now, before))
            # (3)'s last factor [now, K, before]
            moved = np.sqrt(before.v / now.v[:, None]) * clean_before
            change = (clean[:, None] - moved).swapaxes(1, 2)
            w = np.where(end.beta > 0, step / (2 * size), 0.0)  # to a clean image: none
            cost = cost + w * (
                2 * (weight * error * gain) @ change + w * ((weight * gain**2) @ change**2)
            )
        return np.where(allowed, cost, np.inf)


def _start_costs(levels: Levels, first: _Level) -> np.ndarray:
    """Eq. (4)'s other term [P]."""
    ratio = first.m**2 * levels.spectrum / first.beta[:, None] ** 2
    total = np.sum(levels.count * ratio, -1)
    return _START * total**2 * np.sum(levels.weight * ratio, -1)


def _cheapest(levels: Levels, layers: list[_Level], solver: str) -> np.ndarray:
    """The path of least cost through one position of each layer, [number of layers]."""
    # total[now, before]: the least cost of arriving at `now` from `before`.
    first = _step_costs(levels, solver, (None, *layers[:2]), len(layers) == 2)
    total = _start_costs(levels, layers[0]) + first[..., 0].T
    known, choices = {}, []
    for layer in itertools.pairwise(itertools.pairwise(layers)):
        (before, now), (_, after) = layer
        key = id(before), id(now), id(after)
        if key not in known:
            last = after is layers[-1]
            known[key] = _step_costs(levels, solver, (before, now, after), last)
        sums = total[:, None] + known[key]
        choices.append(np.argmin(sums, axis=2))  # [now, after] -> before
        total = np.min(sums, axis=2).T
    chosen = list(np.unravel_index(np.argmin(total), total.shape))[::-1]  # the last two
    for choice in reversed(choices):
        chosen.insert(0, choice[chosen[0], chosen[1]])
    return np.array([layer.position[i] for layer, i in zip(layers, chosen, strict=True)])


def _shortest_path(
    levels: Levels, num_steps: int, solver: str, starts_at_top: bool, stays: bool
) -> np.ndarray:
    """Positions of the levels at which the network is called and, if it `stays`, of the end."""
    table = levels.at(np.arange(levels.end + (not stays), dtype=float))
    first = [levels.at(np.zeros(1)) if starts_at_top else table]
    last = levels.at(np.full(1, levels.end if stays else np.inf))
    path = _cheapest(levels, first + [table] * (num_steps - 1) + [last], solver)
    bottom = levels.end - 1e-3 if stays else levels.end
    for half_width in _NARROWER:
        offsets = half_width * np.linspace(-1, 1, 9)
        near = [levels.at(np.clip(p + offsets, 0, bottom)) for p in path[starts_at_top:-1]]
        path = _cheapest(levels, first * starts_at_top + near + [last], solver)
    return path if stays else path[:-1]
