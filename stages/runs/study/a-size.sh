#!/usr/bin/env bash
# Part A: the size of the codebook, Table 1 of VQGAN-LC on photographs, beside rivals in three forms (study.sh). FC and EMA
# start as published in the first.
. "$(dirname "$0")/study.sh"

features pca
for K in ${SIZES:-1024 4096 16384 65536 100000 1000000}; do
    runs=try patch=4
    case $K in 4096 | 100000) runs=twice ;; esac
    case $K in 65536) patch=8 ;; 100000) patch=10 ;; 1000000) patch=20 ;; esac # of VQBridge: 1,000 to 2,500 patches
    file=codebook-$K
    if [ "$K" -lt 16384 ]; then
        codebook "$K" pca "$K"
    elif [ "$K" -lt 1000000 ]; then
        codebook "$K" pca "$K" --set kmeans.select=random
    else
        file=$file.npy
        random_codebook "$K.npy" "$OUT/features-pca" "$K"
    fi
    $runs "lc-$K" --codebook "$OUT/$file" --set $Q.codebook_size="$K"
    size=(--set $Q.codebook_size="$K")
    for row in "fc $Q.kind=vq" "simvq $Q.kind=simvq" "vqbridge $Q.kind=vqbridge --set $Q.patch_size=$patch"; do
        read -r name options <<< "$row"
        start=()
        [ "$name" != fc ] || start=("${published[@]}")
        # shellcheck disable=SC2086
        {
            $runs "$name-$K" "${size[@]}" --set $options "${learned[@]}" "${start[@]}"
            $runs "$name-$K-fast" "${size[@]}" --set $options "${fast[@]}"
            $runs "$name-$K-tuned" "${size[@]}" --set $options
        }
    done
    ema=("${size[@]}" --set $Q.kind=ema --set train.quantizer_rate=1.0)
    $runs "ema-$K" "${ema[@]}" --set objective.commitment=0.25 "${published[@]}"
    $runs "ema-$K-fast" "${ema[@]}" --set $Q.decay=0.9 --set objective.commitment=0.25
    $runs "ema-$K-tuned" "${ema[@]}" --set $Q.decay=0.9
done
table a-size
