#!/bin/bash
# Gather the wheels that a GPU machine without network lacks, less than 60 MiB, beside run.sh.
#
#   gather.sh PACKAGE...   (default: what vqpipe imports and an image with PyTorch and CUDA usually lacks)
set -euo pipefail
cd "$(dirname "$0")"
[ $# -gt 0 ] || set -- typer rich braceexpand lpips safetensors huggingface_hub open_clip_torch timm pytest jinja2
PYTHON=${PYTHON:-python3} LIMIT_MIB=60
mkdir -p wheels
"$PYTHON" -m pip download --quiet --no-deps --only-binary :all: --dest wheels --constraint ../../../constraints.txt "$@"
size=$(du -sm wheels | cut -f1)
echo "$size MiB in $PWD/wheels"
if [ "$size" -gt $LIMIT_MIB ]; then
    echo "error: more than $LIMIT_MIB MiB. Name fewer packages." >&2
    exit 1
fi
