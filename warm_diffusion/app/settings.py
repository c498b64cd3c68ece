"""Configurations on disk and on the command line: checked, written, compared, read again."""

import argparse
import copy
import difflib
import fnmatch
import importlib.metadata
import json
import math
import os
import pathlib
import re
import reprlib
import sys
import types
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import ml_collections
from absl import flags, logging
from ml_collections import config_flags

import warm_diffusion
from warm_diffusion import denoiser, pretrained, samplers
from warm_diffusion.app import build
from warm_diffusion.data.augmentation import TRANSFORMS
from warm_diffusion.models import SIZES
from warm_diffusion.runtime import console, devices, processes, storage
from warm_diffusion.runtime.console import say, shorten
from warm_diffusion.training import WRITERS

# Where things lie, which may differ between the machines of a run: a checkpoint and the processes
# know their images by their hash.
_BY_MACHINE = (
    "compilation_cache_dir", "data.source", "data.cache_dir", "data.data_dir", "download",
    "eval.inception_weights", "eval.reference",
)  # fmt: skip
# What may change between two starts of one run: where things lie, how long it runs, how a step is
# computed, what it reports and how it samples. All other keys decide what is trained.
_FREE = (
    *_BY_MACHINE, "training.num_steps", "training.device_megabytes", "training.sharding",
    "training.grad_accumulation", "training.steps_per_call", "training.writers",
    "training.profile_steps", "training.log_every", "training.sample_every",
    "training.checkpoint_every", "training.keep_latest", "training.keep_every",
    "training.max_nonfinite_steps", "sampling.", "eval.", "analysis.", "export.",
)  # fmt: skip

# Keys in files of earlier versions, by their names now.
_RENAMED = {
    "eval.seed_ranges": "eval.repeats",
    "sampling.grid": "sampling.time_grid",
    "training.max_nonfinite": "training.max_nonfinite_steps",
}

# --- what every key may be ------------------------------------------------------------------------

Check = tuple[Callable[[Any], bool], str]  # whether a value will do, and what will


def _number(words: str, test: Callable[[float], bool] = lambda value: True) -> Check:
    return lambda v: type(v) in (int, float) and math.isfinite(v) and test(v), f"a number {words}"


def _whole(least: int, most: int = 2**31 - 1, step: int = 1) -> Check:
    words = "a whole number" if step == 1 else f"a multiple of {step}"
    words += f" of at least {least:,}" + (f" and at most {most:,}" if most < 2**31 - 1 else "")
    return lambda v: type(v) is int and least <= v <= most and v % step == 0, words


def _one_of(names: Iterable[Any]) -> Check:
    names = tuple(names)
    words = f"one of {', '.join(map(str, names))}"
    return lambda v: type(v) is type(names[0]) and v in names, words


def _text(least: int = 0) -> Check:
    words = "one line of text" + (", not empty" if least else "")
    return lambda v: type(v) is str and len(v) >= least and not set("\n\r\0") & set(v), words


def _several(each: Check, least: int = 0, most: int = 64, different: bool = True) -> Check:
    def fits(value: Any) -> bool:
        if type(value) not in (tuple, list) or not least <= len(value) <= most:
            return False
        return all(map(each[0], value)) and not (different and len(set(value)) < len(value))

    kind = " different" if different else ""
    return fits, f"{least} to {most}{kind} values, each {each[1]}"


def _or(one: Check, other: Check) -> Check:
    return lambda v: one[0](v) or other[0](v), f"{one[1]} or {other[1]}"


_FLAG = _one_of((False, True))
_FINITE = _number("that is finite")
_POSITIVE = _number("above 0", lambda v: v > 0)
_AT_LEAST_0 = _number("of at least 0", lambda v: v >= 0)
_RATIO = _number("of at least 0 and at most 1,000,000", lambda v: 0 <= v <= 1e6)
_SHARE = _number("of at least 0 and at most 1", lambda v: 0 <= v <= 1)
_BELOW_1 = _number("of at least 0 and below 1", lambda v: 0 <= v < 1)
_TWO_STEPS = _several(_whole(1), 2, 2, different=False)
_ALL_OR_2 = _or((lambda v: v == 0, "0"), _whole(2))

# The first pattern that fits a key counts. How the numbers of a path must stand to each other, and
# what data and devices allow, their constructors say.
CHECKS: dict[str, Check] = {
    "seed": _whole(0, 2**32 - 1),
    "init_from": _text(),
    "*_dir": _text(),
    "data.source": _text(1),
    "data.resolution": _whole(0, SIZES["resolution"][1]),
    "data.channels": _one_of((0, 1, 3)),
    "data.resize": _one_of(("lanczos", "box")),
    "data.too_small": _one_of(("refuse", "skip", "enlarge")),
    "data.tiles": _FLAG,
    "download": _FLAG,
    "model.name": _one_of(("ddpmpp", "ncsnpp")),
    "model.model_channels": _whole(*SIZES["model_channels"], step=2),
    "model.channel_mult": _several(_whole(*SIZES["channel_mult"]), 1, 12, different=False),
    "model.num_blocks": _whole(1, SIZES["num_blocks"][1]),
    "model.attention_resolutions": _several(_whole(*SIZES["resolution"])),
    "model.num_classes": _whole(*SIZES["num_classes"]),
    "model.*dropout": _BELOW_1,
    "model.remat": _FLAG,
    "model.dtype": _one_of(("float32", "bfloat16")),
    "denoiser.parameterization": _one_of(denoiser.PARAMETERIZATIONS),
    "denoiser.sigma_data": _POSITIVE,
    "augment.transforms": _several(_one_of(TRANSFORMS)),
    "augment.probability": _SHARE,
    "schedule.constant_bnr.bnr": _or(_RATIO, (lambda v: v == "auto", "auto")),
    "schedule.*.bnr": _RATIO,
    "schedule.any_bnr.bnr_range": _several(_POSITIVE, 2, 2),
    "schedule.*.attenuation": _number("above 0 and below 1", lambda v: 0 < v < 1),
    "schedule.*_share": _SHARE,
    "schedule.*.p_mean": _number("of at least -20 and at most 20", lambda v: abs(v) <= 20),
    "schedule.*.p_std": _number("above 0 and at most 8", lambda v: 0 < v <= 8),  # within float32
    "schedule.blurring_diffusion.sigma_blur_max": _AT_LEAST_0,
    "schedule.*": _or(_POSITIVE, _several(_FINITE)),
    "loss.residual_weight": _AT_LEAST_0,
    "optimizer.learning_rate": _POSITIVE,
    "optimizer.warmup_images": _whole(0, 2**53),
    "optimizer.b?": _BELOW_1,
    "optimizer.*": _AT_LEAST_0,
    "training.sharding": _one_of(devices.STATE_SHARDINGS),
    "training.steps_per_call": _whole(1, 1_000),
    "training.ema_halflife_images": _several(_POSITIVE, 1),
    "training.ema_rampup": _AT_LEAST_0,
    "training.writers": _several(_one_of(WRITERS)),
    "training.profile_steps": (
        lambda v: v == () or (_TWO_STEPS[0](v) and v[0] <= v[1]),
        "first and last step, whole numbers of at least 1, or ()",
    ),
    "training.log_every": _whole(1),
    "training.checkpoint_every": _whole(1),
    "training.*_every": _whole(0),
    "training.device_megabytes": _whole(0),
    "training.*": _whole(1),
    "sampling.solver": _one_of(samplers.SOLVERS),
    "sampling.num_steps": _whole(1, 1_000),
    "sampling.time_grid": _one_of(pretrained.GRIDS),
    "sampling.rho": _number("of at least 1 and at most 1,000", lambda v: 1 <= v <= 1_000),
    "sampling.ema": _whole(-1),
    "sampling.bnr": _number("of at most 1,000,000", lambda v: v <= 1e6),
    "sampling.label": _whole(-1),
    "sampling.batch_size": _whole(1, 65_536),
    "sampling.churn.s_max": _or(_AT_LEAST_0, (lambda v: v == math.inf, "inf")),
    "sampling.churn.*": _AT_LEAST_0,
    "sampling.*": _FINITE,
    "eval.checkpoint": _text(1),
    "eval.num_samples": _ALL_OR_2,
    "eval.repeats": _whole(1, 1_000),
    "eval.features": _text(1),
    "eval.likelihood": _FLAG,
    "eval.likelihood_images": _ALL_OR_2,
    "eval.likelihood_trace": _one_of(("hutchinson", "exact")),
    "eval.*": _text(),
    "analysis.num_images": _whole(1, 100_000),
    "analysis.held_out": _text(),
    "export.num_images": _whole(0, 4_096),
    "export.evaluation": _text(),
    "export.program": _FLAG,
}


def check(config: ml_collections.ConfigDict) -> None:
    """Compares every key with what it may be.

    Raises:
      ValueError: the keys that do not fit, what they may be, and their values.
    """
    paths = _one_of(key for key in config.schedule if key != "name")
    checks = {"schedule.name": paths, **CHECKS}
    wrong = []
    for key, value in _flat(config.to_dict()).items():
        found = [c for pattern, c in checks.items() if fnmatch.fnmatchcase(key, pattern)]
        fits, words = (*found, (lambda _: False, "left out: configs/default.py has no such key"))[0]
        if not fits(value):
            wrong.append(f"{key} must be {words}, got {reprlib.repr(value)}")
    churn, options = config.sampling.churn, config.training
    if not wrong and churn.s_min > churn.s_max:
        wrong.append(f"sampling.churn.s_min must be at most s_max, got {churn.s_min}")
    edges = ("num_steps", "log_every", "sample_every", "checkpoint_every")
    uneven = [name for name in edges if not wrong and options[name] % options.steps_per_call]
    if uneven:
        wrong.append(
            f"training.steps_per_call={options.steps_per_call} must divide "
            f"{', '.join(f'training.{name}={options[name]}' for name in uneven)}: the run looks up "
            "between calls only"
        )
    if wrong:
        raise ValueError("; ".join(wrong))


def check_training(config: ml_collections.ConfigDict, image_shape: tuple[int, int, int]) -> None:
    """Compares what only training asks for with the images (H, W, C)."""
    heights = [image_shape[0] >> level for level in range(len(config.model.channel_mult))]
    never = [size for size in config.model.attention_resolutions if size not in heights]
    if never:
        raise ValueError(
            "model.attention_resolutions must be among the heights of the network's levels, "
            f"{', '.join(map(str, heights))}, got {', '.join(map(str, never))}"
        )
    index, count = config.sampling.ema, len(config.training.ema_halflife_images)
    if not -1 <= index < count:
        raise ValueError(
            f"sampling.ema must be -1 (raw weights) or 0 to {count - 1} (of "
            f"training.ema_halflife_images), got {index}"
        )


# --- on disk --------------------------------------------------------------------------------------


def to_json(config: ml_collections.ConfigDict) -> str:
    """The realised configuration, every key."""
    return json.dumps(config.to_dict(), indent=2) + "\n"


def plain(config: ml_collections.ConfigDict) -> dict:
    """The configuration as its JSON is read again: with lists for tuples."""
    return json.loads(to_json(config))


def load(path: str, default: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Reads what `to_json` wrote, or the config.json of a model folder, over a default.

    A file may come with somebody else's checkpoint: names of code, and of folders of this machine
    to read code from or to write to, count from the command line only.

    Raises:
      ValueError: no such file, not JSON, or a key or type that the default does not have.
    """
    try:
        if str(path).endswith(".json"):
            saved = storage.read_json(path)
        else:  # EDM's weights
            description = pretrained.load(path).description
            saved = {"format": "EDM's", **description, "info": {}}
        if "format" in saved:  # a model folder's: a description, and perhaps the whole of its run
            height, _, channels = saved["image_shape"]
            data = {"resolution": height, "channels": channels}
            own = {key: saved[key] for key in pretrained.SECTIONS}
            saved = saved["info"].get("configuration", {"data": data})
            saved = {**saved, **own, "sampling": {**saved.get("sampling", {}), "ema": 0}}
        saved.pop("compilation_cache_dir", None)  # compiled programs are code as well
        saved.pop("download", None)
        for key in ("cache_dir", "data_dir"):
            saved.get("data", {}).pop(key, None)
        if ":" in saved.get("eval", {}).get("features", ""):
            saved["eval"]["features"] = f"?{saved['eval']['features'].lstrip('?')}"
        saved = _renamed(saved)
        if unknown := explain_unknown_key(_flat(saved), default):
            raise ValueError(unknown)
        default.update(saved)
    except (
        KeyError, AttributeError, TypeError, FileNotFoundError, ValueError, RecursionError,
    ) as error:  # fmt: skip
        message = shorten(str(error))
        raise ValueError(f"{path}: not a configuration that can be read ({message})") from error
    return default


def _renamed(saved: dict) -> dict:
    """A configuration of an earlier version with the keys' present names."""
    renamed = copy.deepcopy(saved)
    for before, now in _RENAMED.items():
        section, key = before.split(".")
        if key in renamed.get(section, {}):
            renamed[section][now.partition(".")[2]] = renamed[section].pop(key)
    return renamed


def _flat(tree: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in tree.items():
        key = prefix + key
        flat |= _flat(value, f"{key}.") if isinstance(value, dict) else {key: value}
    return flat


def compare(config: ml_collections.ConfigDict, began: dict, path: pathlib.Path) -> list[str]:
    """Compares a configuration with the one that a run, of which `path` is config.json, began with.

    Returns:
      The differences that are harmless, one line each.

    Raises:
      ValueError: keys that decide what is trained differ; the message lists them.
    """
    if not isinstance(began, dict):
        raise ValueError(f"{path} holds {type(began).__name__}, not a configuration")
    new = _flat(plain(config))
    old = _flat(_renamed(began))
    changes = {
        key: f"{key}: {old.get(key, '(absent)')!r} -> {new.get(key, '(absent)')!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    }
    refused = [line for key, line in changes.items() if not key.startswith(_FREE)]
    if refused:
        raise ValueError(
            f"{path.parent} holds a run of another configuration: {'; '.join(refused)}. Use a "
            f"new --workdir, or that run's own with --config={path}"
        )
    return list(changes.values())


# --- on the command line --------------------------------------------------------------------------


_SAMPLING = "sample, eval, analyze, export"


def define_flags() -> None:
    """Defines the flags of all modes that say with what configuration and where they run."""
    config_flags.DEFINE_config_file(
        "config",
        None,  # a default here would be loaded, with all overrides, before errors can be caught
        "Configuration file [that of --checkpoint, else configs/digits.py]; --config.KEY=VALUE "
        "overrides a key (all keys: configs/default.py).",
    )
    flags.DEFINE_float("bnr", None, f"{_SAMPLING}: blur-to-noise ratio of the path [as trained].")
    flags.DEFINE_string("solver", None, f"{_SAMPLING}: euler, heun or multistep.")
    flags.DEFINE_integer("steps", None, f"{_SAMPLING}, restore: steps of the solver.")
    flags.DEFINE_string("time_grid", None, f"{_SAMPLING}: time grid, edm or spectral.")
    flags.DEFINE_bool("download", False, "Fetch public data, weights and networks if missing.")
    flags.DEFINE_bool("distributed", False, "Detect the cluster automatically (Slurm, Cloud TPU).")
    flags.DEFINE_string("coordinator_address", None, "Other clusters: HOST:PORT of process 0.")
    flags.DEFINE_integer("num_processes", None, "Other clusters: number of processes.")
    flags.DEFINE_integer("process_id", None, "Other clusters: number of this process, from 0.")
    flags.DEFINE_float("startup_timeout", 300.0, "Seconds to wait for the other processes.")
    flags.DEFINE_bool("version", False, "Print versions and exit.")
    flags.DEFINE_bool("debug", False, "Show libraries' logs, and a traceback for every error.")


def parse(argv: Sequence[str], default: types.ModuleType) -> list[str]:
    """Reads the flags, or prints the versions; returns the arguments that are no flags.

    Raises:
      ValueError: a flag, a key (`default` is the module configs/default.py) or a file that is not
        known or not right.
    """
    if "--version" in argv[1:]:
        print(*(f"{name} {version}" for name, version in versions().items()), sep="\n")
        sys.exit(0)
    if "--debug" not in argv:
        console.hide_libraries()
    try:
        folder = pathlib.Path(default.__file__).parent
        rest = flags.FLAGS(resolve_config_argument(argv, folder))
        flags.FLAGS.config.to_dict()  # a file that could not be loaded says so now
        return rest
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        given = (re.match(r"--?(?:no)?config\.([^=]*)", argument) for argument in argv)
        keys = [match[1] for match in given if match]
        # A config file's own error comes with its traceback.
        line = str(error).splitlines()[-1] if "Traceback (" in str(error) else str(error)
        line = line.removeprefix("ValueError: ")
        raise ValueError(explain_unknown_key(keys, default.get_config()) or line) from error


def explain_unknown_key(keys: Iterable[str], default: ml_collections.ConfigDict) -> str | None:
    """Names the first key that a configuration lacks, and the nearest one that it has."""
    known = _flat(default.to_dict())
    for key in keys:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            nearest = [_RENAMED[key]] if key in _RENAMED else near
            hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
            return f"unknown configuration key {key!r}{hint} (all keys: configs/default.py)"
    return None


def resolve_config_argument(argv: Sequence[str], configs: pathlib.Path) -> list[str]:
    """Makes `--config` a Python file; the user gave one, a run's JSON file, or nothing.

    A JSON file, given as such or beside the checkpoint that another mode than train reads, becomes
    saved.py:FILE of the folder `configs`. Without one it is digits.py there, or for EDM's public
    networks cifar10.py:hot.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("config", "mode", "workdir", "checkpoint"):
        parser.add_argument(f"--{name}", f"-{name}")
    given, others = parser.parse_known_args(argv[1:])
    config, checkpoint = given.config, given.checkpoint or given.workdir
    if config is None and checkpoint and given.mode not in (None, "train"):
        path = pretrained.split_checkpoint(checkpoint)[0]
        path = path if path.is_file() else path / "config.json"  # a file: EDM's weights
        config = str(path) if path.exists() else None
    if config is None and (checkpoint or "").startswith("edm:cifar10"):
        # EDM's network and protocol of evaluation, before the file is there.
        config = f"{configs / 'cifar10.py'}:hot" + ",cond" * ("-cond-" in checkpoint)
    config = config or str(configs / "digits.py")
    file = pathlib.Path(config.partition(":")[0])
    if file.suffix == ".py" and not file.exists():
        nearest = difflib.get_close_matches(file.name, os.listdir(configs), n=1)
        hint = f"; did you mean configs/{nearest[0]}?" if nearest else ""
        raise ValueError(f"--config: there is no file {file}{hint}")
    if not config.partition(":")[0].endswith(".py"):
        config = f"{configs / 'saved.py'}:{config}"
    rest = {name: getattr(given, name) for name in ("mode", "workdir", "checkpoint")}
    kept = [f"--{name}={value}" for name, value in rest.items() if value is not None]
    return [argv[0], f"--config={config}", *kept, *others]


def start(given: flags.FlagValues, argv: Sequence[str]) -> ml_collections.ConfigDict:
    """Prepares every mode: joins the other processes, sets the compilation cache and short flags.

    Returns:
      The configuration, with --bnr, --solver, --steps, --time_grid and --download in it, and with
      paths in place of the names of public files.

    Raises:
      ValueError: a mistake in the command, of which `argv` is what `parse` left.
    """
    logging.set_verbosity(logging.INFO if given.debug else logging.ERROR)
    others = given.coordinator_address, given.num_processes, given.process_id
    if given.distributed or any(value is not None for value in others):
        processes.join(*others, seconds=given.startup_timeout)
    if len(argv) > 1:
        raise ValueError(f"unexpected argument {argv[1]!r}; flags look like --mode=train")
    _refuse_flags_of_other_modes(given)
    config = given.config
    short = {"bnr": "bnr", "solver": "solver", "num_steps": "steps", "time_grid": "time_grid"}
    for key, flag in short.items():
        if given[flag].present:
            config.sampling[key] = given[flag].value
    config.download |= given.download
    check(config)
    if not given.workdir and given.mode != "info":
        raise ValueError(f"--mode={given.mode} writes files: set --workdir=DIR")
    given.checkpoint = build.fetch_public(config, given.mode, given.checkpoint)
    enable_compilation_cache(config.compilation_cache_dir)
    if jax.process_count() > 1:
        _agree(given)
    return config


def _refuse_flags_of_other_modes(given: flags.FlagValues) -> None:
    """Raises ValueError for a flag whose help names other modes: "sample, eval: what it is"."""
    instead = {"checkpoint": "to start from its weights set --config.init_from",
               "steps": "the length of training is --config.training.num_steps",
               "bnr": "the ratio of training is --config.schedule.constant_bnr.bnr"}  # fmt: skip
    known = given["mode"].parser.enum_values
    for name in given:
        modes = (given[name].help or "").partition(":")[0].split(", ")
        if not given[name].present or given.mode in modes or modes[0] not in known:
            continue
        hint = f": {instead[name]}" if given.mode == "train" and name in instead else ""
        raise ValueError(f"--{name} is for --mode={', '.join(modes)}, got {given.mode}{hint}")


def _agree(given: flags.FlagValues) -> None:
    """All processes must do the same with the same; where things lie may differ by machine."""
    keys = _flat(plain(given.config))
    facts = {f"--{name}": given[name].value for name in ("mode", "seeds", "wait")}
    facts |= {f"the version of {name}": version for name, version in versions().items()}
    facts |= {f"config.{key}": keys[key] for key in keys if not key.startswith(_BY_MACHINE)}
    processes.agree(**facts, **{"the number of devices": jax.local_device_count()})
    say(f"joined   {jax.process_count()} processes, {jax.device_count()} devices")
    if note := processes.unused_devices():
        say(f"note     {note}")


def versions() -> dict[str, str]:
    """Returns the versions of the packages that determine the numbers."""
    others = ("jax", "flax", "optax", "orbax-checkpoint")
    found = {package: importlib.metadata.version(package) for package in others}
    return {"warm-diffusion": warm_diffusion.__version__, **found}


def enable_compilation_cache(folder: str) -> None:
    """Keeps compiled programs for the next start; an environment variable of JAX's goes first."""
    if folder and not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(storage.path(folder)))
    # Small programs as well: a small network's start is made of many of them.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
