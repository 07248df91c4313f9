#!/usr/bin/env bash
# VQGAN-LC, Table 4 (ImageNet, classes): GPT, SiT, DiT and LDM on FC, EMA and LC, and LDM on LC at f8. Tokenizers are
# those of Tables 1 and 2, reused if they are in OUT, otherwise trained. The guidance scale of DiT and SiT: see guidance.sh.
PROTOCOLS="cleanfid-raw adm"
. "$(dirname "$0")/row.sh"
codebook 100000 100000
tokenizer fc-16384 vqgan-fc-f16-16k
tokenizer ema-16384 vqgan-ema-f16-16k
tokenizer lc-100000 vqgan-lc-f16-100k --codebook "$OUT/codebook-100000"
tokenizer lc-f8-100000 vqgan-lc-f8-100k --codebook "$OUT/codebook-100000"
for t in fc-16384 ema-16384 lc-100000; do
    tokens $t "$IMAGES" --image-size 256
    $RUN train-generator --preset gpt-404m --tokens "$OUT/tokens-$t" --tokenizer "$OUT/$t" --out "$OUT/gpt-$t"
    samples gpt-$t imagenet "$IMAGES"
    for model in sit-xl-2 dit-xl-2 ldm-f16; do
        each --images "$IMAGES"
        $RUN train-generator --preset $model "${EACH[@]}" --tokenizer "$OUT/$t" --out "$OUT/$model-$t"
        samples $model-$t imagenet "$IMAGES"
    done
done
each --images "$IMAGES"
$RUN train-generator --preset ldm-f8 "${EACH[@]}" --tokenizer "$OUT/lc-f8-100000" --out "$OUT/ldm-f8-lc-f8-100000"
samples ldm-f8-lc-f8-100000 imagenet "$IMAGES"
sample_table vqgan-lc-table-4
