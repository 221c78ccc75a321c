"""The installation of `make`: pip's output becomes progress, and a failed build is shown with its reason."""

from __future__ import annotations

import importlib.util
import io
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pexpect
import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "deploy/install.py"

#: A package whose build prints what Ninja prints. It is named like the bindings, so that its build counts as theirs.
PROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]

[project]
name = "llama_cpp_python"
version = "0"
"""
BACKEND = """
import os, sys, zipfile


def build_wheel(directory, config_settings=None, metadata_directory=None):
    print("CMAKE_ARGS", os.environ["CMAKE_ARGS"])
    for done in (1, 2):
        print(f"[{done}/4] Building CXX object")
    if FAILS:
        sys.exit("error: no member named 'frobnicate'")
    print("[4/4] Linking")
    name = "llama_cpp_python-0-py3-none-any.whl"
    with zipfile.ZipFile(os.path.join(directory, name), "w") as wheel:
        about = "llama_cpp_python-0.dist-info/"
        wheel.writestr(about + "METADATA", "Metadata-Version: 2.1\\nName: llama_cpp_python\\nVersion: 0\\n")
        tags = "Root-Is-Purelib: true\\nTag: py3-none-any\\n"
        wheel.writestr(about + "WHEEL", "Wheel-Version: 1.0\\nGenerator: x\\n" + tags)
        wheel.writestr(about + "RECORD", "")
    return name
"""


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("deploy_install", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def command(folder: Path, *, fails: bool = False) -> list[str]:
    """Install the package into a folder by the real pip, without a network."""
    (folder / "pyproject.toml").write_text(PROJECT)
    (folder / "backend.py").write_text(f"FAILS = {fails}\n{BACKEND}")
    options = ["--no-index", "--no-deps", "--target", str(folder / "target"), "--no-cache-dir"]
    return [sys.executable, str(SCRIPT), str(folder / "log"), *options, str(folder)]


def test_piped_each_phase_has_a_line_and_options_of_the_user_come_last(tmp_path: Path) -> None:
    environment = {**os.environ, "CMAKE_ARGS": "-DGGML_CUDA=on -DLLAVA_BUILD=OFF"}
    done = subprocess.run(command(tmp_path), capture_output=True, text=True, env=environment, timeout=150, check=False)

    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert lines[0].startswith("0:0")
    assert lines[0].endswith("starting pip")
    assert lines[-1].startswith("installed in 0:")
    assert "\r" not in done.stderr
    (options,) = [line for line in (tmp_path / "log").read_text().splitlines() if "CMAKE_ARGS" in line]
    assert options.strip().startswith("CMAKE_ARGS -DLLAVA_BUILD=ON -DMTMD_VIDEO=OFF -DCMAKE_PROJECT_llama")
    assert options.strip().endswith("-DGGML_CUDA=on -DLLAVA_BUILD=OFF")
    assert (tmp_path / "target/llama_cpp_python-0.dist-info").is_dir()


def test_a_failed_build_shows_the_end_of_the_log_and_its_exit_code(tmp_path: Path) -> None:
    done = subprocess.run(command(tmp_path, fails=True), capture_output=True, text=True, timeout=150, check=False)

    assert done.returncode == 1
    assert "the installation failed after 0:" in done.stderr
    assert f"The end of {tmp_path / 'log'}" in done.stderr
    assert "error: no member named 'frobnicate'" in done.stderr
    assert "Traceback" not in done.stderr


def test_at_a_terminal_one_line_is_rewritten(tmp_path: Path) -> None:
    first, *rest = command(tmp_path)
    child = pexpect.spawn(first, rest, encoding="utf-8", timeout=150, env={**os.environ, "TERM": "xterm"})
    shown = io.StringIO()
    child.logfile_read = shown
    child.expect(pexpect.EOF)
    child.close()

    assert child.exitstatus == 0
    *rewritten, last = shown.getvalue().rstrip().split("\r")
    assert any("starting pip" in line for line in rewritten)
    assert last.startswith("installed in")


def test_what_pip_does_is_read_from_its_output(script: ModuleType) -> None:
    progress = script.Progress()

    def after(line: str) -> str:
        progress.read(line)
        return str(progress)

    packages = "choosing and downloading packages"
    assert after("Collecting alembic>=1.20 (from arriero==0.1)\n") == f"{packages}: 1, now alembic"
    assert after("  Collecting hatchling>=1.27\n") == f"{packages}: 1, now alembic", "it is for a build only"
    assert after("  Downloading llama_cpp_python-0.3.36.tar.gz (76.6 MB)\n") == (
        f"{packages}: 1, now llama_cpp_python-0.3.36.tar.gz (76.6 MB)"
    )
    assert after("  Building wheel for llama_cpp_python (pyproject.toml): started\n") == "compiling llama.cpp"
    assert after("  [62/193] /usr/bin/g++ -DGGML\n") == "compiling llama.cpp: 62 of 193 files, 32 %"
    assert after("  [ 40%] Building CXX object\n") == "compiling llama.cpp: 40 %"
    assert after("  Installing collected packages: ninja\n") == "compiling llama.cpp: 40 %"
    assert after("Installing collected packages: a, b, c\n") == "installing: 3 packages"


def test_the_options_of_the_build_name_a_file_that_exists(script: ModuleType) -> None:
    (included,) = [option for option in script.OPTIONS if "_INCLUDE=" in option]
    assert "\nset(LLAMA_BUILD_COMMON OFF)\n" in Path(included.partition("=")[2]).read_text()
