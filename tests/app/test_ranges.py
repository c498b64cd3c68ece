"""Every key of configs/default.py has a range: inside a configuration builds, outside is a line."""

import math
import pathlib
import re

import pytest
from hypothesis import HealthCheck, Phase, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from configs import default
from warm_diffusion.app import build, ranges, settings
from warm_diffusion.runtime import devices

SOURCE = pathlib.Path(default.__file__).read_text()
KEYS = settings._flat(default.get_config().to_dict())
quickly = hypothesis_settings(
    deadline=None,
    database=None,
    derandomize=True,
    phases=(Phase.explicit, Phase.generate),  # a failure is shown as found: shrinking takes minutes
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


def set_key(config, key, value):
    *sections, name = key.split(".")
    for section in sections:
        config = config[section]
    with config.ignore_type():
        config[name] = value


def comments():
    """Key -> what its comment says, the lines above included."""
    found, above, names = {}, [], {"config": ""}
    for line in SOURCE.splitlines():
        if line.strip().startswith("#"):
            above.append(line.strip()[1:].strip())
            continue
        if section := re.match(r"    config\.(\w+) = (\w+) = ml_coll", line):
            names[section[2]] = f"{section[1]}."
        elif key := re.match(r"    (\w+)\.(\w+) = (?:[^#]*)(?:#(.*))?$", line):
            found[names[key[1]] + key[2]] = " ".join([*above, (key[3] or "").strip()])
        above = []
    return found


def test_every_key_has_a_range_and_every_range_a_key():
    assert ranges.RANGES.keys() == KEYS.keys()


def test_the_defaults_are_in_range():
    ranges.check(KEYS)


def test_choices_that_a_comment_names_are_in_range():
    """`a | b (said of b) | c` in a comment; templates such as folder:DIR are left out."""
    seen = 0
    for key, comment in comments().items():
        allowed = ranges.RANGES[key]
        if "|" not in comment or isinstance(allowed, ranges.Text):
            continue
        words = re.findall(r"(\w+)(?: \([^)]*\))? \|", comment) + re.findall(r"\| (\w+)", comment)
        for word in words:
            assert word in allowed, (key, word)
            seen += 1
    assert seen > 15


def test_special_values_that_a_comment_names_are_in_range():
    """`0: none`, `-1: the raw weights`, `negative: ...`, `empty: ...`."""
    seen = 0
    for key, comment in comments().items():
        allowed = ranges.RANGES[key]
        for text in re.findall(r"(?:^|[;,(] ?)(-?\d+): ", comment):
            number = int(text)
            assert number in allowed or float(number) in allowed, (key, text)
            seen += 1
        if "negative: " in comment:
            assert -1 in allowed, key
            seen += 1
        if "empty: " in comment or "empty turns" in comment:
            assert "" in allowed, key
            seen += 1
    assert seen > 15


# --- drawing values ------------------------------------------------------------------------------


def numbers(allowed):
    low, high = max(allowed.least, -1e6), min(allowed.most, 1e6)
    if allowed.whole:
        high = min(high, low + 4096)
        return st.integers(int(low), int(high)).filter(lambda value: value in allowed)
    return st.floats(low, high, allow_nan=False).filter(lambda value: value in allowed)


def inside(allowed):
    match allowed:
        case ranges.Number():
            return numbers(allowed)
        case ranges.OneOf():
            return st.sampled_from(allowed.values)
        case ranges.Text():
            return st.text("abc:/", min_size=allowed.least, max_size=9)
        case ranges.Several():
            most = min(allowed.most, max(allowed.least, 3))
            each = inside(allowed.each)
            return st.lists(each, min_size=allowed.least, max_size=most, unique=True).map(tuple)
        case ranges.Either():
            return st.one_of(*map(inside, allowed.ranges))


odd = st.one_of(
    st.sampled_from([math.nan, math.inf, -math.inf, -1, 0, 7, 10**20, "", "nope", None, True, ()]),
    st.integers(-(10**21), 10**21),
    st.floats(),
    st.text(max_size=5),
    st.tuples(st.integers(-3, 3)),
    st.just((1, 1)),
    st.just("two\nlines"),
)


@pytest.mark.parametrize("key", ranges.RANGES)
def test_a_value_out_of_range_is_one_line_with_key_value_and_range(key):
    @hypothesis_settings(quickly, max_examples=25)
    @given(odd.filter(lambda value: value not in ranges.RANGES[key]))
    def check(value):
        with pytest.raises(ValueError, match=f"^{re.escape(key)} must be ") as caught:
            ranges.check(KEYS | {key: value})
        told = str(caught.value)
        assert str(ranges.RANGES[key]) in told
        assert repr(value)[:90] in told
        assert "\n" not in told

    check()


# Keys that make no network, path, step or sampler, and those that are right together only.
BUILDING = [
    key
    for key in ranges.RANGES
    if key.startswith(("model.", "schedule.", "loss.", "optimizer.", "augment.", "sampling."))
    or key in ("training.ema_halflife_images", "training.ema_rampup", "seed")
]
TOGETHER = {
    "model.attention_resolutions", "model.channel_mult", "model.parameterization",
    "model.preconditioning", "schedule.name", "schedule.beta_min", "schedule.beta_max",
    "schedule.bnr_range", "schedule.cold_alpha_min", "schedule.cold_alpha_max",
    "loss.residual_floor", "sampling.label", "sampling.guidance", "sampling.ema",
    "sampling.s_churn", "sampling.s_min", "sampling.solver", "sampling.grid",
}  # fmt: skip


@hypothesis_settings(quickly, max_examples=4)
@given(st.fixed_dictionaries({k: inside(ranges.RANGES[k]) for k in BUILDING if k not in TOGETHER}))
def test_values_in_range_build(values):
    """Network, loss, optimizer and sampler, by shapes alone."""
    values = values | {"model.num_blocks": min(values["model.num_blocks"], 2)}  # 64 take minutes
    config = default.get_config()
    config.model.channel_mult, config.model.attention_resolutions = (1,), ()
    for key, value in values.items():
        set_key(config, key, value)
    ranges.check(settings._flat(config.to_dict()))
    built, mesh = build.architecture(config, (8, 8, 1)), devices.make_mesh(1)
    _, abstract = build.initial_state(config, built, mesh)
    assert abstract.params["map_layer0"]["kernel"].shape[1] == 4 * values["model.model_channels"]
    build.loss(config, built)
    build.sampler(config, built, mesh, batch_size=2)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.dropout", 2.0), ("model.dropout", 1.0), ("model.label_dropout", 2.0),
        ("optimizer.learning_rate", 0.0), ("training.ema_rampup", math.nan),
        ("model.num_blocks", 0), ("training.log_every", -1), ("sampling.s_churn", -1.0),
        ("sampling.s_noise", math.nan), ("loss.sigma_data", -1.0), ("optimizer.b2", 2.0),
        ("optimizer.grad_clip", math.nan), ("schedule.p_std", -1.0), ("schedule.p_mean", math.nan),
        ("augment.probability", 7.0), ("data.device_megabytes", -1), ("training.num_steps", -5),
        ("model.model_channels", 0), ("model.model_channels", 7), ("model.channel_mult", ()),
        ("model.model_channels", 100_000), ("seed", 10**19), ("training.keep_latest", 0),
        ("training.max_nonfinite", 0), ("training.ema_halflife_images", ()),
        ("sampling.bnr", math.inf), ("augment.transforms", ("spin",)),
    ],
)  # fmt: skip
def test_settings_that_were_once_trained_to_the_end_are_refused(key, value):
    with pytest.raises(ValueError, match=key):
        ranges.check(KEYS | {key: value})


def test_attention_at_a_height_that_no_level_has_is_refused():
    keys = KEYS | {"model.channel_mult": (1, 2), "model.attention_resolutions": (4, 16)}
    with pytest.raises(ValueError, match="heights of the network's levels, 8, 4, got 16"):
        ranges.check_fit(keys, (8, 8, 1))
    ranges.check_fit(keys | {"model.attention_resolutions": (4, 8)}, (8, 8, 1))
