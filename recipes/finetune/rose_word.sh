# One word for the roses of the flower data (textual inversion), and the same flower by DreamBooth.
set -e
mkdir -p runs/roses && cp data/flowers_128/images/rose* runs/roses/
diptych finetune generator runs/roses --output runs/rose_word \
  --method textual-inversion --placeholder-token "<rosa>" --initializer-token flower \
  --num-vectors 4 --learning-rate 5e-3 --max-train-steps 400 --train-batch-size 16 \
  --validation-fraction 0.1 --validation-steps 50 --seed 1 --resume
