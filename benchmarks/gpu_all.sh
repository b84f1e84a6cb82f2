#!/bin/sh
# On a machine with a GPU: the correctness of every kernel first, then the figures that benchmarks/README.md shows.
#
#     benchmarks/gpu_all.sh [folder for results]
#
# PYTHON, TOKENS and ROUNDS can be set; the defaults take about ten minutes.
set -eu
cd "$(dirname "$0")/.."
out=${1:-benchmarks/results}
python=${PYTHON:-python}
tokens=${TOKENS:-"32768 131072"}
rounds=${ROUNDS:-5}
mkdir -p "$out"
"$python" -m pytest -q -p no:cacheprovider kernels
# shellcheck disable=SC2086
"$python" benchmarks/gpu_block_sparse.py --tokens $tokens --density 0.10 0.25 --rounds "$rounds" --out "$out/gpu-block-sparse.json"
# shellcheck disable=SC2086
"$python" benchmarks/attention_backends.py --device cuda --tokens $tokens --rounds "$rounds" --out "$out/gpu-attention-backends.json"
"$python" benchmarks/gpu_rows.py --rounds "$rounds" --out "$out/gpu-rows.json"
