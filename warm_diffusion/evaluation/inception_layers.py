"""The layers of `inception`, as data: 94 convolutions in a stem and eleven blocks.

A kernel is (height, width, channels out). A branch is a chain of kernels; where two stand in a list
they run side by side on the same input. All have stride 1 and keep the size of the grid, except
where the stem says so and for the last of each branch in a block that reduces: stride 2, unpadded.

Names and sizes: Szegedy et al. 2015 (arXiv 1512.00567) and the arrays of pytorch-fid's and
torch-fidelity's weights file.
"""

import functools
from typing import NamedTuple

Kernel = tuple[int, int, int]


class Block(NamedTuple):
    """Branches in the order of their output channels, and the pooling beside them."""

    branches: dict[str, list[Kernel | list[Kernel]]]
    pool: str  # "average", "maximum": 3 x 3, before branch_pool; "reduce": 3 x 3 of stride 2, alone


def _block_a(pooled: int) -> Block:
    branches = {
        "branch1x1": [(1, 1, 64)],
        "branch5x5": [(1, 1, 48), (5, 5, 64)],
        "branch3x3dbl": [(1, 1, 64), (3, 3, 96), (3, 3, 96)],
        "branch_pool": [(1, 1, pooled)],
    }
    return Block(branches, "average")


def _block_c(n: int) -> Block:
    branches = {
        "branch1x1": [(1, 1, 192)],
        "branch7x7": [(1, 1, n), (1, 7, n), (7, 1, 192)],
        "branch7x7dbl": [(1, 1, n), (7, 1, n), (1, 7, n), (7, 1, n), (1, 7, 192)],
        "branch_pool": [(1, 1, 192)],
    }
    return Block(branches, "average")


def _block_e(pool: str) -> Block:
    fork = [(1, 3, 384), (3, 1, 384)]
    branches = {
        "branch1x1": [(1, 1, 320)],
        "branch3x3": [(1, 1, 384), fork],
        "branch3x3dbl": [(1, 1, 448), (3, 3, 384), fork],
        "branch_pool": [(1, 1, 192)],
    }
    return Block(branches, pool)


# Layer: kernel, stride, whether the grid is padded so as to keep its size.
STEM = {
    "Conv2d_1a_3x3": ((3, 3, 32), 2, False),
    "Conv2d_2a_3x3": ((3, 3, 32), 1, False),
    "Conv2d_2b_3x3": ((3, 3, 64), 1, True),
    "Conv2d_3b_1x1": ((1, 1, 80), 1, True),
    "Conv2d_4a_3x3": ((3, 3, 192), 1, False),
}
POOL_AFTER = ("Conv2d_2b_3x3", "Conv2d_4a_3x3")
BLOCKS = {
    "Mixed_5b": _block_a(32),
    "Mixed_5c": _block_a(64),
    "Mixed_5d": _block_a(64),
    "Mixed_6a": Block(
        {"branch3x3": [(3, 3, 384)], "branch3x3dbl": [(1, 1, 64), (3, 3, 96), (3, 3, 96)]}, "reduce"
    ),
    "Mixed_6b": _block_c(128),
    "Mixed_6c": _block_c(160),
    "Mixed_6d": _block_c(160),
    "Mixed_6e": _block_c(192),
    "Mixed_7a": Block(
        {
            "branch3x3": [(1, 1, 192), (3, 3, 320)],
            "branch7x7x3": [(1, 1, 192), (1, 7, 192), (7, 1, 192), (3, 3, 192)],
        },
        "reduce",
    ),
    "Mixed_7b": _block_e("average"),
    "Mixed_7c": _block_e("maximum"),
}


def stages(block: str, branch: str) -> list[dict[str, Kernel]]:
    """The layers of a branch, stage by stage: full name to kernel."""
    chain = BLOCKS[block].branches[branch]
    if len(chain) == 1:
        return [{f"{block}.{branch}": chain[0]}]
    stages = []
    for i, stage in enumerate(chain, start=1):
        kernels = dict(zip("ab", stage, strict=True)) if isinstance(stage, list) else {"": stage}
        stages.append({f"{block}.{branch}_{i}{letter}": k for letter, k in kernels.items()})
    return stages


@functools.cache
def layer_shapes() -> dict[str, tuple[int, int, int, int]]:
    """Every convolution: name to (height, width, channels in, channels out)."""
    shapes, channels = {}, 3
    for name, ((height, width, out), _, _) in STEM.items():
        shapes[name] = (height, width, channels, out)
        channels = out
    for block, (branches, pool) in BLOCKS.items():
        total = channels if pool == "reduce" else 0
        for branch in branches:
            width_in = channels
            for stage in stages(block, branch):
                shapes |= {name: (k[0], k[1], width_in, k[2]) for name, k in stage.items()}
                width_in = sum(k[2] for k in stage.values())
            total += width_in
        channels = total
    return shapes


def array_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the published arrays that are used."""
    shapes = {}
    for name, (height, width, channels, out) in layer_shapes().items():
        shapes[f"{name}.conv.weight"] = (out, channels, height, width)
        for statistic in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.bn.{statistic}"] = (out,)
    return shapes
