"""Configurations: complete, locked, in range, written and read again, compared."""

import fnmatch
import importlib
import json
import math
import pathlib
import re

import pytest

import main
from configs import cifar10, default, saved
from warm_diffusion.app import settings

CONFIGS = pathlib.Path(default.__file__).parent
NAMES = sorted(p.stem for p in CONFIGS.glob("*.py") if p.stem not in ("__init__", "saved"))


@pytest.mark.parametrize("name", NAMES)
def test_every_config_is_locked_and_has_exactly_the_default_keys(name):
    config = importlib.import_module(f"configs.{name}").get_config()
    assert config.is_locked
    assert (
        settings._flat(config.to_dict()).keys()
        == settings._flat(default.get_config().to_dict()).keys()
    )
    with pytest.raises(AttributeError, match="nope"):
        config.model.nope = 1


@pytest.mark.parametrize("name", NAMES)
def test_a_config_written_and_read_again_is_the_same(tmp_path, name):
    config = importlib.import_module(f"configs.{name}").get_config()
    path = tmp_path / "config.json"
    path.write_text(settings.to_json(config))
    assert saved.get_config(str(path)).to_dict() == config.to_dict()


def test_every_key_of_the_default_has_a_comment():
    source = (CONFIGS / "default.py").read_text().splitlines()
    key = r"    \w+\.\w+ = (?!.*ml_collections)"
    keys = [i for i, line in enumerate(source) if re.match(key, line)]
    assert len(keys) > 40
    for i in keys:
        assert "#" in source[i] or source[i - 1].strip().startswith("#"), source[i]


def test_cifar10_variants_change_what_they_name():
    assert cifar10.get_config("hot").schedule.name == "hot"
    assert cifar10.get_config("small,bnr=0.3").schedule.constant_bnr.bnr == 0.3
    assert cifar10.get_config("small").model.model_channels < 128
    with pytest.raises(ValueError, match="no variant 'smal'"):
        cifar10.get_config("smal")


def written(config):
    return json.loads(settings.to_json(config))


def test_differences_that_decide_what_is_trained_are_refused():
    config, path = default.get_config(), pathlib.Path("run/config.json")
    began = written(config)
    assert settings.compare(config, began, path) == []
    config.schedule.constant_bnr.bnr = 0.25
    with pytest.raises(ValueError, match=r"constant_bnr.bnr: 0.5 -> 0.25\. Use"):
        settings.compare(config, began, path)


def test_differences_in_reporting_and_length_are_reported():
    config = default.get_config()
    config.training.num_steps = 8
    began = written(config)
    config.training.num_steps = 9
    config.sampling.solver = "euler"
    changes = settings.compare(config, began, pathlib.Path("run/config.json"))
    assert changes == ["sampling.solver: 'heun' -> 'euler'", "training.num_steps: 8 -> 9"]


def test_a_file_of_an_earlier_version_is_read_and_is_no_other_run(tmp_path):
    config = default.get_config()
    config.eval.repeats, config.training.max_nonfinite_steps = 7, 8
    earlier = written(config)
    for section, name, before in [
        ("eval", "repeats", "seed_ranges"),
        ("sampling", "time_grid", "grid"),
        ("training", "max_nonfinite_steps", "max_nonfinite"),
    ]:
        earlier[section][before] = earlier[section].pop(name)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(earlier))
    assert saved.get_config(str(path)).to_dict() == config.to_dict()
    assert settings.compare(config, earlier, path) == []


DEEP = '{"a":' * 900 + "0" + "}" * 900
LONG = json.dumps({"a" * 10**6: 1})


@pytest.mark.parametrize(
    "text", ["{", '{"modle": {}}', '{"model": {"name": 3, "nam": 1}}', DEEP, LONG]
)
def test_a_file_that_is_no_config_is_refused_by_name(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"config\.json: not a configuration") as caught:
        saved.get_config(str(path))
    assert len(str(caught.value)) < 600


def arguments(*given):
    return settings.resolve_config_argument(["main.py", *given], CONFIGS)


def test_without_a_config_the_digits_are_trained():
    assert arguments("--workdir=w")[1] == f"--config={CONFIGS / 'digits.py'}"


def test_a_config_file_that_is_not_there_is_named_with_the_nearest_one():
    with pytest.raises(ValueError, match=r"no file .*digit\.py; did you mean configs/digits\.py\?"):
        arguments("--config=configs/digit.py")


def test_a_json_config_is_read_by_saved_py_and_other_flags_stay():
    found = arguments("--config", "w/config.json", "--config.seed=3", "--mode", "train")
    assert found[1] == f"--config={CONFIGS / 'saved.py'}:w/config.json"
    assert {"--config.seed=3", "--mode=train"} <= set(found)


@pytest.mark.parametrize("checkpoint", ["", "checkpoints/40"])
def test_sampling_takes_the_config_of_the_checkpoint(tmp_path, checkpoint):
    (tmp_path / "config.json").write_text("{}")
    found = arguments("--mode=sample", f"--checkpoint={tmp_path / checkpoint}", "--workdir=w")
    assert found[1] == f"--config={CONFIGS / 'saved.py'}:{tmp_path / 'config.json'}"


def test_the_nearest_key_is_named():
    def explain(key):
        return settings.explain_unknown_key(["seed", key], default.get_config())

    text = explain("optimizer.lerning_rate")
    assert "unknown configuration key 'optimizer.lerning_rate'" in text
    assert "did you mean 'optimizer.learning_rate'?" in text
    assert explain("optimizer.learning_rate") is None
    for earlier, now in [
        ("eval.seed_ranges", "eval.repeats"),
        ("sampling.grid", "sampling.time_grid"),
        ("training.max_nonfinite", "training.max_nonfinite_steps"),
    ]:
        assert f"did you mean {now!r}?" in explain(earlier)


# --- every key of configs/default.py has a range -------------------------------------------------

CONFIG = default.get_config()  # one for a thousand checks: a new one takes milliseconds
KEYS = settings._flat(CONFIG.to_dict())
# Values that no key has; of each kind one that is near those that some have.
ODD = (
    None, -3, -3.5, math.nan, math.inf, 10**20, "", "nope", "two\nlines", (-1, -1), (1, 2, 3), [()],
)  # fmt: skip
# What any text may be (a folder, a source), and any number.
ALL_OF_A_KIND = {str: "two\nlines", float: math.nan, int: 10**20, bool: None, tuple: (-1, -1)}


def put(config, key, value):
    *sections, name = key.split(".")
    for section in sections:
        config = config[section]
    with config.ignore_type():
        config[name] = value


def changed(key, value):
    config = default.get_config()
    put(config, key, value)
    return config


def test_the_defaults_are_in_range():
    settings.check(default.get_config())


def complaint(key, value):
    put(CONFIG, key, value)
    try:
        settings.check(CONFIG)
    except ValueError as error:
        return str(error)
    finally:
        put(CONFIG, key, KEYS[key])
    return ""


def test_a_value_out_of_range_is_one_line_with_key_and_value():
    for key, inside in KEYS.items():
        line = rf"{re.escape(key)} must be [^\n]*, got [^\n]*"
        assert re.fullmatch(line, complaint(key, ALL_OF_A_KIND[type(inside)]))
        for value in ODD:
            assert re.fullmatch(f"({line})?", complaint(key, value)), (key, value)


def test_no_number_may_be_negative_but_these():
    signed = {"sampling.bnr", "sampling.guidance"}
    signed |= {key for key in KEYS if key.endswith(".p_mean")}
    numbers = {key for key, inside in KEYS.items() if type(inside) in (int, float)}
    assert {key for key in numbers if not complaint(key, type(KEYS[key])(-3))} == signed


def test_every_check_is_the_first_that_fits_some_key():
    """No line of the table is dead, and no key is without one."""
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
        ("schedule.constant_bnr.bnr", "atuo", "at most 1,000,000 or auto, got 'atuo'"),
        ("schedule.constant_bnr.bnr", 1e30, "at most 1,000,000 or auto, got 1e.30"),
        ("sampling.bnr", 1e30, "sampling.bnr must be a number of at most 1,000,000"),
        ("sampling.num_steps", 1_001, "num_steps must be .* at most 1,000, got 1001"),
        ("sampling.batch_size", 2**31 - 1, "batch_size must be .* at most 65,536, got 2147483647"),
        ("sampling.label", -2, "sampling.label must be a whole number of at least -1, got -2"),
        ("model.model_channels", 7, "model_channels must be a multiple of 2 of at least 4"),
        ("training.profile_steps", (25, 20), "profile_steps must be first and last step"),
        ("training.steps_per_call", 7, "steps_per_call=7 must divide"),
        ("sampling.churn.s_min", 1e7, "s_min must be at most s_max"),
        ("augment.transforms", ("x_flip", "x_flip"), "64 different values"),
        ("augment.transforms", ("spin",), "each one of x_flip, .*, got .'spin'"),
        ("training.ema_halflife_images", (), "ema_halflife_images must be 1 to 64"),
        ("training.keep_latest", 0, "keep_latest must be a whole number of at least 1, got 0"),
        ("eval.num_samples", 1, "num_samples must be 0 or .* at least 2, got 1"),
    ],
)
def test_keys_that_are_wrong_alone_or_together_are_reported(key, value, message):
    with pytest.raises(ValueError, match=message):
        settings.check(changed(key, value))


def test_attention_at_a_height_that_no_level_has_is_refused():
    config = changed("model.attention_resolutions", (4, 16))
    with pytest.raises(ValueError, match="heights of the network's levels, 8, 4, got 16"):
        settings.check_training(config, (8, 8, 1))
    settings.check_training(changed("model.attention_resolutions", (4, 8)), (8, 8, 1))


def test_a_flag_of_some_modes_names_them_first_in_its_help():
    every = {"config", "debug", "distributed", "download", "mode", "version", "workdir"}
    every |= {"coordinator_address", "num_processes", "process_id", "startup_timeout"}
    for flag in main.FLAGS.get_key_flags_for_module(main):
        modes = set(flag.help.partition(":")[0].split(", "))
        assert (modes <= main.MODES.keys()) == (flag.name not in every), flag.name
