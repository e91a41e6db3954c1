# Run B: 124M parameters overfit one file, tiny Shakespeare (338,025 GPT-2 tokens), until the train loss is
# below 0.09.
# Its author reached 0.0891 at step 3,533 (14.5M tokens) from 10.972, at about 4,300 tok/s on Apple MPS.
prepare = "python fineweb.py --input=input.txt --data_dir=shakespeare"
data_dir = "shakespeare"
log_dir = "log_shakespeare_124m"
vocab_size = 50257
block_size = 64
batch_size = 16
batch_tokens = 4 * 16 * 64
max_steps = 300_000
target_loss = 0.09
warmup_steps = 1000
max_lr = 6e-4
min_lr = 6e-5
val_interval = 500
val_tokens = 4096
hellaswag_interval = 0
checkpoint_interval = 1000
sample_interval = 500
prompt = "ROMEO:"
