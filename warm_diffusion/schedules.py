"""Paths t -> (alpha, beta) through blur and noise, their training distribution and time grids.

    (1)  hot            alpha = 0,      beta = t      EDM (Karras et al. 2022, arXiv 2206.00364)
    (2)  constant_bnr   alpha = bnr t,  beta = t      Warm Diffusion (arXiv 2511.16904), default 0.5
    (3)  cold           alpha = t,      beta constant inverse heat dissipation (arXiv 2206.13397)
    (4)  blurring_diffusion  alpha = sigma sin^2(pi t / 2), beta = tan(theta_0 + t (theta_1 -
                        theta_0)), log-SNR = -2 ln beta falls from 10 to -10: Hoogeboom & Salimans
                        2023 (arXiv 2209.05557), variance exploding; Warm Diffusion, table 4
    (5)  spectral       alpha(beta), beta = t         from the data's spectrum (ours): at beta =
                        S_k^(1/2), where noise takes over coefficient k, blur may have taken the
                        share `attenuation`, exp(-lambda_k alpha^2 / 2) = 1 - attenuation. These
                        points, the highest frequency that is still visible deciding, are joined by
                        power laws with rounded corners; beyond them the ratio stays. S ~ 1 / f^2
                        gets a constant ratio, S ~ f^-gamma gets alpha ~ beta^(2 / gamma)
    (6)  any_bnr        (2) with a ratio drawn for each training image (ours)
         from_functions any two functions of t

    (7)  training:      ln beta ~ N(p_mean, p_std^2)  EDM, table 1; (3): ln alpha uniform; (4): t
                        uniform; (6): ln bnr uniform besides, and 0 for a share of the images
    (8)  time_grid:     t_i = (t_max^(1/rho) + i/(n-1) (t_min^(1/rho) - t_max^(1/rho)))^rho,
                        t_n = 0                       EDM, eq. (5)
         spectral_grid: times of least error for a spectrum and a solver, `_grids.py`

Absent on purpose: the noise that inverse heat dissipation adds at each sampling step (churn
serves that) and its list of levels (the path is continuous; its authors' levels for CIFAR-10 are
log-spaced, which is `time_grid(..., rho=inf)`).
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from warm_diffusion import _grids
from warm_diffusion import dct as _dct
from warm_diffusion import spectra as _spectra

_ROUNDING = 1e-5  # relative fall of a level that is no more than rounding in float32
_CORNER = 0.05  # width, in ln beta, over which the corners of (5) are rounded
_LEAST, _MOST = 1e-6, 1e6  # of a path's levels, whose squares float32 must hold


# --- values --------------------------------------------------------------------------------------


@contextlib.contextmanager
def _eager():
    """Computes known numbers at once, also under jit and where transfers are guarded."""
    with jax.ensure_compile_time_eval(), jax.transfer_guard("allow"):
        yield


def _known(function: Callable[..., ArrayLike], *arguments: Any) -> np.ndarray | None:
    """Returns the value of a function as numpy, or None if it is traced."""
    # Formulas may divide by t = 0: the rules tell it, not numpy's warnings.
    with _eager(), np.errstate(all="ignore"):
        value = function(*arguments)
        return None if isinstance(value, jax.core.Tracer) else np.asarray(value)


def _traced(*numbers: ArrayLike) -> bool:
    return any(isinstance(number, jax.core.Tracer) for number in numbers)


def _check_order(**ends: float) -> None:
    """Raises ValueError unless 0 < low < high, by the names of both, and neither is absurd."""
    (low_name, low), (high_name, high) = ends.items()
    if not _traced(low, high) and not _LEAST <= low < high <= _MOST:
        raise ValueError(
            f"expected {_LEAST:g} <= {low_name} < {high_name} <= {_MOST:g}, got "
            f"{low_name}={low}, {high_name}={high}"
        )


def _check_between(low: float, high: float, why: str = "", **number: ArrayLike) -> None:
    """Raises ValueError unless a number that is known, or all of an array, lie in [low, high]."""
    ((name, value),) = number.items()
    if not _traced(value) and not np.all((low <= np.asarray(value)) & (np.asarray(value) <= high)):
        raise ValueError(f"{name} must lie between {low:g} and {high:g}{why}, got {value}")


def _as(t: jax.Array, *numbers: ArrayLike) -> list[jax.Array]:
    """Numbers of a path in the type of times t."""
    return [jnp.asarray(number).astype(t.dtype) for number in numbers]


def _normal(key: jax.Array, shape: tuple[int, ...], mean, std) -> jax.Array:
    drawn = jax.random.normal(key, shape, jnp.float32)
    mean, std = _as(drawn, mean, std)
    return mean + std * drawn


def _uniform(key: jax.Array, shape: tuple[int, ...], low, high) -> jax.Array:
    drawn = jax.random.uniform(key, shape, jnp.float32)
    low, high = _as(drawn, low, high)
    return low + (high - low) * drawn


def _log_uniform(key: jax.Array, shape: tuple[int, ...], low, high) -> jax.Array:
    return jnp.exp(_uniform(key, shape, jnp.log(low), jnp.log(high)))


# --- paths ---------------------------------------------------------------------------------------


class Schedule:
    """A path through blur and noise: a value, and a pytree whose numbers are leaves.

    Paths of one kind with equal numbers are equal. As an argument of a jitted function a path is
    traced by its kind alone, so one compiled loss or sampler serves all numbers, and `jax.vmap`
    maps over them. The functions of this module make paths and check their numbers, as far as those
    are known. Every path starts at the clean image, alpha(0) = beta(0) = 0; from t_min to t_max
    alpha >= 0 and beta > 0 are finite and never fall. `from_functions` makes one of any functions.

    Attributes:
      t_min: smallest time that the network sees, > 0.
      t_max: time at which sampling starts.

    Example:
      >>> path = schedules.constant_bnr(0.5)
      >>> path == schedules.constant_bnr(0.5), path == schedules.constant_bnr(0.6)
      (True, False)
    """

    t_min: ArrayLike
    t_max: ArrayLike

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # 1 and 1.0 make the same path: one compilation
            value = getattr(self, field.name)
            if isinstance(value, int | np.number) and not isinstance(value, bool):
                object.__setattr__(self, field.name, float(value))

    def alpha(self, t: ArrayLike) -> jax.Array:
        """Blur in pixels at times t [...], differentiable on [t_min, t_max]."""
        raise NotImplementedError

    def beta(self, t: ArrayLike) -> jax.Array:
        """Noise standard deviation at times t [...], differentiable on [t_min, t_max]."""
        raise NotImplementedError

    def sample_levels(self, key: jax.Array, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
        """Levels (alpha, beta) to train at, eq. (7), each of `shape` and float32."""
        raise NotImplementedError

    def __repr__(self) -> str:
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        shown = (f"{'bnr' if k == 'ratio' else k}={value!r}" for k, value in values.items())
        return f"{type(self).__name__}({', '.join(shown)})"

    def bnr(self, t: ArrayLike) -> jax.Array:
        """Blur-to-noise ratio alpha / beta at t > 0, in pixels per unit of noise."""
        return self.alpha(t) / self.beta(t)

    @property
    def needs_start(self) -> bool:
        """Whether noise at t_max, below 1, leaves images in [-1, 1] visible: sample by `solve`.

        False where that noise is traced.
        """
        noise = _known(self.beta, self.t_max)
        return noise is not None and bool(np.all(noise < 1))

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other):
            return NotImplemented
        (mine, kind), (yours, other_kind) = jax.tree.flatten(self), jax.tree.flatten(other)
        return kind == other_kind and all(
            one is two or (not _traced(one, two) and np.array_equal(one, two))
            for one, two in zip(mine, yours, strict=True)
        )

    def __hash__(self) -> int:
        leaves, kind = jax.tree.flatten(self)
        # + 0.0: -0.0 equals 0.0.
        return hash((kind, *((np.asarray(leaf, float) + 0.0).tobytes() for leaf in leaves)))


def _value(kind: type) -> type:
    """Makes a path's class a frozen dataclass and a pytree; fields marked static are no leaves."""
    value = dataclasses.dataclass(frozen=True, eq=False, repr=False)
    return jax.tree_util.register_dataclass(value(kind))


@_value
class _ConstantBnr(Schedule):
    ratio: ArrayLike
    beta_min: ArrayLike = 0.002
    beta_max: ArrayLike = 80.0
    p_mean: ArrayLike = -1.2
    p_std: ArrayLike = 1.2

    @property
    def t_min(self) -> ArrayLike:
        return self.beta_min

    @property
    def t_max(self) -> ArrayLike:
        return self.beta_max

    def alpha(self, t: ArrayLike) -> jax.Array:
        t = _dct._floating(t)
        return _as(t, self.ratio)[0] * t

    def beta(self, t: ArrayLike) -> jax.Array:
        return _dct._floating(t)

    def sample_levels(self, key: jax.Array, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
        t = jnp.exp(_normal(key, shape, self.p_mean, self.p_std))
        return self.alpha(t), self.beta(t)


def constant_bnr(bnr: float, **levels: float) -> Schedule:
    """The paper's path, eq. (2): blur in a constant ratio to noise.

    Args:
      bnr: blur-to-noise ratio, pixels of blur per unit of noise, >= 0; the paper's best is 0.5.
      **levels: beta_min = 0.002 and beta_max = 80, the sampler's smallest and largest noise level;
        p_mean = -1.2 and p_std = 1.2, mean and standard deviation of ln beta in training.

    Raises:
      ValueError: a negative ratio, or levels out of order.

    Example:
      >>> path = schedules.constant_bnr(0.5)
      >>> float(path.alpha(4.0)), float(path.beta(4.0))
      (2.0, 4.0)
    """
    _check_between(0, _MOST, bnr=bnr)
    return _checked_levels(_ConstantBnr(bnr, **levels))


def _checked_levels(path: _ConstantBnr) -> _ConstantBnr:
    _check_order(beta_min=path.beta_min, beta_max=path.beta_max)
    _check_distribution(path)
    return path


def _check_distribution(path: Any) -> None:
    """Raises ValueError unless eq. (7) gives levels that float32 holds."""
    _check_between(-20, 20, p_mean=path.p_mean)
    _check_between(0, 8, p_std=path.p_std)


def hot(**levels: float) -> Schedule:
    """Noise only, eq. (1): exactly EDM. `levels` as in `constant_bnr`.

    Example:
      >>> float(schedules.hot().alpha(4.0)), float(schedules.hot().beta(4.0))
      (0.0, 4.0)
    """
    return constant_bnr(0.0, **levels)


@_value
class _AnyBnr(_ConstantBnr):
    bnr_min: ArrayLike = 0.1
    bnr_max: ArrayLike = 10.0
    hot_share: ArrayLike = 0.1

    def sample_levels(self, key: jax.Array, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
        time_key, ratio_key, hot_key = jax.random.split(key, 3)
        beta = jnp.exp(_normal(time_key, shape, self.p_mean, self.p_std))
        ratio = _log_uniform(ratio_key, shape, self.bnr_min, self.bnr_max)
        hot = _uniform(hot_key, shape, 0.0, 1.0) < self.hot_share
        return jnp.where(hot, 0.0, ratio) * beta, beta


def any_bnr(
    bnr: float = 0.5,
    bnr_range: tuple[float, float] = (0.1, 10.0),
    hot_share: float = 0.1,
    **levels: float,
) -> Schedule:
    """One network for every ratio, eq. (6): it sees alpha and beta apart, so it can tell.

    As a path it is `constant_bnr(bnr)`; the network may be sampled along any other.

    Args:
      bnr: ratio of the path.
      bnr_range: smallest and largest ratio in training, ln bnr uniform in between.
      hot_share: share of the training images in [0, 1] that are not blurred at all.
      **levels: as in `constant_bnr`.

    Raises:
      ValueError: a ratio, a share or levels out of range.

    Example:
      >>> path = schedules.any_bnr(0.5, bnr_range=(2.0, 3.0), hot_share=0.0)
      >>> alpha, beta = path.sample_levels(jax.random.key(0), (100,))
      >>> bool(jnp.all((alpha / beta > 1.99) & (alpha / beta < 3.01))), float(path.bnr(1.0))
      (True, 0.5)
    """
    low, high = bnr_range
    _check_between(0, _MOST, bnr=bnr)
    _check_order(**{"bnr_range[0]": low, "bnr_range[1]": high})
    _check_between(0, 1, hot_share=hot_share)
    return _checked_levels(_AnyBnr(bnr, **levels, bnr_min=low, bnr_max=high, hot_share=hot_share))


@_value
class _Cold(Schedule):
    t_min: ArrayLike
    t_max: ArrayLike
    noise: ArrayLike

    def alpha(self, t: ArrayLike) -> jax.Array:
        return _dct._floating(t)

    def beta(self, t: ArrayLike) -> jax.Array:
        t = _dct._floating(t)
        return jnp.where(t > 0, _as(t, self.noise)[0], 0.0)

    @property
    def needs_start(self) -> bool:
        return _known(self.beta, self.t_max) is None or super().needs_start

    def sample_levels(self, key: jax.Array, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
        t = _log_uniform(key, shape, self.t_min, self.t_max)
        return self.alpha(t), self.beta(t)


def cold(*, alpha_min: float = 0.5, alpha_max: float = 24.0, beta: float = 0.01) -> Schedule:
    """Blur only, at a small constant noise, eq. (3): inverse heat dissipation's path.

    It does not end in pure noise, so sampling starts from blurred images, by `samplers.solve`.

    Args:
      alpha_min: smallest blur in pixels (CIFAR-10: 0.5).
      alpha_max: blur at which sampling starts (CIFAR-10: 24; MNIST: 20).
      beta: the noise level, > 0 (training: 0.01).

    Raises:
      ValueError: levels out of order, or no noise at all.

    Example:
      >>> path = schedules.cold()
      >>> float(path.alpha(4.0)), round(float(path.beta(4.0)), 4), path.needs_start
      (4.0, 0.01, True)
    """
    _check_order(alpha_min=alpha_min, alpha_max=alpha_max)
    _check_between(_LEAST, _MOST, " (the loss weights errors by 1 / beta^2)", beta=beta)
    return _Cold(alpha_min, alpha_max, beta)


@_value
class _BlurringDiffusion(Schedule):
    sigma_blur_max: ArrayLike
    log_snr_max: ArrayLike
    t_min: ArrayLike

    t_max = 1.0

    def _inside(self, t: ArrayLike) -> jax.Array:
        # Churn may ask for a time beyond the end, where sine and tangent would turn back.
        t = _dct._floating(t)
        return jnp.where(t > 1, jnp.ones_like(t), t)

    def alpha(self, t: ArrayLike) -> jax.Array:
        t = self._inside(t)
        return _as(t, self.sigma_blur_max)[0] * jnp.sin(np.pi / 2 * t) ** 2

    def beta(self, t: ArrayLike) -> jax.Array:
        t = self._inside(t)
        (half,) = _as(t, self.log_snr_max)
        low, high = (jnp.arctan(jnp.exp(sign * half / 2)) for sign in (-1, 1))
        return jnp.where(t > 0, jnp.tan(low + t * (high - low)), 0.0)

    def sample_levels(self, key: jax.Array, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
        t = _uniform(key, shape, self.t_min, self.t_max)
        return self.alpha(t), self.beta(t)


def blurring_diffusion(
    *, sigma_blur_max: float = 20.0, log_snr_max: float = 10.0, t_min: float = 1e-3
) -> Schedule:
    """Blurring Diffusion's cosine schedule in variance-exploding form, eq. (4).

    Its authors step evenly in t: `time_grid(..., rho=1)`. Their floor under the blur's factors,
    (1 - 0.001) m + 0.001, is left out: it changes frequencies with m below it.

    Args:
      sigma_blur_max: blur in pixels at t = 1 (CIFAR-10: 20).
      log_snr_max: log-SNR next to the clean image, and minus that at t = 1.
      t_min: smallest time that the network sees, in (0, 1).

    Raises:
      ValueError: a negative blur, no range of log-SNR, or t_min out of range.

    Example:
      Half way, log-SNR 0.

      >>> path = schedules.blurring_diffusion()
      >>> round(float(path.alpha(0.5)), 3), round(float(path.beta(0.5)), 3)
      (10.0, 1.0)
    """
    _check_between(0, _MOST, sigma_blur_max=sigma_blur_max)
    _check_between(_LEAST, 40, log_snr_max=log_snr_max)
    _check_order(t_min=t_min, t_max=1.0)
    return _BlurringDiffusion(sigma_blur_max, log_snr_max, t_min)


@_value
class _Spectral(_ConstantBnr):
    log_beta: ArrayLike = ()  # where the slope d ln alpha / d ln beta changes, [K]
    bends: ArrayLike = ()  # by how much, [K]

    def alpha(self, t: ArrayLike) -> jax.Array:
        t = _dct._floating(t)
        points, bends, ratio = _as(t, self.log_beta, self.bends, self.ratio)
        shape = (1,) * t.ndim + (-1,)
        distance = jnp.log(jnp.where(t > 0, t, 1.0))[..., None] - points.reshape(shape)
        # Every corner is a softplus, so the slope everywhere is an average of those at its sides.
        bend = _CORNER * jax.nn.softplus(distance / _CORNER) * bends.reshape(shape)
        return t * ratio * jnp.exp(jnp.sum(bend, axis=-1))


def spectral(spectrum: ArrayLike, attenuation: float = 0.05, **levels: float) -> Schedule:
    """The path with as much blur at each noise level as the data's spectrum allows, eq. (5).

    Args:
      spectrum: variance S of each DCT coefficient [*spatial], `spectra.power_spectrum`; not traced.
      attenuation: share in (0, 1) of a frequency that blur may take before noise hides it.
      **levels: as in `constant_bnr`.

    Raises:
      ValueError: no spectrum, attenuation or levels out of range, or images without any detail.

    Example:
      >>> path = schedules.spectral(np.array([[1.0, 8 / np.pi**2]]), attenuation=1 - np.exp(-1))
      >>> round(float(path.bnr(0.3)), 3), round(float(path.bnr(3.0)), 3)
      (1.0, 1.0)
    """
    log_beta, log_alpha = _takeover_points(_spectra._checked(spectrum, attenuation), attenuation)
    slopes = np.diff(log_alpha) / np.diff(log_beta)
    # The slope is 1 outside and these between the points.
    bends = np.diff(slopes, prepend=1.0, append=1.0) if len(slopes) else np.zeros(1)
    ratio = float(np.exp(log_alpha[0] - log_beta[0]))
    return _checked_levels(_Spectral(ratio, **levels, log_beta=log_beta, bends=bends))


def _takeover_points(spectrum: np.ndarray, attenuation: float) -> tuple[np.ndarray, np.ndarray]:
    """(ln beta, ln alpha) of eq. (5), both rising: where noise takes over a ring of frequencies."""
    eigen = _dct._eigenvalues(*spectrum.shape)
    eigen.flat[0] = 1.0  # in a ring of its own, left out below
    power, inverse = (_spectra._ring_means(a)[:0:-1] for a in (spectrum, 1 / eigen))
    # From the highest frequency down. A ring with less power than one above it decides nothing:
    # when noise reaches its power, the finer detail is still visible and allows less blur.
    decides = np.diff(np.maximum.accumulate(power), prepend=0.0) > 0
    alpha = np.sqrt(-2 * math.log1p(-attenuation) * inverse)
    return np.log(power[decides]) / 2, np.log(alpha[decides])


@_value
class _FromFunctions(Schedule):
    functions: tuple = dataclasses.field(metadata={"static": True})  # alpha, beta, sample_time
    t_min: ArrayLike
    t_max: ArrayLike
    p_mean: ArrayLike
    p_std: ArrayLike

    def _at(self, level: Callable[[jax.Array], ArrayLike], t: ArrayLike) -> jax.Array:
        # The formula never sees 0, where it or its derivative may be infinite, nor the times beyond
        # the end that churn asks for, where it may turn back.
        t = _dct._floating(t)
        low, high = _as(t, self.t_min, self.t_max)
        value = level(jnp.where(t > high, high, jnp.where(t > 0, t, low)))
        return jnp.where(t > 0, value, 0.0).astype(t.dtype)

    def alpha(self, t: ArrayLike) -> jax.Array:
        return self._at(self.functions[0], t)

    def beta(self, t: ArrayLike) -> jax.Array:
        return self._at(self.functions[1], t)

    def _table(self) -> tuple[jax.Array, jax.Array]:
        """ln t and ln beta along the path."""
        low, high = (jnp.log(jnp.asarray(end, jnp.float32)) for end in (self.t_min, self.t_max))
        log_t = jnp.linspace(low, high, 1025)
        return log_t, jnp.log(self.beta(jnp.exp(log_t)))

    def sample_levels(self, key: jax.Array, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
        if self.functions[2] is not None:
            t = self.functions[2](key, shape)
        else:
            # Levels beyond the table get its ends' times: that clips them to the path.
            log_t, log_beta = self._table()
            t = jnp.exp(jnp.interp(_normal(key, shape, self.p_mean, self.p_std), log_beta, log_t))
        return self.alpha(t), self.beta(t)


def from_functions(
    alpha: Callable[[jax.Array], ArrayLike],
    beta: Callable[[jax.Array], ArrayLike],
    *,
    t_min: float,
    t_max: float,
    p_mean: float = -1.2,
    p_std: float = 1.2,
    sample_time: Callable[[jax.Array, tuple[int, ...]], jax.Array] | None = None,
) -> Schedule:
    """A path of any blur and noise that do not fall, with the clean image put at t = 0.

    Two such paths are equal if their functions are the same objects.

    Args:
      alpha: t > 0 [...] -> blur in pixels [...], by jax.numpy.
      beta: t > 0 [...] -> noise standard deviation > 0 [...], likewise.
      t_min: smallest time that the network sees, > 0.
      t_max: time at which sampling starts.
      p_mean: mean of ln beta in training, eq. (7), within the path's range of beta.
      p_std: standard deviation of ln beta in training.
      sample_time: (key, shape) -> t instead; needed where beta does not rise all the way.

    Raises:
      ValueError: a level that is not finite, or negative, or falls; beta that stays constant
        without `sample_time`; times to train at that are not finite and > 0.

    Example:
      >>> path = schedules.from_functions(
      ...     alpha=lambda t: 0.5 * t, beta=lambda t: t**2, t_min=0.05, t_max=9.0
      ... )
      >>> float(path.alpha(4.0)), float(path.beta(4.0)), float(path.beta(0.0))
      (2.0, 16.0, 0.0)
    """
    for name, level in (("alpha", alpha), ("beta", beta)):
        if not callable(level):
            raise ValueError(f"{name} must be a function of t, got {level!r}: lambda t: {level!r}")
    if not _traced(t_min, t_max) and not 0 < t_min < t_max < math.inf:
        raise ValueError(f"expected 0 < t_min < t_max, both finite, got {t_min=}, {t_max=}")
    path = _FromFunctions((alpha, beta, sample_time), t_min, t_max, p_mean, p_std)
    _check_distribution(path)
    if _traced(t_min, t_max):
        return path
    t = np.geomspace(t_min, t_max, 65)
    for name, level in (("alpha", path.alpha), ("beta", path.beta)):
        _check_level(name, t, _known(level, t))
    if sample_time is not None:
        times = _known(sample_time, jax.random.key(0), (8,))
        fits = times is None or (times.shape == (8,) and np.all((times > 0) & (times < np.inf)))
        if not fits:
            raise ValueError(
                f"sample_time(key, (8,)) must return 8 finite times > 0, got {times}: "
                "for example jnp.exp(jax.random.normal(key, shape))"
            )
    else:
        log_beta = _known(lambda: path._table()[1])
        if log_beta is not None and not np.all(np.diff(log_beta) > 0):
            raise ValueError(
                "beta must be > 0 and rise all the way from t_min to t_max, so that each level has "
                "one time to train at: pass sample_time=, (key, shape) -> t"
            )
    return path


def _check_level(name: str, t: np.ndarray, level: np.ndarray | None) -> None:
    """Raises ValueError unless alpha or beta at times t_min, ..., t_max, if known, suit a path."""
    if level is None:
        return
    sign, inside = (">", level > 0) if name == "beta" else (">=", level >= 0)
    inside &= np.isfinite(level)
    if not np.all(inside):
        i = np.argmin(inside)
        raise ValueError(
            f"{name} must be finite and {sign} 0 on [t_min, t_max], got {level[i]:g} at t = "
            f"{t[i]:g}: choose t_min and t_max where it is"
        )
    rising = level[1:] >= (1 - _ROUNDING) * level[:-1]
    if not np.all(rising):
        i = np.argmin(rising)
        raise ValueError(
            f"{name} must never fall as t rises, got {level[i]:g} at t = {t[i]:g}, then "
            f"{level[i + 1]:g} at t = {t[i + 1]:g}: end at a t_max before it turns, or let t run "
            "from the clean image to blur and noise"
        )


# The paths that a configuration may name.
PATHS = {f.__name__: f for f in (hot, constant_bnr, any_bnr, spectral, blurring_diffusion, cold)}


def _check_schedule(schedule: object) -> None:
    """Raises ValueError unless this is a path."""
    if not isinstance(schedule, Schedule):
        got, hint = getattr(schedule, "__name__", repr(schedule)), ""
        if callable(schedule):
            hint = ": call it"
        elif hasattr(schedule, "shape"):
            got, hint = f"an array {schedule.shape}", ": times go to samplers.solve, after the path"
        raise ValueError(
            f"schedule must be a path, such as schedules.constant_bnr(0.5), got {got}{hint}"
        )


def _training_levels(schedule: object) -> Callable:
    """(key, shape) -> (alpha, beta) of a path, or of a training distribution by itself."""
    uncalled = any(schedule is path for path in (*PATHS.values(), from_functions))
    if isinstance(schedule, Schedule) or not callable(schedule) or uncalled:
        _check_schedule(schedule)
        return schedule.sample_levels
    return schedule


# --- time grids ----------------------------------------------------------------------------------


def _check_num_steps(num_steps: object) -> None:
    if isinstance(num_steps, bool) or not isinstance(num_steps, int | np.integer) or num_steps < 1:
        raise ValueError(f"num_steps must be an integer >= 1, got {num_steps}")


def time_grid(schedule: Schedule, num_steps: int, rho: float = 7.0) -> jax.Array:
    """The sampler's times, eq. (8): from t_max down to t_min, then 0, the clean image.

    Args:
      schedule: the path; its t_min and t_max bound the grid.
      num_steps: number of steps n, >= 1 (n = 1 goes from t_max to 0 at once).
      rho: how much the steps shorten towards t_min; 1 is uniform, infinity geometric.

    Returns:
      [num_steps + 1], strictly decreasing.

    Raises:
      ValueError: no path, no step, or rho < 1.

    Example:
      >>> path = schedules.hot(beta_min=1.0, beta_max=100.0)
      >>> print(np.asarray(schedules.time_grid(path, 3, rho=np.inf)).round(3))
      [100.  10.   1.   0.]
    """
    _check_schedule(schedule)
    _check_num_steps(num_steps)
    _check_between(1, math.inf, rho=rho)
    low, high = schedule.t_min, schedule.t_max
    fraction = np.arange(num_steps) / max(num_steps - 1, 1)
    if _traced(low, high):
        fraction = jnp.asarray(fraction, dtype=float)
    if math.isinf(rho):
        times = high * (low / high) ** fraction
    else:
        root_high, root_low = high ** (1 / rho), low ** (1 / rho)
        times = (root_high + fraction * (root_low - root_high)) ** rho
    return jnp.concatenate([jnp.asarray(times, dtype=float), jnp.zeros(1)])


def spectral_grid(
    schedule: Schedule,
    spectrum: ArrayLike,
    num_steps: int,
    solver: str = "multistep",
    *,
    start: float | None = None,
) -> jax.Array:
    """Times of least error on data of this spectrum (`_grids.py`), for `samplers.solve`.

    Args:
      schedule: the path; its beta must rise with t all the way.
      spectrum: variance S of each DCT coefficient [*spatial], `spectra.power_spectrum`; not traced.
      num_steps: number of steps, >= 1.
      solver: the solver that will use it: euler, heun or multistep.
      start: first time; None: chosen, to start from `samplers.gaussian_start` and save the calls
        above.

    Returns:
      [num_steps + 1], strictly decreasing, from at most t_max; the last is 0, or t_min.

    Raises:
      ValueError: no step, an unknown solver, no spectrum, a first time outside the path, or a path
        whose beta does not rise.

    Example:
      >>> path = schedules.constant_bnr(0.5)
      >>> grid = schedules.spectral_grid(path, np.array([[9.0, 1.0], [1.0, 0.1]]), 4)
      >>> grid.shape, bool(grid[0] < 20), round(float(grid[-1]), 4)
      ((5,), True, 0.002)
    """
    _check_schedule(schedule)
    _check_num_steps(num_steps)
    if solver not in ("euler", "heun", "multistep"):
        raise ValueError(f"solver must be one of euler, heun, multistep, got {solver!r}")
    spectrum = _spectra._checked(spectrum)
    top, low = schedule.t_max if start is None else start, schedule.t_min
    if not low < top <= schedule.t_max * 1.00001:
        raise ValueError(
            f"start must lie above t_min = {low:g}, up to t_max = {schedule.t_max:g}, got {start}"
        )
    with _eager():  # numbers, also under jit
        levels = _grids.Levels(schedule.alpha, schedule.beta, (float(low), float(top)), spectrum)
        times = _grids.best_times(levels, num_steps, solver, keeps_top=start is not None)
        return jnp.asarray(times, dtype=float)
