"""Makes a network a denoiser: preconditioning and parameterizations.

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
    (5)  score    D = c_skip x + c_out F,     D + R = D / max(m, 1e-3) per frequency   one head

At alpha = 0 all are EDM exactly (rho(0) = 0, B = I). The paper does not say R's scale without skip,
c in (4), the floor in (5) and c_blur: they are ours. (Blurring Diffusion, arXiv 2209.05557, has
another floor, (1 - 0.001) m + 0.001, in its forward process.) A plain c_out in (4) would vanish
with beta and leave the network unable to restore what a strong blur at little noise took away.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from warm_diffusion import dct as _dct

# Images that the network returns per image, by parameterization.
PARAMETERIZATIONS = {"divide": 2, "clean": 1, "score": 1}
_MIN_TRANSFER = 1e-3  # the floor for undoing the blur, eq. (5)


class Prediction(NamedTuple):
    """Posterior means of both parts of the clean image, each [B, *spatial, C].

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


# (x [B, *spatial, C], alpha, beta): levels are scalars or [B].
Denoiser = Callable[[jax.Array, ArrayLike, ArrayLike], Prediction]
Network = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]  # (x, c_noise, c_blur)


def _predict(denoise: Denoiser, x: jax.Array, alpha: ArrayLike, beta: ArrayLike) -> Prediction:
    """Returns a denoiser's prediction in the type of x; ValueError if it is no Prediction."""
    return _checked(denoise(x, alpha, beta), x)


def _checked(value: object, x: jax.Array) -> Prediction:
    if not isinstance(value, Prediction):
        got = f"an array {value.shape}" if hasattr(value, "shape") else type(value).__name__
        raise ValueError(
            f"denoise must return a denoiser.Prediction, got {got}: if it is a network, "
            "wrap the network: denoiser.precondition(network)"
        )
    return Prediction(*(jnp.asarray(part).astype(x.dtype) for part in value))


def _removed_share(alpha: jax.Array, *sizes: int) -> jax.Array:
    """rho(alpha), eq. (4): sum (1 - m)^2 / lambda over sum 1 / lambda, without DC; alpha [B]."""
    eigen = _dct._eigenvalues(*sizes).reshape(1, -1)[:, 1:]
    if eigen.size == 0:  # a single pixel has nothing to blur
        return jnp.zeros_like(alpha)
    weight = jnp.asarray(1 / eigen / np.sum(1 / eigen), alpha.dtype)
    removed = jnp.expm1(-jnp.asarray(eigen, alpha.dtype) * alpha[:, None] ** 2 / 2) ** 2
    return jnp.sum(removed * weight, axis=-1)


def precondition(
    network: Network, *, sigma_data: float = 0.5, parameterization: str = "divide"
) -> Denoiser:
    """Wraps a raw network as a denoiser, eqs. (2)-(5).

    Args:
      network: (x [B, *spatial, C], c_noise [B], c_blur [B]) -> [B, *spatial, 2C]; `clean` and
        `score`: C.
      sigma_data: standard deviation of the data, in units of the data. The denoiser carries it as
        an attribute, so that the loss finds it there.
      parameterization: what the network's output means: divide, clean or score.

    Returns:
      (x [B, *spatial, C], alpha, beta) -> Prediction in the type of x; alpha and beta scalars or
      [B], beta > 0.

    Raises:
      ValueError: an unknown parameterization; at the call, wrong shapes in or out of the network.

    Example:
      A network of zeros leaves EDM's skip: s^2 / (beta^2 + s^2) of x, here 1 / (3 + 1).

      >>> zeros = lambda x, c_noise, c_blur: jnp.zeros((*x.shape[:-1], 2 * x.shape[-1]))
      >>> denoise = denoiser.precondition(zeros, sigma_data=1.0)
      >>> prediction = denoise(jnp.ones((1, 4, 4, 1)), alpha=0.0, beta=3**0.5)
      >>> round(float(prediction.blurry[0, 0, 0, 0]), 4)
      0.25
    """
    if parameterization not in PARAMETERIZATIONS:
        raise ValueError(
            f"parameterization must be one of {', '.join(PARAMETERIZATIONS)}, "
            f"got {parameterization!r}"
        )

    if not isinstance(sigma_data, jax.core.Tracer) and not sigma_data > 0:
        raise ValueError(f"sigma_data must be > 0, got {sigma_data}")

    def denoise(x: jax.Array, alpha: ArrayLike, beta: ArrayLike) -> Prediction:
        given = _dct._array(x)
        x, channels = _dct._wide(given), given.shape[-1]
        alpha, beta = (_dct._per_image(level, x) for level in (alpha, beta))
        scale = jnp.sqrt(beta**2 + sigma_data**2)
        c_skip, c_out, c_in = (sigma_data / scale) ** 2, beta * sigma_data / scale, 1 / scale
        raw = network(_dct._level(c_in, x) * x, jnp.log(beta) / 4, jnp.log1p(alpha) / 4)
        _check_raw(raw, (*x.shape[:-1], PARAMETERIZATIONS[parameterization] * channels), x.shape)
        raw = raw.astype(x.dtype)  # a bfloat16 network is bfloat16 only inside
        skip = _dct._level(c_skip, x) * x
        if parameterization == "clean":
            share = _removed_share(alpha, *x.shape[1:-1])
            c_clean = jnp.sqrt(c_out**2 + sigma_data**2 * share)
            clean = skip + _dct._level(c_clean, x) * raw
            blurry = _dct._blur(clean, alpha)
            residual = clean - blurry
        else:
            blurry = skip + _dct._level(c_out, x) * raw[..., :channels]
            if parameterization == "divide":
                residual = sigma_data * raw[..., channels:]
            else:
                undo = 1 / jnp.maximum(_dct._transfer_like(alpha, x), _MIN_TRANSFER)
                residual = _dct._idct((undo - 1) * _dct._dct(blurry))
        return Prediction(blurry.astype(given.dtype), residual.astype(given.dtype))

    denoise.sigma_data = sigma_data
    return denoise


def _check_raw(raw: object, expected: tuple[int, ...], shape: tuple[int, ...]) -> None:
    """Raises ValueError unless a network returned one array of the expected shape."""
    if isinstance(raw, tuple | list | dict):
        raise ValueError(
            f"the network must return one array {expected}, got a {type(raw).__name__}: if it "
            "returns state beside its output, keep the state outside, for example "
            "`out, state = apply(...); states.append(state); return out`, and return states[0] "
            "from the loss by jax.value_and_grad(..., has_aux=True)"
        )
    if (found := getattr(raw, "shape", type(raw).__name__)) != expected:
        hint = ""
        if len(shape) == 3:
            hint = (
                "; three axes are signals [B, L, C]: grey images [B, H, W] are x[..., None], one "
                "image [H, W, C] is x[None]"
            )
        elif len(shape) == 4 and shape[1] < shape[2] == shape[3]:
            hint = "; if the data are [B, C, H, W], x.transpose(0, 2, 3, 1) has channels last"
        raise ValueError(f"the network must return {expected} for data {shape}, got {found}{hint}")


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
