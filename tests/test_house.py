"""The rules the house is built by: imports run one way, importing is light, the reasons are a closed list with remedies."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lvsa_compile
from lvsa_compile import reasons

PACKAGE = Path(lvsa_compile.__file__).parent
MAY_IMPORT = {  # folder of the package -> the other folders it may import; modules beside the folders are in LEAVES or on top
    "kernels": set(),
    "sparsity": set(),
    "axes": set(),
    "lowering": {"kernels", "sparsity"},
    "patterns": {"sparsity", "axes"},
    "passes": {"axes", "patterns", "sparsity", "lowering"},
    "report": {"axes", "passes", "patterns", "sparsity", "lowering"},
    "vqeval": set(),
    "integrations": {"axes", "report", "passes", "patterns", "sparsity", "lowering", "kernels"},
}
LEAVES = {"caches", "errors", "compat", "reasons", "options", "horizons", "clock", "counting", "source_stamp"}
NOT_IN_FOLDERS = {"backend", "bisecting", "functional", "runtime", "cli"}


def imports(path: Path):
    """Names of modules of the package that a file imports, at any depth of the code."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"lvsa_compile.{alias.name}" for alias in node.names] if node.module == "lvsa_compile" else [node.module or ""]
        else:
            continue
        yield from (name.split(".")[1] for name in names if name.startswith("lvsa_compile."))


def test_imports_run_one_way():
    for folder, allowed in MAY_IMPORT.items():
        for path in (PACKAGE / folder).rglob("*.py"):
            for name in imports(path):
                assert name == folder or name in allowed | LEAVES, f"{path.relative_to(PACKAGE)} imports {name}"
                assert name not in NOT_IN_FOLDERS


def test_sparsity_knows_nothing_of_torch_and_kernels_nothing_of_graphs():
    for folder, banned in (("sparsity", "torch"), ("kernels", "torch.fx")):
        for path in (PACKAGE / folder).rglob("*.py"):
            assert banned not in path.read_text().replace("__future__", ""), path


def private_torch(path: Path):
    """Names of torch with a leading underscore that a file touches in code."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch") and "._" in f"{node.module}.{node.names[0].name}":
            yield node.module
        chain = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
        if chain.startswith("torch.") and "._" in chain.replace(".__", "."):
            yield chain


def test_private_torch_is_touched_in_one_folder_only():
    touched = {path.relative_to(PACKAGE): sorted(set(private_torch(path))) for path in PACKAGE.rglob("*.py")}
    assert {name.parts[0] for name, found in touched.items() if found} == {"compat"}, touched


def test_files_stay_readable():
    for path in PACKAGE.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 400, path


@pytest.mark.process
def test_importing_the_package_imports_nothing_heavy():
    heavy = {"torch", "numpy", "diffusers", "triton", "sympy"}
    code = f"import sys, lvsa_compile; print(sorted(m for m in sys.modules if m.split('.')[0] in {heavy}))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


@pytest.mark.process
def test_the_backend_needs_neither_diffusers_nor_triton():
    code = "import sys, lvsa_compile.backend; print([m for m in ('diffusers', 'triton', 'flashinfer', 'transformers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


@pytest.mark.process
def test_torch_logs_finds_the_package_while_torch_starts():
    code = "import torch; print('started')"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**__import__("os").environ, "TORCH_LOGS": "+lvsa_compile"}
    )
    assert run.stdout.strip() == "started", run.stderr


def test_reasons_are_unique_and_say_what_they_mean():
    codes = [reason.code for reason in reasons.REASONS]
    assert len(set(codes)) == len(codes) > 15
    assert all(reason.meaning.endswith(".") for reason in reasons.REASONS)


def test_every_public_name_can_be_had():
    for name in lvsa_compile.__all__:
        assert getattr(lvsa_compile, name) is not None
