#!/usr/bin/env bash
# VQGAN-LC, Tables 4 (ImageNet, classes) and 5 (FFHQ, none): GPT, SiT, DiT and LDM on FC, EMA and LC; and Figure 1b, a
# ViT-B on their tokens. The tokenizers are those of Tables 1 to 3, and are reused if they are published.
# Also: FFHQ and FFHQ_EVAL, its training and validation images; SAMPLES, 50,000 unless set; MAE, a checkpoint for the ViT.
. "$(dirname "$0")/row.sh"
SAMPLES=${SAMPLES:-50000}

# tokens NAME IMAGES: the tokens of a tokenizer.
tokens() {
    $RUN tokenize --images "$2" --tokenizer "$OUT/$1" --out "$OUT/tokens-$1" --image-size 256
}

# samples NAME REFERENCE [option of generate ...]: generate, then measure with the paper's protocol.
samples() {
    local name=$1 reference=$2
    shift 2
    $RUN generate --generator "$OUT/$name" --num-images "$SAMPLES" --out "$OUT/samples-$name" "$@"
    $RUN eval-generation --images "$OUT/samples-$name" --reference "$reference" --protocol cleanfid-raw \
        --statistics "$OUT/reference-$(basename "$reference")" --weights "$WEIGHTS" --out "$OUT/report-$name"
}

codebook 100000 100000 -- --set kmeans.per_class=true
row fc-16384 vqgan-fc-f16-16k
row ema-16384 vqgan-ema-f16-16k
row lc-100000 vqgan-lc-f16-100k --codebook "$OUT/codebook-100000"
row lc-f8-100000 vqgan-lc-f8-100k --codebook "$OUT/codebook-100000"

for t in fc-16384 ema-16384 lc-100000; do
    tokens "$t" "$IMAGES"
    $RUN train-generator --preset gpt-404m --tokens "$OUT/tokens-$t" --tokenizer "$OUT/$t" --out "$OUT/gpt-$t"
    samples "gpt-$t" "$IMAGES"
    for model in sit-xl-2 dit-xl-2 ldm-f16; do
        $RUN train-generator --preset $model --images "$IMAGES" --tokenizer "$OUT/$t" --out "$OUT/$model-$t"
        samples "$model-$t" "$IMAGES"
    done
    $RUN tokenize --images "$EVAL" --tokenizer "$OUT/$t" --out "$OUT/eval-tokens-$t" --image-size 256
    $RUN train-classifier --preset vit-b --tokens "$OUT/tokens-$t" --validation "$OUT/eval-tokens-$t" \
        --tokenizer "$OUT/$t" --out "$OUT/vit-$t" ${MAE:+--set classifier.weights="$MAE"}
done
$RUN train-generator --preset ldm-f8 --images "$IMAGES" --tokenizer "$OUT/lc-f8-100000" --out "$OUT/ldm-f8"
samples ldm-f8 "$IMAGES"

: "${FFHQ:?set FFHQ to its training images}" "${FFHQ_EVAL:?set FFHQ_EVAL to its validation images}"
IMAGES=$FFHQ EVAL=$FFHQ_EVAL
FEATURES=ffhq codebook ffhq-100k 100000 -- --set kmeans.per_class=false
schedule=(--steps 187500 --set train.warmup_steps=1172)
row ffhq-fc vqgan-fc-f16-16k "${schedule[@]}"
row ffhq-ema vqgan-ema-f16-16k "${schedule[@]}"
row ffhq-lc vqgan-lc-ffhq-f16-100k --codebook "$OUT/codebook-ffhq-100k"
for t in ffhq-fc ffhq-ema ffhq-lc; do
    tokens "$t" "$FFHQ"
    $RUN train-generator --preset gpt-unconditional --tokens "$OUT/tokens-$t" --tokenizer "$OUT/$t" --out "$OUT/gpt-$t"
    samples "gpt-$t" "$FFHQ"
    $RUN train-generator --preset ldm-f16 --images "$FFHQ" --tokenizer "$OUT/$t" --out "$OUT/ldm-$t" \
        --set examples.conditional=false --set generate.cfg_scale=1
    samples "ldm-$t" "$FFHQ"
done
