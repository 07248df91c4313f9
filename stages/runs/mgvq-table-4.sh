#!/usr/bin/env bash
# MGVQ, Table 4 (ImageNet): LlamaGen's GPT-XXL with a head over groups, on MGVQ-G4 at 384 px, samples resized to 256 px, and
# LlamaGen's own GPT, with its output layer and its sampling, on its tokenizer. SIZE=b, l or xl for a smaller one. REFERENCE,
# ADM's VIRTUAL_imagenet256_labeled.npz, else the training images. Images are stored in ten crops, as in LlamaGen.
PROTOCOL=cleanfid-matched PROTOCOLS=adm
. "$(dirname "$0")/row.sh"
SIZE=${SIZE:-xxl}
two_phases mgvq-f16-g4 mgvq-f16-g4
tokenizer llamagen-f16-16k llamagen-f16-16k
for t in mgvq-f16-g4 llamagen-f16-16k; do
    output=() sampling=()
    if [ $t = llamagen-f16-16k ]; then
        output=(--set generator.head=linear) sampling=(--cfg-scale 1.75 --top-k 0)
    fi
    tokens $t "$IMAGES" --image-size 384 --crops ten
    $RUN train-generator --preset "llamagen-$SIZE" --tokens "$OUT/tokens-$t" --tokenizer "$OUT/$t" \
        --out "$OUT/gpt-$SIZE-$t" ${output[@]+"${output[@]}"}
    samples "gpt-$SIZE-$t" imagenet "${REFERENCE:-$IMAGES}" ${sampling[@]+"${sampling[@]}"}
done
sample_table mgvq-table-4
