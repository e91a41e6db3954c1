# Run E: 124M parameters on 0.8B tokens of FineWeb-Edu; its author states val loss 3.10, HellaSwag 0.292 to
# 0.294. It needs a card of 40 GB; on a smaller one, add --batch_size=16 or less.
#     python train_gpt2.py config/fineweb_edu_800m.py
prepare = "python fineweb.py --max_tokens=0.85e9 --data_dir=edu_fineweb800M"
data_dir = "edu_fineweb800M"
log_dir = "log_fineweb_edu_800m"
vocab_size = 50304
block_size = 1024
batch_size = 32
batch_tokens = 524_288
max_steps = 1526
warmup_steps = 100
