"""A network for images of any size, in the memory of one tile.

The network is called with images padded by reflection (d c b a | a b c d, the border rule of the
DCT and so of the blur) to the multiple that it can halve, and beyond a size in overlapping tiles,
one after the other. Only the network is: what `denoiser.precondition` does in the DCT basis is done
to the whole image, so tiles have no borders there. With p pixels from the border of a tile, m the
margin that is not used and n the overlap,

    (1)  weight      = sin^2(pi / 2 clip((p + 1/2 - m) / (n - 2 m), 0, 1)),   m = n / 4

towards a neighbour, 1 towards the border of the image, divided by the sum over the tiles.
"""

import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np


def _tiles(length: int, tile: int, overlap: int, multiple: int) -> tuple[np.ndarray, np.ndarray]:
    """Starts [n] of the tiles along an axis, and the weights [n, tile] of eq. (1), which sum to 1.

    Starts are multiples, so that tiles are halved where the whole image would be.
    """
    if length <= tile:
        return np.zeros(1, int), np.ones((1, length))
    count = -(-(length - overlap) // (tile - overlap))
    starts = np.arange(count) * (length - tile) // (count - 1) // multiple * multiple
    margin = overlap // 4
    rise = (np.arange(tile) + 0.5 - margin) / (overlap - 2 * margin)
    rise = np.sin(np.pi / 2 * np.clip(rise, 0, 1)) ** 2
    weights = np.ones((count, tile))
    weights[1:] *= rise
    weights[:-1] *= rise[::-1]
    total = np.zeros(length)
    for start, weight in zip(starts, weights, strict=True):
        total[start : start + tile] += weight
    return starts, np.stack(
        [w / total[start : start + tile] for start, w in zip(starts, weights, strict=True)]
    )


def at_any_size(
    network: Callable[..., jax.Array], *, multiple: int = 1, tile: int = 128, overlap: int = 32
) -> Callable[..., jax.Array]:
    """A network for images of any height and width, in the memory of one tile.

    Args:
      network: (x [B, H, W, C], more [B]...) -> [B, H, W, C'], for H and W that are multiples.
      multiple: what it needs height and width to be divisible by.
      tile: largest height and width that it is called with, a multiple.
      overlap: of neighbouring tiles at least, a multiple below `tile`.

    Returns:
      The same for any H and W: padded by reflection, and above `tile` evaluated in tiles that are
      blended by eq. (1). Called once for images up to `tile`.

    Raises:
      ValueError: a tile or an overlap that does not fit.

    Example:
      What a network does to each pixel alone, tiles do as well.

      >>> double = at_any_size(lambda x: 2 * x, multiple=2, tile=8, overlap=4)
      >>> x = np.arange(11 * 21.0).reshape(1, 11, 21, 1)
      >>> bool(jnp.allclose(double(x), 2 * x))
      True
    """
    if not 0 < overlap < tile or tile % multiple or overlap % multiple:
        raise ValueError(
            f"expected 0 < overlap < tile, both divisible by {multiple}, got {overlap} and {tile}"
        )

    def apply(x: jax.Array, *more: jax.Array) -> jax.Array:
        height, width = x.shape[1:3]
        padding = [(0, -size % multiple) for size in (height, width)]
        x = jnp.pad(x, [(0, 0), *padding, (0, 0)], "symmetric") if any(map(any, padding)) else x
        if max(x.shape[1:3]) <= tile:
            return network(x, *more)[:, :height, :width]
        return _blended(network, x, more, tile, overlap, multiple)[:, :height, :width]

    return apply


def _blended(network, x: jax.Array, more: tuple, tile: int, overlap: int, multiple: int):
    """The network on tiles, one after the other, each at the same place of all images."""
    (tops, down), (lefts, across) = (_tiles(size, tile, overlap, multiple) for size in x.shape[1:3])
    shape = (len(x), down.shape[1], across.shape[1], x.shape[3])
    places = np.array(list(itertools.product(range(len(tops)), range(len(lefts)))))
    tops, lefts, down, across = (jnp.asarray(a) for a in (tops, lefts, down, across))

    def at(place):
        row, column = place
        zero = jnp.zeros_like(tops[row])
        start = (zero, tops[row], lefts[column], zero)
        out = network(jax.lax.dynamic_slice(x, start, shape), *more)
        weight = down[row][None, :, None, None] * across[column][None, None, :, None]
        return start, out * weight.astype(out.dtype)

    def add(total, place):
        start, out = at(place)
        before = jax.lax.dynamic_slice(total, start, out.shape)
        return jax.lax.dynamic_update_slice(total, before + out, start), None

    like = jax.eval_shape(at, places[0])[1]
    total = jnp.zeros((*x.shape[:3], like.shape[3]), like.dtype)
    return jax.lax.scan(add, total, places)[0]
