#!/usr/bin/env bash
# VQGAN-LC, Table 10: the dimension that the projector maps codes to. Beyond the paper's table, at 8 dimensions: the MLP
# projector, and the losses and the distance of the paper's text instead of those of its code.
PROTOCOL=cleanfid-rawval
. "$(dirname "$0")/row.sh"
codebook 100000 100000
for dim in 8 16 32 128 256 512; do
    row lc-dim-$dim vqgan-lc-f16-100k --codebook "$OUT/codebook-100000" --set model.quantizer.code_dim=$dim
done
row lc-mlp vqgan-lc-f16-100k --codebook "$OUT/codebook-100000" --set model.quantizer.projector=mlp
row lc-paper vqgan-lc-f16-100k-paper --codebook "$OUT/codebook-100000"
table vqgan-lc-table-10
