"""What would a configuration need on a TPU? Its programs, compiled for one that is not there.

    python -m benchmarks.aot --config=configs/cifar10.py --config.model.dtype=bfloat16 \
        --topology=v5e:4x4 --batch_size=512 --out=aot.json

Compiles the real training step, sampler and Inception features for the chips of a named topology,
by the compiler that a TPU would use (`pip install '.[tpu]'`, 0.7 GB); or, without
--topology, for the devices that are there. Nothing runs, nothing is read, no weights are made. Big
networks take minutes a program (`docs/scaling.md`).

    memory      bytes on a chip: arguments, results that reuse none of them, temporaries, program
    work        FLOP and bytes accessed on a chip by the compiler's count, a loop's body once: of
                the sampler roughly one network call a solver step has; none where it does not say
    collectives arrays that travel between chips, their number and bytes (`hlo.py`)
    products    convolutions of the network, and matrix products (DCT, dense layers, attention,
                resampling), by the type of their factors, with their share of the FLOP
"""

import contextlib
import json
import os
import sys
import time

import clu.parameter_overview
import jax
import numpy as np
from absl import flags
from jax.experimental import topologies
from jax.sharding import Mesh
from ml_collections import ConfigDict, config_flags

from benchmarks import hlo
from benchmarks.train_step import run, write_json
from warm_diffusion import drawing
from warm_diffusion.app import build
from warm_diffusion.architecture import Architecture
from warm_diffusion.data import Statistics
from warm_diffusion.evaluation import features, inception
from warm_diffusion.runtime import devices
from warm_diffusion.training.state import Batch

FLAGS = flags.FLAGS

# libtpu 0.0.42 knows these. Clouds name v4 and v5p by cores: v4-8 is v4:2x2x1, v4-32 v4:2x2x4.
TOPOLOGIES = (
    "v4:2x2x1", "v4:2x2x4", "v5e:2x2", "v5e:4x4", "v5e:4x8", "v5e:16x16", "v5p:2x2x1", "v5p:2x2x4",
    "v6e:2x2", "v6e:4x4",
)  # fmt: skip

PROGRAMS = ("train", "sample", "inception")

# Gigabytes (1e9) of memory on a device, by Google's data sheets.
_MEMORY = {
    "TPU v4": 34.4, "TPU v5 lite": 17.2, "TPU v5": 102.0, "TPU v6 lite": 34.4,
}  # fmt: skip


def make_mesh(topology: str) -> Mesh:
    """The chips of a named topology along the axis `data`; of "" the devices that are there.

    Raises:
      ValueError: a name that the compiler does not know, or no compiler.
    """
    if not topology:
        return devices.make_mesh()
    # Else libtpu asks Google's metadata server which TPU this machine is, for minutes.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    # libtpu lets one process have the chips; there are none to have.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")
    # A v4 chip's two cores are one device, as on the real one; others have no such choice.
    options = {"chip_config_name": "megacore"} if topology.startswith("v4") else {}
    try:
        with _quiet():
            found = topologies.get_topology_desc(topology, "tpu", **options)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"cannot compile for topology {topology!r} ({reason}): it needs "
            f"pip install '.[tpu]' in a checkout, and a name such as {', '.join(TOPOLOGIES)}"
        ) from error
    return Mesh(np.array(found.devices), ("data",))


@contextlib.contextmanager
def _quiet():
    """Keeps what libtpu says about a missing TPU off the terminal."""
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


def abstract_architecture(config: ConfigDict) -> Architecture:
    """Network and path of a configuration, without its data.

    Raises:
      ValueError: the configuration leaves the images' shape to the data.
    """
    shape = (config.data.resolution, config.data.resolution, config.data.channels)
    if 0 in shape:
        raise ValueError("set config.data.resolution and config.data.channels: no data are read")
    if config.schedule.constant_bnr.bnr == "auto":
        config.schedule.constant_bnr.bnr = 0.5  # a number in the program, whatever it is
    statistics = Statistics(np.zeros(shape, np.float32), np.ones(shape[:2], np.float32))
    return build.architecture(config, shape, statistics)


def lower_train(config: ConfigDict, built: Architecture, mesh: Mesh, images: int):
    """The training step, as the run would have it: `images` of data on the devices if they fit."""
    devices.check_batch_size("training.batch_size", config.training.batch_size, mesh)
    _, state = build.initial_state(config, built, mesh)
    size = config.training.batch_size
    classes = jax.ShapeDtypeStruct((images,), np.int32) if built.num_classes else None
    data = Batch(jax.ShapeDtypeStruct((images, *built.image_shape), np.uint8), classes)
    resident = images * np.prod(built.image_shape) <= config.training.device_megabytes * 2**20
    step = build.train_step(config, built, mesh, resident=resident)
    arguments = build.step_arguments(config, state, data, mesh, resident=resident)
    return step.lower(*arguments), size


def lower_sample(config: ConfigDict, built: Architecture, mesh: Mesh):
    """The sampler of `config.sampling`."""
    size = devices.global_batch(config.sampling.batch_size, mesh)
    path = build.sampling_schedule(config, built.statistics)
    settings = build.sampling_settings(config)
    program, arguments = drawing.program(built, path, settings, batch_size=size, mesh=mesh)
    return program.lower(*arguments), size


def lower_inception(built: Architecture, mesh: Mesh):
    """Inception's features and logits of RGB images of this size."""
    program, size = features.program(inception.features_and_logits, mesh)
    images = jax.ShapeDtypeStruct((size, *built.image_shape[:2], 3), np.uint8)
    return program.lower(inception.abstract_params(), images), size


def examine(compiled) -> dict:
    """All that the table shows of a compiled program; see the module."""
    memory, text = compiled.memory_analysis(), compiled.as_text()
    parts = {
        "arguments": memory.argument_size_in_bytes,
        "results": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "program": memory.generated_code_size_in_bytes,
    }
    cost = compiled.cost_analysis() or {}
    found = {}
    for product in hlo.products(text):
        network = product["primitive"] == "conv_general_dilated"
        what = f"{'convolutions' if network else 'matrix products'} {product['dtype']}"
        row = found.setdefault(what, {"count": 0, "flops": 0})
        row["count"] += 1
        row["flops"] += product["flops"]
    return {
        "bytes": {**parts, "total": sum(parts.values())},
        "flops": cost.get("flops"),
        "bytes_accessed": cost.get("bytes accessed"),
        "collectives": hlo.collectives(text),
        "products": found,
        **hlo.count(text),
    }


def compile_programs(config: ConfigDict, topology: str, names: list[str], images: int) -> list:
    """A row for each program; shows each as it comes, for they take minutes.

    Raises:
      ValueError: a program or a topology that is not known; a batch that the chips cannot share.
    """
    unknown = [name for name in names if name not in PROGRAMS]
    if unknown:
        raise ValueError(f"--programs takes {', '.join(PROGRAMS)}, got {', '.join(unknown)}")
    mesh, built = make_mesh(topology), abstract_architecture(config)
    lower = {
        "train": lambda: lower_train(config, built, mesh, images),
        "sample": lambda: lower_sample(config, built, mesh),
        "inception": lambda: lower_inception(built, mesh),
    }
    kind = mesh.devices.flat[0].device_kind
    params = jax.eval_shape(lambda: built.init_params(jax.random.key(0)))
    rows = []
    for name in names:
        begin = time.perf_counter()
        lowered, batch_size = lower[name]()
        middle = time.perf_counter()
        compiled = lowered.compile()
        end = time.perf_counter()
        row = {
            "program": name,
            "topology": topology or f"{mesh.size} x {kind}",
            "chips": mesh.size,
            "chip": kind,
            "chip_bytes": _MEMORY.get(kind, 0) * 1e9,
            "batch_size": batch_size,
            "parameters": int(clu.parameter_overview.count_parameters(params)),
            "lower_seconds": middle - begin,
            "compile_seconds": end - middle,
            **examine(compiled),
        }
        show(row)
        rows.append(row)
    return rows


def show(row: dict) -> None:
    """Prints a program's part of the table."""
    held = row["bytes"]
    print(
        f"{row['program']:<10} {row['topology']}, batch {row['batch_size']}, compiled in "
        f"{row['compile_seconds']:.1f} s"
    )
    share = f" ({held['total'] / row['chip_bytes']:.1%} of a chip)" if row["chip_bytes"] else ""
    print("  memory      " + ", ".join(f"{k} {v / 1e9:.3f} GB" for k, v in held.items()) + share)
    if row["flops"]:
        print(
            f"  work        {row['flops'] / 1e9:,.1f} GFLOP, {row['bytes_accessed'] / 1e9:,.2f} GB "
            "accessed on a chip"
        )
    travels = [
        f"{kind} {c['count']} of {c['bytes'] / 1e6:.3f} MB, largest {c['largest'] / 1e6:.3f} MB"
        + f", {c['looped'] / 1e6:.3f} MB in loops" * (c["looped"] > 0)
        for kind, c in row["collectives"].items()
    ]
    print("  collectives " + ("; ".join(travels) or "none"))
    flops = sum(product["flops"] for product in row["products"].values()) or 1
    parts = [f"{k} {p['count']} ({p['flops'] / flops:.1%})" for k, p in row["products"].items()]
    print("  products    " + (", ".join(parts) or "none"))
    print(
        f"  other       {row['transposes']} transposes, {row['copies']} copies, "
        f"{row['host_callbacks']} host callbacks, {row['float64']} float64"
    )


def main(argv: list[str]) -> None:
    """Prints the table and writes the JSON after each topology."""
    del argv
    config = FLAGS.config
    if FLAGS.batch_size:
        config.training.batch_size = FLAGS.batch_size
    if any(FLAGS.topology):
        jax.config.update("jax_platforms", "cpu")  # nothing runs on a device that may be here
    print(f"network    {config.model.name} {config.model.dtype}, jax {jax.__version__}")
    rows = []
    for topology in FLAGS.topology or [""]:
        rows += compile_programs(config, topology, FLAGS.programs, FLAGS.images)
        report = {"command": sys.argv[1:], "jax": jax.__version__, "programs": rows}
        write_json(FLAGS.out, report | {"config": json.loads(config.to_json_best_effort())})


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", "configs/cifar10.py", "Any configuration.")
    flags.DEFINE_list("topology", [], "Of TPUs, as v5e:4x4; empty: the devices that are here.")
    flags.DEFINE_integer("batch_size", 0, "Of training, over all chips; 0: the configuration's.")
    flags.DEFINE_list("programs", list(PROGRAMS), f"Which of {', '.join(PROGRAMS)}.")
    flags.DEFINE_integer("images", 50_000, "Of the data, which stay on the chips if they fit.")
    flags.DEFINE_string("out", "", "JSON file to write.")
    run(main)
