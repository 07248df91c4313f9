#!/usr/bin/env bash
# MGVQ, Figure 7: 32 latent channels in 1 to 16 groups, and total codebook sizes from 4,096 to 65,536 in 8 groups.
. "$(dirname "$0")/row.sh"
for g in 1 2 4 8 16; do
    row mgvq-groups-$g mgvq-f16-g8 --set model.quantizer.num_groups=$g \
        --set model.quantizer.group.codebook_size=$((16384 / g)) --set model.quantizer.group.code_dim=$((32 / g))
done
for total in 4096 8192 16384 32768 65536; do
    row mgvq-total-$total mgvq-f16-g8 --set model.quantizer.group.codebook_size=$((total / 8))
done
table mgvq-figure-7
