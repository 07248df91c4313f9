#!/usr/bin/env bash
# Part B: where frozen codes come from, Table 6 of VQGAN-LC on photographs: 16,384 codes of image features, of random
# patches, of random numbers, and of a lattice (196,560 codes). MOBILENET is needed.
: "${MOBILENET:?set MOBILENET to the weights of networks.py}"
. "$(dirname "$0")/study.sh"
K=${K:-16384}

features pca
features mobilenet --encoder mobilenet:maps --set features.weights="$MOBILENET" --set features.image_size=224 --pool 14
codebook pca-$K pca $K
codebook mobilenet-$K mobilenet $K
codebook patches-$K pca $K --set kmeans.select=random
for kind in normal sphere; do random_codebook $kind-$K.npy $kind $K; done

twice lc-pca-$K --codebook "$OUT/codebook-pca-$K" --set $Q.codebook_size=$K
twice lc-mobilenet-$K --codebook "$OUT/codebook-mobilenet-$K" --set $Q.codebook_size=$K --set $Q.feature_dim=96
twice lc-patches-$K --codebook "$OUT/codebook-patches-$K" --set $Q.codebook_size=$K
twice lc-normal-$K --codebook "$OUT/codebook-normal-$K.npy" --set $Q.codebook_size=$K
twice lc-sphere-$K --codebook "$OUT/codebook-sphere-$K.npy" --set $Q.codebook_size=$K
# LC with VQBridge's transformer in place of the linear projector
twice lc-bridge-$K --codebook "$OUT/codebook-pca-$K" --set $Q.kind=vqbridge --set $Q.codebook_size=$K --set $Q.frozen_dim=64
twice leech --preset leech-small
table b-source
