# What the scripts of this folder share. A row of a table is a tokenizer or a generator, trained and measured.
#
#   IMAGES      training images, any form of --images; several sets, separated by ";", are trained on together
#   EVAL        images to measure on
#   WEIGHTS     folder of the weights that LPIPS and rFID need
#   OUT         where artifacts go (default: artifacts)
#   RUN         how a command is started; on 8 GPUs, in the repository's folder: RUN="torchrun --nproc-per-node 8 -m stages";
#               under SLURM: slurm.sbatch
#   VALIDATION  held-out images to measure during training, if any
#   DOWNLOAD    set to 1 to fetch CLIP's weights where they are not on this machine
#   SAMPLES     generated images per generator (default: 50,000)
#
# Reconstructions are measured by the protocol `adm` and by that of the paper, PROTOCOL, in columns of their own; generated
# images by PROTOCOLS. Each script sets these. The paper's numbers stand beside ours, from published/. Run a script again
# and it continues: what is published is not made again.
set -euo pipefail
: "${IMAGES:?set IMAGES to the training images}" "${EVAL:?set EVAL to the images to measure on}"
: "${WEIGHTS:?set WEIGHTS to the folder with the weights of LPIPS and Inception}"
OUT=${OUT:-artifacts}
RUN=${RUN:-vqpipe}
SAMPLES=${SAMPLES:-50000}
RUNS=$(dirname "${BASH_SOURCE[0]}")
REPORTS=() SAMPLE_REPORTS=()

# each OPTION LIST: the option before each set of a list separated by ";", in EACH.
each() {
    local option=$1 sets set
    IFS=';' read -ra sets <<< "$2"
    EACH=()
    for set in "${sets[@]}"; do EACH+=("$option" "$set"); done
}

# codebook NAME K [option of extract-features ...] [-- option of kmeans ...]: features, then their k-means centers.
# Features of the same encoder are made once: FEATURES names them. All images are clustered at once, as the paper says,
# because that works for every K and for images without classes. (The released code clusters each ImageNet class into 100
# centers, as does the preset vqgan-lc-f16-100k: PER_CLASS=true, for multiples of 1,000.)
codebook() {
    local name=$1 k=$2
    shift 2
    local extract=()
    while [ $# -gt 0 ] && [ "$1" != -- ]; do extract+=("$1"); shift; done
    [ $# -eq 0 ] || shift
    local features="$OUT/features-${FEATURES:-clip-vit-l}"
    each --images "${FEATURE_IMAGES:-$IMAGES}"
    $RUN extract-features "${EACH[@]}" --preset vqgan-lc-f16-100k --out "$features" \
        ${DOWNLOAD:+--download} ${extract[@]+"${extract[@]}"}
    $RUN kmeans --features "$features" --preset vqgan-lc-f16-100k --k "$k" --out "$OUT/codebook-$name" \
        --set kmeans.per_class="${PER_CLASS:-false}" "$@"
}

# tokenizer NAME PRESET [option of train ...]: train.
tokenizer() {
    local name=$1 preset=$2
    shift 2
    each --images "$IMAGES"
    $RUN train --preset "$preset" "${EACH[@]}" --out "$OUT/$name" --set objective.lpips_weights="$WEIGHTS" \
        ${VALIDATION:+--validation "$VALIDATION"} "$@"
}

# measure NAME TOKENIZER [option of eval ...]: evaluate a tokenizer's reconstructions.
measure() {
    local name=$1 path=$2
    shift 2
    each --images "$EVAL"
    $RUN eval "${EACH[@]}" --tokenizer "$path" --out "$OUT/report-$name" --weights "$WEIGHTS" \
        --protocol adm --protocol "$PROTOCOL" "$@"
    REPORTS+=("$OUT/report-$name")
}

# row NAME PRESET [option of train ...]: train, then evaluate.
row() {
    tokenizer "$@"
    measure "$1" "$OUT/$1"
}

# two_phases NAME PRESET [option of train ...]: a row of MGVQ: 40 epochs as the preset says, then 10 (100,090 steps of 128
# images of ImageNet) without masking.
two_phases() {
    local name=$1 preset=$2
    shift 2
    tokenizer "$name-masked" "$preset" "$@"
    row "$name" "$preset" "$@" --from "$OUT/$name-masked" --steps 100090 \
        --set model.quantizer.masking=off --set objective.disc_start=0
}

# continuous: the continuous tokenizers in VAES, "NAME=FOLDER NAME=FOLDER": diffusers' AutoencoderKL, such as SD-VAE
# (sd), SDXL-VAE (sdxl), or one of 16 channels.
continuous() {
    local given
    [ -n "${VAES:-}" ] || echo 'skipped: continuous tokenizers (set VAES="sd=FOLDER sdxl=FOLDER ...")' >&2
    for given in ${VAES:-}; do
        measure "${given%%=*}-vae" "${given#*=}" --image-size 256
    done
}

# tokens NAME IMAGES [option of tokenize ...]: the tokens of a tokenizer.
tokens() {
    local name=$1 images=$2
    shift 2
    each --images "$images"
    $RUN tokenize "${EACH[@]}" --tokenizer "$OUT/$name" --out "$OUT/tokens-$name" "$@"
}

# samples NAME SET REFERENCE [option of generate ...]: draw images from the generator NAME (or from SAMPLE_FROM) and measure
# them against the references of a set, by PROTOCOLS; the use of codes by their ids is measured too.
samples() {
    local name=$1 set=$2 reference=$3 protocol
    shift 3
    $RUN generate --generator "${SAMPLE_FROM:-$OUT/$name}" --num-images "$SAMPLES" --keep-ids --out "$OUT/samples-$name" "$@"
    each --reference "$reference"
    for protocol in $PROTOCOLS; do
        $RUN eval-generation --images "$OUT/samples-$name" "${EACH[@]}" --protocol "$protocol" --image-size 256 \
            --statistics "$OUT/reference-$set-$protocol" --weights "$WEIGHTS" --out "$OUT/report-$name-$protocol"
    done
    SAMPLE_REPORTS+=("$OUT/report-$name")
}

# published NAME: the options that put a paper's table on a page, in PUBLISHED.
published() {
    PUBLISHED=()
    local file
    for file in "$RUNS/published/$1"*.toml; do
        [ ! -e "$file" ] || PUBLISHED+=(--published "$file")
    done
}

# table NAME: every row so far on one page, beside the paper's numbers.
table() {
    published "$1"
    vqpipe compare "${REPORTS[@]}" --out "$OUT/$1" ${PUBLISHED[@]+"${PUBLISHED[@]}"}
}

# sample_table NAME: the same for generated images, one page a protocol.
sample_table() {
    local protocol
    published "$1"
    for protocol in $PROTOCOLS; do
        vqpipe compare "${SAMPLE_REPORTS[@]/%/-$protocol}" --out "$OUT/$1-$protocol" ${PUBLISHED[@]+"${PUBLISHED[@]}"}
    done
}
