"""The axis tracker on real tensors: follows the eager code of a forward while it runs."""

from __future__ import annotations

import logging
import types
import weakref
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from lvsa_compile import compat
from lvsa_compile.axes.algebra import LOST, Axis, Source, axis_of, origins
from lvsa_compile.axes.call import Axes, Call, sizes_of, tensors_in
from lvsa_compile.axes.patch_rules import CONVOLUTIONS
from lvsa_compile.axes.rules import RULES
from lvsa_compile.axes.tracker import RESHAPED_IN_PLACE, AxisTracker, Reference, ViewCall
from lvsa_compile.axes.values import Array, KnownValues, Later
from lvsa_compile.layout.guarded_values import SameValue, can_be_read
from lvsa_compile.patterns import library_ops
from lvsa_compile.watching.formula import Formula
from lvsa_compile.watching.memory import AS_THEY_ARE, MOST, Found, Memory, is_counted_by, key_of

log = logging.getLogger(__name__)


class EagerTracker(compat.KeepsDynamoAwayItself, AxisTracker):
    """Knows the axes of the real tensors of one forward, which it does not keep alive; of no op inside a compiled graph.

    ``attended`` holds the token axes of the attention it saw, ``of_libraries`` the ops it saw that are neither torch's nor known to be
    attention; ``attend`` computes attention in another way, or gives None.  What it finds out is kept in ``memory`` for the next forward.
    ``end`` is the code of the function around the forward.
    """

    def __init__(self, memory: Memory, end: types.CodeType) -> None:
        super().__init__()
        compat.skip_by_dynamo(EagerTracker.__torch_dispatch__.__code__)
        self.attended: dict[int, Axis] = {}
        self.of_libraries: dict[str, None] = {}
        self.attend: Callable[[compat.OpOverload, tuple[Any, ...], dict[str, Any]], Any] | None = None
        self.values = self._read = _ReadValues()
        self._memory, self._end = memory, end
        self._times: dict[Hashable, int] = {}
        self._held: dict[int, tuple[Reference, Axes, int, int]] = {}  # axes, and the versions at which they hold
        self._writes = self._once = False
        self._formula = Formula()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Dynamo compiles while it is active, and does not look at it."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Runs the op, then notes the axes of what it returned or wrote."""
        before = compat.dynamo_away()
        try:
            if not isinstance(func, compat.OpOverload) or compat.in_compiled_graph(self._end):
                return func(*args, **(kwargs or _NONE))
            return self._run(func, args, kwargs or _NONE)
        finally:
            compat.dynamo_back(before)

    def _run(self, func: compat.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        known = _ops.get(id(func)) or _known(func)
        if known.to_be_decomposed and not compat.modes_on_stack():
            with compat.mode_on(self):
                return compat.decomposed(func, args, kwargs)
        result = None
        if known.of_library:
            self.of_libraries[known.name] = None
        if known.attention:
            result = self._attention(func, args, kwargs)
        elif self._formula.begun and known.name == "bmm" and self._formula.ends_with(args[0]):
            result = self._attention_by_formula(args[1])
        if result is None:
            result = func(*args, **kwargs)
        if known.name == "bmm" or self._formula.begun:
            self._formula.note(known.name, args, result)
        try:
            if known.in_place:
                self._note_write(known, args, kwargs, result)
            elif not known.plain:
                self.note(func, args, kwargs, result)
            else:
                key = (id(func), *[self._key_of(value) for value in args])
                if kwargs:
                    key = (*key, *kwargs, *[self._key_of(value) for value in kwargs.values()])
                if not self._noted_again(key, known, args, kwargs, result):
                    self.note(func, args, kwargs, result)
                    self._remember(key, result)
        except Exception:  # the user's forward goes on; what a rule that failed left unknown is lost
            log.debug("the rule of %s failed", func, exc_info=True)
            for tensor in tensors_in((result,), compat.written_by(func, args, kwargs)):
                self.lose(tensor, str(func), origins(axis for each in tensors_in(args, kwargs.values()) for axis in self.axes_of(each)))
        return result

    def _attention(self, func: compat.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What attention gives that is sparse; None where it is to run as it came."""
        layout = library_ops.layout_of(func, args, kwargs)
        for tensor in args[:2] if layout else ():
            axis = self._axes_of(tensor)[-2 if layout == library_ops.BHSD else -3]
            self.attended[id(axis)] = axis
        return self.attend(func, args, kwargs) if layout and self.attend is not None else None

    def _attention_by_formula(self, value: Tensor) -> Tensor | None:
        """What the second product of attention gives that is sparse; None where it is to run as it came."""
        with compat.mode_on(self):  # which follows how query, key and value are brought into shape
            tensors, more = self._formula.call(value)
        output = self._attention(torch.ops.aten.scaled_dot_product_attention.default, tensors, more)
        return None if output is None else output.reshape(*value.shape[:1], *output.shape[2:]).contiguous()

    def _noted_again(self, key: Hashable, known: _Known, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> bool:
        """Notes what the same call gave before; False where there was none."""
        remembered = self._memory.results.get(key)
        if remembered is None:
            return False
        outputs: tuple[Tensor, ...] = (result,) if type(result) is Tensor else tuple(result)
        if len(outputs) != len(remembered):
            return False
        for tensor, (shape, _) in zip(outputs, remembered):  # noqa: B905 - lengths are equal, and this runs at each op
            if type(tensor) is not Tensor or tensor.shape != shape:
                return False
        held, references = self._held, []
        base = compat.version_of(args[0]) if known.view else -2
        for tensor, (_, axes) in zip(outputs, remembered):  # noqa: B905
            version, reference = compat.version_of(tensor), weakref.ref(tensor)
            held[id(tensor)] = reference, axes, version, base if known.view else version
            references.append(reference)
        if known.view and type(args[0]) is not Parameter:  # nobody writes to a weight within a forward
            parent = held.get(id(args[0]))
            whole = weakref.ref(args[0]) if parent is None or parent[0]() is not args[0] else parent[0]
            self.keep_view(id(args[0]), ViewCall(known.func, known.name, whole, args[1:], kwargs, tuple(references), ""), outputs)
        return True

    def _note_write(self, known: _Known, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Notes a write in place: by what the same write gave before, where no other view of the memory is known."""
        target = args[0]
        parent, view, position = self.made_of(target)
        whole = target if parent is None else parent
        plain = result is target and type(target) is Tensor and type(whole) is Tensor and self.made_of(whole)[0] is None
        views = [each for each in self.views(whole) if any(output() is not None for output in each.outputs)] if plain else []
        if not plain or views != ([] if view is None else [view]) or (view is not None and len(view.outputs) > 1):
            self.note(known.func, args, kwargs, result)
            return
        of_view = (
            ()
            if view is None or parent is None
            else (view.op, key_of(view.rest, self._axes_of), position, self._key_of(parent), parent.shape)
        )
        key = (id(known.func), *[self._key_of(value) for value in (*args, *kwargs.values())], *kwargs, *of_view)
        remembered = self._memory.writes.get(key)
        if remembered is None:
            self.note(known.func, args, kwargs, result)
            if not self._once:
                if len(self._memory.writes) >= MOST:
                    self._memory.writes.clear()
                self._memory.writes[key] = self._axes_of(target), None if parent is None else self._axes_of(parent)
            return
        self._writes = True
        self._store(target, remembered[0])
        if parent is not None and remembered[1] is not None:
            self._store(parent, remembered[1])
        self._writes = False

    def _remember(self, key: Hashable, result: Any) -> None:
        """Remembers what a call gave that gives the same each time."""
        outputs = (result,) if isinstance(result, Tensor) else tuple(result) if isinstance(result, (tuple, list)) else ()
        if self._once or not outputs or any(type(tensor) is not Tensor for tensor in outputs):
            return
        if len(self._memory.results) >= MOST:
            self._memory.results.clear()
        self._memory.results[key] = tuple((tensor.shape, self.axes_of(tensor)) for tensor in outputs)

    def note(self, func: compat.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Notes the axes of what a call returned or wrote."""
        self._writes = compat.schema_of(func).is_mutable  # torch counts a write after its op
        self._once = False
        super().note(func, args, kwargs, result)
        self._writes = False
        if compat.returns_views(func) and isinstance(args[0], Tensor):  # torch lets a view count with its base after the op
            for view in tensors_in((result,)):
                held = self._held[id(view)]
                self._held[id(view)] = (*held[:3], compat.version_of(args[0]))

    def lose(self, tensor: Tensor, name: str, counted: frozenset[str]) -> None:
        """Says that nobody knows what a tensor's axes are, of which the inputs ``counted`` may have a part in each."""
        self.set_axes(tensor, _lost_axes(tensor, name, counted))

    def _reference(self, tensor: Tensor) -> Reference:
        held = self._held.get(id(tensor))
        return held[0] if held is not None and held[0]() is tensor else weakref.ref(tensor)

    def _store(self, tensor: Tensor, axes: Axes) -> None:
        version = compat.version_of(tensor)
        self._held[id(tensor)] = (weakref.ref(tensor), self._memory.one(axes), version, version + self._writes)

    def _stored(self, tensor: Tensor) -> Axes | None:
        held = self._held.get(id(tensor))
        if held is None or held[0]() is not tensor:
            return None
        version = compat.version_of(tensor)
        if version == held[2] or version == held[3]:
            return held[1]
        return self._memory.one(_lost_axes(tensor, "a write", origins(held[1])))  # code that shows no ops wrote to it

    def _key_of(self, value: Any) -> Hashable:
        """``key_of``, quickly for what is most: tensors that are known, and weights, of which the shape tells all."""
        kind = type(value)
        if kind in AS_THEY_ARE:
            return value  # type: ignore[no-any-return]
        if isinstance(value, Tensor) and (kind is Tensor or kind is Parameter):
            held = self._held.get(id(value))
            if held is not None and held[0]() is value:
                version = compat.version_of(value)
                if version == held[2] or version == held[3]:
                    return id(held[1]), value.dtype
            elif kind is Parameter:
                return value.shape, value.dtype
        return key_of(value, self._axes_of)

    def _axes_of(self, tensor: Tensor) -> Axes:
        """``axes_of``, always the same object."""
        axes = self._stored(tensor)
        return self._memory.one(self.axes_of(tensor)) if axes is None else axes

    def _constant(self, tensor: Tensor) -> Axes:
        return self._memory.held(tensor.shape, lambda: super(EagerTracker, self)._constant(tensor))

    def _output_axes(self, func: compat.OpOverload, call: Call) -> list[Axes]:
        key = (func, call.op, key_of((call.args, *call.kwargs.items()), self._axes_of), *(output.shape for output in call.outputs))
        return self._again(key, call, lambda named: super(EagerTracker, self)._output_axes(func, named))

    def _written_axes(self, func: compat.OpOverload, call: Call) -> Axes:
        key = ("written", func, key_of((call.args, *call.kwargs.items()), self._axes_of))
        return self._again(key, call, lambda named: [super(EagerTracker, self)._written_axes(func, named)])[0]

    def _parent_axes(self, call: Call, parent: Tensor, position: int, child: Axes) -> Axes:
        key = ("parent", call.op, key_of((call.args, *call.kwargs.items()), self._axes_of), position, id(self._memory.one(child)))
        return self._again(key, call, lambda named: [super(EagerTracker, self)._parent_axes(named, parent, position, child)])[0]

    def _again(self, key: Hashable, call: Call, rule: Callable[[Call], list[Axes]]) -> list[Axes]:
        """What a rule gave for the same call before, or gives now."""
        found = self._memory.found.get(key)
        if found is not None and found.values:
            tensors = tensors_in(call.args, call.kwargs.values())
            with compat.no_modes():
                found = found if all(holds(tensors[position]) for position, holds in found.values) else None
        if found is not None and not found.times:
            self._once = self._once or bool(found.values)
            return found.axes
        self._once = True
        time = self._times[key] = self._times.get(key, -1) + 1
        if found is not None and time < len(found.times):
            return found.times[time]
        name = f"{call.op}.{self._memory.next_number if found is None else found.number}.{time}"
        self._read.asked.clear()
        axes = [self._memory.one(each) for each in rule(_named(call, name))]
        if found is not None:
            found.times.append(axes)
            return axes
        tensors = tensors_in(call.args, call.kwargs.values())
        values = tuple((i, SameValue(held)) for i, tensor in enumerate(tensors) if (held := self._read.asked.get(id(tensor))) is not None)
        found = Found(axes, values, [axes] if is_counted_by(axes, name) else [], self._memory.next_number)
        self._memory.keep(key, found)
        self._once = bool(found.values or found.times)
        return axes


def _lost_axes(tensor: Tensor, name: str, counted: frozenset[str]) -> Axes:
    return tuple(axis_of(Source(LOST, name, i, size, origins=counted)) for i, size in enumerate(sizes_of(tensor)))


def _named(call: Call, node_name: str) -> Call:
    return Call(call.op, call.args, call.kwargs, call.outputs, call.axes_of, node_name, call.value_of)


class _Known(NamedTuple):
    """What is known of an op: whether its calls are ``plain``, which write nothing and give sizes that no value decides, or write to
    their first argument ``in_place``; ``of_library`` that it is neither torch's nor known to be attention.
    """

    func: compat.OpOverload
    name: str
    plain: bool
    in_place: bool
    view: bool
    attention: bool
    to_be_decomposed: bool
    of_library: bool


_NONE: dict[str, Any] = {}
_ops: dict[int, _Known] = {}  # by identity: ops live as long as the process, and hashing one is slow


def _known(func: compat.OpOverload) -> _Known:
    name = compat.name_of_op(func)
    ruled = name in RULES or torch.Tag.pointwise in func.tags
    plain = not compat.schema_of(func).is_mutable and name not in CONVOLUTIONS
    in_place = name.endswith("_") and not name.endswith("__") and name not in RESHAPED_IN_PLACE and compat.schema_of(func).is_mutable
    composite = compat.is_composite(func) and not ruled
    attention = library_ops.is_known(func)
    of_library = not attention and bool(compat.library_of(func))
    _ops[id(func)] = _Known(func, name, plain, in_place, compat.returns_views(func), attention, composite, of_library)
    return _ops[id(func)]


class _ReadValues(KnownValues):
    """Values of real tensors, read when a rule asks: ``asked`` holds them by the tensor's identity."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: dict[int, Tensor] = {}

    def of(self, tensor: Tensor) -> Array | None:
        """The value of a tensor as an array, or None."""
        if not can_be_read(tensor) or tensor.is_complex():
            return None
        with compat.no_modes():
            value = self.asked[id(tensor)] = tensor.detach().to("cpu", copy=True)
        return Later(lambda: value, constant=False).array()

    def later(self, tensor: Tensor) -> None:
        """Nothing is put off: a value is read while its rule runs."""

    def set(self, tensor: Tensor, later: object) -> None:
        """Nothing is kept."""

    def result(self, *_: Any) -> None:
        """Nothing is computed."""

    def written(self, *_: Any) -> None:
        """Nothing is computed."""
