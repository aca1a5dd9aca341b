from __future__ import annotations

import runpy
from pathlib import Path

from lvsa_compile.lowering.select import lowerings

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


def test_every_lowering_is_in_the_table_of_lowerings():
    text = (ROOT / "docs/lowerings.md").read_text()
    for lowering in lowerings():
        assert f"| `{lowering.name}` | {lowering.summary} |" in text
        host = "no: it plans on the host" in next(line for line in text.splitlines() if line.startswith(f"| `{lowering.name}`"))
        assert host == lowering.plans_on_host
