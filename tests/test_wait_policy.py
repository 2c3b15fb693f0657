"""The threads of OpenMP do not spin, unless the user has chosen how they wait."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("given", "policy"),
    [
        ({}, "passive"),
        ({"OMP_WAIT_POLICY": "active"}, "active"),
        ({"GOMP_SPINCOUNT": "100"}, None),
        ({"KMP_BLOCKTIME": "200"}, None),
    ],
)
def test_the_threads_wait_passively_unless_the_user_has_chosen(given: dict, policy) -> None:
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
    environ = {name: value for name, value in os.environ.items() if name not in names} | given
    code = "import os, sys, base.wait_policy; assert 'torch' not in sys.modules; "
    code += "print(os.environ.get('OMP_WAIT_POLICY'))"
    words = [sys.executable, "-c", code]
    found = subprocess.run(words, cwd=ROOT, env=environ, capture_output=True, text=True)
    assert found.stdout.strip() == str(policy), found.stderr


def test_main_imports_it_before_every_module_that_may_import_torch() -> None:
    modules = []
    for node in ast.parse((ROOT / "main.py").read_text()).body:
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules.append(node.module)
    others = [name for name in modules if name.split(".")[0] not in sys.stdlib_module_names]
    assert others[0] == "base.wait_policy"
