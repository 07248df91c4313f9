# What the scripts of this folder share: one row of a table = one tokenizer, trained and measured.
#
#   IMAGES   training images (any form of --images)          EVAL      images to measure on
#   WEIGHTS  folder with the weights of LPIPS and rFID        OUT       folder for the artifacts (default: artifacts)
#   RUN      how a command is started; on 8 GPUs: RUN="torchrun --nproc-per-node 8 -m stages"; under SLURM: slurm.sbatch
#   VALIDATION  held-out images to measure during training, if any
#
# Run a script again to resume it: artifacts that are published are not made again.
set -euo pipefail
: "${IMAGES:?set IMAGES to the training images}" "${EVAL:?set EVAL to the images to measure on}"
: "${WEIGHTS:?set WEIGHTS to the folder with the weights of LPIPS and Inception}"
OUT=${OUT:-artifacts}
RUN=${RUN:-vqpipe}
REPORTS=()

# codebook NAME K [option of extract-features ...] [-- option of kmeans ...]: features, then their k-means centres.
# Features of the same encoder are made once: FEATURES names them.
codebook() {
    local name=$1 k=$2
    shift 2
    local extract=()
    while [ $# -gt 0 ] && [ "$1" != -- ]; do extract+=("$1"); shift; done
    [ $# -eq 0 ] || shift
    local features="$OUT/features-${FEATURES:-clip-vit-l}"
    $RUN extract-features --images "${FEATURE_IMAGES:-$IMAGES}" --preset vqgan-lc-f16-100k --out "$features" ${extract[@]+"${extract[@]}"}
    $RUN kmeans --features "$features" --preset vqgan-lc-f16-100k --k "$k" --out "$OUT/codebook-$name" "$@"
}

# row NAME PRESET [option of train ...]: train, then evaluate.
row() {
    local name=$1 preset=$2
    shift 2
    $RUN train --preset "$preset" --images "$IMAGES" --out "$OUT/$name" --set objective.lpips_weights="$WEIGHTS" \
        ${VALIDATION:+--validation "$VALIDATION"} "$@"
    $RUN eval --images "$EVAL" --tokenizer "$OUT/$name" --out "$OUT/report-$name" --weights "$WEIGHTS"
    REPORTS+=("$OUT/report-$name")
}

# table NAME: compare all rows so far on one page.
table() {
    vqpipe compare "${REPORTS[@]}" --out "$OUT/$1"
}
