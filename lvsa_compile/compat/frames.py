"""The Python frames of the calls in progress, and lines of code as reports write them."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator

import torch

TORCH = f"{next(iter(torch.__path__))}/"
"""The folder of torch's own code."""
_HERE = f"{__file__.rpartition('/compat/')[0]}/"


def frames() -> Iterator[types.FrameType]:
    """Frames of the calls in progress, innermost first."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def is_entry(frame: types.FrameType) -> bool:
    """Whether a frame is that of a function that ``torch.compile`` returned."""
    return frame.f_code.co_name == "compile_wrapper" and frame.f_code.co_filename.startswith(TORCH)


def users_line() -> str:
    """The innermost line of the calls in progress that is neither torch's nor made by a compiler."""
    for frame in frames():
        code = frame.f_code
        if not code.co_filename.startswith((TORCH, "<", _HERE)):
            return line_of(code.co_filename, frame.f_lineno, code.co_name)
    return "an unknown line"


def line_of(file: str, number: int | None, function: str) -> str:
    """A line of code as Python's tracebacks write it; of what Dynamo made of a function after a break the function's own name."""
    return f'File "{file}", line {number}, in {function.removeprefix("torch_dynamo_resume_in_").partition("_at_")[0]}'
