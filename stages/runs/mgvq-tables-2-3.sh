#!/usr/bin/env bash
# MGVQ, Table 2 (zero-shot sets at 512p) and Table 3 (UHDBench and DAVIS at 2560 x 1440): rFID and PSNR of tokenizers on
# data sets they were not trained on. The tokenizers are those of Table 1 at f16, reused if mgvq-table-1.sh published them.
# The paper trained on more than ImageNet, in a mixture it does not state: IMAGES may name other images too.
#
#   DATA     folder of your copies, DATA/celeba, DATA/uhdbench ...: data_manifests/ describes how to get each, and its layout
#   SETS     those of Table 2 that you have (default: all six)      SETS_2K  of Table 3 (default: uhdbench davis-2017)
#   PARTIAL  1: accept incomplete copies
#   TILE     side of tiles in pixels, if 2560 x 1440 does not fit in memory; the paper's reconstructions are not tiled
#
# The paper does not define 512p or the images of each set: see `unstated` in the manifests. Several sets are small, so
# rFID is computed from 100 images on: compare it on equal sets only.
. "$(dirname "$0")/row.sh"
: "${DATA:?set DATA to the folder of your copies of the data sets}"
row taming-f16-16k taming-f16-16k
row llamagen-f16-16k llamagen-f16-16k
row open-magvit2-f16 open-magvit2-f16
row var-f16 var-f16
row mgvq-f16-g4-masked mgvq-f16-g4
row mgvq-f16-g4 mgvq-f16-g4-finetune --from "$OUT/mgvq-f16-g4-masked"
TOKENIZERS=(taming-f16-16k llamagen-f16-16k open-magvit2-f16 var-f16 mgvq-f16-g4)
PROTOCOL=(--protocol cleanfid-matched --fid-min-images 100 --weights "$WEIGHTS")

# zero_shot SET SIZE [option of eval ...]: one set, prepared once, measured with every tokenizer.
zero_shot() {
    local set=$1 size=$2 name
    shift 2
    vqpipe prepare-data "$set" --source "$DATA/$set" --out "$OUT/set-$set" --num-workers -1 ${PARTIAL:+--allow-partial}
    for name in "${TOKENIZERS[@]}"; do
        measure "$set" "$size" "$name" "$OUT/$name" "$@"
    done
    if [ -n "${SD_VAE:-}" ]; then
        measure "$set" "$size" sd-vae "$SD_VAE" "$@"
    fi
}

# measure SET SIZE NAME TOKENIZER [option of eval ...]
measure() {
    local report="$OUT/report-$1-$2-$3"
    $RUN eval --images "$OUT/set-$1" --tokenizer "$4" --image-size "$2" --out "$report" "${PROTOCOL[@]}" "${@:5}"
    REPORTS+=("$report")
}

REPORTS=()
for set in ${SETS:-celeba davis-2017 textocr vfhq spring enerf-outdoor}; do
    zero_shot "$set" 512
done
table mgvq-table-2
REPORTS=()
for set in ${SETS_2K:-uhdbench davis-2017}; do
    zero_shot "$set" 2560x1440 --batch-size 1 ${TILE:+--tile "$TILE"}
done
table mgvq-table-3
