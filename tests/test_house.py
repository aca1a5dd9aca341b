"""The rules the house is built by: imports run one way, importing is light, the reasons are a closed list with remedies."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import networkx
import pytest

import lvsa_compile
from lvsa_compile import reasons

PACKAGE = Path(lvsa_compile.__file__).parent
FLOORS = (  # rooms of the package, folders and modules alike; a room imports only rooms of the floors above it in this list
    {"errors", "reasons", "caches", "horizons"},
    {"registry", "compat", "kernels", "vqeval"},
    {"source_stamp", "axes", "graph", "policies"},
    {"forward", "ops"},
    {"patterns"},
    {"layout", "selection"},
    {"watching"},
    {"option_checks"},
    {"options", "lowering"},
    {"passes", "compilers"},
    {"report"},
    {"runtime", "functional", "integrations"},
    {"backend"},
    {"regional", "enabling"},
    {"explaining", "bisecting", "bench"},
    {"cli", "__init__"},
)


def imports(path: Path):
    """Names of modules of the package that a file imports, at any depth of the code."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names] if (node.module or "").startswith("lvsa_compile") else []
        else:
            continue
        yield from (name.removeprefix("lvsa_compile.") for name in names if name.startswith("lvsa_compile."))


def room(module: str) -> str:
    return module.split(".")[0]


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def test_imports_run_down():
    floor = {name: number for number, rooms in enumerate(FLOORS) for name in rooms}
    for path in PACKAGE.rglob("*.py"):
        here = room(module_name(path))
        for name in map(room, imports(path)):
            assert name == here or floor[name] < floor[here], f"{path.relative_to(PACKAGE)} imports {name}"


def test_no_module_imports_itself_by_way_of_others():
    modules = {module_name(path): path for path in PACKAGE.rglob("*.py")}
    arrows = networkx.DiGraph()
    for name, path in modules.items():
        for imported in imports(path):
            target = next((each for each in (imported, imported.rpartition(".")[0]) if each in modules), None)
            if target is not None:
                arrows.add_edge(name, target)
    assert list(networkx.simple_cycles(arrows)) == []


def test_patterns_of_frames_know_nothing_of_torch_and_kernels_nothing_of_graphs():
    for files, banned in (("policies/lvsa/frame_pattern.py", "torch"), ("policies/tables.py", "torch"), ("kernels/**/*.py", "torch.fx")):
        for path in PACKAGE.glob(files):
            assert banned not in path.read_text().replace("__future__", ""), path


OF_DIFFUSERS = {"_parallel_config"}


def private_torch(path: Path):
    """Names of torch with a leading underscore that a file touches in code: of its modules, and attributes of any object but ``self``."""
    tree = ast.parse(path.read_text())
    attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    own = {node.attr for node in attributes if isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self"}
    own |= OF_DIFFUSERS | {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and re.match("_[a-z]", node.attr) and node.attr not in own:
            yield node.attr
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
