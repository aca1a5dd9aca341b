"""What is around a graph in its forward: the break before it, attention that runs between graphs, and whether there is a video at all."""

from __future__ import annotations

import dataclasses
import math
import threading
import types
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lvsa_compile import compat
from lvsa_compile.caches import dropped_on_reset
from lvsa_compile.horizons import rows_of_class
from lvsa_compile.passes.compilation import Compilation, Forward, Outside
from lvsa_compile.passes.eager_attention import attention_below, attention_in, codes_with_attention, disabled_among, disabled_below

_FIND = "TORCH_LOGS=graph_breaks names all graph breaks."
_MEND = "Mend that line; where it stands between blocks, lvsa_compile.compile_repeated_blocks(model) does without. " + _FIND
_GIVEN_UP = "Dynamo gave up its function"
_FROM_DEVICE = (
    "Take torch.set_default_device out, under which torch breaks graphs, and give the device where tensors are made "
    '(`with torch.device("cuda"):` around what makes the model).'
)
_FROM_DISABLE = "Take torch.compiler.disable off what is called there. " + _FIND
_FROM_CUT = "Set torch._dynamo.config.optimize_ddp = False, or compile the model before DistributedDataParallel wraps it."

_LARGEST_PATCH = 64  # places of a latent that one token may stand for

_broken: dict[tuple[int, int], tuple[str, str]] = dropped_on_reset({})
"""By thread and compiled function: the first break of the forward in progress, and what mends it."""
_told: dict[tuple[int, int], set[Outside]] = dropped_on_reset({})
"""By thread and compiled function: attention outside of graphs that an earlier graph of the forward told."""
_called_at_breaks: dict[tuple[int, int], list[types.CodeType]] = dropped_on_reset({})
"""By thread and compiled function: code with attention that was called where earlier graphs of the forward ended."""


def look_around(compilation: Compilation) -> Compilation:
    """Fills in ``forward``."""
    graph_module, place = compilation.graph_module, compilation.place
    ends, given_up = compat.break_of(graph_module), compat.given_up()
    entry = (threading.get_ident(), id(compat.compiled_entry()))
    if not place.continues:
        _broken.pop(entry, None)
        _told.pop(entry, None)
        _called_at_breaks.pop(entry, None)
    before = _broken.get(entry, ("", ""))
    if not before[0] and given_up:
        before = (_said_of(given_up[-1][0]), _MEND)
    if not before[0] and _is_cut(compilation):
        before = ("something cut it before it reached lvsa, as DistributedDataParallel does by buckets", _FROM_CUT)
    outside = [found for code, scope in given_up for found in _in_given_up(code, scope, before[1])]
    outside += [
        Outside(attention_in(code), _GIVEN_UP, before[1] or _MEND) for code in _called_at_breaks.get(entry, ()) if compat.was_given_up(code)
    ]
    if ends is not None:
        _broken.setdefault(entry, (f"{ends.line} ({ends.why})", _remedy(ends)))
        outside += _disabled_at(ends)
        called = [code for each in compat.callables_at_break() for code in codes_with_attention(each)]
        _called_at_breaks[entry] = [*_called_at_breaks.get(entry, ()), *called]
    told = _told.setdefault(entry, set())
    forward = Forward(*_video(), *before, tuple(found for found in outside if found not in told))
    told.update(outside)
    return dataclasses.replace(compilation, forward=forward)


def _said_of(code: types.CodeType) -> str:
    return f'File "{code.co_filename}", line {code.co_firstlineno}, in {code.co_name} (Dynamo gave up the function)'


def _in_given_up(code: types.CodeType, scope: Mapping[str, Any], remedy: str) -> list[Outside]:
    """Attention that a function which runs eagerly calls, itself or by a disabled function."""
    own = attention_in(code)
    found = [Outside(own, _GIVEN_UP, remedy)] if own else []
    lines = dict.fromkeys(line for each in disabled_among(code, scope) if (line := attention_below(each)))
    return found + [Outside(line, f"under torch.compiler.disable, called by {code.co_name}", _FROM_DISABLE) for line in lines]


def _disabled_at(ends: compat.GraphBreak) -> list[Outside]:
    """Attention in the function under ``torch.compiler.disable`` at which a graph ends."""
    disabled = [each for called in compat.callables_at_break() for each in disabled_below(called)] if ends.by_disable else []
    lines = dict.fromkeys(line for each in disabled if ends.names(each) and (line := attention_below(each)))
    return [Outside(line, f"under torch.compiler.disable, called at {ends.line}", _FROM_DISABLE) for line in lines]


def _remedy(ends: compat.GraphBreak) -> str:
    if ends.by_default_device:
        return _FROM_DEVICE
    return _FROM_DISABLE if ends.by_disable else _MEND


def _is_cut(compilation: Compilation) -> bool:
    """Whether a tensor comes in that no Python name stands for: the graph is a part of what Dynamo made."""
    placeholders = [node for node in compilation.graph_module.graph.nodes if node.op == "placeholder"]
    return any(compat.placeholder_source(node) is None and isinstance(compat.example_value(node), Tensor) for node in placeholders)


def _video() -> tuple[bool, int, tuple[int, ...], str]:
    """Whether a video goes in, the least number of its tokens, the numbers of frames it may have, and the model that gets it.

    It goes into a known model, or as latents, of five axes or of four in a list.
    """
    model, latents = "", []
    for called, args, kwargs in compat.calls_in_progress():
        kind = type(getattr(called, "_orig_mod", called))
        found = []
        for value in (*args, *kwargs.values()):
            axes = 4 if isinstance(value, (list, tuple)) else 5
            leaves = [leaf for leaf in compat.tree_leaves(value) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
            found += [tuple(map(int, leaf.shape[-4:])) for leaf in leaves if leaf.dim() == axes]
        if (found or rows_of_class(kind)) and issubclass(kind, nn.Module):
            model = model or kind.__name__
        latents += found
    places = [math.prod(shape) // max(1, *shape[:2]) // _LARGEST_PATCH for shape in latents]  # channels and frames come in either order
    frames = tuple(dict.fromkeys(size for shape in latents for size in shape[:2]))
    return bool(model or latents), max(places, default=0), frames, model
