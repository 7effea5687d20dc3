"""Imports run downward, and the package is the one in this checkout."""

import ast
import functools
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
LEVELS = [
    ("effarch.names",),
    ("effarch.kernels",),
    ("effarch.quantization", "effarch.parallel"),
    ("effarch.data", "effarch.models"),
    ("effarch.training.optimizers", "effarch.training.schedules"),
    ("effarch.config", "effarch.sweeps"),
    ("effarch.config_check",),
    ("effarch.training", "effarch.configs"),
    ("effarch",),
    ("effarch.kernels.report",),
    ("effarch.kernels.bench",),
]
"""Lowest first. A module belongs to its longest prefix and imports its own level's part or lower."""


@functools.cache
def modules() -> dict[str, pathlib.Path]:
    found = {}
    for top, prefix in (
        ("effarch", "effarch"),
        ("kernels", "effarch.kernels"),
        ("configs", "effarch.configs"),
    ):
        for path in (ROOT / top).rglob("*.py"):
            relative = path.relative_to(ROOT / top).with_suffix("")
            if top == "effarch" and relative.parts[0] in ("kernels", "configs"):
                continue
            parts = [part for part in relative.parts if part != "__init__"]
            found[".".join([prefix, *parts])] = path
    return found


def place(module: str) -> tuple[int, str]:
    fitting = [
        (len(prefix), level, prefix)
        for level, prefixes in enumerate(LEVELS)
        for prefix in prefixes
        if module == prefix or module.startswith(prefix + ".")
    ]
    _, level, prefix = max(fitting)
    return level, prefix


def imported(path: pathlib.Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.startswith("effarch.") and "__" not in name}


@pytest.mark.parametrize("module", sorted(modules()))
def test_no_import_runs_upward(module):
    level, own = place(module)
    for name in imported(modules()[module]):
        other_level, other = place(name)
        assert other_level < level or other == own, f"{module} imports {name}"


def test_nothing_imports_the_top_level_folders_by_their_bare_names():
    for module, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            for name in names:
                assert name.split(".")[0] not in ("kernels", "configs"), module


def test_kernels_and_configs_are_those_of_this_checkout():
    code = (
        "import sys, effarch.kernels as k, effarch.configs as c;"
        "print(k.__file__); print(c.__file__);"
        "print('kernels' in sys.modules or 'configs' in sys.modules)"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert pathlib.Path(out[0]).is_relative_to(ROOT)
    assert pathlib.Path(out[1]).is_relative_to(ROOT)
    assert out[2] == "False"
