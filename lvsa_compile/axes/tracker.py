"""A dispatch mode that follows the axes of every tensor through the ATen ops that run while it is active.

One small set of rules thus serves every spelling: methods, functions, einops, slice assignment.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lvsa_compile import compat
from lvsa_compile.axes.algebra import CREATED, Size, Source, axis_of, axis_size, origins, regroup, same
from lvsa_compile.axes.call import Axes, Call, sizes_of, tensors_in
from lvsa_compile.axes.overwriting import lost_axes, overwritten
from lvsa_compile.axes.patch_rules import mixes_places
from lvsa_compile.axes.pointwise_rules import pointwise
from lvsa_compile.axes.positions import Relations
from lvsa_compile.axes.rules import RULES
from lvsa_compile.axes.values import KnownValues, Later, View
from lvsa_compile.axes.view_rules import expand, slice_bounds, with_place_apart
from lvsa_compile.errors import in_a_line

_REGROUPING = frozenset(("view", "_unsafe_view", "reshape", "_reshape_alias", "squeeze", "unsqueeze", "alias", "detach"))
_FILLS = frozenset(("fill_", "zero_"))
RESHAPED_IN_PLACE = frozenset(("squeeze_", "unsqueeze_", "transpose_", "t_"))


class RuleFailed(Exception):
    """A rule failed, not the op it is about."""


Reference = Callable[[], "Tensor | None"]
"""Gives a tensor as long as it lives."""


class ViewCall(NamedTuple):
    """A call that made views of ``parent``: run its rule again when ``parent`` is written to.  ``rest`` are its further arguments."""

    func: compat.OpOverload
    op: str
    parent: Reference
    rest: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[Reference, ...]
    node_name: str


class AxisTracker(compat.TorchDispatchMode):
    """Knows the axes of every tensor made while it is active.

    ``relations`` follows symbolic sizes that must be equal for a trail to go on; without it they are not asked for.
    ``node_name`` and ``moment`` are the name and the number of the step that runs, as the caller says; ``last_written`` holds the moment of
    the last write to each piece of memory, ``convolved`` the names of inputs over which a convolution with overlapping windows ran.
    """

    supports_higher_order_operators = True

    def __init__(self, relations: Relations | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.relations = relations
        self.node_name, self.moment = "", 0
        self.last_written: dict[int, int] = {}
        self.convolved: set[str] = set()
        self._axes: dict[int, tuple[Reference, Axes]] = {}
        self._made_by: dict[int, tuple[ViewCall, int]] = {}
        self._views_of: dict[int, list[ViewCall]] = {}
        self.values = KnownValues()

    def axes_of(self, tensor: Tensor) -> Axes:
        """Axes of a tensor; one never seen is a constant of the model."""
        known = self.known_axes(tensor)
        return self._constant(tensor) if known is None else known

    def known_axes(self, tensor: Tensor) -> Axes | None:
        """Axes of a tensor; None of one never seen."""
        known = self._stored(tensor)
        if known is not None:
            return known
        part = compat.local_part(tensor)
        inside = None if part is None else self._stored(part[0])
        return None if part is None or inside is None else self._other_side(inside, sizes_of(tensor), part[1])

    def set_axes(self, tensor: Tensor, axes: Axes) -> None:
        """Says what a tensor's axes are."""
        self._store(tensor, axes)
        part = compat.local_part(tensor)
        if part is not None:  # the process's own part is taken out of a distributed tensor without any op
            self._store(part[0], self._other_side(axes, sizes_of(part[0]), part[1]))

    def _constant(self, tensor: Tensor) -> Axes:
        node_name = self.node_name
        return tuple(axis_of(Source(CREATED, "constant", i, size, node_name)) for i, size in enumerate(sizes_of(tensor)))

    def _store(self, tensor: Tensor, axes: Axes) -> None:
        self._axes[id(tensor)] = (self._reference(tensor), axes)

    def _stored(self, tensor: Tensor) -> Axes | None:
        known = self._axes.get(id(tensor))
        return known[1] if known is not None and known[0]() is tensor else None

    def _reference(self, tensor: Tensor) -> Reference:
        """What gives the tensor later: fakes, which take no memory, are kept alive."""
        return lambda: tensor

    def _other_side(self, axes: Axes, sizes: list[Size], cut: frozenset[int]) -> Axes:
        """Axes of a distributed tensor from those of the process's part, or the other way round; axes that are cut start anew."""
        counted = [axis if i in cut else () for i, axis in enumerate(axes)]
        fresh = lost_axes("shard", self.node_name, sizes, counted)
        return tuple(fresh[i] if i in cut else axis for i, axis in enumerate(axes))

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Runs the op, then notes the axes of what it returned or wrote."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if isinstance(func, compat.OpOverload):
            try:
                self.note(func, args, kwargs, result)
            except Exception as error:
                raise RuleFailed(f"{func}: {in_a_line(error)}") from error
        return result

    def note(self, func: compat.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Notes the axes of what a call returned or wrote."""
        op = compat.name_of_op(func)
        outputs = tuple(t for t in (result if isinstance(result, (tuple, list)) else (result,)) if isinstance(t, Tensor))
        if compat.schema_of(func).is_mutable:
            for tensor in compat.written_by(func, args, kwargs):
                self.last_written[compat.memory_of(tensor)] = self.moment
        if compat.schema_of(func).is_mutable and not (bool(args) and outputs and outputs[0] is args[0]):
            self._lose_written(func, args, kwargs)
        if not outputs:
            return
        if mixes_places(op, args):
            self.convolved |= origins(self.axes_of(args[0])[2:])
        in_place = op.endswith("_") and not op.endswith("__") and bool(args) and outputs[0] is args[0]
        call = self._call(op.rstrip("_") if op in RESHAPED_IN_PLACE else op, args, kwargs, outputs, self.node_name)
        if in_place and op not in RESHAPED_IN_PLACE:
            self._write_value(func, args, kwargs)
            self._write(args[0], self._written_axes(func, call))
            return
        several = isinstance(result, (tuple, list))
        for position, (output, axes) in enumerate(zip(outputs, self._output_axes(func, call), strict=True)):
            self.set_axes(output, axes)
            self.values.set(output, self.values.result(func, args, kwargs, position if several else None, output))
        if compat.returns_views(func) and isinstance(args[0], Tensor):
            self.note_views(func, call.op, args, kwargs, outputs)

    def note_views(
        self, func: compat.OpOverload, op: str, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: tuple[Tensor, ...]
    ) -> None:
        """Remembers which call made views."""
        references = tuple(map(self._reference, outputs))
        self.keep_view(id(args[0]), ViewCall(func, op, self._reference(args[0]), args[1:], kwargs, references, self.node_name), outputs)

    def keep_view(self, parent: int, view: ViewCall, outputs: tuple[Tensor, ...]) -> None:
        """Keeps the call that made views ``outputs`` of the tensor of that identity."""
        if any(id(output) == parent for output in outputs):  # as ``to`` may return its argument
            return
        self._views_of.setdefault(parent, []).append(view)
        for position, output in enumerate(outputs):
            self._made_by[id(output)] = (view, position)

    def _lose_written(self, func: compat.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Marks what a call writes to beside its first argument: ``out=`` and the ``_foreach`` ops are not followed."""
        counted = [axis for tensor in tensors_in(args, kwargs.values()) for axis in self.axes_of(tensor)]
        for target in compat.written_by(func, args, kwargs):
            self._write(target, lost_axes(compat.name_of_op(func), self.node_name, sizes_of(target), counted))
            self._set_value(self._root(target)[0], None)

    def _output_axes(self, func: compat.OpOverload, call: Call) -> list[Axes]:
        rule = RULES.get(call.op)
        if rule is None and torch.Tag.pointwise in func.tags:
            rule = pointwise
        found = rule(call) if rule is not None else None
        if found is None:
            return [call.new_axes(output) for output in call.outputs]
        return [
            axes if len(axes) == output.dim() and all(map(same, map(axis_size, axes), sizes_of(output))) else call.new_axes(output)
            for output, axes in zip(call.outputs, found, strict=True)
        ]

    def _written_axes(self, func: compat.OpOverload, call: Call) -> Axes:
        """Axes of a tensor after an op wrote to it in place."""
        target = call.args[0]
        if call.op == "copy_":
            return expand(Call("expand", (call.args[1],), {}, (target,), self.axes_of, self.node_name))[0]
        if call.op in _FILLS:
            return self.axes_of(target)
        return self._output_axes(func, dataclasses.replace(call, op=call.op[:-1]))[0]

    def _write(self, target: Tensor, axes: Axes) -> None:
        """Notes what a tensor was overwritten with, in every tensor that shares its memory."""
        self.set_axes(target, axes)
        parent, view, position = self.made_of(target)
        if parent is None or view is None:
            self._refresh_views(target)
        else:
            call = self._view_call(view, parent)
            self._write(parent, self._lost(parent, axes) if call is None else self._parent_axes(call, parent, position, axes))

    def _refresh_views(self, parent: Tensor) -> None:
        for view in self.views(parent):
            call = self._view_call(view, parent)
            if call is None:  # of several views some are gone
                alive = [output for reference in view.outputs if (output := reference()) is not None]
                found = [(output, self._lost(output, self.axes_of(parent))) for output in alive]
            else:
                found = list(zip(call.outputs, self._output_axes(view.func, call), strict=True))
            for output, axes in found:
                self.set_axes(output, axes)
                self._refresh_views(output)

    def made_of(self, tensor: Tensor) -> tuple[Tensor | None, ViewCall | None, int]:
        """The tensor that a view was taken of, by which call, and which of its outputs it is."""
        view, position = self._made_by.get(id(tensor), (None, 0))
        own = view is not None and view.outputs[position]() is tensor
        return (view.parent(), view, position) if own and view is not None else (None, None, 0)

    def views(self, parent: Tensor) -> list[ViewCall]:
        """The calls that made views of a tensor, as far as that is known."""
        return [view for view in self._views_of.get(id(parent), ()) if view.parent() is parent]

    def _view_call(self, view: ViewCall, parent: Tensor) -> Call | None:
        """The call that made views; None where some of them are gone."""
        outputs = [output for reference in view.outputs if (output := reference()) is not None]
        if len(outputs) < len(view.outputs):
            return None
        return self._call(view.op, (parent, *view.rest), view.kwargs, tuple(outputs), view.node_name)

    def _call(self, op: str, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: tuple[Tensor, ...], node_name: str) -> Call:
        return Call(op, args, kwargs, outputs, self.axes_of, node_name, self.values.of, self.values.later, self.relations)

    def _write_value(self, func: compat.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Notes the value of what a call writes to, as far as it is known, in every tensor that shares its memory."""
        root, path = self._root(args[0])
        self._set_value(root, self.values.written(func, args, kwargs, root, path))

    def _root(self, tensor: Tensor) -> tuple[Tensor, list[View]]:
        """The tensor whose memory a view shows, and the calls that lead from it to the view."""
        path: list[View] = []
        while True:
            parent, view, position = self.made_of(tensor)
            if parent is None or view is None:
                return tensor, path
            path.insert(0, (view.func, (parent, *view.rest), view.kwargs, position))
            tensor = parent

    def _set_value(self, root: Tensor, later: Later | None) -> None:
        """Says what a tensor's value is, or that it is not known any more; what its views show follows."""
        self.values.set(root, later)
        waiting = [(root, view) for view in self.views(root)]
        while waiting:
            parent, view = waiting.pop(0)
            several = len(view.outputs) > 1
            for position, reference in enumerate(view.outputs):
                output = reference()
                if output is not None:
                    seen = self.values.result(view.func, (parent, *view.rest), view.kwargs, position if several else None, output)
                    self.values.set(output, seen)
                    waiting.extend((output, further) for further in self.views(output))

    def _parent_axes(self, call: Call, parent: Tensor, position: int, child: Axes) -> Axes:
        """Axes of ``parent`` after its view, output ``position`` of ``call``, was overwritten with ``child``."""
        rank = parent.dim()
        if call.op in _REGROUPING:
            grouped = regroup(child, sizes_of(parent))
            return self._lost(parent, child) if grouped is None else grouped
        if call.op in ("permute", "transpose", "t"):
            order = _order(call, rank)
            return tuple(child[order.index(axis)] for axis in range(rank))
        if call.op in ("split", "split_with_sizes") or (call.op == "slice" and call.arg(4, "step", 1) == 1):
            dim = call.arg(1 if call.op == "slice" else 2, "dim", 0) % rank
            if call.op == "slice":
                low, high = slice_bounds(sizes_of(parent)[dim], call.arg(2, "start"), call.arg(3, "end"))
            else:
                low = sum(sizes_of(output)[dim] for output in call.outputs[:position])
                high = low + sizes_of(call.outputs[position])[dim]
            return overwritten(self.axes_of(parent), child, dim, [(low, high)], self._lost(parent, child))
        if call.op == "slice":  # every n-th position: their order along the axis is not followed
            return overwritten(self.axes_of(parent), child, call.arg(1, "dim", 0) % rank, None, self._lost(parent, child))
        if call.op in ("select", "unbind"):
            dim = call.arg(1, "dim", 0) % rank
            chosen = call.arg(2, "index") if call.op == "select" else position
            across = with_place_apart(child, dim)
            runs = [(chosen % parent.shape[dim], chosen % parent.shape[dim] + 1)] if isinstance(parent.shape[dim], int) else None
            return overwritten(self.axes_of(parent), across, dim, runs, self._lost(parent, child))
        return self._lost(parent, child)

    def _lost(self, tensor: Tensor, child: Axes) -> Axes:
        """Axes of a tensor in which ``child`` was written at positions that are not followed."""
        return lost_axes("setitem", self.node_name, sizes_of(tensor), (*self.axes_of(tensor), *child))


def _order(call: Call, rank: int) -> list[int]:
    if call.op == "permute":
        return [dim % rank for dim in call.arg(1, "dims")]
    order = list(range(rank))
    a, b = (call.arg(1, "dim0", 0) % rank, call.arg(2, "dim1", 1) % rank) if call.op == "transpose" else (0, rank - 1)
    order[a], order[b] = order[b], order[a]
    return order
