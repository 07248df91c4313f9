#!/bin/bash
# Gather the wheels that a GPU machine without network lacks, less than 60 MiB, in gpu-wheels at the top of the checkout.
#
#   gather.sh PACKAGE...   (default: what vqpipe imports and an image with PyTorch, timm and pyarrow lacks)
#
#   PYTHON    Python with pip (default: python3)
#   TARGET    Python of the GPU machine, Linux on x86-64 (default: 3.12)
#
# vqpipe's own wheel comes with them, for its version: the code that runs is that of the checkout.
# Dependencies are not followed: name what is missing. faiss-cpu stands for faiss-gpu, which is larger: vqpipe's own
# search runs on the GPU.
set -euo pipefail
cd "$(dirname "$0")/../../.."
[ $# -gt 0 ] || set -- faiss-cpu lpips open_clip_torch ftfy wcwidth diffusers importlib_metadata torch-fidelity braceexpand
PYTHON=${PYTHON:-python3} TARGET=${TARGET:-3.12} LIMIT_MIB=60
rm -rf gpu-wheels
platforms=()
for glibc in 2_28 2_27 2_24 2_17; do
    platforms+=(--platform "manylinux_${glibc}_x86_64")
done
"$PYTHON" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: --dest gpu-wheels \
    --python-version "$TARGET" --implementation cp "${platforms[@]}" --platform manylinux2014_x86_64 \
    --constraint constraints.txt "$@"
"$PYTHON" -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir gpu-wheels .
kib=$(du -sk gpu-wheels | cut -f1)
echo "$(((kib + 1023) / 1024)) MiB in $PWD/gpu-wheels"
if [ "$kib" -gt $((LIMIT_MIB * 1024)) ]; then
    echo "error: more than $LIMIT_MIB MiB. Name fewer packages." >&2
    exit 1
fi
