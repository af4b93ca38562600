#!/usr/bin/env bash
# Everything that needs a GPU. Wants torch with CUDA, triton and transformers, and ragkv itself (pip install --no-deps -e .); no lmdb.
# Raw rows go to benchmarks/results/gpu-DATE-DEVICE.jsonl. Arguments go to run.py: the parts to run, --rounds.
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-python3}
export HF_HUB_OFFLINE=1
# (a) the kernels' tests, compiled instead of interpreted; then what the compiler made of them for this GPU
env -u TRITON_INTERPRET "$PYTHON" -P -m pytest -q tests/kernels/fused
arch=$("$PYTHON" -P -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')
"$PYTHON" -P benchmarks/gpu/inspect_kernels.py --arch "$arch" --jobs 8
# (b) memory, (c) attention, (d) time to first token and (e) decoding
PYTHONPATH=benchmarks/gpu "$PYTHON" -P benchmarks/gpu/run.py "$@"
