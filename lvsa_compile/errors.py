"""Every mistake a user can make with lvsa-compile, one exception class each.

A message names the argument, the value it had and the remedy.  The template lives in the class, so that the text can be tested
and documented from one position.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar


def in_a_line(error: BaseException) -> str:
    """The kind of an error of somebody else's and the first line of what it says."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


class LvsaError(Exception):
    """Base of all errors this package raises on purpose: a dataclass of facts, told by the class's ``template``."""

    template: ClassVar[str]

    def __post_init__(self) -> None:
        super().__init__(self.template.format(self=self))

    def __reduce__(self) -> tuple[object, ...]:
        facts: tuple[dataclasses.Field[Any], ...] = dataclasses.fields(self) if dataclasses.is_dataclass(self) else ()
        return type(self), tuple(getattr(self, fact.name) for fact in facts)


class LvsaWarning(UserWarning):
    """Something a user of the backend most likely did not mean."""


@dataclass(eq=False, repr=False)
class OptionError(LvsaError, ValueError):
    """An option has a value it cannot have; ``source`` says where it was given, if not in the call."""

    template = "option {self.name}={self.value!r}{self.given_at}: {self.problem}. {self.remedy}"

    name: str
    value: object
    problem: str
    remedy: str
    source: str = ""

    @property
    def given_at(self) -> str:
        """Where it was given, in words."""
        return f" of {self.source}" if self.source else ""

    def of(self, source: str) -> OptionError:
        """The same error about an option that was given at ``source``."""
        return OptionError(self.name, self.value, self.problem, self.remedy, source)


class UnknownOptionError(OptionError):
    """An option that neither lvsa-compile nor Inductor has."""

    def __init__(self, name: str, value: object, known: Iterable[str], source: str = "") -> None:
        self.known = sorted(known)
        nearest = difflib.get_close_matches(name, self.known, n=1, cutoff=0.5)
        remedy = f"Did you mean {nearest[0]!r}?" if nearest else f"The options are: {', '.join(self.known)}; and Inductor's own."
        super().__init__(name, value, "neither lvsa nor Inductor has this option", remedy, source)

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.name, self.value, self.known, self.source)

    def of(self, source: str) -> OptionError:
        """The same error about an option that was given at ``source``."""
        return UnknownOptionError(self.name, self.value, self.known, source)


@dataclass(eq=False, repr=False)
class OptionsVariableError(LvsaError, ValueError):
    """The environment variable that holds options cannot be read."""

    template = (
        "environment variable {self.variable}={self.text!r}: {self.problem}. Give a JSON object of options, such as "
        "{self.variable}='{{\"reference_frames\": 21}}', or unset it."
    )

    variable: str
    text: str
    problem: str


@dataclass(eq=False, repr=False)
class CpuKindError(LvsaError, ValueError):
    """An environment variable names a kind of CPU that there is not."""

    template = "environment variable {self.variable}={self.value!r}: no kind of CPU. Choose one of {self.choices}, or unset it."

    variable: str
    value: str
    kinds: tuple[str, ...]

    @property
    def choices(self) -> str:
        """The kinds there are, in words."""
        return ", ".join(self.kinds)


@dataclass(eq=False, repr=False)
class ShapeError(LvsaError, ValueError):
    """Tensors or a grid that do not fit together in a direct call of ``sparse_attention``."""

    template = "{self.argument}={self.value!r}: {self.problem}. {self.remedy}"

    argument: str
    value: object
    problem: str
    remedy: str


@dataclass(eq=False, repr=False)
class ReportFileError(LvsaError, ValueError):
    """A file that should hold a report and does not."""

    template = "{self.path!r} {self.problem}. Give a file that `lvsa explain ... --json` or json.dump(report.to_dict()) wrote."

    path: str
    problem: str


@dataclass(eq=False, repr=False)
class BisectError(LvsaError, ValueError):
    """Something that cannot be bisected."""

    template = "bisect {self.name}={self.value!r}: {self.problem}. {self.remedy}"

    name: str
    value: object
    problem: str
    remedy: str


@dataclass(eq=False, repr=False)
class BenchError(LvsaError, ValueError):
    """Something that ``lvsa bench`` cannot measure here."""

    template = "bench {self.part}: {self.problem}. {self.remedy}"

    part: str
    problem: str
    remedy: str


@dataclass(eq=False, repr=False)
class MissingPackageError(LvsaError, ImportError):
    """Something needs a package that is not installed."""

    template = "{self.needed_for} needs {self.package}. Run `pip install {self.package}`; the extra {self.extra!r} of this package has it."

    needed_for: str
    package: str
    extra: str


@dataclass(eq=False, repr=False)
class TargetError(LvsaError, ValueError):
    """A device that kernels cannot be compiled for here."""

    template = "target {self.target!r}: {self.problem}. {self.remedy}"

    target: str
    problem: str
    remedy: str


@dataclass(eq=False, repr=False)
class RegionError(LvsaError, ValueError):
    """Something that cannot be compiled block by block."""

    template = "{self.function}({self.argument}={self.value}): {self.problem}. {self.remedy}"

    argument: str
    value: object
    problem: str
    remedy: str
    function: str = "compile_repeated_blocks"


@dataclass(eq=False, repr=False)
class StepError(LvsaError, ValueError):
    """An explicit denoising step that is not a whole number from 0, or a number of steps that does not reach it."""

    template = "step({self.value!r}{self.given_of}): {self.problem}"

    value: object
    of: object = None

    @property
    def given_of(self) -> str:
        """The number of steps as it was given."""
        return "" if self.of is None else f", of={self.of!r}"

    @property
    def problem(self) -> str:
        """What is wrong, and the remedy."""
        if self.of is None:
            return "a denoising step is a whole number from 0. Pass the index of the step, not its timestep."
        return f"of is how many steps the video has, a whole number above {self.value!r}. Give it, or leave it out."


@dataclass(eq=False, repr=False)
class StepCountError(LvsaError, RuntimeError):
    """Something counts from the last denoising step, and nobody says how many there are."""

    template = (
        "{self.option}={self.value!r} counts from the last denoising step, and nobody says how many steps the video has. "
        "Call lvsa_compile.integrations.diffusers.attach(pipe), or run each step inside lvsa_compile.step(i, of=n); or leave it out."
    )

    option: str
    value: object


@dataclass(eq=False, repr=False)
class GradientError(LvsaError, RuntimeError):
    """A gradient was asked of an op that has none."""

    template = "{self.function} computes no gradients, and an input requires one. Call it under torch.no_grad(), or detach its inputs."

    function: str


@dataclass(eq=False, repr=False)
class AttachError(LvsaError, TypeError):
    """A pipeline that cannot tell its models the denoising step."""

    template = (
        "attach({self.pipeline}): no model of it has a cache_context, through which diffusers sends the denoising step. Leave attach out; "
        "the clock reads the step from the timestep."
    )

    pipeline: str


@dataclass(eq=False, repr=False)
class ExplainError(LvsaError, RuntimeError):
    """A model could not be explained on the meta device."""

    template = (
        "explain(device='meta') stopped at {self.line}: {self.first} A model that reads values cannot run without them; leave device out, "
        "so that the forward runs where the model is."
    )

    line: str
    problem: str

    @property
    def first(self) -> str:
        """The first line of the problem."""
        return self.problem.strip().splitlines()[0] if self.problem.strip() else "unknown error"


@dataclass(eq=False, repr=False)
class LoweringUnavailableError(LvsaError, RuntimeError):
    """A lowering was asked for by name and cannot serve the call."""

    template = "lowering {self.lowering!r} cannot be used here: {self.why}.{self.remedy}"

    lowering: str
    why: str

    @property
    def remedy(self) -> str:
        """What to do about one that was asked for by name."""
        return "" if self.lowering == "auto" else " Use lowering='auto' to let lvsa-compile choose."


@dataclass(eq=False, repr=False)
class AheadOfTimeError(LvsaError, RuntimeError):
    """A sparse model was to be compiled into an artifact."""

    template = (
        "lvsa cannot compile a model ahead of time (aot_compile): tables and the denoising step are given at each call, for which an "
        'artifact has no place. Use torch.compile(model, backend="lvsa") and run one forward when the process starts: what an earlier '
        "process compiled comes from Inductor's cache (TORCHINDUCTOR_CACHE_DIR)."
    )


@dataclass(eq=False, repr=False)
class RequireError(LvsaError, RuntimeError):
    """``options={"require": "sparse"}`` was given, and attention over the video is dense for a reason that the user can mend."""

    template = "require='sparse': attention over the video is dense. {self.miss}\n{self.report}"

    miss: str
    report: str


@dataclass(eq=False, repr=False)
class RateError(LvsaError, ValueError):
    """A lowering does not say how fast it is, so that ``lowering="auto"`` would never take it."""

    template = (
        "Lowering({self.lowering!r}): neither rates nor a speedup is given. Give rates={{'cuda:90': 0.6}}, its FLOP/s over those of the "
        "best dense kernel by kind of device, or a function speedup=."
    )

    lowering: str


@dataclass(eq=False, repr=False)
class PolicyError(LvsaError, RuntimeError):
    """A policy failed, or answered with what it must not; a defect of the policy."""

    template = "policy {self.policy!r}: its {self.method} {self.problem}"

    policy: str
    method: str
    problem: str


@dataclass(eq=False, repr=False)
class PlanError(LvsaError, ValueError):
    """The plan of a policy does not fit what it was made for; a defect of the policy."""

    template = "policy {self.policy!r}, its plan's {self.part}: {self.problem}. {self.remedy}"

    policy: str
    part: str
    problem: str
    remedy: str


@dataclass(eq=False, repr=False)
class SequencesError(LvsaError, RuntimeError):
    """Sequences in a call of attention are not those that a site was compiled for, which only their values tell."""

    template = (
        "attention {self.site}: it is compiled for one sequence in each sample that holds the whole video, and one of padding after it. "
        "The ends of sequences (cu_seqlens) in this call say otherwise. "
        "Compile with options={{'lower_padding_masks': False}}, which leaves such attention as it is."
    )

    site: str


@dataclass(eq=False, repr=False)
class RewriteError(LvsaError, RuntimeError):
    """The rewritten graph broke an invariant; a defect of lvsa-compile, never of the model."""

    template = (
        "the rewritten graph breaks an invariant: {self.invariant}. This is a defect of lvsa-compile; "
        "set LVSA_DUMP_DIR to a folder, run again and report it with the files written there."
    )

    invariant: str


@dataclass(eq=False, repr=False)
class VideoQualityError(LvsaError):
    """A video, or what was asked of its evaluation, cannot be used."""

    template = "{self.name} {self.value!r}: {self.problem}. {self.remedy}"

    name: str
    value: object
    problem: str
    remedy: str
