# One word for the roses of the flower data (textual inversion), begun as the word "flower".
set -e
mkdir -p runs/roses && cp data/flowers_128/images/roses_* runs/roses/
diptych finetune generator runs/roses --output runs/rose_word \
  --method textual-inversion --placeholder-token "<rosa>" --initializer-token flower \
  --num-vectors 2 --learning-rate 2e-3 --max-train-steps 250 --train-batch-size 16 \
  --validation-fraction 0.1 --validation-steps 50 --num-validation-images 40 --seed 1 --resume
diptych generate "a photo of a <rosa>" --embedding runs/rose_word/learned_embeds.safetensors \
  --seed 1 --num-images-per-prompt 6 --output runs/rose_word/drawn --grid runs/rose_word/after.png
diptych generate "a photo of a flower" \
  --seed 1 --num-images-per-prompt 6 --output runs/rose_word/drawn --grid runs/rose_word/before.png
