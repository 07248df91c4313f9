#!/usr/bin/env bash
# MGVQ, Figure 7: 32 latent channels in 1 to 16 groups, by total codebook sizes from 4,096 to 65,536: 25 models, each
# with its phase of fine-tuning. GROUPS_OF and TOTALS choose fewer.
PROTOCOL=cleanfid-matched
. "$(dirname "$0")/row.sh"
for g in ${GROUPS_OF:-1 2 4 8 16}; do
    for total in ${TOTALS:-4096 8192 16384 32768 65536}; do
        two_phases mgvq-g$g-$total mgvq-f16-g8 --set model.quantizer.num_groups=$g \
            --set model.quantizer.group.codebook_size=$((total / g)) --set model.quantizer.group.code_dim=$((32 / g))
    done
done
table mgvq-figure-7
