"""What a compiled TPU program does, read from its optimised HLO text.

Matrix products, memory traffic and collectives are counted by component of the model. XLA's own
cost analysis counts the body of a loop once and takes on-chip buffers for memory. Here a loop
counts as often as it runs, and only buffers in HBM (memory space 0 of a layout) are traffic.
Kernels are opaque: how often each runs is returned, for others to account.
"""

import dataclasses
import math
import re
from collections.abc import Iterable
from typing import NamedTuple

COMPONENTS = ("embedding", "attention", "mlp", "head+loss", "optimizer", "collectives", "other")

# which component a jax name stack belongs to, the first that matches;
# "other" is norms, residual sums and gradient sums
SCOPES = (
    ("optimizer", r"\boptimizer\b"),
    ("head+loss", r"\b(loss|head)\b"),
    ("attention", r"\battn\b"),
    ("mlp", r"\bmlp\b"),
    ("embedding", r"\bembed\b"),
)

# bytes of one number
ITEMSIZE = {
    "pred": 1,
    "s4": 0.5,
    "u4": 0.5,
    "s8": 1,
    "u8": 1,
    "s16": 2,
    "u16": 2,
    "bf16": 2,
    "f16": 2,
    "s32": 4,
    "u32": 4,
    "f32": 4,
    "s64": 8,
    "u64": 8,
    "f64": 8,
}

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

# operations that move nothing by themselves
FREE = {
    "parameter",
    "constant",
    "get-tuple-element",
    "tuple",
    "bitcast",
    "after-all",
    "while",
    "conditional",
    "call",
    "opt-barrier",
    "partition-id",
    "replica-id",
    "async-start",
    "copy-done",
    "slice-done",
    "async-done",
    "async-update",
}

# operations that read only a part of their first operand
SLICES = {"dynamic-slice", "slice", "gather"}

# operations through which an array passes unchanged
VIEWS = ("bitcast", "copy", "convert", "reshape")


# ---- records -------------------------------------------------------------------------------------


@dataclasses.dataclass
class Work:
    """What a component does in one step on one device."""

    # of matrix products
    flops: float = 0.0
    # the same, with the summed axis filled up to whole matrix units
    busy: float = 0.0
    # read from HBM and written there
    bytes: float = 0.0

    def add(self, flops: float = 0.0, busy: float = 0.0, bytes: float = 0.0):
        """Add more work of the same component."""
        self.flops += flops
        self.busy += busy
        self.bytes += bytes


class Collective(NamedTuple):
    """`bytes` is what each device sends in one step, all `times` together, if in a ring."""

    kind: str
    shape: str
    component: str
    times: int
    bytes: float


class Analysis(NamedTuple):
    """What one run of a program does on one device; kernels are {kernel name: runs}."""

    components: dict[str, Work]
    kernels: dict[str, int]
    collectives: list[Collective]


class Op(NamedTuple):
    """One operation of an HLO program."""

    name: str
    type: str
    code: str
    operands: tuple[str, ...]
    # what stands in its parentheses: operands, a constant's value, a parameter's number
    inside: str
    # attributes behind them
    rest: str

    @property
    def scope(self) -> str:
        """The jax name stack that it comes from."""
        return _group(r'op_name="([^"]*)"', self.rest)


class Program(NamedTuple):
    """HLO text, parsed: its computations, the last operation of each, and where it begins."""

    computations: dict[str, dict[str, Op]]
    roots: dict[str, Op]
    entry: str


def _group(pattern: str, text: str, default: str = "") -> str:
    """The first group of the pattern's first match."""
    match = re.search(pattern, text)
    return match[1] if match else default


# ---- parsing -------------------------------------------------------------------------------------


def parse(text: str) -> Program:
    """The `Program` that an HLO text describes."""
    computations, roots, entry = {}, {}, ""
    # of the computation that is being read
    name, lines = "", None

    for line in text.splitlines():
        if lines is None:
            head = re.match(r"(ENTRY )?%?([\w.-]+) .*\{$", line)
            if head:
                name, lines = head[2], []
                entry = name if head[1] else entry
        elif line == "}" or line.startswith("}, execution_thread"):
            ops = [parse_op(part) for part in lines]
            computations[name] = {op.name: op for op, _ in ops}
            roots[name] = next((op for op, is_root in ops if is_root), ops[-1][0])
            lines = None
        elif re.match(r"\s+(ROOT )?%?[\w.-]+ = ", line):
            lines.append(line)
        elif lines:
            # a kernel's attributes hold line breaks
            lines[-1] += line
    return Program(computations, roots, entry)


def parse_op(line: str) -> tuple[Op, bool]:
    """(an operation, whether it is the last of its computation)."""
    left, _, right = line.partition(" = ")

    # a tuple's type has blanks
    end = _closing(right, 0) + 1 if right.startswith("(") else right.index(" ")
    code = re.match(r" *([\w-]+)(?=\()", right[end:])
    opening = right.index("(", end)
    closing = _closing(right, opening)

    op = Op(
        name=left.replace("ROOT", "").strip(" %"),
        type=right[:end],
        code=code[1] if code else "",
        operands=tuple(re.findall(r"%([\w.-]+)", right[opening:closing])),
        inside=right[opening + 1 : closing],
        rest=right[closing + 1 :],
    )
    return op, "ROOT" in left


def _closing(text: str, start: int) -> int:
    """Where the parenthesis that opens at `start` is closed."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if not depth:
            return i
    raise ValueError("HLO text ends inside parentheses")


class Leaf(NamedTuple):
    """One array of a type."""

    dtype: str
    shape: tuple[int, ...]
    bytes: float
    in_hbm: bool


def leaves(type_: str) -> list[Leaf]:
    """The arrays that a type is made of."""
    arrays = []
    for dtype, dims, layout in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\](\{[^}]*\})?", type_):
        if dtype in ITEMSIZE:
            shape = tuple(int(d) for d in dims.split(",") if d)
            # S(1) and up are memories on the chip
            arrays.append(
                Leaf(dtype, shape, math.prod(shape) * ITEMSIZE[dtype], "S(" not in layout)
            )
    return arrays


def hbm(type_: str) -> float:
    """Bytes of a type that lie in HBM."""
    return sum(leaf.bytes for leaf in leaves(type_) if leaf.in_hbm)


def size(type_: str) -> float:
    """Bytes of a type, wherever it lies."""
    return sum(leaf.bytes for leaf in leaves(type_))


def called(op: Op, key: str = "calls") -> str:
    """The computation that an operation names under `key`."""
    return _group(rf"\b{key}=%?([\w.-]+)", op.rest)


def trip_count(op: Op, computations: dict[str, dict[str, Op]]) -> int:
    """How often a `while` runs.

    jax's loops count from 0, so it is the number that the counter is compared with.
    """
    known = _group(r'known_trip_count[^\d]*"?n"?:"?(\d+)', op.rest)
    if known:
        return int(known)
    condition = computations[called(op, "condition")]
    constants = [o.inside for o in condition.values() if o.code == "constant"]
    return max((int(value) for value in constants if value.isdigit()), default=1)


# ---- matrix products -----------------------------------------------------------------------------


def products(op: Op, types: dict[str, str], matrix_unit: int = 1) -> tuple[float, float]:
    """(FLOPs of a dot or convolution, the same with the summed axis filled to whole units)."""
    if op.code == "dot":
        flops, summed = _dot(op, types)
    else:
        flops, summed = _convolution(op, types)
    filled = math.ceil(summed / matrix_unit) * matrix_unit
    return flops, flops * filled / summed


def _dot(op: Op, types: dict[str, str]) -> tuple[float, int]:
    """(FLOPs, length of the summed axes) of a dot."""
    lhs = leaves(types[op.operands[0]])[0].shape
    axes = _group(r"lhs_contracting_dims=\{([\d,]*)\}", op.rest)
    summed = math.prod(lhs[int(axis)] for axis in axes.split(",") if axis)
    return 2 * math.prod(leaves(op.type)[0].shape) * summed, summed


def _convolution(op: Op, types: dict[str, str]) -> tuple[float, float]:
    """(FLOPs, length of the summed axes) of a convolution, as XLA writes many products."""
    out = leaves(op.type)[0].shape
    lhs, rhs = (leaves(types[operand])[0].shape for operand in op.operands[:2])
    labels = _group(r"dim_labels=(\S+?)(?:,|$)", op.rest)
    lhs_labels, rhs_labels, out_labels = re.split("_|->", labels)
    window = dict(re.findall(r"(\w+)=([\dx_-]+)", _group(r"window=\{([^}]*)\}", op.rest)))

    def setting(key: str, axis: int, default: str) -> str:
        return window[key].split("x")[axis] if key in window else default

    # pairs of a place and a window's element that meet, along each axis (the window has 0 first)
    pairs, kernel = 1, 1
    for axis, label in enumerate(sorted(x for x in lhs_labels if x.isdigit())):
        data = lhs[lhs_labels.index(label)]
        width = rhs[rhs_labels.index(label)]
        places = out[out_labels.index(label)]
        pad = int(setting("pad", axis, "0_0").split("_")[0])
        stride = int(setting("stride", axis, "1"))
        spread = int(setting("lhs_dilate", axis, "1"))
        dilate = int(setting("rhs_dilate", axis, "1"))
        last = (data - 1) * spread
        pairs *= sum(
            _meetings(places, last, element * dilate - pad, stride, spread)
            for element in range(width)
        )
        kernel *= width

    groups = int(_group(r"batch_group_count=(\d+)", op.rest, "1"))
    features = rhs[rhs_labels.index("i")]
    outputs = out[out_labels.index("b")] * out[out_labels.index("f")]
    return 2 * outputs * features * pairs / groups, features * kernel


def _meetings(places: int, last: int, offset: int, stride: int, spread: int) -> int:
    """At how many of `places` an element of a window meets data, not padding and no gap.

    At place p it stands at offset + p stride; data stand at 0, spread, 2 spread, .. last.
    """
    low, high = max(0, -(offset // stride)), min(places - 1, (last - offset) // stride)
    if spread == 1 or high < low:
        return max(0, high - low + 1)
    return sum((offset + place * stride) % spread == 0 for place in range(low, high + 1))


# ---- memory traffic ------------------------------------------------------------------------------


def traffic(op: Op, types: dict[str, str], program: Program) -> float:
    """Bytes that one run of `op` reads from HBM and writes there."""
    if op.code in FREE or op.code.endswith("-done"):
        return 0.0
    if op.code == "fusion":
        return _fusion_traffic(op, types, program)
    if op.code in ("copy-start", "slice-start"):
        # a slice's type begins with the operand
        out = leaves(op.type)[1 if op.code == "slice-start" else 0]
        source = leaves(types[op.operands[0]])[0]
        return out.bytes * (out.in_hbm + source.in_hbm)
    if op.code == "custom-call" and not _is_kernel(op):
        # XLA's own: buffers, views, and gathers done elsewhere on the chip
        free = re.search(r'"(AllocateBuffer|ConcatBitcast|Assume\w+)"', op.rest)
        return 0.0 if free else 2 * size(op.type)
    if op.code in SLICES:
        return hbm(op.type) + size(op.type) * (hbm(types[op.operands[0]]) > 0)
    if op.code == "dynamic-update-slice":
        return 2 * size(types[op.operands[1]]) * (hbm(op.type) > 0)
    return hbm(op.type) + sum(hbm(types[name]) for name in op.operands if name in types)


def _is_kernel(op: Op) -> bool:
    """Whether it is one of Pallas' kernels, not a call of XLA's own."""
    return op.code == "custom-call" and '"tpu_custom_call"' in op.rest


def _fusion_traffic(op: Op, types: dict[str, str], program: Program) -> float:
    """Bytes that a fused computation reads and writes: of arrays that it only cuts, the cuts."""
    inside, root = program.computations[called(op)], program.roots[called(op)]
    outputs = root.operands if root.code == "tuple" else (root.name,)

    # written: an array that is updated in place counts with what is changed
    total, updated = 0.0, set()
    for name, leaf in zip(outputs, leaves(op.type)):
        in_place = _update(name, inside, program)
        written, changed = in_place or (leaf.bytes, "")
        updated.add(changed)
        total += written * leaf.in_hbm

    # read
    parameters = _parameters(inside)
    for i, operand in enumerate(op.operands):
        whole = hbm(types[operand])
        if whole and i in parameters and parameters[i] not in updated:
            total += min(whole, _read(parameters[i], inside, program))
    return total


def _update(name: str, inside: dict[str, Op], program: Program) -> tuple[float, str] | None:
    """(bytes of what is changed of an array, the array before, if it need not be read whole) where
    `name` is an array updated in place, however deep in fusions; else None.
    """
    last = _source(name, inside)
    if last.code == "scatter":
        # what is added to is read and written
        return 2 * size(inside[last.operands[2]].type), _source(last.operands[0], inside).name
    if last.code == "dynamic-update-slice":
        # that no more is read, `_read` sees
        return size(inside[last.operands[1]].type), ""
    if last.code != "fusion":
        return None
    deeper, root = program.computations[called(last)], program.roots[called(last)]
    update = _update(root.name, deeper, program)
    if update is None:
        return None
    # a parameter there is an operand here
    written, before = update
    if before and deeper[before].code == "parameter":
        before = _source(last.operands[int(deeper[before].inside)], inside).name
    return written, before


def _source(name: str, inside: dict[str, Op]) -> Op:
    """The operation that made an array, looking through what moves nothing."""
    while inside[name].code in VIEWS and inside[name].operands:
        name = inside[name].operands[0]
    return inside[name]


def _parameters(inside: dict[str, Op]) -> dict[int, str]:
    """{number of a parameter: its name} of a computation."""
    return {int(op.inside): op.name for op in inside.values() if op.code == "parameter"}


def _handed_on(op: Op, program: Program) -> str:
    """The operand that a fusion hands on unchanged, as those of a fused matrix product are before
    it; none where it computes something.
    """
    inside, root = program.computations[called(op)], program.roots[called(op)]
    last = _source(root.name, inside)
    while last.code == "fusion" and _handed_on(last, program):
        last = _source(_handed_on(last, program), inside)
    return op.operands[int(last.inside)] if last.code == "parameter" else ""


def _read(name: str, inside: dict[str, Op], program: Program) -> float:
    """Bytes of the parameter `name` of a fused computation that it reads."""
    whole = size(inside[name].type)
    total = 0.0
    for op in inside.values():
        if name not in op.operands:
            continue
        if op.code in ("bitcast", "reshape"):
            total += _read(op.name, inside, program)
        elif op.code in SLICES and name == op.operands[0]:
            total += size(op.type)
        elif op.code == "fusion" and _handed_on(op, program) == name:
            # then it is read by what reads that
            total += _read(op.name, inside, program)
        elif op.code == "fusion":
            deeper = program.computations[called(op)]
            parameters = _parameters(deeper)
            for i, operand in enumerate(op.operands):
                if operand == name:
                    total += _read(parameters[i], deeper, program)
        elif op.code == "dynamic-update-slice" and name == op.operands[0]:
            # changed in place
            continue
        else:
            return whole
    return min(total, whole)


# ---- collectives ---------------------------------------------------------------------------------


def sent_bytes(kind: str, whole: float, devices: int) -> float:
    """Bytes that each device of a ring sends in a collective over `whole` bytes of its own."""
    factors = {
        # a sum goes round once in pieces, and its result once more
        "all-reduce": 2 * (devices - 1) / devices,
        "all-gather": devices - 1,
        "reduce-scatter": (devices - 1) / devices,
        "all-to-all": (devices - 1) / devices,
        "collective-permute": 1,
    }
    return whole * factors[kind]


def _group_size(op: Op, devices: int) -> int:
    """How many devices take part in a collective."""
    shape = re.search(r"replica_groups=\[(\d+),(\d+)\]", op.rest)
    if shape:
        return int(shape[2])
    first_group = _group(r"replica_groups=\{\{([\d,]+)\}", op.rest)
    return first_group.count(",") + 1 if first_group else devices


def _shapes(op: Op, types: dict[str, str]) -> str:
    """What a collective is about, like bf16[8,128], f32[4]."""
    arrays = []
    for name in op.operands:
        arrays += leaves(types.get(name, ""))
    return ", ".join(f"{a.dtype}[{','.join(map(str, a.shape))}]" for a in arrays)


# ---- components ----------------------------------------------------------------------------------


def _component_of(scopes: Iterable[str]) -> str | None:
    """The component that the first telling name stack says."""
    for scope in scopes:
        for part, pattern in SCOPES:
            if re.search(pattern, scope):
                return part
    return None


def _own_component(op: Op, program: Program) -> str | None:
    """The component that an operation's name stack, or that of what is fused into it, says."""
    fused = program.computations.get(called(op), {}).values()
    products_inside = [o.scope for o in fused if o.code in ("convolution", "dot")]
    scopes = [op.scope, *products_inside, *(o.scope for o in fused)]
    part = _component_of(scopes)
    if part is None and op.scope.count("/") > 1:
        return "other"
    return part


def _components(ops: dict[str, Op], inherited: str, program: Program) -> dict[str, str]:
    """{operation: component} of a computation.

    What the compiler added, such as copies, belongs to what reads it, else to what made it.
    """
    known = {op.name: _own_component(op, program) for op in ops.values()}
    readers: dict[str, list[str]] = {}
    for op in ops.values():
        for operand in op.operands:
            readers.setdefault(operand, []).append(op.name)

    # from the last to the first, so that a chain of copies belongs to who reads its end
    for op in reversed(ops.values()):
        if known[op.name] is None and op.code != "tuple":
            known[op.name] = _first_known(readers.get(op.name, ()), known)
    for op in ops.values():
        if known[op.name] is None:
            known[op.name] = _first_known(op.operands, known) or inherited
    return {name: part or inherited for name, part in known.items()}


def _first_known(names: Iterable[str], known: dict[str, str | None]) -> str | None:
    return next((known[name] for name in names if known.get(name)), None)


# ---- all of it -----------------------------------------------------------------------------------


def analyse(text: str, matrix_unit: int = 1, devices: int = 1) -> Analysis:
    """What one run of the program does on one device; devices: how many run it together."""
    counter = _Counter(parse(text), matrix_unit, devices)
    counter.walk(counter.program.entry, times=1, inherited="other")
    collectives = [
        Collective(kind, shape, part, times, sent)
        for (kind, shape, part), (times, sent) in counter.collectives.items()
    ]
    return Analysis(counter.components, counter.kernels, collectives)


class _Counter:
    """Walks through a program as it runs and adds up what it does."""

    def __init__(self, program: Program, matrix_unit: int, devices: int):
        self.program = program
        self.matrix_unit = matrix_unit
        self.devices = devices
        self.components = {name: Work() for name in COMPONENTS}
        self.kernels = {}
        # (kind, shape, component): (times, bytes sent)
        self.collectives = {}

    def walk(self, name: str, times: int, inherited: str, fused: str = ""):
        """Add what a computation does in `times` runs.

        inherited: the component of its caller. fused: names of the fusion that it is the inside of,
        whose traffic is counted outside.
        """
        ops = self.program.computations[name]
        types = {op.name: op.type for op in ops.values()}
        component = _components(ops, inherited, self.program)
        for op in ops.values():
            part = component[op.name]
            if op.code.removesuffix("-start") in COLLECTIVES:
                self._collective(op, types, part, times, fused)
                continue
            if op.code in ("dot", "convolution"):
                flops, busy = products(op, types, self.matrix_unit)
                self.components[part].add(times * flops, times * busy)
            if _is_kernel(op):
                self._kernel(op, times)
            if not fused:
                moved = traffic(op, types, self.program)
                self.components[part].add(bytes=times * moved)
            self._enter(op, part, times, fused)

    def _enter(self, op: Op, part: str, times: int, fused: str):
        """Walk through the computations that an operation calls."""
        if op.code == "while":
            turns = trip_count(op, self.program.computations)
            self.walk(called(op, "body"), times * turns, part, fused)
        elif op.code == "fusion":
            self.walk(called(op), times, part, f"{op.name} {called(op)}")
        elif op.code in ("call", "async-start"):
            self.walk(called(op, "to_apply") or called(op), times, part, fused)
        elif op.code == "conditional":
            branches = _group(r"branch_computations=\{([^}]*)\}", op.rest)
            for branch in re.findall(r"%([\w.-]+)", branches):
                self.walk(branch, times, part, fused)

    def _kernel(self, op: Op, times: int):
        """Count a kernel's runs; its operands are traffic, the rest is for who knows it."""
        pattern = r"(splash_mha_\w+?|flash_\w+?)(?:_no_residuals|_residuals)?\b"
        kernel = _group(pattern, f"{op.scope} {op.name}", default=op.name)
        self.kernels[kernel] = self.kernels.get(kernel, 0) + times

    def _collective(self, op: Op, types: dict[str, str], part: str, times: int, fused: str):
        """Count what a collective sends, and outside of fusions its traffic."""
        if not fused:
            moved = traffic(op, types, self.program)
            self.components["collectives"].add(bytes=times * moved)

        kind = op.code.removesuffix("-start")
        if kind == "all-reduce" and "scatter" in fused:
            # TPU compilers fuse the cut into the sum
            kind = "reduce-scatter"
        members = _group_size(op, self.devices)
        if members == 1 and kind != "collective-permute":
            return
        whole = sum(size(types[name]) for name in op.operands if name in types)
        key = (kind, _shapes(op, types), part)
        old_times, old_sent = self.collectives.get(key, (0, 0.0))
        sent = times * sent_bytes(kind, whole, members)
        self.collectives[key] = (old_times + times, old_sent + sent)
