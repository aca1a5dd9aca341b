"""Whether code that no graph holds calls attention: read from its bytecode, since nothing of ours runs when it does."""

from __future__ import annotations

import dis
import re
import types
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from lvsa_compile import compat
from lvsa_compile.forward import context

_NAMES = re.compile(r"scaled_dot_product_attention|\w*flash_attn\w*|\w*sageattn\w*|memory_efficient_attention|flex_attention")
"""Functions that compute attention and that Dynamo does not enter."""
_DEEPEST = 4  # calls


def attention_in(code: types.CodeType) -> str:
    """File and line where a function's own code calls attention; "" where it does not."""
    line = code.co_firstlineno
    for step in dis.get_instructions(code):
        line = step.starts_line or line
        if isinstance(step.argval, str) and step.opname.startswith("LOAD_") and _NAMES.fullmatch(step.argval):
            return f'File "{code.co_filename}", line {line}, in {code.co_name}'
    return ""


def attention_below(called: Any) -> dict[types.CodeType, str]:
    """Code of what is called, or of what it calls by name, that calls attention itself, each with file and line of that."""
    codes = (getattr(function, "__code__", None) for function in _below(called, _DEEPEST, set()))
    return {code: line for code in codes if code is not None and (line := attention_in(code))}


def disabled_below(called: Any) -> list[Any]:
    """Functions under ``torch.compiler.disable`` that what is called calls by name, itself among them."""
    return [function for function in _below(called, _DEEPEST, set()) if compat.is_disabled(function)]


def disabled_among(code: types.CodeType, scope: Mapping[str, Any]) -> list[Any]:
    """Functions under ``torch.compiler.disable`` that the code of a running function calls by name."""
    held = [scope.get(name) for name in code.co_names] + [_attribute(scope.get("self"), name) for name in code.co_names]
    return [value for value in held if isinstance(value, (types.FunctionType, types.MethodType, nn.Module)) and compat.is_disabled(value)]


def _attribute(owner: Any, name: str) -> Any:
    """An attribute of an object of the user's, whose ``__getattr__`` may do anything; None where it has none."""
    try:
        return getattr(owner, name, None)
    except Exception:
        return None


def _below(called: Any, depth: int, seen: set[int]) -> Iterator[Any]:
    """What is called and the user's functions, methods and modules that it calls by name."""
    if id(called) in seen or not depth or isinstance(called, (type, types.ModuleType)) or not callable(called):
        return
    seen.add(id(called))
    if isinstance(called, nn.Module):
        for module in {type(module): module for module in called.modules()}.values():
            yield from _below(module.forward, depth, seen)
        return
    yield called
    called = getattr(called, "_torchdynamo_orig_callable", called)
    function, owner = getattr(called, "__func__", called), getattr(called, "__self__", None)
    code = getattr(function, "__code__", None)
    if code is None:
        inner = vars(type(called)).get("__call__")
        if isinstance(inner, types.FunctionType):
            yield from _below(types.MethodType(inner, called), depth, seen)
    elif not str(function.__module__).startswith("torch."):
        yield called
        by_argument = getattr(context.root_module(), "_modules", {})
        held = [getattr(function, "__globals__", {}).get(name) for name in code.co_names]
        held += [_attribute(owner, name) for name in code.co_names if owner is not None]
        held += [by_argument.get(name) for name in code.co_names]
        held += [cell.cell_contents for cell in function.__closure__ or () if cell != types.CellType()]
        for value in held:
            yield from _below(value, depth - 1, seen)
