#!/usr/bin/env bash
# VQGAN-LC, Table 5 (FFHQ, no classes): LDM and GPT on FC, EMA and LC. IMAGES and EVAL are the training and validation
# faces; the references are both together, as in the paper. Tokenizers are those of Table 3, reused if
# they are in OUT, otherwise trained.
PROTOCOLS="cleanfid-raw adm"
. "$(dirname "$0")/row.sh"
FEATURES=ffhq codebook ffhq-100k 100000
schedule=(--steps 187500 --set train.warmup_steps=1172)
tokenizer ffhq-fc vqgan-fc-f16-16k "${schedule[@]}"
tokenizer ffhq-ema vqgan-ema-f16-16k "${schedule[@]}"
tokenizer ffhq-lc vqgan-lc-ffhq-f16-100k --codebook "$OUT/codebook-ffhq-100k"
for t in ffhq-fc ffhq-ema ffhq-lc; do
    each --images "$IMAGES"
    $RUN train-generator --preset ldm-ffhq-f16 "${EACH[@]}" --tokenizer "$OUT/$t" --out "$OUT/ldm-$t"
    samples ldm-$t ffhq "$IMAGES;$EVAL"
    tokens $t "$IMAGES" --image-size 256
    $RUN train-generator --preset gpt-unconditional --tokens "$OUT/tokens-$t" --tokenizer "$OUT/$t" --out "$OUT/gpt-$t"
    samples gpt-$t ffhq "$IMAGES;$EVAL"
done
sample_table vqgan-lc-table-5
