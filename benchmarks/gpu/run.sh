#!/usr/bin/env bash
# Everything that needs a GPU, in parts that can also be run one by one, the shortest first.
#
#     bash benchmarks/gpu/run.sh                                        # all: tests inspect memory attention ttft
#     bash benchmarks/gpu/run.sh tests memory
#     bash benchmarks/gpu/run.sh graphs --rounds 5                      # their tests, then on and off; not among the five
#     bash benchmarks/gpu/run.sh ttft --tokens 4096 16384 --rounds 5    # options go to run.py
#
# Wants torch with CUDA, triton, transformers, safetensors, xxhash, tqdm and, for the tests, pytest. ragkv is taken from this
# folder and need not be installed; lmdb and faiss are not used. Raw rows are appended as they come to
# benchmarks/results/gpu-DATE-DEVICE.jsonl, or to the file that --out names. A part that fails does not keep the others from running.
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-python3}
parts=()
while [[ $# -gt 0 && $1 != -* ]]; do
  parts+=("$1")
  shift
done
[[ ${#parts[@]} -gt 0 ]] || parts=(tests inspect memory attention ttft)

# The folders as one package, as an installation would lay them out.
tree=$(mktemp -d)
trap 'rm -rf "$tree"' EXIT
mkdir "$tree/ragkv"
ln -s "$PWD"/ragkv/* "$tree/ragkv/"
ln -sfn "$PWD"/{kernels,store,retrieval} "$tree/ragkv/"  # also where the links in ragkv/ were not copied
export PYTHONPATH="$tree:$PWD/benchmarks/gpu" PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
unset TRITON_INTERPRET

failed=()
for part in "${parts[@]}"; do
  echo "== $part"
  case $part in
    tests) "$PYTHON" -P -m pytest -q -p no:cacheprovider tests/kernels/fused ;;
    inspect)
      arch=$("$PYTHON" -P -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')
      "$PYTHON" -P benchmarks/gpu/inspect_kernels.py --arch "$arch" --jobs "$(nproc)"
      ;;
    graphs)
      exact=1
      "$PYTHON" -P -m pytest -q -p no:cacheprovider tests/kernels/fused/test_graphs.py || exact=0
      "$PYTHON" -P benchmarks/gpu/run.py "$part" "$@" && [[ $exact -eq 1 ]]
      ;;
    *) "$PYTHON" -P benchmarks/gpu/run.py "$part" "$@" ;;
  esac || failed+=("$part")
done
[[ ${#failed[@]} -eq 0 ]] || { echo "failed: ${failed[*]}" >&2; exit 1; }
