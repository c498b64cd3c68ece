"""What would a configuration need on a TPU? Compiles its programs for one that is not there.

    python -m benchmarks.aot --config=configs/cifar10.py --config.model.dtype=bfloat16 \
        --topology=v5e:4x4 --config.training.batch_size=512 --out=aot.json

The real training step and sampler are compiled for the chips of a named topology, by the compiler
that a TPU would use (`pip install '.[tpu]'`, 0.7 GB); or, without --topology, for the devices that
are there. Nothing runs, nothing is read, no weights are made. A program of a big network takes
minutes (`docs/scaling.md`). The table shows of each:

    bytes          on a chip: arguments, results that reuse none of them, temporaries, program
    flops, bytes_accessed   by the compiler's count on a chip, a loop's body once (for the sampler
                   roughly one solver step); None where it gives none
    collectives    arrays that travel between chips: their number and whole bytes, once for a
                   loop's body too, and how many of the bytes loops repeat
    convolutions   of the network, by the type of their factors
"""

import collections
import contextlib
import json
import math
import os
import re
import sys
import time

import clu.parameter_overview
import jax
import numpy as np
from absl import flags
from jax.experimental import topologies
from jax.sharding import Mesh
from ml_collections import ConfigDict, config_flags

from benchmarks.train_step import run, words, write_json
from warm_diffusion.app import build
from warm_diffusion.data import Statistics
from warm_diffusion.pretrained import Architecture
from warm_diffusion.runtime import devices
from warm_diffusion.training.step import Batch, abstract_arguments

FLAGS = flags.FLAGS

# libtpu 0.0.42 knows these. Clouds name v4 and v5p by cores: v4-8 is v4:2x2x1, v4-32 v4:2x2x4.
TOPOLOGIES = (
    "v4:2x2x1", "v4:2x2x4", "v5e:2x2", "v5e:4x4", "v5e:4x8", "v5e:16x16", "v5p:2x2x1", "v5p:2x2x4",
    "v6e:2x2", "v6e:4x4",
)  # fmt: skip

PROGRAMS = ("train", "sample")

# Gigabytes (1e9) of memory on a device, by Google's data sheets.
_MEMORY = {
    "TPU v4": 34.4, "TPU v5 lite": 17.2, "TPU v5": 102.0, "TPU v6 lite": 34.4,
}  # fmt: skip


def make_mesh(topology: str) -> Mesh:
    """The chips of a named topology along the axis `data`; for "" the devices of this machine.

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
        config.schedule.constant_bnr.bnr = (
            0.5  # a number in the program; any value gives the same program
        )
    statistics = Statistics(np.zeros(shape, np.float32), np.ones(shape[:2], np.float32))
    return build.architecture(config, shape, statistics)


def lower_train(config: ConfigDict, built: Architecture, mesh: Mesh, images: int):
    """The training step, as the run would have it: `images` of data on the devices if they fit."""
    devices.check_batch_size("training.batch_size", config.training.batch_size, mesh)
    _, state = build.initial_state(config, built, mesh)
    size = config.training.batch_size
    classes = jax.ShapeDtypeStruct((images,), np.int32) if built.network.num_classes else None
    data = Batch(jax.ShapeDtypeStruct((images, *built.image_shape), np.uint8), classes)
    resident = images * np.prod(built.image_shape) <= config.training.device_megabytes * 2**20
    step = build.train_step(config, built, mesh, resident=resident)
    options = build.step_options(config)
    arguments = abstract_arguments(state, data, options, mesh, resident=resident)
    return step.lower(*arguments), size


def lower_sample(config: ConfigDict, built: Architecture, mesh: Mesh):
    """The sampler of `config.sampling`."""
    size = devices.global_batch(config.sampling.batch_size, mesh)
    sampler = build.sampler(config, built, mesh, batch_size=size)
    return sampler.program.lower(*sampler.arguments), size


_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%([\w.-]+) = (.*?) ([a-z][a-z\d-]*)\((.*)$")
_ARRAY = re.compile(r"\b(pred|bf16|[a-z]\d+\w*)\[([\d,]*)\]")
_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute",
                "collective-broadcast")  # fmt: skip


def num_bytes(type_text: str) -> int:
    """Bytes of all arrays in a type of XLA's text, such as (f32[2,3]{1,0}, pred[])."""
    total = 0
    for dtype, sizes in _ARRAY.findall(type_text):
        bits = re.search(r"\d+", dtype)  # none in pred
        item = max(1, int(bits[0]) // 8) if bits else 1
        total += item * math.prod(int(size) for size in sizes.split(",") if size)
    return total


def read(text: str) -> dict:
    """Reads XLA's text of a compiled program: traffic, precision, calls to the host."""
    partitions = re.search(r"num_partitions=(\d+)", text)
    travels, convolutions = {}, collections.Counter()
    types, computation, callbacks, doubles = {}, "", 0, 0
    for line in text.splitlines():
        match = _INSTRUCTION.match(line)
        if not match:
            computation = line.lstrip("%").partition(" ")[0] if line.endswith("{") else computation
            continue
        name, result, opcode, rest = match.groups()
        types[name] = result
        kind, size = opcode.removesuffix("-done"), num_bytes(result)
        if kind in _COLLECTIVES:  # nor the -start of a pair, whose type holds both ends
            if kind == "reduce-scatter":
                size *= int(partitions[1]) if partitions else 1
            if computation.startswith("all-reduce-scatter"):  # a TPU's fusion of the two
                kind = "reduce-scatter"
            row = travels.setdefault(kind, {"count": 0, "bytes": 0, "looped": 0})
            row["count"] += 1
            row["bytes"] += size
            row["looped"] += size * ("while/body" in rest)  # where JAX says that it comes from
        # A TPU's compiler writes matrix products as convolutions too.
        if opcode == "convolution" and "conv_general_dilated" in rest:
            operands = re.findall(r"%([\w.-]+)", rest.partition(")")[0])
            half = all(types[operand].startswith("bf16") for operand in operands)
            convolutions["bfloat16" if half else "float32"] += 1
        target = re.search(r'custom_call_target="([^"]*)"', rest)
        called = target[1] if target else opcode
        callbacks += bool(re.search(r"callback|infeed|outfeed|\bsend\b|\brecv\b", called))
        doubles += bool(re.search(r"\b(f64|c128)\[", result))
    return {
        "collectives": travels,
        "convolutions": dict(convolutions),
        "host_callbacks": callbacks,
        "float64": doubles,
    }


def examine(compiled) -> dict:
    """Everything that the table shows of a compiled program; see the module."""
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
    parts = {
        "arguments": memory.argument_size_in_bytes,
        "results": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "program": memory.generated_code_size_in_bytes,
    }
    return {
        "bytes": {**parts, "total": sum(parts.values())},
        "flops": cost.get("flops"),
        "bytes_accessed": cost.get("bytes accessed"),
        **read(compiled.as_text()),
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
    for name, value in row.items():
        print(f"{name:<16} {words(value)}")
    print(flush=True)


def main(argv: list[str]) -> None:
    """Prints the table and writes the JSON after each topology."""
    del argv
    config = FLAGS.config
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
    flags.DEFINE_list("programs", list(PROGRAMS), f"Which of {', '.join(PROGRAMS)}.")
    flags.DEFINE_integer("images", 50_000, "Number of images; they stay on the chips if they fit.")
    flags.DEFINE_string("out", "", "JSON file to write.")
    run(main)
