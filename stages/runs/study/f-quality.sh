#!/usr/bin/env bash
# Part F: what raises the PSNR or the use of 4,096 frozen codes, 12 bits a position: a higher learning rate, a deeper or a
# wider network, an objective of squared errors alone, a stronger commitment, a still faster projector.
. "$(dirname "$0")/study.sh"
features pca
codebook 4096 pca 4096
for row in "rate --set train.learning_rate=1e-3" "blocks --set model.num_res_blocks=2" \
    "width --set model.base_channels=96" "squared --set objective.l1=0.0 --set objective.l2=4.0" \
    "commitment --set objective.commitment=0.1" "faster --set train.quantizer_rate=60.0"; do
    read -r name options <<< "$row"
    # shellcheck disable=SC2086
    try "lc-4096-$name" --codebook "$OUT/codebook-4096" $options
done
table f-quality
