"""What a report holds: a record per attention site, and one per graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from lvsa_compile.forward.calls import Calls
from lvsa_compile.passes.compilation import PassRun, Segments, TrailStep
from lvsa_compile.policies.contract import Plan

SCHEMA = 2
"""Number of the form that reports have as JSON; 1, which did not name itself, knew no policies."""
UNKNOWN_HORIZON = "unknown"
BETWEEN_GRAPHS = "between graphs"
"""Name of a site for attention that was seen in the code of a function and is decided, if at all, where it runs."""
SPARSE, MASKED, DENSE = "sparse", "masked", "dense"
ON_THE_REAL_DEVICE = "(chosen on the real device)"


@dataclass(frozen=True)
class SiteReport:
    """One attention site: ``decision`` is "sparse", "dense", or "masked": dense, its mask kept by parts so that none of
    queries × keys is made.  A site that is not sparse has a ``reason`` from the closed list.

    ``name`` is the path of its module, ``source`` the file and line; ``layout`` shows the token sequence; ``density`` is the attended
    share of frame pairs, mean over the phases; ``passed_over`` names the lowerings that could not serve, with why, ``seconds``
    what a call took by each that was measured, and ``expected`` how many times faster than dense it should be, 0 where that is not
    known; shapes are ``[batch, heads, tokens, head_dim]``; ``worst_error`` is what
    ``options={"verify": True}`` has seen so far, and ``tolerance`` what rounding explains in the site's dtype; ``flops`` are those of
    dense attention; ``faster`` are the lowerings of ``passed_over`` that are expected to be faster, ``fell_back`` says that one of them
    failed on this machine; ``mendable`` says that attention over the generated video is dense for a reason that the user can mend;
    ``segments`` are kind, label and tokens of each part of the query sequence, ``key_segments`` those of the key sequence where it is
    another; ``trail`` is the way of the query from the input that shows the video, up to where it was lost if it was.
    """

    name: str
    decision: str
    reason: str = ""
    detail: str = ""
    remedy: str = ""
    source: str = ""
    layout: str = ""
    density: float = 1.0
    lowering: str = ""
    passed_over: tuple[tuple[str, str], ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)
    expected: float = 0.0
    query_shape: str = ""
    key_shape: str = ""
    worst_error: float | None = None
    tolerance: float = 0.0
    flops: float = 0.0
    plan: Plan | None = field(default=None, repr=False)
    segments: Segments = ()
    key_segments: Segments = ()
    trail: tuple[TrailStep, ...] = ()
    measure: Callable[[], dict[str, float]] | None = field(default=None, repr=False, compare=False)
    faster: tuple[tuple[str, str], ...] = ()
    fell_back: bool = False
    mendable: bool = False

    def __str__(self) -> str:
        return f"{self.name}: {self.text}"

    @property
    def measured(self) -> float:
        """How many times faster than dense a call was, 0 where the two were not measured."""
        return self.seconds[DENSE] / self.seconds[self.lowering] if {DENSE, self.lowering} <= self.seconds.keys() else 0.0

    @property
    def slower(self) -> str:
        """How much slower than dense attention the lowering is, and what was passed over for it, in words; "" where it is not."""
        times = self.measured or self.expected
        if not self.faster or times >= 1.0:
            return ""
        speed = f"{'measured' if self.measured else 'expected'} at {times:.2g}× the speed of dense attention" if times else "right and slow"
        return f"{speed}, since {'; '.join(f'{name}: {why}' for name, why in self.faster)}"

    @property
    def text(self) -> str:
        """All but the name, in a line."""
        layout = f"  [{self.layout}]" if self.layout and self.layout not in self.detail else ""
        if self.decision == SPARSE:
            error = f", worst error {self.worst_error:.1e}" if self.worst_error is not None else ""
            if self.worst_error is not None and self.worst_error > self.tolerance:
                error += f", ABOVE the tolerance {self.tolerance:.0e}"
            times = ", ".join(f"{name} {1e3 * s:.3g} ms" for name, s in sorted(self.seconds.items(), key=lambda found: found[1]))
            measured = f" (measured: {times}{f'; {self.measured:.2g}×' if self.measured else ''})" if times else ""
            slower = f" ({self.slower})" if self.slower else ""
            return f"sparse, density {self.density:.3f}, lowering {self.lowering}{slower}{measured}{error}{layout}"
        remedy = f"  Remedy: {self.remedy}" if self.remedy else ""
        return f"{self.decision}, {self.reason}: {self.detail}{layout}{remedy}"


@dataclass(frozen=True)
class GraphReport:
    """One graph of a forward: Dynamo makes several where the model ``breaks``.  ``flops`` are all of it, dense; 0 where not known.

    ``passes`` are the passes that ran, each with what it changed and its seconds.
    ``clock_saw`` holds the timesteps that its models' clocks saw, ``short`` says which frames so few denoising steps leave never an anchor;
    ``schedules`` say which steps attend everything where a policy chooses blocks in others, ``state`` what memory that takes;
    ``calls`` counts its calls where it was compiled.
    """

    compile_id: str
    sites: tuple[SiteReport, ...]
    clock: str = ""
    specialised: tuple[str, ...] = ()
    breaks: bool = False
    flops: float = 0.0
    clock_saw: tuple[str, ...] = ()
    short: tuple[str, ...] = ()
    schedules: tuple[str, ...] = ()
    state: str = ""
    passes: tuple[PassRun, ...] = field(default=(), compare=False)
    calls: Calls | None = field(default=None, repr=False, compare=False)


def alike_sites(sites: Iterable[SiteReport]) -> dict[str, list[SiteReport]]:
    """The sites of which all but the name is the same, by the line that describes them, in order."""
    found: dict[str, list[SiteReport]] = {}
    for site in sites:
        found.setdefault(site.text, []).append(site)
    return found
