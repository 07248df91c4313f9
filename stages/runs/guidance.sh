#!/usr/bin/env bash
# FID over the scale of guidance, for a trained generator: GENERATOR, its folder. IMAGES are the references, SCALES the
# scales, SAMPLES the images drawn for each (default 10,000; compare these FIDs only with FIDs of as many samples). The
# page has the curve. All channels of latents are guided (CHANNELS: only the first few). The scale 8 that VQGAN-LC gives for
# DiT and SiT guides 3 of 8 channels, so the best scale for all is another.
: "${GENERATOR:?set GENERATOR to a generator artifact}"
EVAL=none SAMPLES=${SAMPLES:-10000} PROTOCOLS=${PROTOCOLS:-adm}
. "$(dirname "$0")/row.sh"
name=$(basename "$GENERATOR") SAMPLE_FROM=$GENERATOR
for scale in ${SCALES:-1 1.25 1.5 2 3 4 6 8}; do
    samples "$name-cfg-$scale" references "$IMAGES" --cfg-scale "$scale" --set generate.cfg_channels="${CHANNELS:-0}"
done
sample_table "guidance-$name"
