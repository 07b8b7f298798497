"""Test the requirements of a plain `pip install imagewam`, and the errors for missing optional packages."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from tests.support.paths import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]

WITHOUT = """
import sys
for name in sys.argv[1].split(","):
    sys.modules[name] = None
from imagewam_cli.cli.app import run
sys.exit(run(sys.argv[2:]))
"""


def names(requirements: list[str]) -> set[str]:
    return {requirement.split(">=")[0].split("[")[0].lower() for requirement in requirements}


def test_every_base_requirement_is_imported() -> None:
    imported = set()
    for path in [*(ROOT / "imagewam_cli").rglob("*.py"), *(ROOT / "plugins").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                imported.add(node.module.partition(".")[0])
    distributions = packages_distributions()
    found = {name.lower().replace("_", "-") for module in imported for name in distributions.get(module, [])}
    # diffusers and transformers import accelerate; without it, loading holds two copies of the weights in memory.
    assert names(PROJECT["dependencies"]) - found == {"accelerate"}


@pytest.mark.parametrize(
    ("blocked", "arguments", "message", "extra"),
    [
        ("gymnasium", ["record", "--out", "set"], "environment 'tabletop' needs gymnasium", "sim"),
        ("gymnasium", ["eval", "--policy", "random"], "environment 'tabletop' needs gymnasium", "sim"),
    ],
)
def test_a_command_names_the_missing_extra(
    tmp_path: Path, blocked: str, arguments: list[str], message: str, extra: str
) -> None:
    command = [sys.executable, "-c", WITHOUT, blocked, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 1
    assert result.stderr == f"error: {message}, which is not installed\nhint: pip install 'imagewam[{extra}]'\n"
    assert extra in EXTRAS
    assert list(tmp_path.iterdir()) == []


def test_the_demo_names_its_extra_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from imagewam_cli.cli import demo_steps
    from imagewam_cli.errors import UsageError

    demo_steps.require_packages()
    monkeypatch.setattr(demo_steps, "_PACKAGES", ("numpy", "no_such_package"))
    with pytest.raises(UsageError, match="the demo needs no_such_package") as error:
        demo_steps.require_packages()
    assert error.value.hint == "pip install 'imagewam[demo]'"


@pytest.mark.parametrize("command", ["import imagewam_cli", "from imagewam_cli.cli.app import run; run(['--help'])"])
def test_importing_the_package_and_help_import_no_torch(command: str) -> None:
    script = (
        f"{command}; import sys; print(*sys.modules.keys() & {{'torch', 'diffusers', 'transformers'}}, file=sys.stderr)"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stderr == "\n"
