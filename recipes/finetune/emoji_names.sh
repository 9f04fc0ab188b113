# The default captioner, trained on photos, learns the names of emoji (Noto Emoji, Apache-2.0).
# Held out are the 85 pictures that the data set itself holds out.
set -e
diptych finetune captioner data/noto_emoji_128 --output runs/emoji_names \
  --max-train-steps 600 --train-batch-size 24 --learning-rate 5e-4 --lr-scheduler cosine \
  --lr-warmup-steps 30 --random-flip --validation-steps 75 --num-validation-images 85 \
  --keep-best --seed 1 --resume
