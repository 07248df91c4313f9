#!/usr/bin/env bash
# VQGAN-LC, Figure 1b: top-1 accuracy of a ViT-B, pre-trained with MAE, on the tokens of FC, EMA and LC. MAE: its
# checkpoint, mae_pretrain_vit_base.pth; MAE=none trains from scratch. The paper gives no recipe: see the preset vit-b.
: "${MAE:?set MAE to mae_pretrain_vit_base.pth (or to none: from scratch)}"
. "$(dirname "$0")/row.sh"
codebook 100000 100000
tokenizer fc-16384 vqgan-fc-f16-16k
tokenizer ema-16384 vqgan-ema-f16-16k
tokenizer lc-100000 vqgan-lc-f16-100k --codebook "$OUT/codebook-100000"
pretrained=(--set classifier.weights="$MAE")
[ "$MAE" != none ] || pretrained=(--set classifier.pretrained=false)
for t in fc-16384 ema-16384 lc-100000; do
    tokens $t "$IMAGES" --image-size 256
    each --images "$EVAL"
    $RUN tokenize "${EACH[@]}" --tokenizer "$OUT/$t" --out "$OUT/eval-tokens-$t" --image-size 256
    $RUN train-classifier --preset vit-b --tokens "$OUT/tokens-$t" --validation "$OUT/eval-tokens-$t" \
        --tokenizer "$OUT/$t" --out "$OUT/vit-$t" "${pretrained[@]}"
done
