#!/usr/bin/env bash
# Part C: groups at equal bits. One id of 12 bits for scale; 4 groups of 10 bits and 8 groups of 6 with learned and
# frozen codes, as MGVQ's two phases: masked (NAME-masked), then as many steps without masking from there (NAME-unmasked).
# With PHASES=1 only without masking, from the start (NAME).
. "$(dirname "$0")/study.sh"
features pca
codebook 4096 pca 4096
codebook 1024 pca 1024
codebook 64 pca 64

try one-id --codebook "$OUT/codebook-4096"
for row in 4,1024 8,64; do
    groups=${row%,*} K=${row#*,}
    group=(--set $Q.kind=multi_group --set $Q.num_groups=$groups --set $Q.group.codebook_size=$K --set $Q.group.code_dim=8)
    both() { # both NAME [option of train ...]: the phase with masking, then the phase without
        local seed suffix
        if [ "${PHASES:-2}" = 1 ]; then
            twice "$1" "${group[@]}" --set $Q.masking=off "${@:2}"
            return
        fi
        twice "$1-masked" "${group[@]}" --set $Q.masking=sample "${@:2}"
        wait || true
        for seed in $SEEDS; do
            suffix=$(suffix "$seed")
            SEED=$seed try "$1-unmasked$suffix" "${group[@]}" --set $Q.masking=off --set train.whiten_init=false \
                --from "$OUT/$1-masked$suffix" "${@:2}"
        done
    }
    both "lc-$groups" --set $Q.group.kind=lc --set $Q.group.feature_dim=64 --codebook "$OUT/codebook-$K"
    both "cvq-$groups" --set $Q.group.kind=cvq --set $Q.group.normalize=true "${learned[@]}"
    both "cvq-$groups-tuned" --set $Q.group.kind=cvq --set $Q.group.normalize=true
    both "vqbridge-$groups" --set $Q.group.kind=vqbridge --set $Q.group.patch_size=2 "${learned[@]}"
    both "vqbridge-$groups-tuned" --set $Q.group.kind=vqbridge --set $Q.group.patch_size=2
    both "ema-$groups" --set $Q.group.kind=ema --set train.quantizer_rate=1.0 --set objective.commitment=0.25
    both "ema-$groups-tuned" --set $Q.group.kind=ema --set $Q.group.decay=0.9 --set train.quantizer_rate=1.0
done
sign=(--set $Q.kind=bsq --set objective.commitment=0.0 --set objective.codebook=0.0 --set objective.entropy=0.01)
twice bsq-4 "${sign[@]}" --set $Q.code_dim=40 --set $Q.bits_per_id=10 --set $Q.entropy_bits=10
twice fsq-4 --set $Q.kind=multi_group --set $Q.num_groups=4 --set $Q.group.kind=fsq --set $Q.group.levels='[8, 5, 5, 5]' \
    --set $Q.masking=off
table c-groups
