"""What every key of a configuration may be, in one table, and whether a configuration fits.

`RANGES` has an entry for each key of configs/default.py (a test compares them, and the choices and
special values that comments there name). What depends on the data besides is in `check_fit`.
"""

import dataclasses
import math
import sys
from collections.abc import Mapping
from typing import Any

from warm_diffusion import denoiser, drawing, samplers
from warm_diffusion.architecture import PRECONDITIONINGS
from warm_diffusion.data.augmentation import TRANSFORMS
from warm_diffusion.models import SIZES
from warm_diffusion.runtime import devices
from warm_diffusion.training import WRITERS


class Range:
    """A set of values; `value in range` asks, `str(range)` says."""

    def __or__(self, other: "Range") -> "Range":
        return Either((self, other))


@dataclasses.dataclass(frozen=True)
class Number(Range):
    """Finite numbers between two, which belong to it unless `above` or `below` is set.

    An infinite `most` belongs to it as well.
    """

    least: float = -sys.float_info.max
    most: float = sys.float_info.max
    above: bool = False  # without `least` itself
    below: bool = False  # without `most` itself
    whole: bool = False
    step: int = 1  # of whole numbers

    def __contains__(self, value: Any) -> bool:
        kinds = int if self.whole else int | float
        if isinstance(value, bool) or not isinstance(value, kinds):
            return False
        low = value > self.least if self.above else value >= self.least
        high = value < self.most if self.below else value <= self.most
        return low and high and (not self.whole or value % self.step == 0)

    def __str__(self) -> str:
        name = "a whole number" if self.whole else "a number"
        name = f"a multiple of {self.step}" if self.step > 1 else name
        ends = []
        if self.least > -sys.float_info.max:
            ends.append(f"{'above' if self.above else 'of at least'} {self.least:,}")
        if self.most < sys.float_info.max:
            ends.append(f"{'below' if self.below else 'at most'} {self.most:,}")
        return f"{name} {' and '.join(ends)}" if ends else f"{name} that is finite"


@dataclasses.dataclass(frozen=True)
class OneOf(Range):
    """One of some values."""

    values: tuple

    def __contains__(self, value: Any) -> bool:
        return any(value == own and type(value) is type(own) for own in self.values)

    def __str__(self) -> str:
        return ("one of " if len(self.values) > 1 else "") + ", ".join(map(str, self.values))


@dataclasses.dataclass(frozen=True)
class Text(Range):
    """Text, `least` characters or more."""

    least: int = 0

    def __contains__(self, value: Any) -> bool:
        return (
            isinstance(value, str) and len(value) >= self.least and not set("\n\r\0") & set(value)
        )

    def __str__(self) -> str:
        return "one line of text" + (", not empty" if self.least else "")


@dataclasses.dataclass(frozen=True)
class Several(Range):
    """A tuple of values of one range."""

    each: Range
    least: int = 0
    most: int = 64
    different: bool = False

    def __contains__(self, value: Any) -> bool:
        if not isinstance(value, tuple | list) or not self.least <= len(value) <= self.most:
            return False
        different = not self.different or len(set(value)) == len(value)
        return all(item in self.each for item in value) and different

    def __str__(self) -> str:
        how_many = f"{self.least}" if self.least == self.most else f"{self.least} to {self.most}"
        return f"{how_many}{' different' if self.different else ''} values, each {self.each}"


@dataclasses.dataclass(frozen=True)
class Either(Range):
    """What lies in any of some ranges."""

    ranges: tuple[Range, ...]

    def __contains__(self, value: Any) -> bool:
        return any(value in part for part in self.ranges)

    def __str__(self) -> str:
        return " or ".join(map(str, self.ranges))


def _whole(least: int, most: float = 2**31 - 1, **options) -> Number:
    return Number(least, most, whole=True, **options)


_FLAG = OneOf((False, True))
_POSITIVE = Number(0, above=True)
_AT_LEAST_0 = Number(0)
_SHARE = Number(0, 1)
_SHARE_BELOW_1 = Number(0, 1, below=True)
_SEEDS = 2**32
_EVERY = ("log_every", "sample_every", "checkpoint_every")  # what a run does between steps

RANGES: Mapping[str, Range] = {
    "seed": _whole(0, _SEEDS - 1),
    "init_from": Text(),
    "compilation_cache_dir": Text(),
    "data.source": Text(1),
    "data.resolution": _whole(0, SIZES["resolution"][1]),
    "data.channels": OneOf((0, 1, 3)),
    "data.resize": OneOf(("lanczos", "box")),
    "data.tiles": _FLAG,
    "data.too_small": OneOf(("refuse", "skip", "enlarge")),
    "data.cache_dir": Text(),
    "data.data_dir": Text(),
    "data.download": _FLAG,
    "data.device_megabytes": _whole(0),
    "model.name": OneOf(("ddpmpp", "ncsnpp")),
    "model.parameterization": OneOf(denoiser.PARAMETERIZATIONS),
    "model.preconditioning": OneOf(PRECONDITIONINGS),
    "model.model_channels": _whole(*SIZES["model_channels"], step=2),
    "model.channel_mult": Several(_whole(*SIZES["channel_mult"]), 1, 12),
    "model.num_blocks": _whole(1, SIZES["num_blocks"][1]),
    "model.attention_resolutions": Several(_whole(*SIZES["resolution"]), different=True),
    "model.dropout": _SHARE_BELOW_1,
    "model.num_classes": _whole(*SIZES["num_classes"]),
    "model.label_dropout": _SHARE_BELOW_1,
    "model.remat": _FLAG,
    "model.dtype": OneOf(("float32", "bfloat16")),
    "augment.transforms": Several(OneOf(TRANSFORMS), different=True),
    "augment.probability": _SHARE,
    "schedule.name": OneOf(
        ("hot", "constant_bnr", "any_bnr", "spectral", "blurring_diffusion", "cold")
    ),
    "schedule.bnr": _AT_LEAST_0 | OneOf(("auto",)),
    "schedule.attenuation": Number(0, 1, above=True, below=True),
    "schedule.bnr_range": Several(_POSITIVE, 2, 2, different=True),
    "schedule.hot_share": _SHARE,
    "schedule.beta_min": _POSITIVE,
    "schedule.beta_max": _POSITIVE,
    "schedule.p_mean": Number(-20, 20),
    "schedule.p_std": Number(0, 8, above=True),  # levels stay within float32
    "schedule.sigma_blur_max": _AT_LEAST_0,
    "schedule.cold_alpha_min": _POSITIVE,
    "schedule.cold_alpha_max": _POSITIVE,
    "schedule.cold_beta": _POSITIVE,
    "loss.sigma_data": _POSITIVE,
    "loss.residual_weight": _AT_LEAST_0 | OneOf(("flow",)),
    "loss.residual_floor": _AT_LEAST_0,
    "optimizer.learning_rate": _POSITIVE,
    "optimizer.warmup_images": _whole(0, 2**53),
    "optimizer.b1": _SHARE_BELOW_1,
    "optimizer.b2": _SHARE_BELOW_1,
    "optimizer.eps": _AT_LEAST_0,
    "optimizer.grad_clip": _AT_LEAST_0,
    "training.num_steps": _whole(1),
    "training.batch_size": _whole(1),
    "training.sharding": OneOf(devices.STATE_SHARDINGS),
    "training.grad_accumulation": _whole(1),
    "training.steps_per_call": _whole(1, 1_000),
    "training.ema_halflife_images": Several(_POSITIVE, 1, different=True),
    "training.ema_rampup": _AT_LEAST_0,
    "training.writers": Several(OneOf(WRITERS), different=True),
    "training.log_every": _whole(1),
    "training.sample_every": _whole(0),
    "training.checkpoint_every": _whole(1),
    "training.keep_latest": _whole(1),
    "training.keep_every": _whole(0),
    "training.max_nonfinite": _whole(1),
    "training.profile_steps": OneOf(((),)) | Several(_whole(1), 2, 2),
    "sampling.solver": OneOf(samplers.SOLVERS),
    "sampling.num_steps": _whole(1, 100_000),
    "sampling.grid": OneOf(drawing.GRIDS),
    "sampling.rho": Number(1, 1_000),
    "sampling.bnr": Number(),
    "sampling.s_churn": _AT_LEAST_0,
    "sampling.s_min": _AT_LEAST_0,
    "sampling.s_max": Number(0, math.inf),
    "sampling.s_noise": _AT_LEAST_0,
    "sampling.ema": _whole(-1),
    "sampling.guidance": Number(),
    "sampling.label": _whole(-(2**31)),
    "sampling.batch_size": _whole(1),
    "eval.checkpoint": Text(1),
    "eval.num_samples": OneOf((0,)) | _whole(2, _SEEDS),
    "eval.seed_ranges": _whole(1, 1_000),
    "eval.features": Text(1),
    "eval.inception_weights": Text(),
    "eval.reference": Text(),
    "eval.split": Text(),
    "eval.likelihood": _FLAG,
    "eval.likelihood_images": OneOf((0,)) | _whole(2),
    "eval.likelihood_trace": OneOf(("hutchinson", "exact")),
    "analysis.num_images": _whole(1),
    "analysis.held_out": Text(),
    "export.num_images": _whole(0),
    "export.evaluation": Text(),
    "export.program": _FLAG,
}


def check(keys: Mapping[str, Any]) -> None:
    """Compares a configuration with `RANGES`.

    Args:
      keys: values by name, such as `data.source`.

    Raises:
      ValueError: the keys that do not fit, their values, and what they may be.
    """
    wrong = [
        f"{key} must be {allowed}, got {_shown(keys[key])}"
        for key, allowed in RANGES.items()
        if key in keys and keys[key] not in allowed
    ]
    if wrong:
        raise ValueError("; ".join(wrong))
    _check_calls(keys)
    if keys["sampling.s_min"] > keys["sampling.s_max"]:
        raise ValueError(
            f"sampling.s_min must be at most sampling.s_max, got {keys['sampling.s_min']} and "
            f"{keys['sampling.s_max']}"
        )


def _check_calls(keys: Mapping[str, Any]) -> None:
    window, steps = keys["training.profile_steps"], keys["training.steps_per_call"]
    if list(window) != sorted(window):
        raise ValueError(f"training.profile_steps must be first and last step, got {window}")
    edges = [f"training.{name}" for name in ("num_steps", *_EVERY)]
    uneven = [f"{key}={keys[key]}" for key in edges if keys[key] % steps]
    if uneven:
        raise ValueError(
            f"training.steps_per_call={steps} must divide {', '.join(uneven)}: the run looks up "
            "between calls only"
        )


def check_fit(keys: Mapping[str, Any], image_shape: tuple[int, int, int]) -> None:
    """Compares a configuration with the images (H, W, C) that it is for.

    Raises:
      ValueError: attention at a height that no level of the network has.
    """
    heights = [image_shape[0] >> level for level in range(len(keys["model.channel_mult"]))]
    never = [size for size in keys["model.attention_resolutions"] if size not in heights]
    if never:
        raise ValueError(
            "model.attention_resolutions must be among the heights of the network's levels, "
            f"{', '.join(map(str, heights))}, got {', '.join(map(str, never))}"
        )


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 100 else f"{shown[:100]}..."
