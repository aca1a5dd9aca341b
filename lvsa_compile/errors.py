"""Every mistake a user can make with lvsa-compile, one exception class each.

A message names the argument, the value it had and the remedy.  The template lives in the class, so that the text can be tested
and documented from one place.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def in_a_line(error: BaseException) -> str:
    """The kind of an error of somebody else's and the first line of what it says."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


class LvsaError(Exception):
    """Base of all errors this package raises on purpose."""


class LvsaWarning(UserWarning):
    """Something a user of the backend most likely did not mean."""


class OptionError(LvsaError, ValueError):
    """An option has a value it cannot have; ``source`` says where it was given, if not in the call."""

    def __init__(self, name: str, value: object, problem: str, remedy: str, source: str = "") -> None:
        super().__init__(f"option {name}={value!r}{f' of {source}' if source else ''}: {problem}. {remedy}")
        self.name, self.value, self.problem, self.remedy, self.source = name, value, problem, remedy, source

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.name, self.value, self.problem, self.remedy, self.source)

    def of(self, source: str) -> OptionError:
        """The same error about an option that was given at ``source``."""
        return OptionError(self.name, self.value, self.problem, self.remedy, source)


class UnknownOptionError(OptionError):
    """An option that neither lvsa-compile nor Inductor has."""

    def __init__(self, name: str, value: object, known: Iterable[str], source: str = "") -> None:
        known = sorted(known)
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        remedy = f"Did you mean {nearest[0]!r}?" if nearest else f"The options are: {', '.join(known)}; and Inductor's own."
        super().__init__(name, value, "neither lvsa nor Inductor has this option", remedy, source)
        self._known = known

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.name, self.value, self._known, self.source)

    def of(self, source: str) -> OptionError:
        """The same error about an option that was given at ``source``."""
        return UnknownOptionError(self.name, self.value, self._known, source)


class OptionsVariableError(LvsaError, ValueError):
    """The environment variable that holds options cannot be read."""

    def __init__(self, variable: str, text: str, problem: str) -> None:
        remedy = f"Give a JSON object of options, such as {variable}='{{\"reference_frames\": 21}}', or unset it."
        super().__init__(f"environment variable {variable}={text!r}: {problem}. {remedy}")
        self.variable, self.text, self.problem = variable, text, problem

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.variable, self.text, self.problem)


class CpuKindError(LvsaError, ValueError):
    """An environment variable names a kind of CPU that there is not."""

    def __init__(self, variable: str, value: str, kinds: Iterable[str]) -> None:
        kinds = tuple(kinds)
        super().__init__(f"environment variable {variable}={value!r}: no kind of CPU. Choose one of {', '.join(kinds)}, or unset it.")
        self.variable, self.value, self.kinds = variable, value, kinds

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.variable, self.value, self.kinds)


class ShapeError(LvsaError, ValueError):
    """Tensors or a grid that do not fit together in a direct call of ``sparse_attention``."""

    def __init__(self, argument: str, value: object, problem: str, remedy: str) -> None:
        super().__init__(f"{argument}={value!r}: {problem}. {remedy}")
        self.argument, self.value, self.problem, self.remedy = argument, value, problem, remedy

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.argument, self.value, self.problem, self.remedy)


class ReportFileError(LvsaError, ValueError):
    """A file that should hold a report and does not."""

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(f"{path!r} {problem}. Give a file that `lvsa explain ... --json` or json.dump(report.to_dict()) wrote.")
        self.path, self.problem = path, problem

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.path, self.problem)


class BisectError(LvsaError, ValueError):
    """Something that cannot be bisected."""

    def __init__(self, name: str, value: object, problem: str, remedy: str) -> None:
        super().__init__(f"bisect {name}={value!r}: {problem}. {remedy}")
        self.name, self.value, self.problem, self.remedy = name, value, problem, remedy

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.name, self.value, self.problem, self.remedy)


class BenchError(LvsaError, ValueError):
    """Something that ``lvsa bench`` cannot measure here."""

    def __init__(self, part: str, problem: str, remedy: str) -> None:
        super().__init__(f"bench {part}: {problem}. {remedy}")
        self.part, self.problem, self.remedy = part, problem, remedy

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.part, self.problem, self.remedy)


class TargetError(LvsaError, ValueError):
    """A device that kernels cannot be compiled for here."""

    def __init__(self, target: str, problem: str, remedy: str) -> None:
        super().__init__(f"target {target!r}: {problem}. {remedy}")
        self.target, self.problem, self.remedy = target, problem, remedy

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.target, self.problem, self.remedy)


class RegionError(LvsaError, ValueError):
    """Something that cannot be compiled block by block."""

    def __init__(self, argument: str, value: object, problem: str, remedy: str) -> None:
        super().__init__(f"compile_repeated_blocks({argument}={value}): {problem}. {remedy}")
        self.argument, self.value, self.problem, self.remedy = argument, value, problem, remedy

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.argument, self.value, self.problem, self.remedy)


class StepError(LvsaError, ValueError):
    """An explicit denoising step that is not a whole number from 0, or a number of steps that does not reach it."""

    def __init__(self, value: object, of: object = None) -> None:
        problem = f"step({value!r}): a denoising step is a whole number from 0. Pass the index of the step, not its timestep."
        if of is not None:
            problem = (
                f"step({value!r}, of={of!r}): of is how many steps the video has, a whole number above {value!r}. Give it, or leave it out."
            )
        super().__init__(problem)
        self.value, self.of = value, of

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.value, self.of)


class GradientError(LvsaError, RuntimeError):
    """A gradient was asked of an op that has none."""

    def __init__(self, function: str) -> None:
        super().__init__(
            f"{function} computes no gradients, and an input requires one. Call it under torch.no_grad(), or detach its inputs."
        )
        self.function = function

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.function,)


class AttachError(LvsaError, TypeError):
    """A pipeline that cannot tell its models the denoising step."""

    def __init__(self, pipeline: str) -> None:
        super().__init__(
            f"attach({pipeline}): no model of it has a cache_context, through which diffusers sends the denoising step. Leave attach out; "
            "the clock reads the step from the timestep."
        )
        self.pipeline = pipeline

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.pipeline,)


class ExplainError(LvsaError, RuntimeError):
    """A model could not be explained on the meta device."""

    def __init__(self, line: str, problem: str) -> None:
        first = problem.strip().splitlines()[0] if problem.strip() else "unknown error"
        super().__init__(
            f"explain(device='meta') stopped at {line}: {first} A model that reads values cannot run without them; leave device out, "
            "so that the forward runs where the model is."
        )
        self.line, self.problem = line, problem

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.line, self.problem)


class LoweringUnavailableError(LvsaError, RuntimeError):
    """A lowering was asked for by name and cannot serve the call."""

    def __init__(self, lowering: str, why: str) -> None:
        super().__init__(f"lowering {lowering!r} cannot be used here: {why}. Use lowering='auto' to let lvsa-compile choose.")
        self.lowering, self.why = lowering, why

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.lowering, self.why)


class AheadOfTimeError(LvsaError, RuntimeError):
    """A sparse model was to be compiled into an artifact."""

    def __init__(self) -> None:
        super().__init__(
            "lvsa cannot compile a model ahead of time (aot_compile): tables and the denoising step are given at each call, for which an "
            'artifact has no place. Use torch.compile(model, backend="lvsa") and run one forward when the process starts: what an earlier '
            "process compiled comes from Inductor's cache (TORCHINDUCTOR_CACHE_DIR)."
        )

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), ()


class RequireError(LvsaError, RuntimeError):
    """``options={"require": "sparse"}`` was given, and attention over the video is dense for a reason that the user can mend."""

    def __init__(self, miss: str, report: str) -> None:
        super().__init__(f"require='sparse': attention over the video is dense. {miss}\n{report}")
        self.miss, self.report = miss, report

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.miss, self.report)


class RateError(LvsaError, LookupError):
    """A lowering says that its speed is known, and it is not."""

    def __init__(self, lowering: str) -> None:
        super().__init__(
            f"by_rate({lowering!r}): lowering/rates.py has no rate for this lowering on any kind of device. Add it there, or give the "
            "lowering a speedup of its own."
        )
        self.lowering = lowering

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.lowering,)


class RewriteError(LvsaError, RuntimeError):
    """The rewritten graph broke an invariant; a defect of lvsa-compile, never of the model."""

    def __init__(self, invariant: str) -> None:
        super().__init__(
            f"the rewritten graph breaks an invariant: {invariant}. This is a defect of lvsa-compile; "
            "set LVSA_DUMP_DIR to a folder, run again and report it with the files written there."
        )
        self.invariant = invariant

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.invariant,)


class VideoQualityError(LvsaError):
    """A video, or what was asked of its evaluation, cannot be used."""

    def __init__(self, name: str, value: object, problem: str, remedy: str) -> None:
        super().__init__(f"{name} {value!r}: {problem}. {remedy}")
        self.name, self.value, self.problem, self.remedy = name, value, problem, remedy

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.name, self.value, self.problem, self.remedy)
