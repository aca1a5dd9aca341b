"""The callable Dynamo gets back: asks the clock for the step, then calls the compiled graph with its tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lvsa_compile import compat
from lvsa_compile.clock import Clock, clock_of
from lvsa_compile.passes.compilation import ExtraInput, TimestepInput


def with_clock(
    compiled: Callable[..., Any], extra_inputs: Sequence[ExtraInput], timestep: TimestepInput | None, owner_position: int | None
) -> Callable[..., Any]:
    """Wraps a compiled graph so that each call gets the appended inputs.

    The clock belongs to the parameter at ``owner_position`` of the call, since Dynamo runs one graph for all models of a class; a
    graph without parameters has a clock of its own.
    """
    own_clock = Clock()
    turning = any(extra.phases > 1 or extra.dense_steps for extra in extra_inputs)

    def appended(clock: Clock, extra: ExtraInput) -> Any:
        return clock.phase(extra.phases, extra.value.device, extra.dense_steps) if extra.phases else extra.value

    def run(*args: Any) -> Any:
        clock = own_clock if owner_position is None else clock_of(args[owner_position], compat.root_module)
        if turning and timestep is not None:
            clock.tick(args[timestep.position])
        return compiled(*args, *(appended(clock, extra) for extra in extra_inputs))

    return run
