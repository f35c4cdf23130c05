"""What a compiled TPU program does, read from its optimised HLO text: products, memory traffic and collectives, by component.

XLA's own cost analysis counts the body of a loop once and takes on-chip buffers for memory. Here loops count as often as they run, and only
buffers in HBM (memory space 0 of a layout) are traffic. Kernels are opaque: how often each runs is returned, for others to account.
"""

import math
import re
from typing import NamedTuple

COMPONENTS = ("embedding", "attention", "mlp", "head+loss", "optimizer", "collectives", "other")
# which component a jax name stack belongs to, the first that matches; "other" is norms, residual sums and gradient sums
SCOPES = (
    ("optimizer", r"\boptimizer\b"),
    ("head+loss", r"\b(loss|head)\b"),
    ("attention", r"\battn\b"),
    ("mlp", r"\bmlp\b"),
    ("embedding", r"\bembed\b"),
)
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
SLICES = {"dynamic-slice", "slice", "gather"}


class Op(NamedTuple):
    name: str
    type: str
    code: str
    operands: tuple[str, ...]
    # what stands in its parentheses: operands, a constant's value, a parameter's number
    inside: str
    rest: str  # attributes behind them

    @property
    def scope(self) -> str:
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found[1] if found else ""


class Collective(NamedTuple):
    """`bytes` is what each device sends over the network in one step, all `times` together; at best, as in a ring."""

    kind: str
    shape: str
    component: str
    times: int
    bytes: float


def _closing(text: str, start: int) -> int:
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if not depth:
            return i
    raise ValueError("HLO text ends inside parentheses")


def _op(line: str) -> tuple[Op, bool]:
    left, _, right = line.partition(" = ")
    end = _closing(right, 0) + 1 if right.startswith("(") else right.index(" ")
    code, paren = re.match(r" *([\w-]+)(?=\()", right[end:]), right.index("(", end)
    close = _closing(right, paren)
    name = left.replace("ROOT", "").strip(" %")
    return Op(
        name,
        right[:end],
        code[1],
        tuple(re.findall(r"%([\w.-]+)", right[paren:close])),
        right[paren + 1 : close],
        right[close + 1 :],
    ), "ROOT" in left


def parse(text: str) -> tuple[dict[str, dict[str, Op]], dict[str, Op], str]:
    """(computations as {op name: Op}, root Op of each, name of the entry computation)."""
    computations, roots, entry, lines = {}, {}, "", None
    for line in text.splitlines():
        if lines is None:
            if head := re.match(r"(ENTRY )?%?([\w.-]+) .*\{$", line):
                lines, here = [], head[2]
                entry = here if head[1] else entry
        elif line == "}" or line.startswith("}, execution_thread"):
            ops = [_op(x) for x in lines]
            computations[here] = {op.name: op for op, _ in ops}
            roots[here] = next((op for op, root in ops if root), ops[-1][0])
            lines = None
        elif re.match(r"\s+(ROOT )?%?[\w.-]+ = ", line):
            lines.append(line)
        elif lines:
            lines[-1] += line  # a kernel's attributes hold line breaks
    return computations, roots, entry


def leaves(type_: str) -> list[tuple[str, tuple[int, ...], float, bool]]:
    """(dtype, shape, bytes, whether in HBM) of each array of a type."""
    out = []
    for dtype, dims, layout in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\](\{[^}]*\})?", type_):
        if dtype in ITEMSIZE:
            shape = tuple(int(d) for d in dims.split(",") if d)
            out.append((dtype, shape, math.prod(shape) * ITEMSIZE[dtype], "S(" not in layout))
    return out


def hbm(type_: str) -> float:
    """Bytes of a type that lie in HBM."""
    return sum(size for _, _, size, outside in leaves(type_) if outside)


def size(type_: str) -> float:
    """Bytes of a type, wherever it lies."""
    return sum(leaf[2] for leaf in leaves(type_))


def _called(op: Op, key: str = "calls") -> str:
    found = re.search(rf"\b{key}=%?([\w.-]+)", op.rest)
    return found[1] if found else ""


def trip_count(op: Op, computations, roots) -> int:
    """How often a `while` runs: what its counter, which starts at 0 in XLA's loops from jax, is compared with."""
    if known := re.search(r'known_trip_count[^\d]*"?n"?:"?(\d+)', op.rest):
        return int(known[1])
    condition = computations[_called(op, "condition")]
    return max(
        (int(o.inside) for o in condition.values() if o.code == "constant" and o.inside.isdigit()),
        default=1,
    )


def _met(places: int, last: int, offset: int, stride: int, spread: int) -> int:
    """At how many of `places` a window's element meets data, that is neither padding nor a gap: offset + p stride in 0, spread, .. last."""
    low, high = max(0, -(offset // stride)), min(places - 1, (last - offset) // stride)
    if spread == 1 or high < low:
        return max(0, high - low + 1)
    return sum((offset + p * stride) % spread == 0 for p in range(low, high + 1))


def products(op: Op, types: dict[str, str], matrix_unit: int = 1) -> tuple[float, float]:
    """(FLOPs of a dot or convolution, the same with the summed axis filled up to whole matrix units)."""
    out, lhs, rhs = (
        leaves(t)[0][1] for t in (op.type, types[op.operands[0]], types[op.operands[1]])
    )
    if op.code == "dot":
        summed = math.prod(
            lhs[int(i)]
            for i in re.search(r"lhs_contracting_dims=\{([\d,]*)\}", op.rest)[1].split(",")
            if i
        )
        flops = 2 * math.prod(out) * summed
    else:
        a, b, c = re.match(
            r"(\w+)_(\w+)->(\w+)", re.search(r"dim_labels=(\S+?)(?:,|$)", op.rest)[1]
        ).groups()
        window = dict(
            re.findall(
                r"(\w+)=([\dx_-]+)", (re.search(r"window=\{([^}]*)\}", op.rest) or [0, ""])[1]
            )
        )
        # the window lists axis 0 first
        spatial, pairs, kernel = sorted(x for x in a if x.isdigit()), 1, 1
        pick = lambda key, i, default: window[key].split("x")[i] if key in window else default
        for i, x in enumerate(spatial):
            n, k, o = lhs[a.index(x)], rhs[b.index(x)], out[c.index(x)]
            pad, stride = int(str(pick("pad", i, "0_0")).split("_")[0]), int(pick("stride", i, 1))
            spread, dilate = int(pick("lhs_dilate", i, 1)), int(pick("rhs_dilate", i, 1))
            pairs *= sum(
                _met(o, (n - 1) * spread, q * dilate - pad, stride, spread) for q in range(k)
            )
            kernel *= k
        groups = int((re.search(r"batch_group_count=(\d+)", op.rest) or [0, 1])[1])
        summed = rhs[b.index("i")]
        flops = 2 * out[c.index("b")] * out[c.index("f")] * summed * pairs / groups
        summed *= kernel
    return flops, flops * math.ceil(summed / matrix_unit) * matrix_unit / summed


def _read(name: str, inside: dict[str, Op], computations) -> float:
    """Bytes of `name`, a parameter of a fused computation, that it reads: of an array that is only cut, the cuts."""
    total = 0.0
    for op in inside.values():
        if name not in op.operands:
            continue
        if op.code in ("bitcast", "reshape"):
            total += _read(op.name, inside, computations)
        elif op.code in SLICES and name == op.operands[0]:
            total += size(op.type)
        elif op.code == "fusion":
            deeper = computations[_called(op)]
            number = {int(o.inside): o.name for o in deeper.values() if o.code == "parameter"}
            total += sum(
                _read(number[i], deeper, computations)
                for i, o in enumerate(op.operands)
                if o == name
            )
        elif op.code == "dynamic-update-slice" and name == op.operands[0]:
            pass  # changed in place
        else:
            return size(inside[name].type)
    return min(total, size(inside[name].type))


def _fusion_traffic(op: Op, types, computations, roots) -> float:
    inside, root = computations[_called(op)], roots[_called(op)]

    def source(name):  # through what moves nothing
        while (
            inside[name].code in ("bitcast", "copy", "convert", "reshape") and inside[name].operands
        ):
            name = inside[name].operands[0]
        return inside[name]

    total, updated = 0.0, set()
    outs = root.operands if root.code == "tuple" else (root.name,)
    for name, (_, _, bytes_, outside) in zip(outs, leaves(op.type)):
        last = source(name)
        if last.code == "scatter":
            updated.add(source(last.operands[0]).name)
            bytes_ = 2 * size(inside[last.operands[2]].type)  # what is added to is read and written
        elif last.code == "dynamic-update-slice":
            bytes_ = size(inside[last.operands[1]].type)
        total += bytes_ * outside
    number = {int(o.inside): o.name for o in inside.values() if o.code == "parameter"}
    for i, operand in enumerate(op.operands):
        if (whole := hbm(types[operand])) and i in number and number[i] not in updated:
            total += min(whole, _read(number[i], inside, computations))
    return total


def _traffic(op: Op, types, computations, roots) -> float:
    """Bytes that one run of `op` reads from HBM and writes there."""
    if op.code in FREE or op.code.endswith("-done"):
        return 0.0
    if op.code == "fusion":
        return _fusion_traffic(op, types, computations, roots)
    if op.code in ("copy-start", "slice-start"):
        out, source = leaves(op.type)[0], leaves(types[op.operands[0]])[0]
        if op.code == "slice-start":  # its type begins with the operand
            out = leaves(op.type)[1]
        return out[2] * out[3] + out[2] * source[3]
    # XLA's own: buffers, views, and gathers done elsewhere on the chip
    if op.code == "custom-call" and '"tpu_custom_call"' not in op.rest:
        return (
            0.0
            if re.search(r'"(AllocateBuffer|ConcatBitcast|Assume\w+)"', op.rest)
            else 2 * size(op.type)
        )
    if op.code in SLICES:
        return hbm(op.type) + size(op.type) * (hbm(types[op.operands[0]]) > 0)
    if op.code == "dynamic-update-slice":
        return 2 * size(types[op.operands[1]]) * (hbm(op.type) > 0)
    return hbm(op.type) + sum(hbm(types[o]) for o in op.operands if o in types)


def _group_size(op: Op, devices: int) -> int:
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]", op.rest):
        return int(found[2])
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", op.rest):
        return found[1].count(",") + 1
    return devices


def analyse(text: str, matrix_unit: int = 1, devices: int = 1) -> dict:
    """What one run of the program does on one device.

    {"components": {component: {"flops", "busy", "bytes"}}, "collectives": [Collective], "kernels": {kernel name: runs}}. flops are those of
    matrix products; busy the same with the summed axis filled up to whole matrix units; bytes are HBM traffic.
    """
    computations, roots, entry = parse(text)
    parts = {name: dict(flops=0.0, busy=0.0, bytes=0.0) for name in COMPONENTS}
    kernels, collectives = {}, {}

    def own(op):
        """The component that an op's name stack, or that of what is fused into it, says."""
        inner = computations.get(_called(op), {}).values()
        for scope in [
            op.scope,
            *(o.scope for o in inner if o.code in ("convolution", "dot")),
            *(o.scope for o in inner),
        ]:
            for part, pattern in SCOPES:
                if re.search(pattern, scope):
                    return part
        return "other" if op.scope.count("/") > 1 else None

    def components(ops, inherited):
        """{op name: component}: what the compiler added by itself, such as copies, belongs to what reads it, else to what made it."""
        known = {op.name: own(op) for op in ops.values()}
        users = {}
        for op in ops.values():
            for operand in op.operands:
                users.setdefault(operand, []).append(op.name)
        for op in reversed(list(ops.values())):
            if known[op.name] is None and op.code != "tuple":
                known[op.name] = next(
                    (known[u] for u in users.get(op.name, ()) if known.get(u)), None
                )
        for op in ops.values():
            if known[op.name] is None:
                known[op.name] = (
                    next((known[o] for o in op.operands if known.get(o)), None) or inherited
                )
        return known

    def collective(op, types, part, times, inside=""):
        kind = op.code.removesuffix("-start")
        if kind == "all-reduce" and "scatter" in inside:
            kind = "reduce-scatter"  # TPU compilers fuse the cut into the sum
        n = _group_size(op, devices)
        whole = sum(size(types[o]) for o in op.operands if o in types)
        if n > 1 or kind == "collective-permute":
            sent = {
                "all-reduce": 2 * whole * (n - 1) / n,
                "all-gather": whole * (n - 1),
                "reduce-scatter": whole * (n - 1) / n,
                "all-to-all": whole * (n - 1) / n,
            }.get(kind, whole)
            shapes = ", ".join(
                f"{d}[{','.join(map(str, s))}]"
                for o in op.operands
                if o in types
                for d, s, _, _ in leaves(types[o])
            )
            key = (kind, shapes, part)
            old = collectives.get(key, (0, 0.0))
            collectives[key] = (old[0] + times, old[1] + sent * times)

    def walk(name, times, inherited, fused=""):
        ops = computations[name]
        types = {o.name: o.type for o in ops.values()}
        owner = components(ops, inherited)
        for op in ops.values():
            part = owner[op.name]
            if op.code in ("dot", "convolution"):
                flops, busy = products(op, types, matrix_unit)
                parts[part]["flops"] += times * flops
                parts[part]["busy"] += times * busy
            if op.code.removesuffix("-start") in COLLECTIVES and not op.code.endswith("-done"):
                collective(op, types, part, times, fused)
                if not fused:
                    parts["collectives"]["bytes"] += times * _traffic(
                        op, types, computations, roots
                    )
                continue
            if op.code == "custom-call" and '"tpu_custom_call"' in op.rest:
                kernel = re.search(
                    r"(splash_mha_\w+?|flash_\w+?)(?:_no_residuals|_residuals)?\b",
                    op.scope + " " + op.name,
                )
                kernel = kernel[1] if kernel else op.name
                # its operands are traffic; who knows it accounts for the rest
                kernels[kernel] = kernels.get(kernel, 0) + times
            if not fused:
                parts[part]["bytes"] += times * _traffic(op, types, computations, roots)
            if op.code == "while":
                walk(_called(op, "body"), times * trip_count(op, computations, roots), part, fused)
            elif op.code == "fusion":
                walk(_called(op), times, part, f"{op.name} {_called(op)}")
            elif op.code in ("call", "async-start"):
                walk(_called(op, "to_apply") or _called(op), times, part, fused)
            elif op.code == "conditional":
                for branch in re.findall(
                    r"%([\w.-]+)",
                    (re.search(r"branch_computations=\{([^}]*)\}", op.rest) or [0, ""])[1],
                ):
                    walk(branch, times, part, fused)

    walk(entry, 1, "other")
    return dict(
        components=parts,
        kernels=kernels,
        collectives=[
            Collective(kind, shape, part, *value)
            for (kind, shape, part), value in collectives.items()
        ],
    )
