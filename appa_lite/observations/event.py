"""Events: text such as ``area_mean(rain, box) > 30`` to a functional of fields and a threshold, without executing anything.

Expressions are those of arithmetic, over three kinds of values: fields (a variable), series (a number a frame) and
numbers (one for the whole period).

    rain, u * u + v * v, sqrt(...), abs(...)        fields; any kind may be combined with numbers
    area_mean(f, box), max(f, box), min(f, box)     fields to series; without a box, the whole domain
    fraction(f > s, box), at(f, y, x)               share of the area; the value at the nearest cell
    time_mean(s), time_sum(s), time_max(s), time_min(s), first(s), last(s)      series to numbers
    duration(s > 3), spell(s > 3)                   hours in all, and the longest stretch of them
    hypot(u, v)                                     speed

A series that is compared with the threshold stands for its largest value over the period (smallest, if below it): the
event happens at some time. A box is ``box(y0, y1, x0, x1)`` in the coordinates of the grid, or a name.
"""

import ast
import difflib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from appa_lite.core.errors import UserError
from appa_lite.core.fields import FieldSpec

OPERATORS = {ast.Add: torch.add, ast.Sub: torch.sub, ast.Mult: torch.mul, ast.Div: torch.div}
TIME = {
    "time_mean": lambda s: s.mean(1),
    "time_sum": lambda s: s.sum(1),
    "time_max": lambda s: s.amax(1),
    "time_min": lambda s: s.amin(1),
    "first": lambda s: s[:, 0],
    "last": lambda s: s[:, -1],
}
SPACE = ("area_mean", "max", "min", "fraction")
SPELLS = ("duration", "spell")
POINTWISE = {"sqrt": (1, lambda v: v.clamp(min=0).sqrt()), "abs": (1, torch.abs), "hypot": (2, torch.hypot)}
FUNCTIONS = (*SPACE, "at", *TIME, *SPELLS, *POINTWISE)


@dataclass(frozen=True)
class Value:
    """A compiled expression: fields (B, T, C, H, W) -> (B, T, H, W), (B, T) or (B,); numbers of the text are (1,)."""

    kind: str  #: field, series or number
    compute: Callable[[Tensor], Tensor]
    flag: bool = False  #: of zeros and ones, the outcome of a comparison


class Event:
    """S(x) > s, or < s, for fields x (B, T, C, H, W) in physical units.

    ``functional`` is S, with its sign changed for an event that lies below, and ``threshold`` is s likewise, so that the
    event is always S > s; None where the text has no comparison.

    Args:
        text: of the event; spec: of the fields; boxes: by name, (y0, y1, x0, x1), or (x0, x1) on a ring;
        frames: of the period, that the event is looked for in.

    Raises:
        UserError: text that is no event of these fields.
    """

    def __init__(self, text: str, spec: FieldSpec, boxes: Mapping[str, Sequence[float]] | None = None, frames: slice = slice(None)):
        self.text, self.spec, self.boxes, self.frames = str(text).strip(), spec, dict(boxes or {}), frames
        try:
            tree = ast.parse(self.text, mode="eval").body
        except (SyntaxError, ValueError, RecursionError):
            raise UserError(f"event='{self.text}' is not an expression: expected such as 'area_mean({spec.names[0]}) > 30'") from None
        left, self.above, self.threshold = tree, True, None
        if isinstance(tree, ast.Compare):
            left, right, self.above = self._sides(tree)
            self.threshold = self._constant(right, "the threshold") * (1 if self.above else -1)
        value = self._value(left)
        if value.kind == "field":
            raise UserError(
                f"event='{self.text}' compares a whole field: say which part, such as max({ast.unparse(left)}, box) or area_mean"
            )
        self.kind, self._compute, self.expression = value.kind, value.compute, ast.unparse(left)

    def functional(self, fields: Tensor) -> Tensor:
        """S (B,) of fields (B, T, C, H, W): to be exceeded, whichever side of the threshold the event lies on."""
        found = self._compute(fields[:, self.frames])
        found = found if self.above else -found
        found = found.amax(1) if self.kind == "series" else found
        return found.expand(len(fields))

    @property
    def when(self) -> str:
        """When the event is to happen, in words that follow its text."""
        several = self.frames.stop is None or self.frames.stop - (self.frames.start or 0) > 1
        return " at some time of the period" if self.kind == "series" and several else ""

    @property
    def variable(self) -> str:
        """The variable that the text names first."""
        names = [entry.name for entry in (*self.spec.variables, *self.spec.derived)]
        places = [node for node in ast.walk(ast.parse(self.expression)) if isinstance(node, ast.Name) and node.id in names]
        return min(places, key=lambda node: (node.lineno, node.col_offset)).id

    def scene(self, fields: Tensor) -> Tensor:
        """That variable (B, H, W) at the frame where the series is furthest out, or its mean over the frames of the event."""
        inside = fields[:, self.frames]
        value = self.spec.evaluate(inside, self.variable)
        if self.kind != "series":
            return value.mean(1)
        found = self._compute(inside).expand(inside.shape[:2])
        return value[torch.arange(len(value)), (found if self.above else -found).argmax(1)]

    # Compilation

    def _sides(self, tree: ast.Compare) -> tuple[ast.expr, ast.expr, bool]:
        if len(tree.ops) != 1 or not isinstance(tree.ops[0], ast.Gt | ast.GtE | ast.Lt | ast.LtE):
            raise UserError(f"'{ast.unparse(tree)}': expected one comparison, > or <")
        return tree.left, tree.comparators[0], isinstance(tree.ops[0], ast.Gt | ast.GtE)

    def _constant(self, node: ast.expr, what: str) -> float:
        sign = -1 if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) else 1
        inner = node.operand if isinstance(node, ast.UnaryOp) else node
        if not (isinstance(inner, ast.Constant) and type(inner.value) in (int, float) and math.isfinite(inner.value)):
            raise UserError(f"event='{self.text}': {what} is a number, found '{ast.unparse(node)}'")
        return sign * float(inner.value)

    def _value(self, node: ast.expr) -> Value:
        if isinstance(node, ast.Constant):
            number = self._constant(node, "a constant")
            return Value("number", lambda x: x.new_full((1,), number))
        if isinstance(node, ast.Name):
            return self._variable(node.id)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            inner = self._value(node.operand)
            return Value(inner.kind, lambda x: -inner.compute(x))
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            return self._combine(OPERATORS[type(node.op)], [self._value(node.left), self._value(node.right)], node)
        if isinstance(node, ast.Compare):
            left, right, above = self._sides(node)
            value, limit = self._value(left), self._constant(right, "a limit")
            return Value(value.kind, lambda x: ((value.compute(x) > limit) if above else (value.compute(x) < limit)).to(x), True)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
            return self._call(node.func.id, node)
        raise UserError(f"event='{self.text}': '{ast.unparse(node)}' is not understood: known functions are {', '.join(FUNCTIONS)}")

    def _variable(self, name: str) -> Value:
        known = [entry.name for entry in (*self.spec.variables, *self.spec.derived)]
        if name not in known:
            raise UserError(f"event='{self.text}': " + unknown("variable", name, known))
        return Value("field", lambda x: self.spec.evaluate(x, name))

    def _combine(self, function: Callable[..., Tensor], values: list[Value], node: ast.expr) -> Value:
        kinds = {value.kind for value in values if value.kind != "number"}
        if len(kinds) > 1:
            raise UserError(f"event='{self.text}': '{ast.unparse(node)}' combines a field and a series: take its area_mean first")
        kind = kinds.pop() if kinds else "number"
        axes = {"field": 4, "series": 2, "number": 1}[kind]
        return Value(kind, lambda x: function(*(_widen(value.compute(x), axes) for value in values)))

    def _call(self, name: str, node: ast.Call) -> Value:
        if name not in FUNCTIONS:
            raise UserError(f"event='{self.text}': " + unknown("function", name, FUNCTIONS))
        if name in POINTWISE:
            count, function = POINTWISE[name]
            self._count(node, count, count)
            return self._combine(function, [self._value(a) for a in node.args], node)
        if name == "at":
            self._count(node, 2 if self.spec.grid.shape[0] == 1 else 3, 3)
            value = self._of_kind("field", node)
            row, column = self._nearest([self._constant(a, "a place") for a in node.args[1:]])
            return Value("series", lambda x: value.compute(x)[..., row, column])
        if name in SPACE:
            self._count(node, 1, 2)
            value = self._of_kind("field", node, name == "fraction")
            return Value("series", _over_space(name, value.compute, self._cells(node.args[1] if len(node.args) > 1 else None)))
        self._count(node, 1, 1)
        value = self._of_kind("series", node, name in SPELLS)
        if name in TIME:
            return Value("number", lambda x: TIME[name](value.compute(x)))
        hours = self.spec.step / 3600
        return Value("number", lambda x: hours * (value.compute(x).sum(1) if name == "duration" else longest(value.compute(x))))

    def _count(self, node: ast.Call, low: int, high: int) -> None:
        if not low <= len(node.args) <= high:
            wanted = str(low) if low == high else f"{low} to {high}"
            raise UserError(f"event='{self.text}': '{ast.unparse(node)}' takes {wanted} arguments, found {len(node.args)}")

    def _of_kind(self, kind: str, node: ast.Call, flag: bool = False) -> Value:
        value, text = self._value(node.args[0]), ast.unparse(node.args[0])
        if value.kind != kind:
            raise UserError(f"event='{self.text}': '{node.func.id}' is of a {kind}, but '{text}' is a {value.kind}")
        if value.flag != flag:
            expected = f"a condition such as {text} > 3" if flag else f"values, but '{text}' is a condition"
            raise UserError(f"event='{self.text}': '{node.func.id}' is of {expected}")
        return value

    # Places

    def _cells(self, node: ast.expr | None) -> Tensor:
        """Weights (H, W) of the cells of a box, zero elsewhere; they sum to one."""
        weights = self.spec.weights()
        if node is not None:
            for axis, (low, high) in enumerate(self._box(node)):
                inside = self._between(axis, low, high).double()
                weights = weights * (inside[:, None] if axis == 0 else inside)
        if not bool(weights.any()):
            raise UserError(f"event='{self.text}': the box '{ast.unparse(node)}' holds no cell of the grid, {self._extent()}")
        return weights / weights.sum()

    def _box(self, node: ast.expr) -> list[tuple[float, float]]:
        """Limits along y and x."""
        if isinstance(node, ast.Name):
            if node.id not in self.boxes:
                hint = f"give boxes.{node.id}=[y0,y1,x0,x1]" + (f", or one of: {', '.join(self.boxes)}" if self.boxes else "")
                raise UserError(f"event='{self.text}': there is no box '{node.id}': {hint}")
            limits = [float(v) for v in self.boxes[node.id]]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "box":
            limits = [self._constant(a, "a limit of a box") for a in node.args]
        else:
            raise UserError(f"event='{self.text}': '{ast.unparse(node)}' is no box: expected box(y0, y1, x0, x1) or a name")
        ring = self.spec.grid.shape[0] == 1
        if len(limits) == 2 and ring:
            return [(-math.inf, math.inf), (limits[0], limits[1])]
        if len(limits) != 4:
            raise UserError(f"event='{self.text}': a box is {'x0, x1' if ring else 'y0, y1, x0, x1'}, found {len(limits)} numbers")
        return [(limits[0], limits[1]), (limits[2], limits[3])]

    def _between(self, axis: int, low: float, high: float) -> Tensor:
        """Which rows or columns lie between two limits; on an axis that wraps around, low may be above high."""
        places = torch.tensor(self.spec.grid.y if axis == 0 else self.spec.grid.x, dtype=torch.float64)
        if low <= high:
            return (places >= low) & (places <= high)
        if self.spec.grid.periodic[axis]:
            return (places >= low) | (places <= high)
        raise UserError(f"event='{self.text}': a box from {low:g} to {high:g} along {'yx'[axis]}: the smaller limit comes first")

    def _nearest(self, place: list[float]) -> tuple[int, int]:
        found = []
        for axis, centres in enumerate((self.spec.grid.y, self.spec.grid.x)):
            wanted = place[-2:][axis] if len(place) == 2 else (place[0] if axis else centres[0])
            distance = (torch.tensor(centres, dtype=torch.float64) - wanted).abs()
            if float(distance.min()) > abs(self.spec.grid.spacing[axis]):
                raise UserError(f"event='{self.text}': the place {wanted:g} is outside the grid, {self._extent()}")
            found.append(int(distance.argmin()))
        if not bool(self.spec.mask_tensor()[found[0], found[1]]):
            raise UserError(f"event='{self.text}': the place {place} is not a cell of the model (masked)")
        return found[0], found[1]

    def _extent(self) -> str:
        grid = self.spec.grid
        return f"y {min(grid.y):g} to {max(grid.y):g}, x {min(grid.x):g} to {max(grid.x):g}"


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """The words for a name that is not among ``known``, with the nearest of them."""
    near = difflib.get_close_matches(name, list(known), 1, 0.5)
    return f"unknown {what} '{name}':{f' did you mean {near[0]!r}?' if near else ''} known: {', '.join(known)}"


def longest(flags: Tensor) -> Tensor:
    """The longest run of ones in series of zeros and ones (B, T): (B,)."""
    run = best = flags[:, 0]
    for frame in flags.unbind(1)[1:]:
        run = (run + 1) * frame
        best = torch.maximum(best, run)
    return best


def _over_space(name: str, compute: Callable[[Tensor], Tensor], weights: Tensor) -> Callable[[Tensor], Tensor]:
    inside = weights > 0

    def reduce(x: Tensor) -> Tensor:
        values = compute(x)
        if name in ("area_mean", "fraction"):
            return torch.where(inside.to(x.device), values * weights.to(x), 0).sum((-2, -1))
        cells = values[..., inside.to(x.device)]
        return cells.amax(-1) if name == "max" else cells.amin(-1)

    return reduce


def _widen(value: Tensor, axes: int) -> Tensor:
    return value.reshape(value.shape + (1,) * (axes - value.ndim)) if value.ndim < axes else value
