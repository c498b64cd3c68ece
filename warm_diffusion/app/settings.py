"""Configurations on disk and on the command line: realised, written, compared, read again."""

import argparse
import difflib
import importlib.metadata
import json
import os
import pathlib
from collections.abc import Sequence

import absl.flags
import jax
import ml_collections
from ml_collections import config_flags

from warm_diffusion.app import build, ranges
from warm_diffusion.runtime import processes, storage
from warm_diffusion.runtime.console import say

# Where things lie, which may differ between the machines of a run: a checkpoint and the processes
# know their images by their hash.
_BY_MACHINE = (
    "compilation_cache_dir",
    "data.source",
    "data.cache_dir",
    "data.data_dir",
    "data.download",
    "eval.inception_weights",
    "eval.reference",
)
# What may change between two starts of one run: where things lie, how long it runs, what it reports
# and how it samples. All other keys decide what is trained.
_FREE = (
    *_BY_MACHINE,
    "data.device_megabytes",
    "training.num_steps",
    "training.sharding",
    "training.grad_accumulation",
    "training.writers",
    "training.steps_per_call",
    "training.profile_steps",
    "training.log_every",
    "training.sample_every",
    "training.checkpoint_every",
    "training.keep_latest",
    "training.keep_every",
    "training.max_nonfinite",
    "sampling.",
    "eval.",
    "analysis.",
    "export.",
)


def to_json(config: ml_collections.ConfigDict) -> str:
    """The realised configuration, every key."""
    return json.dumps(config.to_dict(), indent=2) + "\n"


def load(path: str, default: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Reads what `to_json` wrote, or the config.json of a model folder, over a default.

    The default gives the types, and the values of keys that the file is too old to have. Names of
    code and of folders to write to count from the command line only.

    Raises:
      ValueError: no such file, not JSON, or a key or type that the default does not have.
    """
    try:
        default.update(_read(path))
    except (KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{path}: does not fit this version's configuration ({error})") from error
    return default


def _read(path: str | os.PathLike) -> dict:
    """What a file says of the configuration, without what counts from the command line only.

    A file may come with somebody else's checkpoint: it names no code, and no folder of this machine
    to read code from (data sets of TensorFlow Datasets name theirs) or to write to.
    """
    saved, _ = _saved(path)
    saved.pop("compilation_cache_dir", None)  # compiled programs are code as well
    for key in ("cache_dir", "data_dir", "download"):
        saved.get("data", {}).pop(key, None)
    if ":" in saved.get("eval", {}).get("features", ""):
        saved["eval"]["features"] = f"?{saved['eval']['features'].lstrip('?')}"
    return saved


def _saved(path: str | os.PathLike) -> tuple[dict, bool]:
    """The configuration in a file, and whether it is a whole one."""
    try:
        saved = storage.read_json(path)
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"{path}: not a configuration that can be read ({error})") from error
    whole = True
    try:
        if "format" in saved:  # the config.json of a model folder
            whole = "configuration" in saved.get("info", {})
            saved = saved["info"]["configuration"] if whole else build.configuration_of(saved)
            saved["sampling"] = {**saved.get("sampling", {}), "ema": 0}  # it holds one average
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a configuration ({error!r})") from error
    return saved, whole


def missing_keys(path: str | os.PathLike, default: ml_collections.ConfigDict) -> list[str]:
    """The keys that a file is too old to have; none where it holds no whole configuration."""
    saved, whole = _saved(path)
    return sorted(_flat(default.to_dict()).keys() - _flat(saved).keys()) if whole else []


def check(config: ml_collections.ConfigDict, image_shape: tuple[int, int, int] | None) -> None:
    """Compares every key with its range, and with the images (H, W, C) once they are known.

    Raises:
      ValueError: keys that do not fit, their values, and what they may be.
    """
    keys = _flat(config.to_dict())
    if image_shape is None:
        ranges.check(keys)
    else:
        ranges.check_fit(keys, image_shape)


def check_average(config: ml_collections.ConfigDict) -> None:
    """Raises ValueError unless `sampling.ema` names an average that training keeps."""
    index, count = config.sampling.ema, len(config.training.ema_halflife_images)
    if not -1 <= index < count:
        raise ValueError(
            f"sampling.ema must be -1 (raw weights) or 0 to {count - 1} (of "
            f"training.ema_halflife_images), got {index}"
        )


def _flat(tree: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in tree.items():
        flat |= (
            _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return flat


def compare(config: ml_collections.ConfigDict, began: dict, path: pathlib.Path) -> list[str]:
    """Compares a configuration with the one that a run began with.

    Args:
      config: the new one.
      began: the run's, as its last checkpoint or its `path` tells.
      path: the run's config.json.

    Returns:
      The differences that are harmless, one line each.

    Raises:
      ValueError: keys that decide what is trained differ; the message lists them.
    """
    changes, refused = _differences(config, began)
    if refused:
        raise ValueError(
            f"{path.parent} holds a run of another configuration: {'; '.join(refused)}. Use a "
            f"new --workdir, or continue that run with --config={path}"
        )
    return changes


def _differences(config: ml_collections.ConfigDict, began: dict) -> tuple[list[str], list[str]]:
    """All keys that differ from those of a run, one line each; and those that must not."""
    # Through JSON on both sides, so that tuples compare with lists.
    new, old = _flat(json.loads(to_json(config))), _flat(began)
    changes = [
        f"{key}: {old.get(key, '(absent)')!r} -> {new.get(key, '(absent)')!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]
    # A key that the run is too old to have does not lock it out; what it is now is said above.
    refused = [
        f"{key}: {old[key]!r} -> {new.get(key, '(absent)')!r}"
        for key in sorted(old)
        if old[key] != new.get(key) and not key.startswith(_FREE)
    ]
    return changes, refused


def refuse_other_run(config: ml_collections.ConfigDict, path: pathlib.Path) -> None:
    """For a job that began before the run had written its configuration to `path`.

    Raises:
      ValueError: keys that decide what is trained differ; the message lists them.
    """
    _, refused = _differences(config, storage.read_json(path))
    if refused:
        raise ValueError(
            f"the run in {path.parent} has another configuration than this job was started with: "
            f"{'; '.join(refused)}. Start it again: it now finds {path}"
        )


def explain_unknown_key(argv: Sequence[str], config: ml_collections.ConfigDict) -> str | None:
    """Names the first `--config.KEY` in argv that the configuration lacks, and the nearest one."""
    known = _flat(config.to_dict())
    for argument in argv:
        if not argument.startswith(("--config.", "-config.", "--noconfig.")):
            continue
        key = argument.partition("=")[0].partition("config.")[2]
        if key in known:
            continue
        nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        return f"unknown configuration key {key!r}{hint} (all keys: configs/default.py)"
    return None


def resolve_config_argument(argv: Sequence[str], configs: pathlib.Path) -> list[str]:
    """Makes `--config` a Python file whatever the user gave: that, a run's JSON file, or nothing.

    Args:
      argv: the command line.
      configs: folder of the config files; its saved.py reads JSON.

    Returns:
      argv, with `--config=configs/saved.py:FILE` where a JSON file is meant: given as such, or
      beside the checkpoint that another mode than train reads; with neither, `configs/digits.py`.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("config", "mode", "workdir", "checkpoint"):
        parser.add_argument(f"--{name}", f"-{name}")
    given, others = parser.parse_known_args(argv[1:])
    config, checkpoint = given.config, given.checkpoint or given.workdir
    if config is None and checkpoint and given.mode not in (None, "train"):
        path = storage.path(checkpoint)
        path = path.parent.parent if path.parent.name == "checkpoints" else path
        config = str(path / "config.json") if (path / "config.json").exists() else None
    config = config or str(configs / "digits.py")
    if config.endswith(".json"):
        config = f"{configs / 'saved.py'}:{config}"
    rest = {name: getattr(given, name) for name in ("mode", "workdir", "checkpoint")}
    flags = [f"--{name}={value}" for name, value in rest.items() if value is not None]
    return [argv[0], f"--config={config}", *flags, *others]


def start(flags: absl.flags.FlagValues) -> ml_collections.ConfigDict:
    """What comes before every mode: the other processes, the compilation cache, short flags.

    Args:
      flags: main.py's, parsed.

    Returns:
      The configuration, with --bnr, --solver, --steps and --grid in its sampling section.
    """
    others = flags.coordinator_address, flags.num_processes, flags.process_id
    if flags.distributed or any(value is not None for value in others):
        processes.join(*others, seconds=flags.join_seconds)
    config = flags.config
    short = ("bnr", "bnr"), ("solver", "solver"), ("num_steps", "steps"), ("grid", "grid")
    for key, flag in short:
        if flags[flag].present:
            config.sampling[key] = flags[flag].value
    check(config, None)
    enable_compilation_cache(config.compilation_cache_dir)
    _, _, file = config_flags.get_config_filename(flags["config"]).partition(":")
    missing = missing_keys(file, config) if file.endswith(".json") else []
    if missing:
        say(f"note     {file} is of an earlier version without the keys {', '.join(missing)}")
    if jax.process_count() > 1:
        _agree(flags)
    return config


def _agree(flags: absl.flags.FlagValues) -> None:
    """All processes must do the same with the same; where things lie may differ by machine."""
    keys = _flat(json.loads(to_json(flags.config)))
    told = {f"--{name}": flags[name].value for name in ("mode", "seeds", "wait")}
    told |= {f"the version of {name}": version for name, version in versions().items()}
    told |= {f"config.{key}": keys[key] for key in keys if not key.startswith(_BY_MACHINE)}
    processes.agree(**told, **{"the number of devices": jax.local_device_count()})
    say(f"joined   {jax.process_count()} processes, {jax.device_count()} devices")
    if note := processes.unused_devices():
        say(f"note     {note}")


def versions() -> dict[str, str]:
    """Of the packages that decide what comes out."""
    found = {}
    for package in ("warm-diffusion", "jax", "flax", "optax", "orbax-checkpoint"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"  # run from a checkout, without pip install
    return found


def enable_compilation_cache(folder: str) -> None:
    """Keeps compiled programs for the next start; an environment variable of JAX's goes first."""
    if not folder or os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    jax.config.update("jax_compilation_cache_dir", str(storage.path(folder)))
    # Small programs as well: a small network's start is made of many of them.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
