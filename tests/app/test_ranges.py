"""Every key of configs/default.py has a range: outside of it a configuration is one line."""

import math
import re

import pytest

from configs import default
from warm_diffusion.app import settings

KEYS = settings._flat(default.get_config().to_dict())
# Values that no key has; of each kind one that is near those that some have.
ODD = (
    None, -3, -3.5, math.nan, math.inf, 10**20, "", "nope", "two\nlines", (-1, -1), (1, 2, 3), [()],
)  # fmt: skip
# What any text may be (a folder, a source), and any number.
ALL_OF_A_KIND = {str: "two\nlines", float: math.nan, int: 10**20, bool: None, tuple: (-1, -1)}


def changed(key, value):
    config = default.get_config()
    *sections, name = key.split(".")
    section = config
    for part in sections:
        section = section[part]
    with section.ignore_type():
        section[name] = value
    return config


def test_the_defaults_are_in_range():
    settings.check(default.get_config())


def complaint(key, value):
    try:
        settings.check(changed(key, value))
    except ValueError as error:
        return str(error)
    return ""


def test_a_value_out_of_range_is_one_line_with_key_and_value():
    for key, inside in KEYS.items():
        line = rf"{re.escape(key)} must be [^\n]*, got [^\n]*"
        assert re.fullmatch(line, complaint(key, ALL_OF_A_KIND[type(inside)]))
        for value in ODD:
            assert re.fullmatch(f"({line})?", complaint(key, value)), (key, value)


def test_no_number_may_be_negative_but_these():
    signed = {"sampling.bnr", "sampling.guidance", "sampling.label"}
    signed |= {key for key in KEYS if key.endswith(".p_mean")}
    numbers = {key for key, inside in KEYS.items() if type(inside) in (int, float)}
    assert {key for key in numbers if not complaint(key, type(KEYS[key])(-3))} == signed


def test_every_check_is_the_first_that_fits_some_key():
    """No line of the table is dead, and no key is without one."""
    import fnmatch

    used = {
        next(pattern for pattern in settings.CHECKS if fnmatch.fnmatchcase(key, pattern))
        for key in KEYS
        if key != "schedule.name"
    }
    assert used == settings.CHECKS.keys()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("schedule.name", "warm", "schedule.name must be one of .*hot.*, got 'warm'"),
        ("schedule.constant_bnr.bnr", "atuo", "of at least 0 or auto, got 'atuo'"),
        ("model.model_channels", 7, "model_channels must be a multiple of 2 of at least 4"),
        ("training.profile_steps", (25, 20), "profile_steps must be first and last step"),
        ("training.steps_per_call", 7, "steps_per_call=7 must divide"),
        ("sampling.churn.s_min", 1e7, "s_min must be at most s_max"),
        ("augment.transforms", ("x_flip", "x_flip"), "64 different values"),
    ],
)
def test_keys_that_are_wrong_together_or_in_their_own_way_are_told(key, value, message):
    with pytest.raises(ValueError, match=message):
        settings.check(changed(key, value))


def test_attention_at_a_height_that_no_level_has_is_refused():
    config = changed("model.attention_resolutions", (4, 16))
    with pytest.raises(ValueError, match="heights of the network's levels, 8, 4, got 16"):
        settings.check_training(config, (8, 8, 1))
    settings.check_training(changed("model.attention_resolutions", (4, 8)), (8, 8, 1))
