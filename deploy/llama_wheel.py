"""
Compiles llama.cpp for this machine once, and installs it into the virtual environment whose Python runs this: `make`
calls it before everything else is installed.

    python deploy/llama_wheel.py LOG

pip's own cache tells wheels apart by their version, so after a change of options it would give the old one. Compiled
wheels are therefore kept here by their options, in a folder of pip's cache, and one that is installed is replaced when
the options have changed. CMAKE_ARGS in the environment follow the options of `install.py`.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
from collections.abc import Mapping
from pathlib import Path

import install  # it is beside this file

PACKAGE = "llama-cpp-python"
ROOT = Path(__file__).resolve().parents[1]
#: What the installed wheel was compiled with, in the virtual environment.
MARK = "llama-cpp-python.build"


def requirement(project: Path = ROOT / "pyproject.toml") -> str:
    """Return the required versions of the package, as the project states them."""
    listed: list[str] = tomllib.loads(project.read_text(encoding="utf-8"))["project"]["dependencies"]
    (found,) = [one for one in listed if one.startswith(PACKAGE)]
    return found


def key_of(wanted: str, given: Mapping[str, str]) -> str:
    """Return a name of all that determines the compiled wheel: versions, options, this machine and its Python."""
    options = [option for option in install.OPTIONS if "_INCLUDE=" not in option]
    paths = [ROOT / "deploy" / "llama-cpp.cmake", *sorted((ROOT / "deploy").glob("ggml-*"))]
    included = [path.read_text(encoding="utf-8") for path in paths]
    machine = [sysconfig.get_platform(), platform.machine(), f"{sys.version_info[0]}.{sys.version_info[1]}"]
    whole = [wanted, options, included, given.get("CMAKE_ARGS", ""), machine]
    return hashlib.sha256(json.dumps(whole).encode()).hexdigest()[:16]


def folder_of(key: str) -> Path:
    """Return the folder of a wheel, in pip's cache: where that is kept between machines, so is this."""
    asked = [sys.executable, "-m", "pip", "--disable-pip-version-check", "cache", "dir"]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    cache = Path(done.stdout.strip()) if not done.returncode and done.stdout.strip() else Path.home() / ".cache" / "pip"
    return cache / "arriero-wheels" / key


def find_wheel(folder: Path) -> Path | None:
    """Return the wheel in a folder, or None."""
    return next(iter(sorted(folder.glob("llama_cpp_python-*.whl"))), None)


def build(wanted: str, folder: Path, log: Path) -> Path:
    """Compile the wheel into the folder. Ends the program when that fails."""
    with tempfile.TemporaryDirectory() as made_in:
        arguments = ["--no-cache-dir", "--no-deps", "--no-binary", PACKAGE, "--wheel-dir", made_in, wanted]
        if code := install.run(log, ["wheel", *arguments], sys.stderr, "build of llama.cpp", "compiled"):
            sys.exit(code)
        folder.mkdir(parents=True, exist_ok=True)
        for made in Path(made_in).glob("llama_cpp_python-*.whl"):
            partial = folder / f".{made.name}.{os.getpid()}"
            shutil.copyfile(made, partial)
            partial.replace(folder / made.name)  # whole, or not there
    found = find_wheel(folder)
    if found is None:
        sys.exit(f"the build left no wheel of {PACKAGE}; see {log}")
    return found


def main() -> None:
    """Install the wheel of these options, compiled now or earlier, unless it is installed."""
    if len(sys.argv) != 2:
        sys.exit("usage: python deploy/llama_wheel.py LOG")
    wanted = requirement()
    key, mark = key_of(wanted, os.environ), Path(sys.prefix) / MARK
    if mark.is_file() and mark.read_text(encoding="utf-8").strip() == key:
        return
    folder = folder_of(key)
    wheel = find_wheel(folder) or build(wanted, folder, Path(sys.argv[1]))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    subprocess.run([*pip, "--no-deps", "--force-reinstall", str(wheel)], check=True)
    mark.write_text(f"{key}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
