#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Proof and figures from a GPU host that has torch, Triton and pytest, and nothing else of ours.
#
#   bench/gpu.sh build                 where nvcc is: native libraries, wheels, commit into build/gpu
#   bench/gpu.sh plan                  what each call does, and how long each unit may take
#   bench/gpu.sh run 1|2|3|SECTION...  on the GPU host, in a copy of this tree with build/gpu
#       --device cpu                   the same without a GPU
#       --again                        measure what is already there for this commit, too
#       --budget SECONDS               start nothing after this long (default 520)
#   bench/gpu.sh rehearse [--short]    all three calls on the CPU with tiny shapes, nothing kept
#
# Sections: machine warm correctness tests sanitizer ops sae hooks sharing generation. Each outcome
# is in $OUT/<gpu>.json (OUT: default bench/results) as soon as it is known, case by case, so a call
# that was cut off continues where it stopped. Bring that file into bench/results before the next call,
# which begins with it. No pip, no network. The two _C*.abi3.so files serve any Python with
# torch >= 2.11.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
# Plain Python that the host lacks: what a pipeline needs, and the peer that trains dictionaries.
wheels=(importlib_metadata zipp eai-sparsify==1.3.3 natsort schedulefree simple-parsing docstring-parser)

build() {
  cd "$root"
  make install SIDECHAIN_CUDA=1
  pack "$root/.venv/bin/python"
}

# build/gpu from an installed package; $1: the Python it is installed in.
pack() {
  cd "$root"
  rm -rf build/gpu && mkdir -p build/gpu
  cp python/sidechain/_C.abi3.so python/sidechain/_C_cuda.abi3.so build/gpu/
  PYTHONPATH=$root/python "$1" -c 'from sidechain.bench import results; print(results.commit())' \
    >build/gpu/COMMIT
  "$1" -m pip download -q --no-deps --only-binary=:all: -d build/gpu/wheels "${wheels[@]}" \
    "diffusers==$("$1" -c 'import diffusers; print(diffusers.__version__)')"
  if ls build/gpu/wheels | grep -v -- '-none-any.whl$'; then
    echo "gpu.sh: expected wheels of plain Python, got those above" >&2
    exit 1
  fi
  ls -l build/gpu build/gpu/wheels
  if grep -q dirty build/gpu/COMMIT; then
    echo "gpu.sh: the tree differs from its commit: a later call cannot go on from rows of this one"
  fi
}

host() {
  site=$(mktemp -d) # not local: the trap runs after this function has gone
  trap 'rm -rf "$site"' EXIT
  for file in _C.abi3.so _C_cuda.abi3.so COMMIT; do
    [ -f "$root/build/gpu/$file" ] || {
      echo "gpu.sh: expected build/gpu/$file, got none: run 'bench/gpu.sh build' where nvcc is" >&2
      exit 2
    }
  done
  # A package folder as an installation would make it; the tree itself stays as it is.
  mkdir "$site/sidechain"
  tar -C "$root/python/sidechain" --exclude='*.so' --exclude=__pycache__ -cf - . |
    tar -C "$site/sidechain" -xf -
  rm -rf "$site/sidechain/triton_kernels"
  cp -r "$root/triton_kernels" "$site/sidechain/triton_kernels"
  cp "$root"/build/gpu/{_C.abi3.so,_C_cuda.abi3.so,COMMIT} "$site/sidechain/"
  for wheel in "$root"/build/gpu/wheels/*.whl; do
    if [ -f "$wheel" ]; then "$python" -m zipfile -e "$wheel" "$site"; fi
  done
  export PYTHONPATH=$site:$root/bench${PYTHONPATH:+:$PYTHONPATH} PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
  export HF_HUB_OFFLINE=1
  "$python" -m gpu_host "$@"
}

case ${1:-} in
  build) build ;;
  pack) pack "$python" ;;
  plan) PYTHONPATH=$root/python:$root/bench "$python" -m gpu_host plan ;;
  rehearse) host "$@" ;;
  run) shift && host run --out "${OUT:-$root/bench/results}" "$@" ;;
  *) sed -n '3,20s/^# \{0,1\}//p' "$0" && exit 2 ;;
esac
