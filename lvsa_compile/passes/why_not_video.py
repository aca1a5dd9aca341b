"""Why a site is not self-attention over the video that the model generates."""

from __future__ import annotations

from torch import Tensor, fx

from lvsa_compile import compat, reasons
from lvsa_compile.axes.algebra import same
from lvsa_compile.compat import example_value
from lvsa_compile.forward import context
from lvsa_compile.layout.lost import after
from lvsa_compile.layout.token_layout import CONTRADICTED, IMAGE, SCRAMBLED, UNKNOWN, VIDEO, Segment, TokenLayout
from lvsa_compile.passes.compilation import Compilation
from lvsa_compile.reasons import Miss

_OF_A_PART = (
    reasons.SPATIAL_OR_TEMPORAL,
    reasons.NOT_VIDEO,
    reasons.SINGLE_FRAME,
    reasons.OTHER_VIDEO,
    reasons.NO_GRID,
    reasons.CROSS_ATTENTION,
    reasons.FRAMES_NOT_CONTIGUOUS,
    reasons.LAYOUT_UNKNOWN,
)
"""What a part of a forward may look like that was cut off from the inputs."""


_FOR_A_BLOCK = "Use lvsa_compile.compile_repeated_blocks(model), lvsa's own and not diffusers', or compile the model as a whole."


def why_not_video(node: fx.Node, query: TokenLayout, key: TokenLayout, compilation: Compilation) -> Miss | None:
    """Why the site is not self-attention over the generated video, or None."""
    miss = _miss(node, query, key, compilation)
    if miss is None:
        return None
    if node in compilation.cut_off and miss.reason in _OF_A_PART:
        forward = compilation.forward
        return reasons.GRAPH_BREAK.because(f"query {query}, key {key}; the graph was broken at {forward.broken}", forward.remedy)
    if miss.reason is reasons.NO_GRID and compilation.position.continues and context.parent.get() is None:
        return reasons.GRAPH_BREAK.because(f"query {query}, key {key}; an earlier part of the forward ran eagerly")
    if miss.reason is reasons.OTHER_VIDEO and compilation.not_denoiser:
        return reasons.NOT_DENOISER.because(compilation.not_denoiser)
    return miss


def _miss(node: fx.Node, query: TokenLayout, key: TokenLayout, compilation: Compilation) -> Miss | None:
    has_video = compilation.has_video
    query_videos, key_videos = query.of_kind(VIDEO), key.of_kind(VIDEO)
    pictured = [layout.shows_pictures or bool(layout.of_kind(SCRAMBLED)) for layout in (query, key)]
    for segment in (*query.segments, *key.segments):
        if segment.kind == UNKNOWN and (has_video or _may_be_video(node.graph, segment)):
            if compat.known_only_at_run_time(segment.size):
                return reasons.SIZE_NOT_KNOWN.because(f"there are {segment.size} tokens; {_lost(node, segment)}")
            cached = query_videos and _holds_more(segment, query_videos)
            return reasons.CACHED_KEYS.because(_lost(node, segment)) if cached else reasons.LAYOUT_UNKNOWN.because(_lost(node, segment))
        if segment.kind == CONTRADICTED:
            return reasons.LAYOUT_CONTRADICTED.because(segment.lost_at)
        if segment.kind == SCRAMBLED and all(pictured):
            return reasons.FRAMES_NOT_CONTIGUOUS.because(_not_all_frames(segment))
    if query.batch_video:
        return reasons.SPATIAL_OR_TEMPORAL.because(f"batch counts frames or places of the video; tokens: {query}")
    if not query_videos or not key_videos:
        if pictured[0] != pictured[1]:
            return reasons.CROSS_ATTENTION.because(f"query {query}, key {key}")
        if query.of_kind(IMAGE) and key.of_kind(IMAGE):
            return reasons.SINGLE_FRAME.because(f"query {query}")
        if query.shows_pictures:
            if compilation.output_lost and not has_video and not compilation.not_denoiser:
                return reasons.LAYOUT_UNKNOWN.because(
                    f"the way of the video to what the model returns is lost after {compilation.output_lost}"
                )
            return reasons.OTHER_VIDEO.because(f"query {query}, key {key}; a conditioning video's grid does not reach the model's output")
        parent = context.parent.get()
        if parent is not None and parent.called_by_others:
            return reasons.FORWARD_NOT_CALLED.because(f"{parent.block} of {type(parent.model).__name__} is called, its forward is not")
        if parent is not None and parent.first_forward and not has_video:
            return reasons.FIRST_FORWARD.because(f"{parent.block or 'a part'} of {type(parent.model).__name__}")
        if not has_video and (parent is None or parent.problem):
            why = "no input of this graph shows a video grid" if parent is None else parent.problem
            if parent is None and compilation.forward.model and compilation.timestep is None:
                around = f"query {query}, key {key}; {why}, and {compilation.forward.model} around it gets a video"
                return reasons.NO_GRID.because(around, _FOR_A_BLOCK)
            return reasons.NO_GRID.because(f"query {query}, key {key}; {why}")
        return reasons.NOT_VIDEO.because(f"query {query}, key {key}")
    if len(query_videos) > 1 or len(key_videos) > 1:
        return reasons.SEVERAL_VIDEOS.because(f"query {query}, key {key}")
    query_grid, key_grid = query_videos[0].grid, key_videos[0].grid
    assert query_grid is not None
    assert key_grid is not None
    same_size = same(query_grid.frames, key_grid.frames) and same(query_grid.tokens_per_frame, key_grid.tokens_per_frame)
    if not (query_grid.frame_sources & key_grid.frame_sources) or not same_size:
        return reasons.OTHER_VIDEO.because(f"query {query} from {query_videos[0].source}, key {key} from {key_videos[0].source}")
    return None


def _not_all_frames(segment: Segment) -> str:
    if segment.grid is None:
        return f"{segment.size} tokens of {segment.source} are not the video's frames, all of them, whole and in order"
    return f"{segment.grid.frames} latent frames of {segment.source}, from frame {segment.grid.first} on, are not all of the video's"


def _may_be_video(graph: fx.Graph, lost: Segment) -> bool:
    """Whether an input with axes enough for frames, rows and columns went into a segment, or one that nobody knows."""
    values = [example_value(node) for node in graph.nodes if node.op == "placeholder" and node.name in lost.origins]
    return not values or any(isinstance(value, Tensor) and value.dim() >= 4 for value in values)


def _holds_more(lost: Segment, videos: list[Segment]) -> bool:
    """Whether keys whose order was lost come from the video of the query and from something else beside it."""
    own = {source.node_name for video in videos if video.grid is not None for source in video.grid.frame_sources}
    return bool(lost.origins & own) and bool(lost.origins - own)


def _lost(node: fx.Node, lost: Segment) -> str:
    return f"which frame each token is of is unknown after {after(lost.source, lost.lost_at, node.graph)}"
