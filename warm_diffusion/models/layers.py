"""The layers of the U-Net (`unet.py`): group norm with SiLU, convolution with resampling.

Norms compute in float32, convolutions in their `dtype`. Gradients of weights come out in float32
all the same; those of kernels are rounded to bfloat16 before on NVIDIA's GPUs.
"""

import functools
import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

_MAX_GROUPS, _MIN_GROUP_SIZE, _NORM_EPS = 32, 4, 1e-6


@functools.partial(
    jax.checkpoint, static_argnums=(3, 4), policy=jax.checkpoint_policies.save_only_these_names("n")
)
def _normalise(x: jax.Array, scale: jax.Array, bias: jax.Array, groups: int, activate: bool):
    """Group norm in float32, then SiLU if asked, in the type of x.

    What the gradient needs is recomputed from x: kept, it would be several float32 arrays for
    one of x's type, and a training step's time is that of moving such arrays.
    """
    batch, channels = x.shape[0], x.shape[-1]
    values = x.astype(jnp.float32)

    def mean(values):  # over positions first, which leaves little to regroup
        each = values.mean(axis=(1, 2)).reshape(batch, groups, -1).mean(axis=-1)
        return jnp.repeat(each, channels // groups, axis=-1)[:, None, None]

    centre = checkpoint_name(mean(values), "n")
    # The fast variance E[x^2] - E[x]^2 can turn negative where the mean is large.
    variance = checkpoint_name(mean((values - centre) ** 2), "n")
    scale, bias = scale[None, None, None], bias[None, None, None]
    values = (values - centre) * (scale * jax.lax.rsqrt(variance + _NORM_EPS)) + bias
    return (nn.silu(values) if activate else values).astype(x.dtype)


class Norm(nn.Module):
    """Group norm with EDM's number of groups, and SiLU after it unless `activate` is off."""

    activate: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        # EDM's number wherever that divides the channels, else the next that does.
        groups = math.gcd(channels, max(1, min(_MAX_GROUPS, channels // _MIN_GROUP_SIZE)))
        scale = self.param("scale", nn.initializers.ones_init(), (channels,))
        bias = self.param("bias", nn.initializers.zeros_init(), (channels,))
        return _normalise(x, scale, bias, groups, self.activate)


def scaled_init(gain: float) -> nn.initializers.Initializer:
    """Xavier uniform times `gain`; 0 for layers that start switched off."""
    if gain == 0:
        return nn.initializers.zeros_init()
    return nn.initializers.variance_scaling(gain**2, "fan_avg", "uniform")


def _resample(x: jax.Array, taps: Sequence[int], direction: str, padding: int) -> jax.Array:
    """Halves or doubles height and width by the separable low-pass filter `taps`."""
    batch, height, width, channels = x.shape
    if tuple(taps) == (1, 1) and padding == 0:  # the same as below, without a depthwise convolution
        if direction == "down":
            return x.reshape(batch, height // 2, 2, width // 2, 2, channels).mean(axis=(2, 4))
        return x.repeat(2, axis=1).repeat(2, axis=2)
    kernel = np.outer(taps, taps) / np.sum(taps) ** 2
    if direction == "up":
        kernel, padding = 4 * kernel, len(taps) - 1 - padding
    return jax.lax.conv_general_dilated(
        x,
        jnp.tile(jnp.asarray(kernel, x.dtype)[:, :, None, None], (1, 1, 1, channels)),
        window_strides=(2, 2) if direction == "down" else (1, 1),
        padding=[(padding, padding)] * 2,
        lhs_dilation=(2, 2) if direction == "up" else (1, 1),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=channels,
    )


def _convolve(x: jax.Array, kernel: jax.Array, padding: int) -> jax.Array:
    """Convolution in the type of x."""
    return jax.lax.conv_general_dilated(
        x,
        kernel.astype(x.dtype),
        window_strides=(1, 1),
        padding=[(padding, padding)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


# JAX's own rule puts the kernel's gradient out in bfloat16, which a TPU then adds up over the chips
# in bfloat16: of hundreds of addends the last ones are lost. This one keeps the accumulator's
# float32; it allows no forward mode, so it is for training only. cuDNN has no product of bfloat16
# with a float32 result: XLA makes both factors float32 (on an H200 118 of the 270 ms that a step of
# CIFAR-10's network took). There each device rounds its accumulator, float32 as well, to bfloat16,
# and several add up in bfloat16.
@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _convolve_in_training(x: jax.Array, kernel: jax.Array, padding: int) -> jax.Array:
    return _convolve(x, kernel, padding)


def _backward(padding: int, saved: tuple, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    (of_x,) = jax.vjp(lambda x: _convolve(x, kernel, padding), x)[1](gradient)

    def sums(x, gradient, dtype):
        return jax.lax.conv_general_dilated(
            x,
            gradient,
            window_strides=(1, 1),
            padding=[(padding, padding)] * 2,
            dimension_numbers=("CHWN", "IHWO", "HWNC"),  # sums over images and positions
            preferred_element_type=dtype,
        ).astype(kernel.dtype)

    exact = functools.partial(sums, dtype=kernel.dtype)
    rounded = functools.partial(sums, dtype=x.dtype)
    of_kernel = jax.lax.platform_dependent(x, gradient, cuda=rounded, default=exact)
    return of_x, of_kernel


_convolve_in_training.defvjp(lambda *of: (_convolve(*of), of[:2]), _backward)


class Conv(nn.Module):
    """Convolution with optional resampling first; features 0 only resamples.

    `fused_down` filters after the convolution instead, with all padding before it. `train` allows
    no forward-mode derivative.
    """

    features: int
    kernel_size: int = 3
    resample: str = ""  # up, down or empty
    taps: Sequence[int] = (1, 1)
    fused_down: bool = False
    gain: float = 1.0
    dtype: jnp.dtype = jnp.float32
    train: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.astype(self.dtype)
        filter_padding = (len(self.taps) - 1) // 2
        conv_padding = self.kernel_size // 2 + (filter_padding if self.fused_down else 0)
        if self.resample and not self.fused_down:
            x = _resample(x, self.taps, self.resample, filter_padding)
        if self.features == 0:
            return x
        kernel_shape = (self.kernel_size, self.kernel_size, x.shape[-1], self.features)
        kernel = self.param("kernel", scaled_init(self.gain), kernel_shape)
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,))
        own_rule = self.train and x.dtype != kernel.dtype
        x = (_convolve_in_training if own_rule else _convolve)(x, kernel, conv_padding)
        if self.fused_down:
            x = _resample(x, self.taps, "down", 0)
        return (x + bias.reshape(1, 1, 1, -1)).astype(self.dtype)
