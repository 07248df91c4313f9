#!/usr/bin/env bash
# MGVQ, Table 1 (f16 and f8): discrete tokenizers trained here, on ImageNet but for VQGAN at f8 and VAR, which their
# authors trained on OpenImages; continuous ones in VAES. Where OPENIMAGES is not set, those rows are left out.
PROTOCOL=cleanfid-matched
. "$(dirname "$0")/row.sh"
# on_openimages NAME PRESET [option of train ...]: a row trained on OpenImages.
on_openimages() {
    if [ -n "${OPENIMAGES:-}" ]; then
        IMAGES=$OPENIMAGES row "$@"
    else
        echo "skipped: $1 (set OPENIMAGES to its training images)" >&2
    fi
}
row taming-f16-1k taming-f16-16k --set model.quantizer.codebook_size=1024
row taming-f16-16k taming-f16-16k
row llamagen-f16-16k llamagen-f16-16k
row llamagen-f16-32k llamagen-f16-16k --set model.quantizer.codebook_size=32768
row open-magvit2-f16 open-magvit2-f16
on_openimages var-f16 var-f16
on_openimages taming-f8-256 taming-f8-16k --set model.quantizer.codebook_size=256
on_openimages taming-f8-16k taming-f8-16k
row llamagen-f8-16k llamagen-f8-16k
row open-magvit2-f8 open-magvit2-f8
for f in 16 8; do
    for g in 4 8; do
        two_phases mgvq-f$f-g$g mgvq-f$f-g$g
    done
done
continuous
table mgvq-table-1
