"""The compiled llama.cpp: kept by its options, and replaced in an environment when they have changed."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import venv
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "deploy/llama_wheel.py"


@pytest.fixture
def key_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Mapping[str, str]], str]:
    monkeypatch.syspath_prepend(str(ROOT / "deploy"))
    found: Callable[[str, Mapping[str, str]], str] = importlib.import_module("llama_wheel").key_of
    return found


def test_other_options_or_versions_are_another_wheel(
    key_of: Callable[[str, Mapping[str, str]], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    install = importlib.import_module("install")
    plain = key_of("llama-cpp-python>=0.3.36", {})
    assert plain == key_of("llama-cpp-python>=0.3.36", {"HOME": "/elsewhere"})
    others = {
        key_of("llama-cpp-python>=0.3.37", {}),
        key_of("llama-cpp-python>=0.3.36", {"CMAKE_ARGS": "-DGGML_CUDA=ON"}),
    }
    monkeypatch.setattr(install, "OPTIONS", ("-DLLAVA_BUILD=OFF",))
    others.add(key_of("llama-cpp-python>=0.3.36", {}))
    assert len(others | {plain}) == 4


def test_a_kept_wheel_is_installed_once_and_again_after_a_change_of_options(tmp_path: Path) -> None:
    """In a real environment, with the real pip; only the wheel is small."""
    import zipfile

    venv.create(tmp_path / "venv", with_pip=False, symlinks=True)
    python = tmp_path / "venv/bin/python"
    (pip,) = [path for path in map(Path, sys.path) if (path / "pip").is_dir()][:1]
    environment = {**os.environ, "PYTHONPATH": str(pip), "PIP_CACHE_DIR": str(tmp_path / "cache"), "CMAKE_ARGS": ""}
    site = tmp_path / "venv/lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"

    def keep(arguments: str, text: str) -> None:
        told = (
            f"import sys; sys.path.insert(0, {str(SCRIPT.parent)!r}); import llama_wheel as it; import os; "
            "print(it.folder_of(it.key_of(it.requirement(), os.environ)))"
        )
        asked = subprocess.run(
            [python, "-c", told],
            capture_output=True,
            text=True,
            check=True,
            env={**environment, "CMAKE_ARGS": arguments},
        )
        folder = Path(asked.stdout.strip())
        assert folder.is_relative_to(tmp_path / "cache")
        folder.mkdir(parents=True)
        with zipfile.ZipFile(folder / "llama_cpp_python-0.3.36-py3-none-any.whl", "w") as wheel:
            about = "llama_cpp_python-0.3.36.dist-info/"
            wheel.writestr("llama_cpp/__init__.py", f"BUILD = {text!r}\n")
            wheel.writestr(about + "METADATA", "Metadata-Version: 2.1\nName: llama_cpp_python\nVersion: 0.3.36\n")
            wheel.writestr(
                about + "WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
            )
            wheel.writestr(about + "RECORD", "llama_cpp/__init__.py,,\n")

    def run(arguments: str) -> None:
        made = {**environment, "CMAKE_ARGS": arguments}
        subprocess.run([python, str(SCRIPT), str(tmp_path / "log")], check=True, env=made, timeout=120)

    keep("", "plain")
    keep("-DGGML_CUDA=ON", "cuda")
    run("")
    installed = site / "llama_cpp/__init__.py"
    assert "plain" in installed.read_text()
    installed.write_text("BUILD = 'untouched'")
    run("")
    assert "untouched" in installed.read_text()
    run("-DGGML_CUDA=ON")
    assert "cuda" in installed.read_text()
