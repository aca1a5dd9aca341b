"""What is around a graph in its forward: the break before it, attention that runs between graphs, and whether there is a video at all."""

from __future__ import annotations

import dataclasses
import math
import threading
import types
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lvsa_compile import compat
from lvsa_compile.caches import dropped_on_reset
from lvsa_compile.forward.labels import watched_forward
from lvsa_compile.horizons import rows_of_class
from lvsa_compile.passes.compilation import Compilation, Forward, Outside
from lvsa_compile.passes.eager_attention import attention_below, attention_in, disabled_among, disabled_below

_FIND = "TORCH_LOGS=graph_breaks names all graph breaks."
_MEND = "Mend that line; where it stands between blocks, lvsa_compile.compile_repeated_blocks(model) does without. " + _FIND
_GIVEN_UP = "Dynamo gave up its function"
_FROM_DEVICE = (
    "Take torch.set_default_device out, under which torch breaks graphs, and give the device where tensors are made "
    '(`with torch.device("cuda"):` around what makes the model).'
)
_FROM_DISABLE = "Take torch.compiler.disable off what is called there. " + _FIND
_FROM_CUT = "Set torch._dynamo.config.optimize_ddp = False, or compile the model before DistributedDataParallel wraps it."

_LARGEST_PATCH = 64  # positions of a latent that one token may stand for


@dataclasses.dataclass
class _InProgress:
    """A forward of which graphs are compiled: its first break and what mends it, the attention outside of graphs that was told, and code
    with attention, by its line, that was called where graphs ended.
    """

    broken: tuple[str, str] = ("", "")
    reported: set[Outside] = dataclasses.field(default_factory=set)
    called: dict[types.CodeType, str] = dataclasses.field(default_factory=dict)


_in_progress: dict[tuple[int, int], _InProgress] = dropped_on_reset({})
"""By thread and compiled function."""


def look_around(compilation: Compilation) -> Compilation:
    """Fills in ``forward``."""
    if compilation.in_eager_code:
        return dataclasses.replace(compilation, forward=_video())
    ends, given_up = compat.break_of(compilation.graph_module), compat.given_up()
    entry = (threading.get_ident(), id(compat.compiled_entry()))
    if not compilation.position.continues:
        _in_progress.pop(entry, None)
    so_far = _in_progress.setdefault(entry, _InProgress())
    broken, remedy = so_far.broken
    if not broken and given_up:
        broken, remedy = _line_of(given_up[-1][0]), _MEND
    if not broken and _is_cut(compilation):
        broken, remedy = "something cut it before it reached lvsa, as DistributedDataParallel does by buckets", _FROM_CUT
    outside = [found for code, scope in given_up for found in _in_given_up(code, scope, remedy)]
    outside += [Outside(line, _GIVEN_UP, remedy or _MEND) for code, line in so_far.called.items() if compat.was_given_up(code)]
    if ends is not None:
        called = compat.callables_at_break()
        if not so_far.broken[0]:
            so_far.broken = (f"{ends.line} ({ends.why})", _remedy(ends))
        outside += _disabled_at(ends, called)
        for each in called:
            so_far.called |= attention_below(each)
    if watched_forward.get() is not None and compilation.attend is not None:
        outside = []  # decided where it runs
    new = tuple(found for found in outside if found not in so_far.reported)
    so_far.reported.update(outside)
    return dataclasses.replace(compilation, forward=dataclasses.replace(_video(), broken=broken, remedy=remedy, outside=new))


def _line_of(code: types.CodeType) -> str:
    return f'File "{code.co_filename}", line {code.co_firstlineno}, in {code.co_name} (Dynamo gave up the function)'


def _in_given_up(code: types.CodeType, scope: Mapping[str, Any], remedy: str) -> list[Outside]:
    """Attention that a function which runs eagerly calls, itself or by a disabled function."""
    own = attention_in(code)
    found = [Outside(own, _GIVEN_UP, remedy)] if own else []
    lines = _first_lines(disabled_among(code, scope))
    return found + [Outside(line, f"under torch.compiler.disable, called by {code.co_name}", _FROM_DISABLE) for line in lines]


def _disabled_at(ends: compat.GraphBreak, called: Sequence[Any]) -> list[Outside]:
    """Attention in the function under ``torch.compiler.disable`` at which a graph ends; ``called`` is what was about to be called."""
    disabled = [each for function in called for each in disabled_below(function) if ends.names(each)] if ends.by_disable else []
    return [Outside(line, f"under torch.compiler.disable, called at {ends.line}", _FROM_DISABLE) for line in _first_lines(disabled)]


def _first_lines(functions: Sequence[Any]) -> list[str]:
    """The line at which each function first calls attention, each once; nothing of those that call none."""
    return list(dict.fromkeys(line for each in functions for line in list(attention_below(each).values())[:1]))


def _remedy(ends: compat.GraphBreak) -> str:
    if ends.by_default_device:
        return _FROM_DEVICE
    return _FROM_DISABLE if ends.by_disable else _MEND


def _is_cut(compilation: Compilation) -> bool:
    """Whether a tensor comes in that no Python name stands for: the graph is a part of what Dynamo made."""
    placeholders = [node for node in compilation.graph_module.graph.nodes if node.op == "placeholder"]
    return any(compat.placeholder_source(node) is None and isinstance(compat.example_value(node), Tensor) for node in placeholders)


def _video() -> Forward:
    """The video that goes in, if any: into a known model, or as latents, of five axes or of four in a list."""
    model, latents = "", []
    for called, args, kwargs in compat.calls_in_progress():
        kind = type(compat.uncompiled(called))
        found = []
        for value in (*args, *kwargs.values()):
            axes = 4 if isinstance(value, (list, tuple)) else 5
            leaves = [leaf for leaf in compat.tree_leaves(value) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
            found += [tuple(map(int, leaf.shape[-4:])) for leaf in leaves if leaf.dim() == axes]
        if (found or rows_of_class(kind)) and issubclass(kind, nn.Module):
            model = model or kind.__name__
        latents += found
    tokens = [math.prod(shape) // max(1, *shape[:2]) // _LARGEST_PATCH for shape in latents]  # channels and frames come in either order
    frames = tuple(dict.fromkeys(size for shape in latents for size in shape[:2]))
    return Forward(bool(model or latents), max(tokens, default=0), frames, model)
