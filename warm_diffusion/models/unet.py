"""The DDPM++ / NCSN++ U-Net (Song et al. 2021, arXiv 2011.13456), as EDM configures it, two-headed.

EDM (arXiv 2206.00364, appendix F.1, tables 6-8) describes both networks. What the paper's divide
and conquer adds: twice the output channels (denoiser first, deblurrer second), and a second
conditioning input for the blur level, through an embedding of its own whose last layer starts at
zero. So with one head, or at initialisation, the network is EDM's.

Layers carry EDM's names (`enc_32x32_block0`, ...), which makes its weights loadable
(`edm.py`). Norms and softmax are always float32; `dtype` is that of the convolutions.
"""

import functools
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from warm_diffusion.models.layers import Conv, Norm, scaled_init

_SKIP_SCALE = 0.5**0.5  # keeps the variance of the sum of two branches


class Block(nn.Module):
    """Residual block conditioned on an embedding, with self-attention if asked."""

    features: int
    resample: str = ""
    attention: bool = False
    dropout: float = 0.0
    taps: Sequence[int] = (1, 1)
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, embedding: jax.Array, train: bool) -> jax.Array:
        def conv(name: str, **options) -> Conv:
            shared = dict(taps=self.taps, dtype=self.dtype, train=train)
            return Conv(self.features, name=name, **shared, **options)

        skip = x
        if self.resample or x.shape[-1] != self.features:
            skip = conv("skip", kernel_size=1, resample=self.resample)(x)
        x = conv("conv0", resample=self.resample)(Norm(name="norm0")(x))
        shift = nn.Dense(self.features, kernel_init=scaled_init(1.0), name="affine")(embedding)
        x = Norm(name="norm1")(x + shift[:, None, None].astype(self.dtype))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        x = (conv("conv1", gain=0.0)(x) + skip) * _SKIP_SCALE
        return self._attend(x, train) if self.attention else x

    def _attend(self, x: jax.Array, train: bool) -> jax.Array:
        batch, height, width, channels = x.shape
        shared = dict(kernel_size=1, dtype=self.dtype, train=train)
        qkv = Conv(3 * channels, gain=0.2**0.5, name="qkv", **shared)
        # EDM interleaves the three: output channel 3 c + (0, 1, 2) is query, key, value of c.
        qkv = qkv(Norm(False, name="norm2")(x)).reshape(batch, height * width, channels, 3)
        query, key, value = (qkv[..., i] for i in range(3))
        logits = jnp.einsum(
            "bqc,bkc->bqk", query, key / channels**0.5, preferred_element_type=jnp.float32
        )
        weights = nn.softmax(logits, axis=-1).astype(self.dtype)
        mixed = jnp.einsum("bqk,bkc->bqc", weights, value).reshape(x.shape)
        project = Conv(channels, gain=0.0, name="proj", **shared)
        return (x + project(mixed)) * _SKIP_SCALE


def _positional_embedding(level: jax.Array, size: int) -> jax.Array:
    """Sines, then cosines of `level` [B] at `size` / 2 frequencies from 1 down to 1e-4."""
    half = size // 2
    frequencies = 1e-4 ** (np.arange(half) / (half - 1))
    angles = level[:, None] * jnp.asarray(frequencies, level.dtype)[None]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1)


class UNet(nn.Module):
    """U-Net with `heads` images out for one image in; see `ddpmpp` and `ncsnpp`.

    Called with x [B, H, W, C], c_noise [B], c_blur [B]; returns float32 [B, H, W, heads * C]. H and
    W may differ; both must be divisible by `factor`.
    """

    resolution: int
    channels: int
    model_channels: int = 128
    channel_mult: Sequence[int] = (2, 2, 2)
    num_blocks: int = 4
    attention_resolutions: Sequence[int] = (16,)
    dropout: float = 0.13
    num_classes: int = 0
    label_dropout: float = 0.0
    augment_dim: int = 0
    heads: int = 2
    fourier_embedding: bool = False
    residual_encoder: bool = False
    taps: Sequence[int] = (1, 1)
    remat: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        c_noise: jax.Array,
        c_blur: jax.Array,
        labels: jax.Array | None = None,
        augment_labels: jax.Array | None = None,
        train: bool = False,
    ) -> jax.Array:
        if x.ndim != 4 or x.shape[3] != self.channels:
            raise ValueError(f"expected images [B, H, W, {self.channels}], got {x.shape}")
        self.check_size(*x.shape[1:3])
        if labels is not None and self.num_classes == 0:
            raise ValueError("labels were passed to a network with num_classes=0")
        embedding = self._embed(c_noise, c_blur, labels, augment_labels, train)
        x, skips = self._encode(x, embedding, train)
        return self._decode(x, skips, embedding, train)

    @property
    def factor(self) -> int:
        """The number 2^(levels - 1) that must divide height and width."""
        return 2 ** (len(self.channel_mult) - 1)

    def check_size(self, height: int, width: int) -> None:
        """Raises ValueError unless the levels can halve such images."""
        if height % self.factor or width % self.factor:
            levels = len(self.channel_mult)
            raise ValueError(
                f"{levels} levels halve an image {levels - 1} times: "
                f"height and width must be divisible by {self.factor}, got {height}x{width}; "
                "shorten channel_mult or resize the data"
            )

    def _embed(
        self,
        c_noise: jax.Array,
        c_blur: jax.Array,
        labels: jax.Array | None,
        augment_labels: jax.Array | None,
        train: bool,
    ) -> jax.Array:
        size = self.model_channels * (2 if self.fourier_embedding else 1)
        if self.fourier_embedding:
            frequencies = self.param("frequencies", nn.initializers.normal(16.0), (size // 2,))
            angles = 2 * jnp.pi * c_noise[:, None] * jax.lax.stop_gradient(frequencies)[None]
            embedding = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1)
        else:
            embedding = _positional_embedding(c_noise, size)

        def dense(name: str, features: int, gain: float = 1.0, use_bias: bool = True) -> nn.Dense:
            return nn.Dense(features, use_bias, kernel_init=scaled_init(gain), name=name)

        blur = nn.silu(dense("blur0", size)(_positional_embedding(c_blur, size)))
        embedding = embedding + dense("blur1", size, gain=0.0)(blur)
        if self.num_classes:
            one_hot = jnp.zeros((c_noise.shape[0], self.num_classes))
            if labels is not None:  # a label of -1 is "no class", like no labels at all
                one_hot = jax.nn.one_hot(labels, self.num_classes)
            if train and self.label_dropout:
                keep = jax.random.uniform(self.make_rng("dropout"), (c_noise.shape[0], 1))
                one_hot = one_hot * (keep >= self.label_dropout)
            embedding = embedding + dense("map_label", size)(one_hot * self.num_classes**0.5)
        if self.augment_dim:
            if augment_labels is None:
                augment_labels = jnp.zeros((c_noise.shape[0], self.augment_dim))
            embedding = embedding + dense("map_augment", size, use_bias=False)(augment_labels)
        width = 4 * self.model_channels
        embedding = nn.silu(dense("map_layer0", width)(embedding))
        return nn.silu(dense("map_layer1", width)(embedding))

    def _block(self, name: str, features: int, **options) -> Block:
        shared = dict(dropout=self.dropout, taps=self.taps, dtype=self.dtype)
        # `train`, argument 3, is a Python bool.
        block = nn.remat(Block, static_argnums=(3,)) if self.remat else Block
        return block(features, name=name, **shared, **options)

    def _levels(self) -> list[tuple[int, str, int, bool]]:
        """(level, name of its resolution, features, attention) from fine to coarse."""
        sizes = [self.resolution >> level for level in range(len(self.channel_mult))]
        return [
            (
                level,
                f"{size}x{size}",
                self.model_channels * mult,
                size in self.attention_resolutions,
            )
            for level, (size, mult) in enumerate(zip(sizes, self.channel_mult, strict=True))
        ]

    def _encode(
        self, x: jax.Array, embedding: jax.Array, train: bool
    ) -> tuple[jax.Array, list[jax.Array]]:
        skips, auxiliary = [], x
        conv = functools.partial(Conv, dtype=self.dtype, train=train)
        for level, size, features, attention in self._levels():
            if level == 0:
                x = conv(self.model_channels, name=f"enc_{size}_conv")(x)
            else:
                down = self._block(f"enc_{size}_down", x.shape[-1], resample="down")
                x = down(x, embedding, train)
                if self.residual_encoder:
                    project = conv(
                        x.shape[-1], resample="down", taps=self.taps, fused_down=True,
                        name=f"enc_{size}_aux_residual",
                    )  # fmt: skip
                    x = auxiliary = (x + project(auxiliary)) * _SKIP_SCALE
            skips.append(x)
            for index in range(self.num_blocks):
                block = self._block(f"enc_{size}_block{index}", features, attention=attention)
                x = block(x, embedding, train)
                skips.append(x)
        return x, skips

    def _decode(
        self, x: jax.Array, skips: list[jax.Array], embedding: jax.Array, train: bool
    ) -> jax.Array:
        for level, size, features, attention in reversed(self._levels()):
            if level == len(self.channel_mult) - 1:
                x = self._block(f"dec_{size}_in0", x.shape[-1], attention=True)(x, embedding, train)
                x = self._block(f"dec_{size}_in1", x.shape[-1])(x, embedding, train)
            else:
                up = self._block(f"dec_{size}_up", x.shape[-1], resample="up")
                x = up(x, embedding, train)
            for index in range(self.num_blocks + 1):
                attend = attention and index == self.num_blocks
                x = jnp.concatenate([x, skips.pop()], axis=-1)
                block = self._block(f"dec_{size}_block{index}", features, attention=attend)
                x = block(x, embedding, train)
        x = Norm(name=f"dec_{size}_aux_norm")(x)
        conv = functools.partial(Conv, dtype=self.dtype, train=train)
        out = conv(self.heads * self.channels, gain=0.0, name=f"dec_{size}_aux_conv")
        return out(x).astype(jnp.float32)


def ddpmpp(
    resolution: int = 32,
    channels: int = 3,
    model_channels: int = 128,
    channel_mult: Sequence[int] = (2, 2, 2),
    num_blocks: int = 4,
    attention_resolutions: Sequence[int] = (16,),
    dropout: float = 0.13,
    num_classes: int = 0,
    augment_dim: int = 9,
    *,
    heads: int = 2,
    label_dropout: float = 0.0,
    remat: bool = False,
    dtype: jnp.dtype = jnp.float32,
) -> UNet:
    """DDPM++ as in EDM, table 7 (the paper's CIFAR-10 network by default).

    Args:
      resolution: height of the images, which names the levels and places the attention.
      channels: channels of the images.
      model_channels: base width.
      channel_mult: width of each level, in multiples of `model_channels`, fine to coarse.
      num_blocks: residual blocks a level (one more in the decoder).
      attention_resolutions: sizes at which blocks attend; the coarsest level always does once.
      dropout: dropout probability in training.
      num_classes: number of class labels, 0 for none.
      augment_dim: size of the augmentation conditioning, 0 for none.
      heads: images out per image in; 2 for `divide`, else 1 (`denoiser.PARAMETERIZATIONS`).
      label_dropout: probability of training without the label (classifier-free guidance).
      remat: recompute each block for its gradient instead of keeping what it computed: less
        memory, about a third more work.
      dtype: of the convolutions; parameters, norms and softmax stay float32.
    """
    return UNet(
        resolution=resolution,
        channels=channels,
        model_channels=model_channels,
        channel_mult=tuple(channel_mult),
        num_blocks=num_blocks,
        attention_resolutions=tuple(attention_resolutions),
        dropout=dropout,
        num_classes=num_classes,
        augment_dim=augment_dim,
        heads=heads,
        label_dropout=label_dropout,
        remat=remat,
        dtype=dtype,
    )


def ncsnpp(*args, **options) -> UNet:
    """NCSN++ as in EDM, table 7: `ddpmpp` with other parts, same arguments.

    They are the Fourier embedding of the noise level, the residual encoder and the filter
    [1, 3, 3, 1].
    """
    return ddpmpp(*args, **options).clone(
        fourier_embedding=True, residual_encoder=True, taps=(1, 3, 3, 1)
    )
