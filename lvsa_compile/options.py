"""Every option of the ``lvsa`` backend, declared once: name, default, meaning and check.

``torch.compile(model, backend="lvsa", options={...})`` takes these names, and the keys of Inductor's own configuration beside them.
Options that no call gives come from ``set_default_options``, else from the environment variable ``LVSA_OPTIONS``, else from here.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from lvsa_compile import option_checks as checks
from lvsa_compile.errors import OptionError, OptionsVariableError, UnknownOptionError
from lvsa_compile.option_checks import Check
from lvsa_compile.policies.contract import Policy
from lvsa_compile.policies.given import given_policy, policy_as_dict
from lvsa_compile.policies.lvsa.policy import LVSA, wrong_rotation

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
Inner: TypeAlias = "str | Callable[..., Any]"
"""A compiler by name, or a Dynamo backend."""


def _option(default: T, meaning: str, check: Check) -> T:
    result: T = field(default=default, metadata={"meaning": meaning, "check": check})
    return result


_OF_LVSA = tuple(field.name for field in fields(LVSA))
"""Options that are fields of policy LVSA."""


@dataclass(frozen=True)
class Options:
    """The options of one compile, validated.  All lengths are in latent frames, after temporal patchify.

    Raises:
        OptionError: a value an option cannot have; the text names option, value and remedy.
    """

    window: int = _option(3, "Half-width of the local window, in latent frames; 0 leaves the anchors alone.", checks.whole(0))
    first_frames: int = _option(1, "How many frames at the start are attended by every frame at every step.", checks.whole(0))
    reference_frames: int | None = _option(
        None, "Training horizon of the model in latent frames; by default from a table of known models.", checks.optional(checks.whole(1))
    )
    sparsity_scale: float = _option(1.0, "Multiplies the budget of attended frames that `reference_frames` sets.", checks.positive)
    key_frame_interval: int | None = _option(
        None,
        "Distance of the periodic anchors; None chooses it from the horizon, 0 means no periodic anchors.",
        checks.optional(checks.whole(0)),
    )
    expand_window: bool = _option(True, "Whether the window grows until it holds 2 * window + 1 frames that are not anchors.", checks.flag)
    rotate: bool | str = _option(
        True,
        "What the anchor grid moves by one frame with: 'step', each denoising step; 'layer', each layer of the model; 'both', for "
        "schedules of few steps; True is 'step', and False keeps it where it is.",
        wrong_rotation,
    )
    policy: Any = _option(  # noqa: RUF009 - as all options
        "lvsa",
        "How blocks are chosen: a policy's name, a policy such as `LVSA(window=2)`, or a dict of its name and fields.  `window`, "
        "`first_frames`, `sparsity_scale`, `key_frame_interval`, `expand_window` and `rotate` are fields of policy 'lvsa'.",
        checks.policy("policy"),
    )
    policy_at_horizon: Any = _option(  # noqa: RUF009 - as all options
        "dense",
        "The policy where that of `policy` would leave nothing out, as LVSA at and below the training horizon; 'dense' is none.",
        checks.policy("policy_at_horizon", "dense"),
    )
    when_slower: str = _option(
        "sparse",
        "What a site gets whose pattern is expected not to be faster: 'sparse' keeps the pattern, 'dense' leaves it.",
        checks.one_of("sparse", "dense"),
    )
    dense_steps: int = _option(0, "How many denoising steps at the start attend densely.", checks.whole(0, frames=False))
    dense_layers: tuple[int, ...] = _option(
        (), "Video attention sites left dense, by their number in the model's order, from 0.", checks.indices
    )
    max_sites: int | None = _option(
        None,
        "Rewrite at most this many sites, in the model's order; for finding the one that matters.",
        checks.optional(checks.whole(0, frames=False)),
    )
    disable_passes: tuple[str, ...] = _option(
        (), "Passes of the compiler to switch off, by name, for finding a fault; names are checked when a graph is compiled.", checks.names
    )
    lower_padding_masks: bool = _option(
        True, "Whether a site whose mask is the same for every query (padding) may be sparse, with the mask kept.", checks.flag
    )
    verify: bool = _option(
        False, "Compute each sparse site a second time by its meaning in float32 and report the worst error; slow.", checks.flag
    )
    eager_attention: bool = _option(
        True,
        "Whether attention of the model that runs in eager code, between its graphs or under torch.compiler.disable, is made sparse, too, "
        "from its second forward on.",
        checks.flag,
    )
    require: str | None = _option(
        None,
        "'sparse' raises an error, from the second forward of a size on, where attention over the video is dense for a reason that the "
        "user can mend; for servers and tests.",
        checks.optional(checks.one_of("sparse")),
    )
    strict: bool = _option(
        False, "Whether an error inside lvsa-compile is raised; else it is a warning, and the graph is compiled as it came.", checks.flag
    )
    lowering: str = _option(
        "auto",
        "How the pattern is computed; 'auto' takes what is expected to be fastest, under mode='max-autotune' what measuring finds.",
        checks.lowering,
    )
    inner: Inner = _option(  # noqa: RUF009 - as all options; the rule trips over a type that holds functions
        "auto",
        "Compiler of the rewritten graph: 'inductor', 'torchair' or 'npugraph_ex' on Ascend NPUs, 'aot_eager', 'eager', or any Dynamo "
        "backend as a function; 'auto' is Inductor, and torchair on an NPU.",
        checks.inner,
    )
    mode: str | None = _option(
        None, "Inductor's mode, since torch.compile does not take mode= and options= together.", checks.optional(checks.inductor_mode)
    )
    inductor: tuple[tuple[str, Any], ...] = field(default=(), metadata={"meaning": "Keys of Inductor's own configuration."})
    sources: tuple[tuple[str, str], ...] = field(default=(), compare=False, metadata={"meaning": "Where options come from, if not a call."})

    def __post_init__(self) -> None:
        for spec in option_fields():
            value = getattr(self, spec.name)
            if problem := spec.metadata["check"](value):
                raise OptionError(spec.name, value, *problem)
        if not self.may_be_inductor:
            for name, value in (("mode", self.mode), *self.inductor):
                if value is not None:
                    raise OptionError(
                        name,
                        value,
                        f"this is Inductor's, and inner={self.inner!r} does not use Inductor",
                        "Drop it, or use inner='inductor'.",
                    )
        if self.verify and (callable(self.inner) or self.inner in ("torchair", "npugraph_ex")):
            raise OptionError(
                "verify", True, "its comparison is an op that only torch's own compilers know", "Verify with inner='aot_eager'."
            )
        if self.verify and self.uses_cuda_graphs:
            raise OptionError(
                "verify", True, "CUDA graphs replay without running the comparison", "Drop mode and triton.cudagraphs while verifying."
            )
        for name in ("policy", "policy_at_horizon"):  # as JSON has them
            if isinstance(value := getattr(self, name), Mapping):
                object.__setattr__(self, name, given_policy(name, value))
        self.chosen_policy  # noqa: B018 - combinations that no frame could use are an error now, not at the first forward

    @property
    def may_be_inductor(self) -> bool:
        """Whether Inductor may compile the graph."""
        return self.inner in ("auto", "inductor")

    def on(self, device_type: str) -> Options:
        """These options where a graph runs on a kind of device.

        Raises:
            OptionError: one of them is Inductor's, and another compiler compiles there.
        """
        inner = self.inner_on(device_type)
        return self if self.inner != "auto" or inner == "inductor" else dataclasses.replace(self, inner=inner)

    def inner_on(self, device_type: str) -> Inner:
        """Who compiles a graph on a kind of device."""
        return self.inner if self.inner != "auto" else "torchair" if device_type == "npu" else "inductor"

    def graph_compiler(self, device: torch.device) -> str:
        """Who compiles a graph on a device, where that is one that knows no ops of this package; else ""."""
        inner = self.inner_on(device.type)
        if callable(inner):
            return getattr(getattr(inner, "func", inner), "__name__", type(inner).__name__) if device.type == "npu" else ""
        return inner if inner in ("torchair", "npugraph_ex") else ""

    @property
    def uses_cuda_graphs(self) -> bool:
        """Whether Inductor will use CUDA graphs: by its own option, else by the mode, else by its configuration."""
        from lvsa_compile import compat

        by_mode = self.mode in ("reduce-overhead", "max-autotune") or (self.may_be_inductor and compat.cuda_graphs_by_default())
        return bool(dict(self.inductor).get("triton.cudagraphs", by_mode))

    @property
    def measures(self) -> bool:
        """Whether these options ask for the fastest that measuring finds."""
        return str(self.mode).startswith("max-autotune") or bool(dict(self.inductor).get("max_autotune"))

    def changed(self) -> dict[str, Any]:
        """The options that are not at their defaults, Inductor's own too."""
        return {f.name: _as_reported(getattr(self, f.name)) for f in option_fields() if getattr(self, f.name) != f.default} | dict(
            self.inductor
        )

    @functools.cached_property
    def chosen_policy(self) -> Policy:
        """The policy of option ``policy``, with the fields of LVSA that are given beside it."""
        return LVSA(**{name: getattr(self, name) for name in _OF_LVSA}) if self.policy == "lvsa" else given_policy("policy", self.policy)

    @functools.cached_property
    def chosen_at_horizon(self) -> Policy | None:
        """The policy of option ``policy_at_horizon``; None for dense attention."""
        return None if self.policy_at_horizon == "dense" else given_policy("policy_at_horizon", self.policy_at_horizon)


def _as_reported(value: Any) -> Any:
    """An option's value as reports show it, a function by its name, a policy by its name and fields."""
    if isinstance(value, Policy):
        return policy_as_dict(value)
    return f"{value.__module__}.{getattr(value, '__qualname__', type(value).__name__)}" if callable(value) else value


def option_fields() -> list[Any]:
    """The fields of ``Options`` a user sets by name, in order, each with ``metadata`` ``meaning`` and ``check``."""
    return [f for f in fields(Options) if "check" in f.metadata]


VARIABLE = "LVSA_OPTIONS"
"""Environment variable that holds options as JSON; processes that are started from this one get it too."""
_SETTER = "lvsa_compile.set_default_options"
_defaults: dict[str, Any] = {}


def set_default_options(**options: Any) -> None:
    """Sets options for all compiles of this process that do not give them themselves; for programs that take a backend by name alone.

    They come before those of ``LVSA_OPTIONS``, key by key, and hold for what is compiled from now on.  Each call replaces what an
    earlier one set, and a call with no options takes all back.  Processes that are started from this one do not get them.

    Args:
        **options: as for ``torch.compile(backend="lvsa", options={...})``.

    Raises:
        OptionError: a value that an option cannot have; then the defaults stay as they were.
        UnknownOptionError: a name that neither lvsa nor Inductor has; names the nearest.

    Example:
        >>> lvsa_compile.set_default_options(reference_frames=21)
        >>> pipe.transformer.compile(backend="lvsa")
    """
    global _defaults
    _parsed(options, {})
    _defaults = dict(options)  # at once, for compiles in other threads


def parse_options(given: Mapping[str, Any] | None, mode: str | None = None) -> Options:
    """Options as they reach the backend, with the defaults of this process, checked.

    ``mode`` is what ``torch.compile(mode=...)`` was called with.

    Raises:
        OptionError: a value that an option cannot have.
        UnknownOptionError: a name that neither lvsa nor Inductor has; names the nearest.
        OptionsVariableError: ``LVSA_OPTIONS`` holds no JSON object.
    """
    call = dict(given or {})
    if mode is not None:
        call.setdefault("mode", mode)
    merged: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for source, options in ((f"environment variable {VARIABLE}", _of_environment()), (_SETTER, _defaults), ("", call)):
        named = {_inductor_name(name): value for name, value in options.items()}
        if "policy" in named:  # what was set for another policy before does not reach this one
            merged = {name: value for name, value in merged.items() if name not in _OF_LVSA}
        merged |= named
        sources |= dict.fromkeys(named, source)
    return _parsed(merged, {name: source for name, source in sources.items() if source})


def _inductor_name(name: str) -> str:
    """A key of Inductor's configuration as Inductor writes it; any other name as it is."""
    from lvsa_compile import compat

    written = name.replace("-", "_")
    return written if compat.inductor_has_option(written) else name


def _of_environment() -> dict[str, Any]:
    text = os.environ.get(VARIABLE, "").strip()
    if not text:
        return {}
    try:
        found = json.loads(text)
    except ValueError as error:
        raise OptionsVariableError(VARIABLE, text, f"it is no JSON ({error})") from None
    if not isinstance(found, dict):
        raise OptionsVariableError(VARIABLE, text, f"it is JSON, and a {type(found).__name__}")
    return found


def _parsed(given: Mapping[str, Any], sources: Mapping[str, str]) -> Options:
    """Options checked; an error names the source of a value that no call gave."""
    from lvsa_compile import compat

    names = {f.name for f in option_fields()}
    ours: dict[str, Any] = {}
    inductors: list[tuple[str, Any]] = []
    try:
        for name, value in given.items():
            if name in names:
                ours[name] = value
            elif compat.inductor_has_option(written := _inductor_name(name)):
                if problem := compat.inductor_option_problem(written, value):
                    raise OptionError(name, value, *problem)
                inductors.append((written, value))
            else:
                raise UnknownOptionError(name, value, names | set(compat.inductor_options()) if "." in name else names)
        _check_beside_policy(ours)
        ours |= {name: tuple(value) for name, value in ours.items() if isinstance(value, list)}
        return Options(**ours, inductor=tuple(inductors), sources=tuple(sources.items()))
    except OptionError as error:
        if error.name in sources:
            raise error.of(sources[error.name]) from None
        others = [f"{name} comes from {source}" for name, source in sources.items() if f"{name}=" in error.problem]
        if others:
            raise OptionError(error.name, error.value, f"{error.problem} ({', '.join(others)})", error.remedy) from None
        raise


def _check_beside_policy(given: Mapping[str, Any]) -> None:
    """Fields of LVSA beside another policy, or beside one that has them itself, say two things."""
    policy = given.get("policy", "lvsa")
    name = next((name for name in _OF_LVSA if name in given), None)
    if policy == "lvsa" or name is None:
        return
    chosen = given_policy("policy", policy)
    remedy = f"Give it there, as in policy=LVSA({name}=...)." if isinstance(chosen, LVSA) else "Leave it out."
    raise OptionError(name, given[name], f"a field of policy 'lvsa' beside policy={policy_as_dict(chosen)}", remedy)


def make_options(**given: Any) -> dict[str, Any]:
    """Checks options now rather than at the first forward, and returns the dict for ``torch.compile(options=...)``.

    Raises:
        OptionError: a value that an option cannot have.
        UnknownOptionError: a name that neither lvsa nor Inductor has; names the nearest.

    Example:
        >>> torch.compile(model, backend="lvsa", options=lvsa_compile.make_options(window=2, max_autotune=True))
    """
    parse_options(given)
    return dict(given)
