"""From a network to a denoiser: preconditioning and parameterizations.

A denoiser maps (x, alpha, beta) to the posterior means of the blurry clean image and of the
residual that the blur removed (Warm Diffusion's divide and conquer, sec. 3.2):

    (1)  D(x; alpha, beta) ~ E[B(alpha) x0 | x],    R(x; alpha, beta) ~ E[(I - B(alpha)) x0 | x]

With F the network, s = sigma_data and EDM's factors (arXiv 2206.00364, table 1)

    (2)  c_skip = s^2 / (beta^2 + s^2),  c_out = beta s / sqrt(beta^2 + s^2),
         c_in = 1 / sqrt(beta^2 + s^2),  c_noise = ln(beta) / 4,   and  c_blur = log1p(alpha) / 4

the parameterizations, compared in the paper's table 5, are

    (3)  divide   D = c_skip x + c_out F_D,   R = s F_R                      two heads, the default
    (4)  clean    x0_hat = c_skip x + c F,    D = B x0_hat,  R = x0_hat - D  one head
         with c^2 = c_out^2 + s^2 rho(alpha), rho the share of a 1/f^2 image that the blur removes
    (5)  score    D = c_skip x + c_out F,     D + R = D / max(m, 1e-3) per frequency   one head;
         the floor is Blurring Diffusion's (arXiv 2209.05557)

An experiment, with the data's spectrum S_k = E[dct(x0)_k^2] and v = m^2 S + beta^2 per frequency:

    (6)  spectral  D = (m^2 S / v) x + m c F_D,   R = ((1 - m) m S / v) x + (1 - m) c F_R
         with c = (S / v)^1/2 beta: the Wiener filter, and the network learns what is not linear

At alpha = 0 (3) to (5) are EDM exactly (rho(0) = 0, B = I). Differs from the paper (which does not
say): R's scale without skip, c in (4), and c_blur. A plain c_out in (4) would vanish with beta and
leave the network unable to restore what a strong blur at little noise took away.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from warm_diffusion import dct as _dct

PARAMETERIZATIONS = ("divide", "clean", "score")
_MIN_TRANSFER = 1e-3  # Blurring Diffusion's floor for undoing the blur, eq. (5)


class Prediction(NamedTuple):
    """Posterior means of both parts of the clean image, each [B, H, W, C].

    Example:
      >>> denoiser.Prediction(blurry=0.5, residual=0.25).clean
      0.75
    """

    blurry: jax.Array
    residual: jax.Array

    @property
    def clean(self) -> jax.Array:
        """Estimate of the clean image, D + R."""
        return self.blurry + self.residual


# (x [B, H, W, C], alpha, beta): levels are scalars while sampling, [B] in the loss.
Denoiser = Callable[[jax.Array, ArrayLike, ArrayLike], Prediction]
Network = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]  # (x, c_noise, c_blur)


def check_prediction(value: object) -> Prediction:
    """What a denoiser returned, if it is a Prediction.

    Raises:
      ValueError: it is something else, as from a raw network.

    Example:
      >>> denoiser.check_prediction(np.zeros((2, 8, 8, 6)))  # doctest: +ELLIPSIS
      Traceback (most recent call last):
      ValueError: denoise must return a denoiser.Prediction, got an array (2, 8, 8, 6): ...
    """
    if not isinstance(value, Prediction):
        got = f"an array {value.shape}" if hasattr(value, "shape") else type(value).__name__
        raise ValueError(
            f"denoise must return a denoiser.Prediction, got {got}: if it is a network, "
            "wrap the network: denoiser.precondition(network)"
        )
    return value


def num_heads(parameterization: str) -> int:
    """Images that the network puts out per image: 2 for `divide`, 1 for `clean` and `score`.

    Raises:
      ValueError: an unknown parameterization.

    Example:
      >>> denoiser.num_heads("divide")
      2
    """
    if parameterization not in PARAMETERIZATIONS:
        raise ValueError(
            f"parameterization must be one of {', '.join(PARAMETERIZATIONS)}, "
            f"got {parameterization!r}"
        )
    return 2 if parameterization == "divide" else 1


def removed_share(alpha: ArrayLike, height: int, width: int) -> jax.Array:
    """rho(alpha), eq. (4): sum (1 - m)^2 / lambda over sum 1 / lambda, without DC; alpha [...].

    Example:
      >>> [round(float(denoiser.removed_share(alpha, 8, 8)), 3) for alpha in (0.0, 100.0)]
      [0.0, 1.0]
    """
    eigen = _dct.eigenvalues(height, width).reshape(-1)[1:]
    if eigen.size == 0:  # a single pixel has nothing to blur
        return jnp.zeros_like(alpha)
    alpha = jnp.asarray(alpha)[..., None]
    eigen = eigen.reshape((1,) * (alpha.ndim - 1) + (-1,))
    removed = jnp.expm1(-eigen * alpha**2 / 2) ** 2
    return jnp.sum(removed / eigen, axis=-1) / jnp.sum(1 / eigen)


def _wiener(
    x: jax.Array, alpha: ArrayLike, beta: ArrayLike, raw: jax.Array, spectrum: ArrayLike
) -> Prediction:
    """Both heads by eq. (6): `raw` [B, H, W, 2C] in units of the error of the best linear one."""
    m = _dct.transfer_like(alpha, x)
    power = jnp.asarray(spectrum, x.dtype).reshape(1, *x.shape[1:3], 1)
    noise = _dct.expand_like(beta, x)
    variance = m**2 * power + noise**2
    skip, scale = m * power / variance * _dct.dct(x), jnp.sqrt(power / variance) * noise
    blurry, residual = (_dct.dct(part) for part in jnp.split(raw, 2, axis=-1))
    return Prediction(
        _dct.idct(m * (skip + scale * blurry)), _dct.idct((1 - m) * (skip + scale * residual))
    )


def precondition(
    network: Network,
    *,
    sigma_data: float = 0.5,
    parameterization: str = "divide",
    spectrum: ArrayLike | None = None,
) -> Denoiser:
    """Wraps a raw network as a denoiser, eqs. (2)-(6).

    Args:
      network: (x [B, H, W, C], c_noise [B], c_blur [B]) -> [B, H, W, 2C]; `clean` and `score`: C.
      sigma_data: standard deviation of the data, in units of the images.
      parameterization: what the network's output means: divide, clean or score.
      spectrum: mean square of each DCT coefficient of the data [H, W], >= 0, for eq. (6), which
        is of `divide` alone; None for EDM's factors.

    Returns:
      (x [B, H, W, C], alpha, beta) -> Prediction; alpha and beta scalars or [B], beta > 0.

    Raises:
      ValueError: an unknown parameterization, or one that (6) is not for; at the call, wrong shapes
        in or out of the network.

    Example:
      A network of zeros leaves EDM's skip: s^2 / (beta^2 + s^2) of x, here 1 / (3 + 1).

      >>> zeros = lambda x, c_noise, c_blur: jnp.zeros((*x.shape[:3], 2 * x.shape[3]))
      >>> denoise = denoiser.precondition(zeros, sigma_data=1.0)
      >>> prediction = denoise(jnp.ones((1, 4, 4, 1)), alpha=0.0, beta=3**0.5)
      >>> round(float(prediction.blurry[0, 0, 0, 0]), 4)
      0.25
    """
    heads = num_heads(parameterization)
    if spectrum is not None and parameterization != "divide":
        raise ValueError(
            f"spectral preconditioning is of parameterization 'divide', got {parameterization!r}"
        )

    def denoise(x: jax.Array, alpha: ArrayLike, beta: ArrayLike) -> Prediction:
        x = _dct.as_images(x)
        if spectrum is not None and jnp.shape(spectrum) != x.shape[1:3]:
            raise ValueError(
                f"a spectrum for images {x.shape} must be {x.shape[1:3]}, got {jnp.shape(spectrum)}"
            )
        shape = x.shape
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        alpha, beta = (
            jnp.broadcast_to(_dct.expand_like(level, x)[:, 0, 0, 0], shape[:1]).astype(x.dtype)
            for level in (alpha, beta)
        )
        scale = jnp.sqrt(beta**2 + sigma_data**2)
        c_skip, c_out, c_in = (sigma_data / scale) ** 2, beta * sigma_data / scale, 1 / scale
        raw = network(_dct.expand_like(c_in, x) * x, jnp.log(beta) / 4, jnp.log1p(alpha) / 4)
        if raw.shape != (*shape[:3], heads * shape[3]):
            raise ValueError(
                f"with parameterization {parameterization!r} the network must return "
                f"{(*shape[:3], heads * shape[3])} for images {shape}, got {raw.shape}"
            )
        raw = raw.astype(x.dtype)  # a bfloat16 network is bfloat16 only inside
        if spectrum is not None:
            return _wiener(x, alpha, beta, raw, spectrum)
        skip = _dct.expand_like(c_skip, x) * x
        if parameterization == "clean":
            c_clean = jnp.sqrt(c_out**2 + sigma_data**2 * removed_share(alpha, *shape[1:3]))
            clean = skip + _dct.expand_like(c_clean, x) * raw
            blurry = _dct.blur(clean, alpha)
            return Prediction(blurry, clean - blurry)
        blurry = skip + _dct.expand_like(c_out, x) * raw[..., : shape[3]]
        if parameterization == "divide":
            return Prediction(blurry, sigma_data * raw[..., shape[3] :])
        undo = 1 / jnp.maximum(_dct.transfer_like(alpha, x), _MIN_TRANSFER)
        return Prediction(blurry, _dct.idct((undo - 1) * _dct.dct(blurry)))

    return denoise


def guided(conditional: Denoiser, unconditional: Denoiser, weight: float) -> Denoiser:
    """Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598): both heads extrapolated.

    Args:
      conditional: a denoiser that knows the class.
      unconditional: the same, without.
      weight: 0 is unconditional, 1 conditional; above 1 exaggerates what the class adds.

    Returns:
      The denoiser u + weight (c - u), at two network calls each time.

    Example:
      1 + 2 * (4 - 1).

      >>> four, one = (lambda x, *_, c=c: denoiser.Prediction(c * x, x) for c in (4, 1))
      >>> float(denoiser.guided(four, one, 2)(jnp.ones(()), 0.0, 1.0).blurry)
      7.0
    """

    def denoise(x: jax.Array, alpha: ArrayLike, beta: ArrayLike) -> Prediction:
        with_class, without = conditional(x, alpha, beta), unconditional(x, alpha, beta)
        return Prediction(*(u + weight * (c - u) for c, u in zip(with_class, without, strict=True)))

    return denoise
