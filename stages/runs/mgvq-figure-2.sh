#!/usr/bin/env bash
# MGVQ, Figure 2: codes in the plane, active or not, of four models with one codebook: small and large in size and in
# dimension. The text of the paper does not give their sizes: those here are ours, on LlamaGen's network.
PROTOCOL=cleanfid-matched
. "$(dirname "$0")/row.sh"
for size in 16384 65536; do
    for dim in 8 64; do
        name=figure-2-$size-$dim
        tokenizer $name llamagen-f16-16k --set model.quantizer.codebook_size=$size --set model.quantizer.code_dim=$dim
        measure $name "$OUT/$name" --analyze embedding --embedding-codes "${CODES:-16384}"
    done
done
table mgvq-figure-2
