"""What one compile knows, handed from pass to pass; each pass returns it with its own part filled in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from lvsa_compile import compat
from lvsa_compile.axes.call import Axes
from lvsa_compile.forward.context import Position
from lvsa_compile.layout.guarded_values import Reader
from lvsa_compile.layout.mask_form import MaskForm
from lvsa_compile.layout.token_layout import TokenLayout
from lvsa_compile.options import Options
from lvsa_compile.patterns.site import AttentionSite, DenseSite
from lvsa_compile.policies.contract import Facts, Horizon, State
from lvsa_compile.policies.rows import Rows
from lvsa_compile.reasons import Miss
from lvsa_compile.selection.contract import AttentionCall
from lvsa_compile.selection.select import Choice
from lvsa_compile.watching.eager_call import Attend

EAGER = "eager"
"""Beginning of the compile id of attention that runs in eager code, which is a graph of one node."""

Segments = tuple[tuple[str, str, int], ...]
"""Kind, label and tokens of each part of a sequence."""


def sizes_of(tensor: Tensor) -> str:
    """A shape as reports show it, symbolic sizes by their names: [1, s0, 24]."""
    return f"[{', '.join(str(size) for size in tensor.shape)}]"


@dataclass(frozen=True)
class SparsePlan:
    """How a site becomes sparse: the call it is lowered to, the lowering chosen, and what its mask says."""

    call: AttentionCall
    choice: Choice
    mask: MaskForm | None = None


@dataclass(frozen=True)
class TrailStep:
    """An op on the way from the latent to a query: what it gave, and file and line; ``lost`` where the layout was lost there."""

    op: str
    shape: str
    source: str
    lost: bool = False


@dataclass(frozen=True)
class Decision:
    """What becomes of one site: a ``plan``, or a ``miss`` that says why it stays dense.

    ``mendable`` says that attention over the generated video is dense for a reason that the user can mend.
    A dense site with a ``mask`` is "masked": computed dense by the mask's parts, so that the mask itself need not be made.
    ``segments`` are the kinds, labels and sizes in tokens of the query sequence, as far as they are numbers; ``key_segments`` those of
    the key sequence where it is another.  ``layer`` is the number of its layer among those of the graph, for a site over the video.
    """

    name: str
    node: fx.Node
    site: AttentionSite | None = None
    layout: str = ""
    mask: MaskForm | None = None
    plan: SparsePlan | None = None
    miss: Miss | None = None
    mendable: bool = False
    segments: Segments = ()
    key_segments: Segments = ()
    trail: tuple[TrailStep, ...] = ()
    layer: int = 0


@dataclass(frozen=True)
class ExtraInput:
    """An input appended to the graph: a constant, the row of a table that a denoising step uses, the guidance branch, or state.

    ``value`` is the constant; of the others it only shows shape and dtype, on the meta device, and ``device`` is where they are.
    Of a row ``rows`` is the rule, and ``step`` tells which of the denoising steps of one graph it is of.  Of state ``site`` is the name
    of the site that keeps it.
    """

    name: str
    value: Tensor
    device: torch.device
    rows: Rows | None = None
    step: int = 0
    state: State | None = None
    site: str = ""
    is_branch: bool = False


Piece = tuple[int, int | None]
"""An input by position, and which element of it along the first axis; None for all of it."""


@dataclass(frozen=True)
class TimestepInput:
    """What tells the denoising step: an input of the graph at ``position``, or the number ``value`` that Dynamo made a constant.

    ``steps`` are the pieces that tell each of several denoising steps of one graph, in order.
    """

    position: int
    name: str
    value: float | None = None
    steps: tuple[Piece, ...] = ()


@dataclass(frozen=True)
class Outside:
    """Attention in code that runs between graphs: its line, why it is in no graph, and what mends that."""

    line: str
    why: str
    remedy: str


@dataclass(frozen=True)
class Forward:
    """What is around a graph in its forward.

    Whether a video goes in (``shows_video``), of at least ``least_tokens`` and, as far as its shape tells,
    of one of these numbers of ``frames``, and the ``model`` that gets it; where and why the forward was ``broken`` before this graph,
    "" where it was not, and the ``remedy``; attention ``outside`` of all graphs.
    """

    shows_video: bool = False
    least_tokens: int = 0
    frames: tuple[int, ...] = ()
    model: str = ""
    broken: str = ""
    remedy: str = ""
    outside: tuple[Outside, ...] = ()


@dataclass(frozen=True)
class PassRun:
    """A pass that ran: what it changed, in a line, and how many seconds it took."""

    name: str
    changed: str
    seconds: float


@dataclass(frozen=True)
class Compilation:
    """The state of one compile.

    Args:
        graph_module: the graph, a copy that passes may edit.
        options: the user's.
        example_inputs: what the graph was called with; real tensors.
        device: where the model will run if that is not where it is traced.
        model: the class of the model, for reports.
        compile_id: the compile as torch's logs name it, such as "0/1".
        position: where the graph stands in its forward.
        attend: compiles attention of the same model that runs in eager code; None where that stays as it is.
        forward: what is around it there.
        sites: attention, in the order of the graph.
        layouts: token layouts of query and key by site.
        masks: what the mask of each masked site means, None where that cannot be expressed.
        analysis_nodes: nodes for analysis only; ``rewrite`` erases them.
        video_inputs: names of the inputs that hold the generated video.
        assumed: symbolic sizes that are taken to be equal, or to be numbers, while the layout is traced; None before any are.
        noticed: further equalities that would be of use.
        cut_off: sites whose query comes from an earlier graph without an annotation.
        output_lost: where the way of a video to the outputs was lost.
        not_denoiser: why a video that is attended is not generated.
        reader: knows which inputs' values were read.
        trace_failure: why there are no layouts.
        horizon: the training horizon; ``horizon_missing`` says why there is none.
        timestep: the input that tells the denoising step.
        step_of: which of several denoising steps of the graph a site belongs to.
        clock_before: the input that moved the clock before this graph runs.
        decisions: what becomes of each site.
        followed: whether attention between the graphs of the model is compiled from its next forward on.
        specialised: symbolic sizes that had to be fixed, in words.
        extra_inputs: inputs appended to the graph.
        outgoing: annotations of outputs, by position, for the next graph of the same forward.
        passed_on: axes of the other outputs, in terms of the graph's inputs.
        flops: those of the whole graph, dense; 0 where a size is not a number.
        changed: whether a pass changed what the graph computes; without it the graph is compiled as it came.
        passes: the passes that ran.
    """

    graph_module: fx.GraphModule
    options: Options
    example_inputs: Sequence[Any] = ()
    device: torch.device | None = None
    model: str = ""
    compile_id: str = "-"
    position: Position = Position()  # noqa: RUF009 - frozen
    attend: Attend | None = field(default=None, compare=False)
    forward: Forward = Forward()
    sites: tuple[AttentionSite | DenseSite, ...] = ()
    layouts: dict[fx.Node, tuple[TokenLayout, TokenLayout]] = field(default_factory=dict)
    masks: dict[fx.Node, MaskForm | None] = field(default_factory=dict)
    analysis_nodes: tuple[fx.Node, ...] = ()
    video_inputs: frozenset[str] = frozenset()
    assumed: tuple[compat.Equality, ...] | None = None
    noticed: tuple[compat.Equality, ...] = ()
    cut_off: frozenset[fx.Node] = frozenset()
    output_lost: str = ""
    not_denoiser: str = ""
    reader: Reader | None = None
    trace_failure: str = ""
    horizon: Horizon | None = None
    horizon_missing: str = ""
    timestep: TimestepInput | None = None
    step_of: dict[fx.Node, int] = field(default_factory=dict)
    clock_before: str = ""
    decisions: tuple[Decision, ...] = ()
    followed: bool = False
    specialised: tuple[str, ...] = ()
    extra_inputs: tuple[ExtraInput, ...] = ()
    outgoing: tuple[tuple[int, Axes], ...] = ()
    passed_on: tuple[tuple[int, Axes], ...] = ()
    flops: float = 0.0
    changed: bool = False
    passes: tuple[PassRun, ...] = ()

    @property
    def has_video(self) -> bool:
        """Whether an input shows a video grid that is generated."""
        return bool(self.video_inputs)

    @property
    def in_eager_code(self) -> bool:
        """Whether this is one call of attention in eager code, of which no compile is in progress."""
        return self.compile_id.startswith(EAGER)

    @property
    def facts(self) -> Facts:
        """What policies are told beside the geometry of a site."""
        return Facts(self.horizon, self.horizon_missing)

    @property
    def layers(self) -> int:
        """How many layers attend over the video in the graph; at least 1."""
        return 1 + max((decision.layer for decision in self.decisions), default=0)

    @property
    def masked(self) -> tuple[Decision, ...]:
        """The decisions that leave a site dense and take its mask apart."""
        return tuple(decision for decision in self.decisions if decision.plan is None and decision.mask is not None)

    @property
    def sparse(self) -> tuple[Decision, ...]:
        """The decisions that rewrite a site."""
        return tuple(decision for decision in self.decisions if decision.plan is not None)


Pass = Callable[[Compilation], Compilation]
