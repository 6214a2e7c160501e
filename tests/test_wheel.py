"""A wheel holds everything that the installed package needs: every module, C source, page and data file."""

import re
import subprocess
import sys
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("nanochat", "scripts", "tasks", "bench")


def setuptools_is_new_enough() -> bool:
    """Whether the installed one is as pyproject.toml asks."""
    least = re.search(r'requires = \["setuptools>=(\d+)"\]', (ROOT / "pyproject.toml").read_text())
    assert least
    try:
        return int(version("setuptools").split(".")[0]) >= int(least[1])
    except PackageNotFoundError:
        return False


def test_wheel_is_complete(tmp_path: Path) -> None:
    listed = subprocess.run(["git", "ls-files", *PACKAGES], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    source = tmp_path / "source"  # setuptools writes a build folder beside pyproject.toml
    for name in [*listed.stdout.split(), "pyproject.toml", "README.md", "LICENSE"]:
        if (ROOT / name).exists():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(tmp_path), str(source)]
    isolated = not setuptools_is_new_enough()  # then pip installs one in an environment of the build's own
    if not isolated:
        command.append("--no-build-isolation")
    built = subprocess.run(command, capture_output=True, text=True)
    if isolated and built.returncode and "setuptools" in built.stderr:
        pytest.skip("setuptools cannot be installed for the build")
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    inside = set(zipfile.ZipFile(wheel).namelist())
    expected = {name for name in listed.stdout.split() if (ROOT / name).exists()}
    assert expected - inside == set()
