#!/usr/bin/env bash
# Every quantizer on one small network with one budget, on a CPU: utilization, and quality for the bits.
# 128 px, f8, 256 positions, no GAN, no LPIPS. IMAGES and EVAL are any photographs; STEPS steps of 16 images each.
# 12 bits per position for quantizers with one id, 40 for groups and depths. Learned codebooks have the loss weights of
# their papers, frozen ones those of the preset `small`; all but `fc` use whiten_init.
WEIGHTS=${WEIGHTS:-none} # neither LPIPS nor rFID is computed
. "$(dirname "$0")/row.sh"
STEPS=${STEPS:-1000}

# try NAME [option of train ...]
try() {
    local name=$1
    shift
    $RUN train --preset small --images "$IMAGES" --out "$OUT/$name" --steps "$STEPS" --set train.warmup_steps=50 "$@"
    $RUN eval --images "$EVAL" --tokenizer "$OUT/$name" --out "$OUT/report-$name"
    REPORTS+=("$OUT/report-$name")
}
learned=(--set train.quantizer_rate=1.0 --set objective.commitment=0.25 --set objective.codebook=1.0)
Q=model.quantizer

$RUN extract-features --images "$IMAGES" --preset small --out "$OUT/features"
$RUN kmeans --features "$OUT/features" --preset small --out "$OUT/codebook-4096"
$RUN kmeans --features "$OUT/features" --preset small --k 1024 --out "$OUT/codebook-1024"

try fc --set $Q.kind=vq "${learned[@]}" --set train.whiten_init=false
try vq --set $Q.kind=vq "${learned[@]}"
try vq-sphere --set $Q.kind=vq --set $Q.normalize=true "${learned[@]}"
try ema --set $Q.kind=ema "${learned[@]}"
try cvq --set $Q.kind=cvq "${learned[@]}"
try ibq --set $Q.kind=ibq "${learned[@]}" --set objective.entropy=0.05
try simvq --set $Q.kind=simvq "${learned[@]}"
try lc --codebook "$OUT/codebook-4096"
try fsq --set $Q.kind=fsq --set $Q.levels='[8, 8, 8, 8]'
try lfq --set $Q.kind=lfq --set $Q.code_dim=12 --set objective.commitment=0.25 --set objective.entropy=0.1
try multi-scale --set $Q.kind=multi_scale --set $Q.code_dim=32 "${learned[@]}"
try residual --set $Q.kind=residual --set $Q.codebook_size=1024 --set $Q.code_dim=32 "${learned[@]}"
groups=(--set $Q.kind=multi_group --set $Q.group.codebook_size=1024 --set $Q.group.code_dim=8)
for masking in off sample; do
    suffix=$([ $masking = off ] || echo -masked)
    try groups-cvq$suffix "${groups[@]}" --set $Q.group.kind=cvq --set $Q.group.normalize=true "${learned[@]}" \
        --set $Q.masking=$masking
    try groups-lc$suffix "${groups[@]}" --set $Q.group.kind=lc --set $Q.group.feature_dim=64 \
        --codebook "$OUT/codebook-1024" --set $Q.masking=$masking
done
table bake-off
