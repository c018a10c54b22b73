#!/bin/bash
# Install the dependencies under constraints.txt, for CUDA $1 (12 or 13). Run by the Dockerfile.
set -euo pipefail

case $1 in
  13)
    constraints=constraints.txt
    index=()
    ;;
  12)
    # The same versions; torch and torchvision as built for CUDA 12.6, which bring CUDA libraries of their own.
    constraints=/tmp/constraints-cu12.txt
    grep -vE '^(nvidia-|cuda-|triton==)' constraints.txt \
      | sed -E 's/^(torch|torchvision)==(.*)$/\1==\2+cu126/' > "$constraints"
    index=(--extra-index-url https://download.pytorch.org/whl/cu126)
    ;;
  *)
    echo "CUDA must be 12 or 13, not '$1'" >&2
    exit 2
    ;;
esac
pip install --no-cache-dir --constraint "$constraints" "${index[@]}" '.[run,score,tensorboard,wandb,mlflow]'
# As in the Makefile: without the dependencies that none of their networks needs.
pip install --no-cache-dir --constraint "$constraints" --no-deps vbench pyiqa
