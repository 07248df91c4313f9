#!/usr/bin/env bash
# MGVQ, Table 2 (zero-shot sets at 512p) and Table 3 (UHDBench and DAVIS at 2560 x 1440): rFID and PSNR of tokenizers on
# images they never saw. The baselines are those of Table 1 at f16, found where mgvq-table-1.sh left them or made here.
#
#   MIXTURE  training sets of MGVQ, separated by ";". The paper adds FFHQ, OpenImages, SA-1B, Argoverse 2, Mapillary Vistas
#            and LAION-HQ to ImageNet; it gives no shares, here sets are weighted by size (data.set_weights)
#   DATA     folder of your copies, DATA/celeba, DATA/uhdbench ...: data_manifests/ says how to get each set
#   SETS     those of Table 2 that you have (default: all six)      SETS_2K  of Table 3 (default: uhdbench davis-2017)
#   PARTIAL  set to 1 to take incomplete copies as they are
#   TILE     pixels; set where 2560 x 1440 does not fit: another reconstruction than the paper's, which is in one piece
#
# What 512p means, and which images of each set, the paper does not say: see `unstated` in the manifests. Several sets
# are small, so rFID is asked for from 100 images on: compare it on equal sets only.
PROTOCOL=cleanfid-matched
. "$(dirname "$0")/row.sh"
: "${DATA:?set DATA to the folder of your copies of the data sets}"
: "${MIXTURE:?set MIXTURE to the training sets of MGVQ, separated by ;}"
tokenizer taming-f16-16k taming-f16-16k
tokenizer llamagen-f16-16k llamagen-f16-16k
tokenizer open-magvit2-f16 open-magvit2-f16
[ -z "${OPENIMAGES:-}" ] || IMAGES=$OPENIMAGES tokenizer var-f16 var-f16
IMAGES=$MIXTURE tokenizer mgvq-f16-g4-mixture-masked mgvq-f16-g4-mixture
IMAGES=$MIXTURE tokenizer mgvq-f16-g4-mixture mgvq-f16-g4-mixture --from "$OUT/mgvq-f16-g4-mixture-masked" \
    --steps 100090 --set model.quantizer.masking=off --set objective.disc_start=0
TOKENIZERS=(taming-f16-16k llamagen-f16-16k open-magvit2-f16 ${OPENIMAGES:+var-f16} mgvq-f16-g4-mixture)

# zero_shot SET SIZE [option of eval ...]: one set, prepared once, measured with every tokenizer.
zero_shot() {
    local set=$1 size=$2 name given EVAL=$OUT/set-$1
    shift 2
    vqpipe prepare-data "$set" --source "$DATA/$set" --out "$EVAL" ${PARTIAL:+--allow-partial}
    for name in "${TOKENIZERS[@]}"; do
        measure "$set-$size-$name" "$OUT/$name" --image-size "$size" --fid-min-images 100 "$@"
    done
    for given in ${VAES:-}; do
        measure "$set-$size-${given%%=*}-vae" "${given#*=}" --image-size "$size" --fid-min-images 100 "$@"
    done
}

for set in ${SETS:-celeba davis-2017 textocr vfhq spring enerf-outdoor}; do
    zero_shot "$set" 512
done
table mgvq-table-2
REPORTS=()
for set in ${SETS_2K:-uhdbench davis-2017}; do
    zero_shot "$set" 2560x1440 --batch-size 1 ${TILE:+--tile "$TILE"}
done
table mgvq-table-3
