"""Independent numpy formulas that the core is tested against: nothing here imports the core.

The blur goes through scipy's DCT; Gaussian data are diagonal in the DCT basis, so every posterior,
flow and variance below is a formula per frequency.
"""

import dataclasses
import itertools

import numpy as np
import scipy.fft


def dct(x):
    """Orthonormal DCT-II over the spatial axes of [B, *spatial, C]."""
    return scipy.fft.dctn(np.asarray(x, np.float64), norm="ortho", axes=range(1, np.ndim(x) - 1))


def idct(coefficients):
    """Its inverse."""
    axes = range(1, np.ndim(coefficients) - 1)
    return scipy.fft.idctn(np.asarray(coefficients, np.float64), norm="ortho", axes=axes)


def eigenvalues(*sizes):
    """lambda = sum over axes of pi^2 k^2 / size^2, [*sizes]: method section 1."""
    found = np.zeros(sizes)
    for index in np.ndindex(sizes):
        found[index] = np.pi**2 * sum((k / n) ** 2 for k, n in zip(index, sizes, strict=True))
    return found


def like(level, x):
    """A level, a number or [B], shaped to multiply data [B, *spatial, C]."""
    level = np.asarray(level, np.float64)
    return level.reshape(level.shape + (1,) * (np.ndim(x) - level.ndim))


def transfer(alpha, *sizes):
    """m(alpha) = exp(-lambda alpha^2 / 2): [*sizes, 1] for a number, [B, *sizes, 1] for [B]."""
    alpha = np.asarray(alpha, np.float64)
    squares = alpha.reshape(alpha.shape + (1,) * (len(sizes) + 1)) ** 2
    return np.exp(-eigenvalues(*sizes)[..., None] * squares / 2)


def blur(x, alpha):
    """B(alpha) x for data [B, *spatial, C]; alpha a number or [B]."""
    return idct(transfer(alpha, *x.shape[1:-1]) * dct(x))


def natural_spectrum(*sizes, channels=None):
    """A spectrum that falls as 1 / f^2, as that of natural images; channels may differ."""
    spectrum = 0.5 / (eigenvalues(*sizes) + 0.1)
    if channels is None:
        return spectrum
    return spectrum[..., None] * (1 + 0.5 * np.arange(channels))


def rings(height, width):
    """The ring of frequencies of every coefficient."""
    i, j = np.indices((height, width))
    return np.round(np.hypot(i / height, j / width) * max(height, width)).astype(int)


def rough_spectrum(height=12, width=10):
    """A spectrum that falls and rises, and has rings of frequencies without any variance."""
    spectrum = natural_spectrum(height, width)
    spectrum *= np.random.default_rng(0).uniform(0.02, 2.0, spectrum.shape)
    spectrum[rings(height, width) == 4] = 0.0
    spectrum[rings(height, width) > 9] = 0.0
    return spectrum


@dataclasses.dataclass(frozen=True)
class GaussianData:
    """x0 ~ N(mean, spectrum), diagonal in the DCT basis; method section 7."""

    mean: np.ndarray  # [*spatial, C]
    spectrum: np.ndarray  # [*spatial, C]

    def draw(self, rng, count):
        noise = rng.standard_normal((count, *self.mean.shape))
        return self.mean + idct(np.sqrt(self.spectrum) * noise)

    def marginal(self, alpha, beta):
        """Mean and variance of the DCT coefficients of a forward state; levels numbers or [B]."""
        m = transfer(alpha, *self.mean.shape[:-1])
        beta = np.asarray(beta, np.float64)
        beta = beta.reshape(beta.shape + (1,) * self.mean.ndim)
        return m * dct(self.mean[None])[0], m**2 * self.spectrum + beta**2

    def posterior_means(self, x, alpha, beta):
        """(D, R) at states x [B, *spatial, C]: E[B x0 | x] and E[(I - B) x0 | x]."""
        m = transfer(alpha, *self.mean.shape[:-1])
        mean, variance = self.marginal(alpha, beta)
        clean = dct(self.mean[None]) + m * self.spectrum / variance * (dct(x) - mean)
        return idct(m * clean), idct((1 - m) * clean)

    def posterior_variance(self, alpha, beta):
        """Variance of each DCT coefficient of x0 given x."""
        return self.spectrum * np.square(beta) / self.marginal(alpha, beta)[1]

    def flow(self, x, start, end):
        """The probability flow's state at level `end` from x at `start`, levels (alpha, beta)."""
        mean, variance = self.marginal(*start)
        mean_end, variance_end = self.marginal(*end)
        return idct(mean_end + (dct(x) - mean) * np.sqrt(variance_end / variance))


def gaussian_data(*shape, seed=0):
    """Gaussian data [*spatial, C] with a mean that is not zero, a natural spectrum per channel."""
    mean = np.random.default_rng(seed).uniform(-0.8, 0.8, shape)
    return GaussianData(mean, natural_spectrum(*shape[:-1], channels=shape[-1]))


def edm_times(t_min, t_max, num_steps, rho):
    """EDM (arXiv 2206.00364), eq. (5), then 0."""
    times = []
    for i in range(num_steps):
        root = t_max ** (1 / rho)
        if num_steps > 1:
            root += i / (num_steps - 1) * (t_min ** (1 / rho) - t_max ** (1 / rho))
        times.append(root**rho)
    return np.array([*times, 0.0])


def difference_step(x, blurry, residual, start, end):
    """Method section 3: x' = x + [B' - B](D + R) + (beta' / beta - 1)(x - D)."""
    clean = blurry + residual
    change = blur(clean, end[0]) - blur(clean, start[0])
    return x + change + (end[1] / start[1] - 1) * (x - blurry)


def solve(solver, heads, x, levels):
    """Method section 3 from x at levels[0] to levels[-1], maybe (0, 0); heads(x, *level) = D, R."""
    previous, previous_step = None, None
    for start, end in itertools.pairwise(levels):
        last = end[1] == 0
        blurry, residual = heads(x, *start)
        moved = difference_step(x, blurry, residual, start, end)
        if solver == "heun" and not last:
            blurry_end, residual_end = heads(moved, *end)
            clean = blurry_end + residual_end
            second = blur(clean, end[0]) - blur(clean, start[0])
            second += (end[1] - start[1]) / end[1] * (moved - blurry_end)
            moved = x + ((moved - x) + second) / 2
        if solver == "multistep" and not last:
            clean, step = blurry + residual, np.log(start[1] / end[1])
            if previous is not None:
                ahead = (clean - previous) / (2 * previous_step / step)
                moved = moved + blur(ahead, end[0]) - end[1] / start[1] * blur(ahead, start[0])
            previous, previous_step = clean, step
        x = moved
    return x


def edm_sampler(denoise, x, t, churn=0.0, low=0.0, high=np.inf):
    """EDM, Algorithm 2 with S_noise = 0, without churn Algorithm 1; denoise(x, sigma) = D."""
    num_steps = len(t) - 1
    for i in range(num_steps):
        gamma = min(churn / num_steps, np.sqrt(2) - 1) if low <= t[i] <= high else 0.0
        t_hat = t[i] + gamma * t[i]
        d = (x - denoise(x, t_hat)) / t_hat
        x_next = x + (t[i + 1] - t_hat) * d
        if t[i + 1] != 0:
            d_next = (x_next - denoise(x_next, t[i + 1])) / t[i + 1]
            x_next = x + (t[i + 1] - t_hat) * (d / 2 + d_next / 2)
        x = x_next
    return x


def dpm_solver_2m(denoise, x, t):
    """DPM-Solver++(2M) (arXiv 2211.01095, Algorithm 2), alpha_t = 1, sigma_t = t, denoise = x0.

    x' = (t' / t) x - (e^-h - 1) D with D = (1 + 1 / 2r) x0 - 1 / 2r x0_previous, h = ln(t / t'),
    r = h_previous / h; D = x0 in the first step and the last one, to 0.
    """
    previous = None
    for i in range(len(t) - 1):
        clean = ahead = denoise(x, t[i])
        if previous is not None and t[i + 1] > 0:
            r = np.log(t[i - 1] / t[i]) / np.log(t[i] / t[i + 1])
            ahead = (1 + 1 / (2 * r)) * clean - 1 / (2 * r) * previous
        x, previous = t[i + 1] / t[i] * x - (t[i + 1] / t[i] - 1) * ahead, clean
    return x


def within_standard_errors(samples, mean=None, variance=None, errors=5.0):
    """Asserts mean and variance of normal samples [N, ...], each within `errors` standard errors.

    Of N normal samples the mean has the standard error sqrt(variance / N), the variance
    variance * sqrt(2 / (N - 1)).
    """
    count = len(samples)
    if mean is not None:
        scale = np.sqrt(np.var(samples, axis=0, ddof=1) / count)
        deviation = np.abs(np.mean(samples, axis=0) - mean) / scale
        np.testing.assert_array_less(deviation, errors)
    if variance is not None:
        deviation = np.abs(np.var(samples, axis=0, ddof=1) / variance - 1)
        np.testing.assert_array_less(deviation, errors * np.sqrt(2 / (count - 1)))
