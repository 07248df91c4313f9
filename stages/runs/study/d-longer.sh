#!/usr/bin/env bash
# Part D: longer runs of frozen codes, one id and four groups: 20,000 steps.
. "$(dirname "$0")/study.sh"
STEPS=${LONG_STEPS:-20000}
features pca
codebook 4096 pca 4096
codebook 1024 pca 1024
try lc-4096-long --codebook "$OUT/codebook-4096"
try lc-groups-long --set $Q.kind=multi_group --set $Q.num_groups=4 --set $Q.group.kind=lc --set $Q.group.codebook_size=1024 \
    --set $Q.group.code_dim=8 --set $Q.group.feature_dim=64 --set $Q.masking=off --codebook "$OUT/codebook-1024"
table d-longer
