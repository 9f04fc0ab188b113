# A LoRA of the default generator on the second emoji style (FxEmojis, CC BY 4.0, Mozilla).
# Held out are the 45 pictures that the data set itself holds out. Then: has it forgotten scenes?
set -e
diptych finetune generator data/fxemoji_128 --output runs/emoji_style \
  --method lora --rank 32 --lora-layers all --optimizer muon --learning-rate 1e-3 \
  --lr-scheduler cosine --lr-warmup-steps 20 --max-train-steps 500 --train-batch-size 16 \
  --validation-steps 100 --num-validation-images 45 --ema-decay 0.99 --seed 1 --resume
diptych evaluate images --runtime torch -f json > runs/emoji_style/before.json
diptych evaluate images --lora runs/emoji_style -f json > runs/emoji_style/after.json
