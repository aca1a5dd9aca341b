"""The closed list of reasons why an attention site is left dense, each with what a user can do about it.

Users meet a reason in the log line, in the report and in ``docs/reasons.md``, always in these words.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

NOTHING_TO_DO: Final = "Nothing to do: dense is right here."


@dataclass(frozen=True)
class Reason:
    """Why a site stays dense.  ``remedy`` is empty where dense is what the site should be.

    ``mendable`` says that attention over the generated video may stand behind it, and that the user can have it sparse.
    """

    code: str
    meaning: str
    remedy: str = ""
    mendable: bool = False

    def because(self, detail: str = "", remedy: str = "") -> Miss:
        """This reason for one site, with what was found there and, where that says more than the reason's own, what mends it."""
        return Miss(self, detail, remedy or self.remedy)


@dataclass(frozen=True)
class Miss:
    """A reason as it applies to one site; ``detail`` holds the values that decided, ``remedy`` what the user can do."""

    reason: Reason
    detail: str = ""
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.reason.code}: {self.detail or self.reason.meaning}"


CROSS_ATTENTION: Final = Reason(
    "cross_attention", "Video attends to something that is not video, or the other way round; LVSA leaves that dense."
)
NOT_VIDEO: Final = Reason("not_video", "No token of the query or of the key comes from the video: text, audio or image attention.")
NO_GRID: Final = Reason(
    "no_grid",
    "No input of this graph shows the frames, rows and columns of a video.",
    "For a part of a video model: lvsa_compile.compile_repeated_blocks(model), or compile the model as a whole. Otherwise nothing to do.",
    mendable=True,
)
FIRST_FORWARD: Final = Reason(
    "first_forward",
    "The model around this attention was found while a part of it was compiled. It becomes sparse once a forward has shown the video.",
    "Nothing to do: call the model again. Where no report of a sparse site follows, nothing that goes in or comes out shows the video; "
    "torch.compile of the whole model reports why. lvsa_compile.compile_repeated_blocks(model) is sparse from the first forward on.",
)
FORWARD_NOT_CALLED: Final = Reason(
    "forward_not_called",
    "compile_repeated_blocks follows a model's forward to learn what its blocks get, and something else calls the blocks.",
    'Compile the function that calls the blocks, torch.compile(function, backend="lvsa"), and leave compile_repeated_blocks out.',
    mendable=True,
)
OUTSIDE_GRAPHS: Final = Reason(
    "outside_graphs",
    "Attention runs in eager code between the graphs of a forward, where no compiler sees it.",
    "Mend the graph breaks (TORCH_LOGS=graph_breaks names them), pass fullgraph=True, or try lvsa_compile.compile_repeated_blocks(model).",
    mendable=True,
)
SPATIAL_OR_TEMPORAL: Final = Reason(
    "spatial_or_temporal", "The site attends within each frame or along time at each place; there is no frame-by-frame pattern to thin out."
)
GRAPH_BREAK: Final = Reason(
    "graph_break",
    "The forward was broken into several graphs before this site, and what its tokens are did not come across.",
    "Mend the line that the detail names; where it stands between blocks, lvsa_compile.compile_repeated_blocks(model) does without.",
    mendable=True,
)
SINGLE_FRAME: Final = Reason("single_frame", "The video has one latent frame.")
OTHER_VIDEO: Final = Reason("other_video", "Query and key hold different videos, or the video is not the one the model generates.")
NOT_DENOISER: Final = Reason(
    "not_denoiser",
    "What is compiled attends over a video and does not generate it, as a VAE, an encoder, an upscaler or a discriminator does.",
    "Nothing to do for those. A part of a denoiser: compile it together with what gets the timestep and returns the video.",
)
ALREADY_SPARSE: Final = Reason("already_sparse", "The model brings its own sparse attention here.")
INSIDE_SUBGRAPH: Final = Reason(
    "inside_subgraph",
    "The site is inside a nested subgraph (checkpoint or nested compile region).",
    "Switch gradient checkpointing and nested compile regions off for inference.",
    mendable=True,
)
FORM_NOT_REWRITTEN: Final = Reason(
    "form_not_rewritten",
    "Attention in a form that is recognised and not rewritten: the detail says what stands in the way.",
    "Use torch.nn.functional.scaled_dot_product_attention; in diffusers leave the attention backend at its default.",
    mendable=True,
)
CACHED_KEYS: Final = Reason(
    "cached_keys", "The keys are what earlier calls kept with new frames among them, and which frame each key is of cannot be seen."
)
LAYOUT_UNKNOWN: Final = Reason(
    "layout_unknown",
    "The trail from the model's inputs to this site was lost.",
    "If that op sorts or picks tokens, leave it: dense is right. If it keeps the frames in order, please open an issue with its line, and "
    "a rule for it will make the site sparse.",
)
LAYOUT_CONTRADICTED: Final = Reason(
    "layout_contradicted",
    "The evidence of the video's grid disagrees, so none of it counts.",
    "Check the numbers of frames, rows and columns, and the coordinates, that the model is called with.",
    mendable=True,
)
FRAMES_NOT_CONTIGUOUS: Final = Reason(
    "frames_not_contiguous",
    "The tokens of a latent frame do not lie together, or frames are missing or out of order.",
    "Where a model attends among some of its frames, nothing. Of ring attention each process sees a part of the video; Ulysses shows it "
    "the whole: ContextParallelConfig(ulysses_degree=...).",
)
SEVERAL_VIDEOS: Final = Reason("several_videos", "The sequence holds more than one stretch of the generated video.")
TRAINING: Final = Reason(
    "training",
    "Gradients are required; LVSA is an inference method.",
    "Run the model under torch.no_grad() or torch.inference_mode(). Where training is meant, nothing is lost: attention is dense.",
)
DROPOUT: Final = Reason("dropout", "The site drops attention weights at random.", "Call model.eval() before compiling.", mendable=True)
CAUSAL: Final = Reason("causal", "The site is causal token by token.")
MASK_NOT_EXPRESSIBLE: Final = Reason(
    "mask_not_expressible",
    "The site has an attention mask that key ranges cannot express; a mask is never dropped.",
    "Where the mask is all true, do not pass it.",
)
SHAPE_NOT_SUPPORTED: Final = Reason("shape_not_supported", "Query, key and value are not [batch, heads, tokens, head_dim] of equal batch.")
HORIZON_UNKNOWN: Final = Reason(
    "horizon_unknown",
    "The training horizon of this model is not known.",
    "Pass options={'reference_frames': N}, N being the latent frames the model was trained on.",
    mendable=True,
)
SIZE_NOT_KNOWN: Final = Reason(
    "size_not_known",
    "The number of frames or tokens is known only while the model runs.",
    "Compile without dynamic=True, or without fullgraph=True.",
    mendable=True,
)
SIZE_MARKED_DYNAMIC: Final = Reason(
    "size_marked_dynamic",
    "The pattern needs a size as a number, and torch._dynamo.mark_dynamic forbids to fix it.",
    "Leave the mark off frames, rows and columns, or use torch._dynamo.maybe_mark_dynamic; each size of video then compiles once. Batch "
    "and text may stay marked.",
    mendable=True,
)
PATTERN_FULL: Final = Reason(
    "pattern_full",
    "At this length every frame attends every frame at every phase, so nothing can be skipped.",
    "Nothing to do: the model runs as it would without LVSA, which is for videos longer than what it was trained on. To skip frames "
    "all the same, at a risk to quality, set reference_frames to fewer latent frames than the video has.",
)
PIXEL_FRAMES: Final = Reason(
    "pixel_frames",
    "reference_frames counts latent frames, and the number given looks like one of pixel frames: at it nothing can be skipped.",
    "Give latent frames: of a video codec that keeps one frame and then one of four, 81 pixel frames are 21.",
    mendable=True,
)
NO_LOWERING: Final = Reason(
    "no_lowering",
    "No lowering can serve the site, not even plain PyTorch, as where a compiler knows no ops of this package.",
    "The detail says what each lacks; options={'inner': 'aot_eager'} lets plain PyTorch serve.",
    mendable=True,
)
DENSE_LAYER: Final = Reason("dense_layer", "The option dense_layers names this site.", "Take its index out of dense_layers.")
MAX_SITES: Final = Reason("max_sites", "The option max_sites allows no more sites.", "Raise max_sites, or leave it out.")
POLICY_REFUSES: Final = Reason(
    "policy_refuses", "The policy does not serve a site like this one.", "The detail says what the policy wants.", mendable=True
)
FEW_TOKENS: Final = Reason(
    "few_tokens",
    "The video is so short that choosing blocks is not worth it.",
    "Nothing to do. To choose blocks all the same, give the policy a smaller min_tokens.",
)
PASS_DISABLED: Final = Reason(
    "pass_disabled", "The option disable_passes switches off a pass that makes sites sparse.", "Take the pass out of disable_passes."
)
NOT_FASTER: Final = Reason(
    "not_faster",
    "Sparse attention is not expected to be faster here and when_slower='dense' was asked for.",
    "Past the training horizon the pattern also keeps the video alive; when_slower='sparse' keeps it.",
)

INTERNAL_ERROR: Final = Reason(
    "internal_error",
    "lvsa-compile failed, so the whole graph is compiled as it came.",
    "Please report the detail, with the model and the sizes of its inputs. options={'strict': True} raises the error.",
)

REASONS: Final = tuple(value for value in globals().values() if isinstance(value, Reason))
"""All reasons, from the furthest from being sparse to the nearest; the report shows the nearest miss first."""
