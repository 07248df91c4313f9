# What the scripts of the study share: do frozen codes win? Small networks, photographs, two cores.
#
#   TRAIN     training photographs, any form of --images; several sets, separated by ";"
#   EVAL      photographs to measure on; MORE, "NAME=IMAGES NAME=IMAGES", further sets for the parts that ask for them
#   MOBILENET the weights of networks.py: codebooks of image features (part B), a Frechet distance under its own name
#   SQUEEZE   the weights of a SqueezeNet 1.1, for a perceptual distance under its own name
#   OUT       where artifacts go (default: study)
#   STEPS     optimizer steps of a run (default: 3,000)
#   SEEDS     seeds of the rows that are made more than once (default: 0 1)
#   ONLY      a regular expression: only the runs whose names match it (default: all)
#   JOBS      runs at the same time, one thread each (default: 2)
#   PRECISION default: fp32, which every processor computes at full speed; bf16 needs AVX-512 or AMX
#
# Every run is the preset `small` (f8, 128 px, 256 positions, 16 images a step, no GAN, no LPIPS) with another quantizer.
# Run a script again and it continues; finished runs are not made again.
set -euo pipefail
: "${TRAIN:?set TRAIN to the training images}" "${EVAL:?set EVAL to the images to measure on}"
STUDY=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
OUT=${OUT:-study} STEPS=${STEPS:-3000} SEEDS=${SEEDS:-0 1} ONLY=${ONLY:-} JOBS=${JOBS:-2} PRECISION=${PRECISION:-fp32}
export OMP_NUM_THREADS=1
mkdir -p "$OUT"
Q=model.quantizer
REPORTS=()
declare -A RECIPES # path of an artifact -> the command that makes it, once a run needs it
# A learned codebook has one of three forms. NAME: the loss weights of its paper, at the scale of the preset's objective, and
# the rate of the network. NAME-fast: it learns faster, as LC's projector does. NAME-tuned: the recipe of the preset, that is
# LC's commitment weight too.
learned=(--set train.quantizer_rate=1.0 --set objective.commitment=0.25 --set objective.codebook=1.0)
fast=(--set objective.commitment=0.25 --set objective.codebook=1.0)
published=(--set train.whiten_init=false) # the start of the published codes

vqpipe() { python "$STUDY/networks.py" vqpipe "$@"; }

each() { # each OPTION LIST: the option before each set of the list, in EACH
    local sets set
    IFS=';' read -ra sets <<< "$2"
    EACH=()
    for set in "${sets[@]}"; do EACH+=("$1" "$set"); done
}

recipe() { RECIPES["$OUT/$1"]=$(printf '%q ' "${@:2}"); } # recipe NAME COMMAND ...: how to make it

make_needed() { # make_needed WORD ...: the artifacts among these words, after those that their own recipes name
    local word command
    for word in "$@"; do
        [ -n "${RECIPES[$word]:-}" ] || continue
        eval "command=(${RECIPES[$word]})"
        unset "RECIPES[$word]"
        make_needed "${command[@]}"
        "${command[@]}"
    done
}

features() { # features NAME [option of extract-features ...]
    each --images "$TRAIN"
    recipe "features-$1" vqpipe extract-features "${EACH[@]}" --preset small --out "$OUT/features-$1" --num-workers 0 "${@:2}"
}

codebook() { # codebook NAME FEATURES K [option of kmeans ...]
    recipe "codebook-$1" vqpipe kmeans --features "$OUT/features-$2" --preset small --k "$3" --out "$OUT/codebook-$1" "${@:4}"
}

random_codebook() { # random_codebook NAME KIND K: normal, sphere, or features to draw from
    recipe "codebook-$1" python "$STUDY/networks.py" codebook "$2" "$3" 64 "$OUT/codebook-$1"
}

one() { # one NAME SEED [option of train ...]: train and measure
    local name=$1 seed=$2 set
    shift 2
    each --images "$TRAIN"
    vqpipe train --preset small "${EACH[@]}" --out "$OUT/$name" --steps "$STEPS" --seed "$seed" --precision "$PRECISION" \
        "$@" > "$OUT/$name.log" 2>&1
    for set in "eval=$EVAL" ${MORE:-}; do
        each --images "${set#*=}"
        vqpipe eval "${EACH[@]}" --tokenizer "$OUT/$name" --out "$OUT/report-$name-${set%%=*}" --num-workers 0 \
            ${MOBILENET:+--extractor mobilenet:pooled --extractor-weights "$MOBILENET" --fid-min-images 1000} \
            ${SQUEEZE:+--perceptual squeeze="$SQUEEZE"} >> "$OUT/$name.log" 2>&1
    done
    echo "done: $name" >&2
}

try() { # try NAME [option of train ...]: a run of seed 0, beside the others
    [[ $1 =~ $ONLY ]] || return 0
    make_needed "$@"
    while [ "$(jobs -rp | wc -l)" -ge "$JOBS" ]; do wait -n || echo "a run has failed: see the logs in $OUT" >&2; done
    REPORTS+=("$OUT/report-$1-eval")
    one "$1" "${SEED:-0}" "${@:2}" &
}

suffix() { [ "$1" = 0 ] || echo "-seed$1"; } # suffix SEED: what follows the name of a run

twice() { # twice NAME [option of train ...]: a run of each of SEEDS
    local seed
    for seed in $SEEDS; do SEED=$seed try "$1$(suffix "$seed")" "${@:2}"; done
}

table() { # table NAME: wait for the runs, then compare those that finished
    local report done=()
    wait || true
    for report in "${REPORTS[@]}"; do
        if [ -d "$report" ]; then done+=("$report"); else echo "not finished: $report" >&2; fi
    done
    [ "${#done[@]}" -eq 0 ] || vqpipe compare "${done[@]}" --out "$OUT/$1"
}
