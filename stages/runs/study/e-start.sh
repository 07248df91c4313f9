#!/usr/bin/env bash
# Part E: what keeps frozen codes alive: the start (whitened or published), the projector's rate (1 or 20 times), the
# projector (linear or MLP), at 16,384 codes.
. "$(dirname "$0")/study.sh"
K=${K:-16384}
features pca
codebook $K pca $K
for whiten in true false; do
    for rate in 1.0 20.0; do
        for projector in linear mlp; do
            try "lc-whiten-$whiten-rate-$rate-$projector" --codebook "$OUT/codebook-$K" --set $Q.codebook_size=$K \
                --set train.whiten_init=$whiten --set train.quantizer_rate=$rate --set $Q.projector=$projector
        done
    done
done
table e-start
