"""The code of `msd.backends.compiled`: products with a few rows, as LLVM assembly.

A product is computed in tiles: `rows` inputs times `outputs` rows of the weight, each of whose sums stays in a vector
register until the last column, so that a weight is read from memory once for all inputs (Goto and van de Geijn, ACM
TOMS 2008, section 4, for matrices of any size). The next rows of the weight are fetched ahead. The order in which
an output is summed does not depend on the tile, so neither does its value.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

FIELDS = ("x", "y", "columns", "full", "smaller", "weights")  # of a call; then `WEIGHT` for each weight
WEIGHT = ("weight", "outputs", "column")
ADDRESSES = ("x", "y", "weight")


@dataclass(frozen=True)
class Registers:
    """What a CPU has. lanes: floats in a vector. sums: vectors for sums, which leaves some for inputs and weights.

    rows: the most inputs of a tile.
    """

    lanes: int
    sums: int
    rows: int

    def outputs(self, rows: int) -> int:
        """Returns the number of outputs of a tile of so many inputs."""
        return min(3, self.sums // rows)


def assembly(registers: Registers, columns: int, stored: str = "float") -> str:
    """Returns the functions `product_1` to `product_{registers.rows}` for inputs with so many columns.

    stored: LLVM's type of the weights, "float" or "half"; inputs, products, sums and outputs are floats.

    `product_m` takes the address of int64 fields: `FIELDS`, then `WEIGHT` for each weight. Its inputs x [rows, columns]
    are `full` groups of m and then `smaller` ones of m - 1; y [rows, `columns`] has the outputs of a weight from its
    `column`. Every thread of a team (OpenMP) computes its share of each weight's outputs.
    """
    vector = f"<{registers.lanes} x float>"
    parts = [
        f"declare {vector} @llvm.fma.v{registers.lanes}f32({vector}, {vector}, {vector})",
        "declare void @llvm.prefetch.p0(ptr, i32, i32, i32)",
        "declare i32 @omp_get_thread_num()",
        "declare i32 @omp_get_num_threads()",
    ]
    sizes = {(rows, 1) for rows in range(1, registers.rows + 1)}
    for rows in range(1, registers.rows + 1):
        sizes |= {(n, registers.outputs(rows)) for n in (rows, rows - 1) if n}
    parts += [_tile(rows, outputs, columns, registers.lanes, stored) for rows, outputs in sorted(sizes)]
    for rows in range(1, registers.rows + 1):
        outputs = registers.outputs(rows)
        parts += [_groups(rows, n, columns) for n in sorted({outputs, 1})]
        parts.append(_product(rows, outputs, columns, stored))
    return "\n".join(parts)


def _tile(rows: int, outputs: int, columns: int, lanes: int, stored: str) -> str:
    """Returns `tile_{rows}_{outputs}(y, stride, x, w)`, which writes [rows, outputs] of y."""
    vector, conversion = f"<{lanes} x float>", "bitcast" if stored == "float" else "fpext"
    cells = [(i, j) for i in range(rows) for j in range(outputs)]
    lines = [
        f"define internal void @tile_{rows}_{outputs}(ptr %y, i64 %stride, ptr %x, ptr %w) alwaysinline {{",
        "entry:",
        "  br label %loop",
        "loop:",
        "  %k = phi i64 [0, %entry], [%next, %loop]",
        *(f"  %before_{i}_{j} = phi {vector} [zeroinitializer, %entry], [%sum_{i}_{j}, %loop]" for i, j in cells),
    ]
    for j in range(outputs):
        lines += [
            f"  %w_at_{j} = add i64 %k, {j * columns}",
            f"  %w_address_{j} = getelementptr {stored}, ptr %w, i64 %w_at_{j}",
            f"  %w_stored_{j} = load <{lanes} x {stored}>, ptr %w_address_{j}, align 2",
            f"  %w_{j} = {conversion} <{lanes} x {stored}> %w_stored_{j} to {vector}",
            f"  %ahead_{j} = getelementptr {stored}, ptr %w_address_{j}, i64 {outputs * columns}",
            f"  call void @llvm.prefetch.p0(ptr %ahead_{j}, i32 0, i32 3, i32 1)",
        ]
    for i in range(rows):
        lines += [
            f"  %x_at_{i} = add i64 %k, {i * columns}",
            f"  %x_address_{i} = getelementptr float, ptr %x, i64 %x_at_{i}",
            f"  %x_{i} = load {vector}, ptr %x_address_{i}, align 4",
        ]
    lines += [
        f"  %sum_{i}_{j} = call {vector} @llvm.fma.v{lanes}f32"
        f"({vector} %x_{i}, {vector} %w_{j}, {vector} %before_{i}_{j})"
        for i, j in cells
    ]
    lines += [
        f"  %next = add nuw nsw i64 %k, {lanes}",
        f"  %more = icmp ult i64 %next, {columns}",
        "  br i1 %more, label %loop, label %end",
        "end:",
    ]
    for start in range(0, len(cells), lanes):
        some = cells[start : start + lanes]
        lines += _added([f"%sum_{i}_{j}" for i, j in some], lanes, f"total_{start}")
        for lane, (i, j) in enumerate(some):
            lines += [
                f"  %y_{i}_{j} = extractelement {vector} %total_{start}, i32 {lane}",
                f"  %row_{i}_{j} = mul i64 %stride, {i}",
                f"  %y_at_{i}_{j} = add i64 %row_{i}_{j}, {j}",
                f"  %y_address_{i}_{j} = getelementptr float, ptr %y, i64 %y_at_{i}_{j}",
                f"  store float %y_{i}_{j}, ptr %y_address_{i}_{j}, align 4",
            ]
    return "\n".join([*lines, "  ret void", "}"])


def _added(vectors: list[str], lanes: int, name: str) -> Iterator[str]:
    """Yields code after which lane i of `name` is the sum of the lanes of `vectors[i]`.

    Each round adds the second half of what is left of every sum to the first half, and joins two vectors to one.
    """
    vector, left, each, number = f"<{lanes} x float>", lanes, 1, 0
    while left > 1:
        if len(vectors) % 2:
            vectors = [*vectors, "zeroinitializer"]
        first = [part * left + lane for part in range(2 * each) for lane in range(left // 2)]
        second = [lane + left // 2 for lane in first]
        joined = []
        for one, other in zip(vectors[::2], vectors[1::2], strict=True):
            last = left == 2
            own = name if last else f"{name}_{number}"
            halves = ((f"{name}_first_{number}", first), (f"{name}_second_{number}", second))
            for half, chosen in halves:
                mask = ", ".join(f"i32 {lane}" for lane in chosen)
                yield f"  %{half} = shufflevector {vector} {one}, {vector} {other}, <{lanes} x i32> <{mask}>"
            yield f"  %{own} = fadd {vector} %{halves[0][0]}, %{halves[1][0]}"
            joined.append(f"%{own}")
            number += 1
        vectors, left, each = joined, left // 2, 2 * each


def _groups(rows: int, outputs: int, columns: int) -> str:
    """Returns `groups_{rows}_{outputs}(y, stride, x, w, full, smaller)`: some outputs of all inputs, tile by tile."""
    lines = [
        f"define internal void @groups_{rows}_{outputs}"
        "(ptr %y, i64 %stride, ptr %x, ptr %w, i64 %full, i64 %smaller) {",
        "entry:",
    ]
    sizes = {"full": rows} | ({"smaller": rows - 1} if rows > 1 else {})
    for name, size in sizes.items():
        tile = [
            f"  %{name}_y_at = mul i64 %{name}_i, %{name}_step",
            f"  %{name}_y = getelementptr float, ptr %y_{name}, i64 %{name}_y_at",
            f"  %{name}_x_at = mul i64 %{name}_i, {size * columns}",
            f"  %{name}_x = getelementptr float, ptr %x_{name}, i64 %{name}_x_at",
            f"  call void @tile_{size}_{outputs}(ptr %{name}_y, i64 %stride, ptr %{name}_x, ptr %w)",
        ]
        first = f"mul i64 %full, {rows}" if name == "smaller" else "add i64 0, 0"  # the first of these inputs
        lines += [
            f"  %{name}_first = {first}",
            f"  %{name}_y_first = mul i64 %{name}_first, %stride",
            f"  %y_{name} = getelementptr float, ptr %y, i64 %{name}_y_first",
            f"  %{name}_x_first = mul i64 %{name}_first, {columns}",
            f"  %x_{name} = getelementptr float, ptr %x, i64 %{name}_x_first",
            f"  %{name}_step = mul i64 %stride, {size}",
            *_loop(f"{name}_i", "entry" if name == "full" else "full_i_end", "0", f"%{name}", 1, tile),
        ]
    return "\n".join([*lines, "  ret void", "}"])


def _product(rows: int, outputs: int, columns: int, stored: str) -> str:
    """Returns `product_{rows}(call)` (see `assembly`): this thread's outputs of each weight, some at a time."""

    def computed(name: str, count: int) -> Sequence[str]:
        return [
            f"  %{name}_y = getelementptr float, ptr %own_y, i64 %{name}",
            f"  %{name}_at = mul i64 %{name}, {columns}",
            f"  %{name}_w = getelementptr {stored}, ptr %weight, i64 %{name}_at",
            f"  call void @groups_{rows}_{count}"
            f"(ptr %{name}_y, i64 %columns, ptr %x, ptr %{name}_w, i64 %full, i64 %smaller)",
        ]

    each_weight = [
        f"  %i_at = mul i64 %i, {len(WEIGHT)}",
        f"  %fields_at = add i64 %i_at, {len(FIELDS)}",
        "  %fields = getelementptr i64, ptr %call, i64 %fields_at",
        *_loaded("fields", WEIGHT),
        "  %begin_of_all = mul i64 %outputs, %thread",
        "  %begin = udiv i64 %begin_of_all, %threads",
        "  %stop_of_all = mul i64 %outputs, %thread_after",
        "  %stop = udiv i64 %stop_of_all, %threads",
        "  %span = sub i64 %stop, %begin",
        f"  %rest = urem i64 %span, {outputs}",
        "  %whole = sub i64 %stop, %rest",
        "  %own_y = getelementptr float, ptr %y, i64 %column",
        *_loop("many", "i_body", "%begin", "%whole", outputs, computed("many", outputs)),
        *_loop("one", "many_end", "%whole", "%stop", 1, computed("one", 1)),
    ]
    lines = [
        f"define void @product_{rows}(ptr %call) {{",
        "entry:",
        *_loaded("call", FIELDS),
        "  %thread_32 = call i32 @omp_get_thread_num()",
        "  %threads_32 = call i32 @omp_get_num_threads()",
        "  %thread = zext i32 %thread_32 to i64",
        "  %threads = zext i32 %threads_32 to i64",
        "  %thread_after = add i64 %thread, 1",
        *_loop("i", "entry", "0", "%weights", 1, each_weight, last="one_end"),
        "  ret void",
        "}",
    ]
    return "\n".join(lines)


def _loaded(place: str, names: Sequence[str]) -> Iterator[str]:
    """Yields code that loads consecutive fields at the address `place`."""
    for at, name in enumerate(names):
        yield f"  %{name}_address = getelementptr i64, ptr %{place}, i64 {at}"
        yield f"  %{name} = load {'ptr' if name in ADDRESSES else 'i64'}, ptr %{name}_address"


def _loop(
    name: str, before: str, start: str, stop: str, step: int, body: Sequence[str], last: str | None = None
) -> Sequence[str]:
    """Returns code that runs `body` with %name from `start` up to before `stop`, and then goes on.

    before: the block that this code continues. last: the one in which `body` ends, if it has loops of its own.
    """
    return [
        f"  br label %{name}_head",
        f"{name}_head:",
        f"  %{name} = phi i64 [{start}, %{before}], [%{name}_next, %{last or name + '_body'}]",
        f"  %{name}_more = icmp ult i64 %{name}, {stop}",
        f"  br i1 %{name}_more, label %{name}_body, label %{name}_end",
        f"{name}_body:",
        *body,
        f"  %{name}_next = add i64 %{name}, {step}",
        f"  br label %{name}_head",
        f"{name}_end:",
    ]
