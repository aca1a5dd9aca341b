"""The ``lvsa`` command: explain a model, look at the machine, draw a pattern."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import inspect
import json
import platform
import shlex
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lvsa_compile.errors import LvsaError
from lvsa_compile.policies.lvsa.frame_pattern import FramePattern
from lvsa_compile.vqeval.command import vqeval

app = typer.Typer(help="Long Video Sparse Attention for torch.compile.", no_args_is_help=True, pretty_exceptions_enable=False)
app.command()(vqeval)


@app.callback(invoke_without_command=True)
def _top(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Long Video Sparse Attention for torch.compile."""
    if version:
        print(importlib.metadata.version("lvsa-compile"))
        raise typer.Exit


@app.command()
def explain(
    target: Annotated[str, typer.Argument(help="FILE.py or FILE.py:FUNCTION; the function (default: build) returns (model, kwargs).")],
    option: Annotated[list[str] | None, typer.Option("--option", "-o", help="NAME=VALUE of a backend option, as often as needed.")] = None,
    device: Annotated[str | None, typer.Option(help="Where to run one forward; 'meta' needs neither memory nor time.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    html: Annotated[Path | None, typer.Option(help="Write the report as a page.")] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Time a call of each sparse site, as it is lowered and dense.")] = False,
) -> None:
    """What the backend would do with a model, and why, without compiling it."""
    from lvsa_compile.explaining import explain as explain_model
    from lvsa_compile.options import parse_options
    from lvsa_compile.report.terminal import show

    options = _options(option or [])
    parse_options(options)
    if html is not None and (html.is_dir() or not html.absolute().parent.is_dir()):
        raise typer.BadParameter(f"--html {str(html)!r} is a folder, or in one that does not exist. Give the path of a file.")
    _check_device(device)
    model, inputs = _load(target)
    with _named(f"a forward of {type(model).__name__} with the inputs of {target!r}"):
        report = explain_model(model, options=options, device=device, **inputs)
    if measure:
        report = report.measured()
        if report.sparse_sites and not any(site.seconds for site in report.sparse_sites):
            Console(stderr=True).print(
                "lvsa: --measure found nothing that it can time here: the model is on the meta device, or has no room."
            )
    if as_json:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        show(report, _for_tables())
    if html is not None:
        report.to_html(str(html))
        Console(stderr=True).print(Text(f"The page is in {html}."), soft_wrap=True)


@app.command()
def diff(
    before: Annotated[Path, typer.Argument(help="A report, as lvsa explain --json prints it.")],
    after: Annotated[Path, typer.Argument(help="Another one.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the differences as JSON.")] = False,
) -> None:
    """What two reports say differently, site by site.  Exit code 1 where anything does."""
    from lvsa_compile.report.comparison import differences, gathered, read_report

    found = differences(read_report(before), read_report(after))
    if as_json:
        print(json.dumps([asdict(difference) for difference in found], indent=1))
    elif found:
        table = Table("site", "what", str(before), str(after))
        table.columns[0].overflow = "fold"
        for name, difference in gathered(found):
            table.add_row(*(Text(part) for part in (name or "(all)", difference.what, difference.before or "–", difference.after or "–")))
        _for_tables().print(table)
    else:
        Console().print("The reports say the same.")
    if found:
        raise typer.Exit(1)


@app.command()
def bisect(
    target: Annotated[str, typer.Argument(help="FILE.py or FILE.py:FUNCTION; the function (default: build) returns (model, kwargs).")],
    tolerance: Annotated[float, typer.Option(help="How far the output may move, relative to its largest value.")] = 0.05,
    option: Annotated[list[str] | None, typer.Option("--option", "-o", help="NAME=VALUE of a backend option, as often as needed.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Finds the site at which the model's output has moved by more than a tolerance, sites made sparse one after the other.

    The change adds up over the sites: compare it with and without the one that is named.  Compiles the model some log2(sites) times;
    inner=aot_eager is quick, and inner=inductor is what runs.  Exit code 1 where a site is found.
    """
    from lvsa_compile.bisecting import bisect as search
    from lvsa_compile.options import parse_options

    options = _options(option or [])
    parse_options(options)
    model, inputs = _load(target)
    say = functools.partial(Console(stderr=True).print, style="dim", highlight=False)
    found = search(model, inputs, tolerance, options, say)
    if as_json:
        print(json.dumps(asdict(found), indent=1))
    elif not found.site:
        Console().print(f"With all {found.sites} sites sparse the output moves by {found.error:.2e}, within {tolerance:g}.")
    else:
        Console().print(
            Text(
                f"{found.site}, number {found.number} of {found.sites}: with the sites up to it sparse the output moves by "
                f"{found.error:.2e}, with those before it by {found.error_before:.2e}; tolerance {tolerance:g}.\n{found.source}\n"
                f"To leave it dense: options={{'dense_layers': [{found.number - 1}]}}, which counts from 0"
            ),
            soft_wrap=True,
        )
    if found.site:
        raise typer.Exit(1)


@app.command()
def doctor() -> None:
    """Versions, devices, policies, and each lowering: usable, or why not."""
    import torch

    from lvsa_compile.registry import LOWERINGS, POLICIES, registered
    from lvsa_compile.report.report import versions
    from lvsa_compile.selection.select import lowerings

    console = Console()
    facts = Table("what", "found")
    for name, version in versions().items():
        facts.add_row(name, version)
    for package in ("triton", "diffusers", "flashinfer-python", "torch_npu"):
        facts.add_row(package, _version(package))
    facts.add_row("machine", platform.platform())
    console.print(facts)

    table = Table("lowering", "what it is", *(devices := _devices()))
    for lowering in lowerings():
        refusals = [lowering.unavailable(torch.device(device)) for device in devices]
        table.add_row(lowering.name, lowering.summary, *("usable" if refusal is None else refusal for refusal in refusals))
    console.print(table)

    table = Table("policy", "what it is")
    for kind in registered(POLICIES).values:
        table.add_row(kind.name, (inspect.getdoc(kind) or "").partition("\n")[0])
    console.print(table)
    for what, group in (("lowering", LOWERINGS), ("policy", POLICIES)):
        for failed in registered(group).failed:
            console.print(
                Text(f"{what} {failed.name!r} of {failed.where} is left out, it cannot be imported: {failed.error}"), soft_wrap=True
            )


@app.command()
def pattern(
    frames: Annotated[int, typer.Option(help="Latent frames of the video.")],
    window: Annotated[int, typer.Option(help="Half-width of the window, in latent frames.")] = 3,
    first_frames: Annotated[int, typer.Option(help="Frames at the start that every frame attends.")] = 1,
    reference_frames: Annotated[int, typer.Option(help="Training horizon in latent frames.")] = 21,
    key_frame_interval: Annotated[int | None, typer.Option(help="Distance of periodic anchors; by default chosen.")] = None,
    sparsity_scale: Annotated[float, typer.Option(help="Multiplies the budget of attended frames.")] = 1.0,
    steps: Annotated[int, typer.Option(min=1, help="How many denoising steps of the rotation to show.")] = 3,
) -> None:
    """Draws which frame attends which, and how the anchors move from step to step."""
    from lvsa_compile.policies.lvsa.policy import plan_with
    from lvsa_compile.policies.picture import picture_of
    from lvsa_compile.policies.tables import VideoSpan

    shown = FramePattern(frames, window, first_frames, reference_frames, sparsity_scale, key_frame_interval)
    span = VideoSpan(0, frames, 1, 0)
    picture = picture_of(plan_with(shown, span, span))
    console = Console()
    console.print(
        f"{frames} latent frames, window {window}, anchors every {shown.interval or '–'} frames, density {shown.density:.3f}"
        + (", full: nothing to skip" if shown.is_full else "")
    )
    rows, columns = max(console.height - 6, 8), console.width - 6
    if frames > min(rows, columns):
        console.print(f"drawn for {min(rows, frames)} of {frames} query frames and {min(columns, frames)} of {frames} attended ones")
    for step, view in enumerate(picture.views[:steps]):
        console.print(Text(f"\nstep {step}: █ anchor, ▒ window, · skipped; a row is a query frame"))
        for frame in _sampled(frames, rows):
            own = {key for first, last in view.own[frame] for key in range(first, last + 1)}
            cells = ("█" if key in view.shared else "▒" if key in own else "·" for key in _sampled(frames, columns))
            console.print(Text(f"{frame:4d} " + "".join(cells)), no_wrap=True, crop=True)


@app.command()
def bench(
    parts: Annotated[
        list[str] | None,
        typer.Argument(help="Some of: sites, variants, sweep, growth, model, blocks, policies, watching, overheads. Default: all."),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="How often each is measured, all in turn.")] = 5,
    device: Annotated[str, typer.Option(help="Where to run.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON; progress goes to stderr.")] = False,
    output: Annotated[
        Path | None,
        typer.Option("--output", help="Write the results as JSON into this file, too; parts that it has are replaced, others kept."),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw seconds against frames into this .svg, .png or .pdf file.")] = None,
    quick: Annotated[bool, typer.Option(help="Small shapes: shows that it works, not how fast it is.")] = False,
) -> None:
    """Measures LVSA against dense attention, FlexAttention and gathering per frame, on this machine, side by side.

    Everything takes about half an hour on two cores; keep the machine quiet.
    """
    import torch

    from lvsa_compile.bench import plot as picture
    from lvsa_compile.bench.results import PARTS, added_to, machine, run
    from lvsa_compile.bench.tables import tables
    from lvsa_compile.report.report import versions

    for path in (output, plot):
        if path is not None and not path.parent.is_dir():
            raise typer.BadParameter(f"{str(path)!r} is in a folder that does not exist. Make {str(path.parent)!r} first.")
    parts = parts or list(PARTS)
    if plot is not None:
        picture.check(parts)
    if output is not None:
        added_to(output, {"machine": machine(torch.device(device)), "versions": versions(), "commands": []})
    progress = Console(stderr=True)
    command = shlex.join(["lvsa", *sys.argv[1:]])
    say = functools.partial(progress.print, style="dim", highlight=False)
    results = run(parts, torch.device(device), rounds, command, say, quick)
    if output is not None:
        output.write_text(json.dumps(added_to(output, results), indent=1) + "\n")
    if as_json:
        print(json.dumps(results, indent=1))
    else:
        for table in tables(results):
            Console().print(table.to_rich())
    if plot is not None:
        picture.plot(results, plot)


@app.command()
def kernels(
    more: Annotated[list[str] | None, typer.Argument(help="Further targets.", show_default=False)] = None,
    target: Annotated[
        list[str] | None, typer.Option(help="Such as cuda:90 or hip:gfx942; as often as needed. Default: all that are held to a limit.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compiles every configuration of the Triton kernel, with no GPU, and shows registers, spills, shared memory and matrix instructions.

    Exit code 1 where a variant spills, needs more shared memory than the part has, or does not use its matrix units.
    """
    from lvsa_compile.kernels.inspection import MATRIX_INSTRUCTION, TARGETS, inspect

    table = Table(
        "target", "dtype", "head dim", "mask", "loads", "tile", "warps", "stages", "registers", "spilled", "shared", "matrix ops", "problem"
    )
    found = []
    for variant in inspect([*(target or []), *(more or [])] or TARGETS):
        found.append(variant)
        shape = variant.configuration
        table.add_row(
            variant.target, variant.dtype, str(variant.head_dim), "yes" if variant.masked else "",
            "descriptor" if variant.described else "pointer", f"{shape.block_m}×{shape.block_n}",
            *(str(n) for n in (shape.warps, shape.stages, variant.registers, variant.spilled_bytes, variant.shared_bytes)),
            f"{variant.matrix_instructions} {MATRIX_INSTRUCTION[variant.target]}", "; ".join(variant.problems),
        )  # fmt: skip
    if as_json:
        print(json.dumps([asdict(variant) for variant in found], indent=1))
    else:
        _for_tables().print(table)
    if any(variant.problems for variant in found):
        raise typer.Exit(1)


def _for_tables() -> Console:
    """Wide where no terminal says how wide, so that nothing is cut in a log."""
    console = Console()
    return console if console.is_terminal else Console(width=max(console.width, 180))


def _sampled(count: int, room: int) -> list[int]:
    """All of ``range(count)`` where there is room, else evenly spaced members of it."""
    return list(range(count)) if count <= room else [i * count // room for i in range(room)]


def _load(target: str) -> tuple[Any, dict[str, Any]]:
    """Model and keyword arguments from ``FILE.py[:FUNCTION]``."""
    name, _, function = target.partition(":")
    path = Path(name)
    if not path.is_file() or path.suffix != ".py":
        raise typer.BadParameter(
            f"{name!r} is no Python file. Give the path of a Python file, and after a colon the function that builds the model."
        )
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))
    with _named(f"running {name!r}"):
        spec.loader.exec_module(module)
    build = getattr(module, function or "build", None)
    if not callable(build):
        raise typer.BadParameter(
            f"{name!r} has no function {function or 'build'!r}. Name one that returns (model, kwargs), as in {name}:my_function."
        )
    with _named(f"{function or 'build'}() of {name!r}"):
        built = build()
    if not (isinstance(built, tuple) and len(built) == 2 and isinstance(built[1], dict)):
        raise typer.BadParameter(
            f"{function or 'build'}() returned {type(built).__name__}. It must return (model, kwargs), kwargs being a dict."
        )
    return built


@contextlib.contextmanager
def _named(what: str) -> Iterator[None]:
    """An error of the user's own code as one line, with the line of it that raised."""
    try:
        yield
    except LvsaError:
        raise
    except Exception as error:
        from lvsa_compile.explaining import user_line, what_it_says

        raise typer.BadParameter(f"{what} raised {what_it_says(error)} ({user_line(error)})") from None


def _check_device(device: str | None) -> None:
    import torch

    try:
        if device is not None:
            torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise typer.BadParameter(f"--device {device!r} cannot be used: {str(error).splitlines()[0]} Try 'cpu' or 'meta'.") from None


def _options(given: list[str]) -> dict[str, Any]:
    """``["window=2", "rotate=false"]`` as a dict; values are read as JSON where they are JSON."""
    options: dict[str, Any] = {}
    for item in given:
        name, equals, value = item.partition("=")
        if not equals:
            raise typer.BadParameter(f"--option {item!r} has no value. Write NAME=VALUE, as in window=2.")
        try:
            options[name] = json.loads({"True": "true", "False": "false", "None": "null"}.get(value, value))
        except json.JSONDecodeError:
            options[name] = value
    return options


def _version(package: str) -> str:
    import importlib.metadata

    try:
        return importlib.metadata.version(package.replace("_", "-"))
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> list[str]:
    import torch

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return ["cpu", *([accelerator.type] if accelerator is not None else [])]


def main() -> None:
    """Runs the command; an error of this package is one line, not a traceback."""
    try:
        app()
    except LvsaError as error:
        Console(stderr=True).print(Text(f"lvsa: {error}"), soft_wrap=True)
        raise SystemExit(2) from None
