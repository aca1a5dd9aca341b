"""Running on the fake tensors of a compile without leaving anything behind."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator
from typing import Any

from lvsa_compile.compat.fakes import tracing_on_fakes
from lvsa_compile.compat.sizes import symbol_values


@contextlib.contextmanager
def isolated_run(fake_mode: Any) -> Iterator[None]:
    """``tracing_on_fakes`` that leaves nothing behind: guards, replacements, symbols and caches are afterwards what they were.

    That counts for caches too: an answer that Dynamo got ("it cannot be told whether u0 <= 64"), when it is pushed out of a cache and
    asked for again later, may be another one, at which AOTAutograd fails ("possible memo disaster").  Where sizes are symbols, no cached
    results of ops are used: to make a tensor of one takes twice as long as to run the op.
    """
    from torch._subclasses.fake_tensor import disable_fake_tensor_cache

    environment = fake_mode.shape_env
    if environment is None:
        with tracing_on_fakes(fake_mode):
            yield
        return
    before = {name: _contents(value) for name, value in vars(environment).items()}
    cached = {name: method for name, method in vars(type(environment)).items() if isinstance(method, functools._lru_cache_wrapper)}
    for name, method in cached.items():
        setattr(environment, name, functools.cache(functools.partial(method.__wrapped__, environment)))
    uncached = disable_fake_tensor_cache(fake_mode) if symbol_values(fake_mode) else contextlib.nullcontext()
    try:
        with tracing_on_fakes(fake_mode), uncached:
            yield
    finally:
        for name in cached:
            delattr(environment, name)
        for name, saved in before.items():
            _restore(environment, name, saved)
        environment._update_version_counter()  # for the caches that go by it


_ONLY_GROW = ("_version_counter", "_prev_cache_key", "unbacked_symint_counter", "unbacked_symfloat_counter")

_CONTAINERS = (dict, list, set)


def _contents(value: Any) -> Any:
    """A container with the containers in it, copied; anything else as it is."""
    if isinstance(value, dict):
        inside = {key: copy.copy(each) if isinstance(each, _CONTAINERS) else each for key, each in value.items()}
        return value, inside
    return (value, copy.copy(value)) if isinstance(value, (list, set)) else (value, None)


def _restore(environment: Any, name: str, saved: tuple[Any, Any]) -> None:
    value, contents = saved
    if name in _ONLY_GROW:
        return
    if contents is not None and value != contents:
        value.clear()
        (value.extend if isinstance(value, list) else value.update)(contents)
    if getattr(environment, name) is not value:
        setattr(environment, name, value)
