"""
Installs a llama.cpp that is built for Vulkan into a virtual environment of its own: `make test-gpu` calls it.

    python deploy/vulkan.py ENVIRONMENT

The environment gets the packages of the Python that runs this, except for llama-cpp-python, which is compiled. The
wheel is kept in a cache of its own, `$XDG_CACHE_HOME/arriero/wheels/vulkan`: pip's cache has one wheel for each
version, so it would give this one to installations for the CPU.

Nothing of the system is changed. Headers that are too old are replaced by newer ones from Debian's archive, for the
build only. What else is missing is named with the command that installs it. CMAKE_ARGS in the environment follow the
options here.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

PACKAGE = "llama-cpp-python"
#: The first Vulkan header with what ggml uses: vk::LayerSettingEXT.
HEADER_VERSION = (1, 3, 272)
#: What installs Debian's packages for the build, and a software device.
INSTALL = "apt-get install --no-install-recommends mesa-vulkan-drivers libvulkan-dev glslc spirv-headers"
#: The release of Debian that newer headers are from, and their package.
NEWER, HEADERS = "trixie", "libvulkan-dev"
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"

_VERSION = re.compile(r"#define VK_HEADER_VERSION_COMPLETE VK_MAKE_API_VERSION\(0, (\d+), (\d+), VK_HEADER_VERSION\)")
_PATCH = re.compile(r"#define VK_HEADER_VERSION (\d+)")


class Missing(Exception):
    """Something that the build needs is not here; the message says what to type."""


def cache() -> Path:
    """Return the folder of the wheels."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "arriero" / "wheels" / "vulkan"


def find_wheel(version: str, folder: Path | None = None) -> Path | None:
    """Return the wheel of this version for this machine, or None."""
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    found = sorted((folder or cache()).glob(f"llama_cpp_python-{version}-*{platform}.whl"))
    return found[0] if found else None


def header_version(folder: Path) -> tuple[int, int, int] | None:
    """Return the version of the Vulkan headers in a folder, or None."""
    try:
        text = (folder / "vulkan" / "vulkan_core.h").read_text(errors="replace")
    except OSError:
        return None
    main, patch = _VERSION.search(text), _PATCH.search(text)
    return (int(main[1]), int(main[2]), int(patch[1])) if main and patch else None


@contextmanager
def headers(system: Path = Path("/usr/include")) -> Iterator[Path | None]:
    """Yield a folder of headers that are new enough; None for the system's own. Raises Missing."""
    found = header_version(system)
    if shutil.which("glslc") is None or found is None:
        raise Missing(f"the Vulkan headers and glslc are needed; on Debian: {INSTALL}")
    if found >= HEADER_VERSION:
        yield None
        return
    have, need = (".".join(map(str, version)) for version in (found, HEADER_VERSION))
    if shutil.which("apt-get") is None:
        raise Missing(f"the Vulkan headers are {have}, and {need} is needed: install newer ones")
    with tempfile.TemporaryDirectory() as folder:
        _download_headers(Path(folder), have)
        yield Path(folder) / "headers" / "usr" / "include"


def _download_headers(folder: Path, have: str) -> None:
    """Unpack newer headers of Debian into a folder, without installing them. Raises Missing."""
    for name in ("lists/partial", "cache/archives/partial"):
        (folder / name).mkdir(parents=True)
    sources = [*Path("/etc/apt/sources.list.d").glob("*.sources"), Path("/etc/apt/sources.list")]
    text = "\n".join(path.read_text() for path in sources if path.is_file())
    found = re.search(r"^URIs: *(\S+)|^deb (?:\[.*\] )?(\S+)", text, re.MULTILINE)
    mirror = (found[1] or found[2]) if found else "https://deb.debian.org/debian"
    (folder / "list").write_text(f"deb [signed-by={KEYRING}] {mirror} {NEWER} main\n")
    given = {"Etc::sourcelist": folder / "list", "Etc::sourceparts": "/dev/null"}
    given |= {"State::lists": folder / "lists", "Cache": folder / "cache"}
    options = [part for name, value in given.items() for part in ("-o", f"Dir::{name}={value}")]
    for command in (["apt-get", *options, "update", "-qq"], ["apt-get", *options, "download", f"{HEADERS}/{NEWER}"]):
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode:
            raise Missing(f"the Vulkan headers are {have}, and newer ones were not found: {done.stderr.strip()}")
    subprocess.run(["dpkg", "-x", *map(str, folder.glob(f"{HEADERS}_*.deb")), str(folder / "headers")], check=True)


def build(version: str, log: Path) -> Path:
    """Compile the package, and return its wheel in the cache. Raises Missing; ends the program when the build fails."""
    with headers() as include, tempfile.TemporaryDirectory() as folder:
        options = ["-DGGML_VULKAN=ON", *([f"-DVulkan_INCLUDE_DIR={include}"] if include else [])]
        os.environ["CMAKE_ARGS"] = " ".join((*options, os.environ.get("CMAKE_ARGS", ""))).strip()
        wanted = ["--no-cache-dir", "--no-deps", "--no-binary", PACKAGE, "--wheel-dir", folder, f"{PACKAGE}=={version}"]
        import install  # it is beside this file, and needed for a build only

        if code := install.run(log, ["wheel", *wanted], sys.stderr, "build", "built"):
            sys.exit(code)
        cache().mkdir(parents=True, exist_ok=True)
        for made in Path(folder).glob("*.whl"):
            partial = cache() / f".{made.name}.{os.getpid()}"
            shutil.copyfile(made, partial)
            partial.replace(cache() / made.name)  # whole, or not there
    found = find_wheel(version)
    if found is None:
        raise Missing(f"the build left no wheel of {PACKAGE} {version} for this machine; see {log}")
    return found


def install_into(environment: Path, wheel: Path) -> None:
    """Put the wheel into a virtual environment, before the packages of the Python that runs this."""
    pip = [sys.executable, "-m", "pip", "--python", str(environment), "--disable-pip-version-check"]
    options = ["--quiet", "--no-index", "--no-deps", "--force-reinstall"]
    subprocess.run([*pip, "install", *options, str(wheel)], check=True)
    own = f"lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"
    shared = sysconfig.get_path("purelib")
    (environment / own / "shared.pth").write_text(f"import site; site.addsitedir({shared!r})\n")


def main() -> None:
    """Build the wheel unless it is in the cache, and install it."""
    if len(sys.argv) != 2:
        sys.exit("usage: python deploy/vulkan.py ENVIRONMENT")
    environment, version = Path(sys.argv[1]), metadata.version(PACKAGE)
    try:
        wheel = find_wheel(version)
        if wheel is None:
            sys.stderr.write("building llama.cpp for Vulkan, which takes from 5 to 15 minutes\n")
            wheel = build(version, environment / "install.log")
    except Missing as error:
        sys.exit(str(error))
    sys.stderr.write(f"using {wheel}\n")
    install_into(environment, wheel)


if __name__ == "__main__":
    main()
