#!/usr/bin/env bash
# MGVQ, Table 4 (ImageNet): LlamaGen's GPT-XXL with a head over groups, on MGVQ-G4 at 384 px, with samples resized to
# 256 px, and the same on LlamaGen's tokenizer. SIZE: b, l or xl for a smaller GPT. REFERENCE: ADM's
# VIRTUAL_imagenet256_labeled.npz; default: the training images. SAMPLES: 50,000 unless set.
. "$(dirname "$0")/row.sh"
SAMPLES=${SAMPLES:-50000}
SIZE=${SIZE:-xxl}
row mgvq-f16-g4-masked mgvq-f16-g4
row mgvq-f16-g4 mgvq-f16-g4-finetune --from "$OUT/mgvq-f16-g4-masked"
row llamagen-f16-16k llamagen-f16-16k
for t in mgvq-f16-g4 llamagen-f16-16k; do
    $RUN tokenize --images "$IMAGES" --tokenizer "$OUT/$t" --image-size 384 --flip --out "$OUT/tokens-384-$t"
    $RUN train-generator --preset "llamagen-$SIZE" --tokens "$OUT/tokens-384-$t" --tokenizer "$OUT/$t" \
        --out "$OUT/gpt-$SIZE-$t"
    $RUN generate --generator "$OUT/gpt-$SIZE-$t" --num-images "$SAMPLES" --out "$OUT/samples-gpt-$SIZE-$t"
    $RUN eval-generation --images "$OUT/samples-gpt-$SIZE-$t" --reference "${REFERENCE:-$IMAGES}" --image-size 256 \
        --statistics "$OUT/reference-adm" --weights "$WEIGHTS" --out "$OUT/report-gpt-$SIZE-$t"
done
