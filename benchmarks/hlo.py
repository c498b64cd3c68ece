"""What a compiled program does, read from XLA's text of it: traffic, precision, copies.

    collectives   arrays that travel between the devices, by kind, with their whole size: of a
                  reduce-scatter what goes in, of an all-gather what comes out, of an asynchronous
                  pair the end
    products      convolutions, and matrix products, which a TPU's compiler writes as convolutions;
                  in bfloat16 where both factors are, with 2 FLOP a multiplication of the kernel's
                  every position (borders count in full)

Each instruction counts once, in a loop's body too, however often it runs; `looped` is the part of a
collective's bytes that loops repeat.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator

_KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute",
          "collective-broadcast")  # fmt: skip
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%([\w.-]+) = (.*?) ([a-z][a-z\d-]*)\((.*)$")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%([\w.-]+) \(.*\{$")
_ARRAY = re.compile(r"\b(pred|bf16|[a-z]\d+\w*)\[([\d,]*)\]")
_CALLBACK = re.compile(r"callback|infeed|outfeed|\bsend\b|\brecv\b")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of the text: `%name = type opcode(rest`, inside a computation."""

    computation: str
    name: str
    type: str
    opcode: str
    rest: str

    @property
    def primitive(self) -> str:
        """JAX's operation that it comes from, such as conv_general_dilated; empty if none."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found[1].rpartition("/")[2] if found else ""


def instructions(text: str) -> Iterator[Instruction]:
    """The instructions of all computations of `compiled.as_text()`, in order."""
    computation = ""
    for line in text.splitlines():
        if found := _COMPUTATION.match(line):
            computation = found[1]
        elif found := _INSTRUCTION.match(line):
            yield Instruction(computation, *found.groups())


def arrays(type_text: str) -> list[tuple[str, tuple[int, ...]]]:
    """(dtype, shape) of each array in a type, a tuple's in order: `(f32[2,3]{1,0}, bf16[])`."""
    return [
        (dtype, tuple(int(size) for size in sizes.split(",") if size))
        for dtype, sizes in _ARRAY.findall(type_text)
    ]


def num_bytes(type_text: str) -> int:
    """Bytes of all arrays in a type, without the padding of a layout."""
    return sum(math.prod(shape) * _item_bytes(dtype) for dtype, shape in arrays(type_text))


def _item_bytes(dtype: str) -> int:
    bits = re.search(r"\d+", dtype)
    return max(1, int(bits[0]) // 8) if bits else 1  # pred


def _in_loops(listed: list[Instruction]) -> set[str]:
    """The computations that loops repeat: their bodies, and what those call."""
    calls, found = collections.defaultdict(set), set()
    for instruction in listed:
        called = re.findall(r"(?:body|calls|to_apply)=%([\w.-]+)", instruction.rest)
        branches = re.findall(r"branch_computations=\{([^}]*)\}", instruction.rest)
        called += [name.strip(" %") for names in branches for name in names.split(",")]
        calls[instruction.computation].update(called)
        if instruction.opcode == "while":
            found.update(called)
    waiting = list(found)
    while waiting:
        new = calls[waiting.pop()] - found
        found |= new
        waiting += new
    return found


def collectives(text: str) -> dict[str, dict[str, int]]:
    """Kind to {count, bytes, largest, looped} of what travels; bytes are the whole arrays'."""
    listed = list(instructions(text))
    loops = _in_loops(listed)
    partitions = re.search(r"num_partitions=(\d+)", text)
    partitions = int(partitions[1]) if partitions else 1
    found = {}
    for instruction in listed:
        kind = instruction.opcode.removesuffix("-done")
        if kind not in _KINDS:  # nor the -start of a pair, whose type holds both ends
            continue
        size = num_bytes(instruction.type)
        if kind == "reduce-scatter":
            size *= partitions
        if instruction.computation.startswith("all-reduce-scatter"):  # a TPU's fusion of the two
            kind = "reduce-scatter"
        row = found.setdefault(kind, {"count": 0, "bytes": 0, "largest": 0, "looped": 0})
        row["count"] += 1
        row["bytes"] += size
        row["largest"] = max(row["largest"], size)
        row["looped"] += size * (instruction.computation in loops)
    return found


def products(text: str) -> list[dict]:
    """Every convolution and matrix product: {dtype, flops, primitive, type, highest}.

    dtype is bfloat16 if both factors are, else float32; `highest` tells a float32 product that asks
    for full precision, which a TPU makes of several bfloat16 ones.
    """
    listed = list(instructions(text))
    types = {instruction.name: instruction.type for instruction in listed}
    found = []
    for instruction in listed:
        if instruction.opcode not in ("convolution", "dot"):
            continue
        operands = re.findall(r"%([\w.-]+)", instruction.rest.partition(")")[0])
        factors = [arrays(types[name])[0] for name in operands]
        bfloat16 = all(dtype == "bf16" for dtype, _ in factors)
        found.append(
            {
                "dtype": "bfloat16" if bfloat16 else "float32",
                "flops": _flops(instruction, [shape for _, shape in factors]),
                "primitive": instruction.primitive,
                "type": instruction.type,
                "highest": "operand_precision={highest,highest}" in instruction.rest,
            }
        )
    return found


def _flops(instruction: Instruction, factors: list[tuple[int, ...]]) -> int:
    """2 FLOP a multiplication: each output value sums over the kernel but its output features."""
    _, output = arrays(instruction.type)[0]
    if instruction.opcode == "dot":
        axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.rest)[1]
        contracted = math.prod(factors[0][int(axis)] for axis in axes.split(",") if axis)
        return 2 * math.prod(output) * contracted
    kernel_axes = re.search(r"dim_labels=\w+_(\w+)->", instruction.rest)[1]
    features = factors[1][kernel_axes.index("o")]
    return 2 * math.prod(output) * math.prod(factors[1]) // features


def count(text: str) -> dict[str, int]:
    """How many transposes, copies, host callbacks and float64 arrays a program has."""
    opcodes, callbacks, doubles = collections.Counter(), 0, 0
    for instruction in instructions(text):
        opcodes[instruction.opcode] += 1
        target = re.search(r'custom_call_target="([^"]*)"', instruction.rest)
        called = target[1] if target else instruction.opcode
        callbacks += bool(_CALLBACK.search(called))
        doubles += any(dtype in ("f64", "c128") for dtype, _ in arrays(instruction.type))
    return {
        "transposes": opcodes["transpose"],
        "copies": opcodes["copy"],
        "host_callbacks": callbacks,
        "float64": doubles,
    }
