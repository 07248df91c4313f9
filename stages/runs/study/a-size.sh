#!/usr/bin/env bash
# Part A: the size of the codebook, Table 1 of VQGAN-LC on photographs. Rivals have their published start and, as
# NAME-tuned, whitened latents and a faster codebook.
. "$(dirname "$0")/study.sh"
tuned=(--set train.whiten_init=true --set train.quantizer_rate=20.0 --set objective.commitment=0.25 --set objective.codebook=1.0)

features pca
for K in ${SIZES:-1024 4096 16384 65536 100000 1000000}; do
    runs=try patch=4
    case $K in 4096 | 100000) runs=twice ;; esac
    case $K in 65536) patch=8 ;; 100000 | 1000000) patch=10 ;; esac
    file=$OUT/codebook-$K
    if [ "$K" -lt 16384 ]; then
        codebook "$K" pca "$K"
    elif [ "$K" -lt 1000000 ]; then
        codebook "$K" pca "$K" --set kmeans.select=random
    else
        file=$file.npy
        [ -f "$file" ] || python "$STUDY/networks.py" codebook "$OUT/features-pca" "$K" 64 "$file"
    fi
    $runs "lc-$K" --codebook "$file" --set $Q.codebook_size="$K"
    $runs "fc-$K" --set $Q.kind=vq --set $Q.codebook_size="$K" "${learned[@]}" "${published[@]}"
    $runs "fc-$K-tuned" --set $Q.kind=vq --set $Q.codebook_size="$K" "${tuned[@]}"
    $runs "ema-$K" --set $Q.kind=ema --set $Q.codebook_size="$K" --set train.quantizer_rate=1.0 \
        --set objective.commitment=0.25 "${published[@]}"
    $runs "ema-$K-tuned" --set $Q.kind=ema --set $Q.codebook_size="$K" --set $Q.decay=0.9 --set train.quantizer_rate=1.0 \
        --set objective.commitment=0.25
    for row in "simvq-$K --set $Q.kind=simvq" "vqbridge-$K --set $Q.kind=vqbridge --set $Q.patch_size=$patch"; do
        read -r name options <<< "$row"
        # shellcheck disable=SC2086
        $runs "$name" $options --set $Q.codebook_size="$K" "${learned[@]}"
        # shellcheck disable=SC2086
        $runs "$name-tuned" $options --set $Q.codebook_size="$K" "${tuned[@]}"
    done
done
table a-size
