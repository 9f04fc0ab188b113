# The default captioner, trained on photos, learns the names of emoji (Noto Emoji, Apache-2.0).
# Held out are the 85 pictures that the data set itself holds out.
set -e
diptych finetune captioner data/noto_emoji_128 --output runs/emoji_names --freeze encoder \
  --max-train-steps 450 --train-batch-size 32 --learning-rate 1e-3 --lr-scheduler cosine \
  --lr-warmup-steps 20 --random-flip --validation-steps 75 --num-validation-images 85 \
  --keep-best --seed 1 --resume
