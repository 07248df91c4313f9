#!/usr/bin/env bash
# MGVQ, Table 1 (ImageNet, f16 and f8): the discrete tokenizers, trained here, and the two continuous ones if their folders
# in diffusers' layout are given as SD_VAE and SDXL_VAE. Fine-tuning without masking is MGVQ's second stage.
. "$(dirname "$0")/row.sh"
row taming-f16-1k taming-f16-16k --set model.quantizer.codebook_size=1024
row taming-f16-16k taming-f16-16k
row llamagen-f16-16k llamagen-f16-16k
row llamagen-f16-32k llamagen-f16-16k --set model.quantizer.codebook_size=32768
row open-magvit2-f16 open-magvit2-f16
row var-f16 var-f16
row taming-f8-256 taming-f8-16k --set model.quantizer.codebook_size=256
row taming-f8-16k taming-f8-16k
row llamagen-f8-16k llamagen-f8-16k
row open-magvit2-f8 open-magvit2-f8
for f in 16 8; do
    for groups in "4 8192 8" "8 2048 4"; do
        read -r g size dim <<< "$groups"
        row mgvq-f$f-g$g-masked mgvq-f$f-g$g
        row mgvq-f$f-g$g mgvq-f$f-g$g --from "$OUT/mgvq-f$f-g$g-masked" --steps 100090 \
            --set model.quantizer.masking=off --set objective.disc_start=0
    done
done
for name in sd sdxl; do
    folder=$(eval echo "\${${name^^}_VAE:-}")
    [ -n "$folder" ] || { echo "skipped: $name-vae (set ${name^^}_VAE to its folder)" >&2; continue; }
    $RUN eval --images "$EVAL" --tokenizer "$folder" --out "$OUT/report-$name-vae" --weights "$WEIGHTS" --image-size 256
    REPORTS+=("$OUT/report-$name-vae")
done
table mgvq-table-1
