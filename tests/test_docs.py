from __future__ import annotations

import json
import re
import runpy
import shlex
from pathlib import Path

import pytest
import synthetic_videos
from typer.testing import CliRunner

from lvsa_compile.cli import app
from lvsa_compile.selection.select import lowerings

ROOT = Path(__file__).parent.parent


def test_reference_pages_are_what_the_code_says():
    pages = runpy.run_path(str(ROOT / "docs/write_reference.py"))["PAGES"]
    for name, page in pages.items():
        assert (ROOT / "docs" / name).read_text() == page(), f"run python docs/write_reference.py: {name} is out of date"


def test_the_readme_code_is_python_and_what_needs_no_weights_runs():
    text = (ROOT / "README.md").read_text()
    with_weights, by_itself = (part.split("```")[0] for part in text.split("```python\n")[1:])
    compile(with_weights, "README.md", "exec")
    exec(compile(by_itself, "README.md", "exec"), {})


def test_the_readmes_figures_are_those_of_the_results():
    rows = {row["horizon"]: row for row in json.loads((ROOT / "benchmarks/results/cpu.json").read_text())["model"] if "speedup" in row}
    text = (ROOT / "README.md").read_text()
    assert sorted(rows) == [1, 2, 4, 6]
    for title, figure in (("speed-up", "speedup"), ("what counting FLOPs allows", "bound")):
        assert f"| {title} | {' | '.join(f'{rows[n][figure]:.2f}×' for n in sorted(rows))} |" in text


def test_every_lowering_is_in_the_table_of_lowerings():
    text = (ROOT / "docs/lowerings.md").read_text()
    for lowering in lowerings():
        assert f"| `{lowering.name}` | {lowering.summary} |" in text
        host = "no: it plans on the host" in next(line for line in text.splitlines() if line.startswith(f"| `{lowering.name}`"))
        assert host == lowering.plans_on_host


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_code_in_the_documents_runs(page, capsys):
    """Blocks of a page one after the other; what needs weights is only compiled."""
    scope: dict[str, object] = {}
    for block in blocks(page, "python"):
        code = compile(block, page.name, "exec")
        if "pipe" not in block:
            exec(code, scope)


def test_commands_in_the_documents_run(tmp_path, monkeypatch):
    path = f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r})"
    model = "from tiny_models import wan, wan_inputs\nbuild = lambda: (wan(num_layers=1), wan_inputs())"
    (tmp_path / "my_model.py").write_text(f"{path}\n{model}\n")
    synthetic_videos.written(tmp_path / "video.mp4", synthetic_videos.healthy()[:20])
    monkeypatch.chdir(tmp_path)
    commands = [line for page in sorted((ROOT / "docs").glob("*.md")) for block in blocks(page, "sh") for line in block.splitlines()]
    ran = 0
    for command in commands:
        program, *arguments = shlex.split(command)
        if program != "lvsa" or arguments[0] in ("bench", "kernels") or "--clip" in arguments:  # of minutes, or with weights
            continue
        target = arguments[arguments.index(">") + 1] if ">" in arguments else None
        arguments = arguments[: arguments.index(">")] if target else arguments
        if arguments[0] in ("explain", "bisect"):
            arguments += ["-o", "reference_frames=4", "-o", "window=1"]
        run = CliRunner().invoke(app, arguments)
        if target:
            for name in (target, "yesterday.json"):
                (tmp_path / name).write_text(run.stdout)
        assert run.exit_code in ((0, 1) if arguments[0] == "bisect" else (0,)), (command, run.output)  # 1: it found a site
        ran += 1
    assert ran >= 5


def test_pictures_are_what_the_code_draws():
    for name, draw in runpy.run_path(str(ROOT / "docs/write_pictures.py"))["PICTURES"].items():
        assert (ROOT / "docs/pictures" / name).read_text() == draw(), "run python docs/write_pictures.py"


def test_the_site_lists_every_page_and_links_lead_somewhere():
    navigation = (ROOT / "mkdocs.yml").read_text()
    pages = sorted((ROOT / "docs").glob("*.md"))
    for page in pages:
        assert page.name in navigation
    for page in [*pages, ROOT / "README.md"]:
        for link in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
