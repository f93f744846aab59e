#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Proof and figures from a GPU host that has torch, Triton and pytest, and nothing else of ours.
#
#   bench/gpu.sh build                 where nvcc is: native libraries and commit into build/gpu
#   bench/gpu.sh run [SECTION...]      on the GPU host, in a copy of this tree with build/gpu
#       --device cpu                   the same without a GPU, to try it
#       --again                        measure what is already there for this commit, too
#       --budget SECONDS               start nothing after this long (default 460)
#
# Sections: correctness tests sanitizer ops hooks sae sharing (default: all). Each is merged into
# $OUT/<gpu>.json (OUT: default bench/results) as soon as it ends, so a run that was cut off goes on
# where it stopped. No pip, no network. The two _C*.abi3.so files serve any Python and torch >= 2.11.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}

build() {
  cd "$root"
  make install SIDECHAIN_CUDA=1
  mkdir -p build/gpu
  cp python/sidechain/_C.abi3.so python/sidechain/_C_cuda.abi3.so build/gpu/
  git describe --always --dirty >build/gpu/COMMIT
  # Plain Python, for the sections that run a pipeline; transformers and pandas are the host's.
  .venv/bin/python -m pip download -q --no-deps --only-binary=:all: -d build/gpu/wheels \
    "diffusers==$(.venv/bin/python -c 'import diffusers; print(diffusers.__version__)')" \
    importlib_metadata zipp
  ls -l build/gpu
}

run() {
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
  cp -r "$root/triton_kernels" "$site/sidechain/triton_kernels"
  cp "$root"/build/gpu/{_C.abi3.so,_C_cuda.abi3.so,COMMIT} "$site/sidechain/"
  for wheel in "$root"/build/gpu/wheels/*.whl; do
    if [ -f "$wheel" ]; then "$python" -m zipfile -e "$wheel" "$site"; fi
  done
  export PYTHONPATH=$site PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
  "$python" "$root/bench/gpu_sections.py" --out "${OUT:-$root/bench/results}" "$@"
}

case ${1:-} in
  build) build ;;
  run) shift && run "$@" ;;
  *) sed -n '3,16s/^# \{0,1\}//p' "$0" && exit 2 ;;
esac
