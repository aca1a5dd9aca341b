"""``enable``: a model's attention is sparse where it runs, compiled or not."""

from __future__ import annotations

from typing import Any, TypeVar

from lvsa_compile.backend import attention_in_eager_code
from lvsa_compile.errors import OptionError
from lvsa_compile.options import parse_options
from lvsa_compile.watching.find_model import denoisers_in
from lvsa_compile.watching.watch import watch

Model = TypeVar("Model")
_UNSEEN = (
    "lvsa saw no attention in a forward of {model}: it runs in graphs of another compiler, or by kernels that are no ops of torch or of "
    'a library that lvsa knows. Compile with backend="lvsa", or use torch.nn.functional.scaled_dot_product_attention.'
)


def enable(model: Model, **options: Any) -> Model:
    """Makes the attention of a model, or of a pipeline's denoisers, sparse where it runs, in place; nothing is compiled.

    Each forward is followed while it runs, which says what each call of attention gets; what is compiled with ``backend="lvsa"`` inside
    of it is sparse, too.  For programs that compile nothing, or in which no graph of the model reaches the backend.  The class of the
    model and its state dict stay as they are; ``undo(model)`` takes all of it off again.

    Args:
        model: a module, or an object that holds denoisers, such as a pipeline of diffusers.
        **options: as for ``torch.compile(backend="lvsa", options={...})``; they count where an earlier call gave others.

    Returns:
        The model.

    Raises:
        RegionError: ``model`` is no module and holds none whose forward gets a timestep.
        OptionError: an option has a value it cannot have.

    Example:
        >>> pipe = lvsa_compile.enable(WanPipeline.from_pretrained("Wan-AI/Wan2.1-T2V-1.3B-Diffusers"), window=2)
    """
    attend = attention_in_eager_code(parse_options(options))
    if attend is None:
        raise OptionError("eager_attention", False, "enable is for attention in eager code", "Leave it out.")
    for denoiser in denoisers_in(model, "enable"):
        present = watch(denoiser, ticks=True)
        present.attend_by(attend)
        present.unseen = _UNSEEN.format(model=type(denoiser).__name__)
    return model
