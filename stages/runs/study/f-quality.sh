#!/usr/bin/env bash
# Part F: what raises the PSNR or the use of frozen codes: a higher learning rate, a deeper or a wider network, an objective of
# squared errors alone, a stronger or a weaker commitment, a still faster projector, an MLP as projector. One id of 4,096,
# of 16,384 and of 1,000,000 codes, and four groups of 1,024.
. "$(dirname "$0")/study.sh"
features pca
codebook 4096 pca 4096
codebook 16384 pca 16384 --set kmeans.select=random
random_codebook 1000000.npy "$OUT/features-pca" 1000000
codebook 1024 pca 1024

variations() { # variations NAME [option of train ...]: runs that differ from NAME in one thing
    local row name options
    for row in "rate --set train.learning_rate=1e-3" "blocks --set model.num_res_blocks=2" \
        "width --set model.base_channels=96" "squared --set objective.l1=0.0 --set objective.l2=4.0" \
        "commitment --set objective.commitment=0.1" "weaker --set objective.commitment=0.005" \
        "faster --set train.quantizer_rate=60.0"; do
        read -r name options <<< "$row"
        # shellcheck disable=SC2086
        try "$1-$name" "${@:2}" $options
    done
}
variations lc-4096 --codebook "$OUT/codebook-4096"
for row in 16384,codebook-16384 1000000,codebook-1000000.npy; do
    K=${row%,*}
    frozen=(--codebook "$OUT/${row#*,}" --set $Q.codebook_size="$K")
    variations "lc-$K" "${frozen[@]}"
    try "lc-$K-mlp" "${frozen[@]}" --set $Q.projector=mlp
done
groups=(--set $Q.kind=multi_group --set $Q.num_groups=4 --set $Q.masking=off --set $Q.group.codebook_size=1024
    --set $Q.group.code_dim=8)
variations lc-4 "${groups[@]}" --codebook "$OUT/codebook-1024" --set $Q.group.kind=lc --set $Q.group.feature_dim=64
# The strongest rival in groups (c-groups.sh), with the change that raises the PSNR of LC most.
try ema-4-rate "${groups[@]}" --set $Q.group.kind=ema --set $Q.group.decay=0.9 --set train.quantizer_rate=1.0 \
    --set train.learning_rate=1e-3
table f-quality
