# Run C: 124M parameters, 10B FineWeb tokens, 8 A100 of 80 GB, about 4 hours according to its author.
#     torchrun --standalone --nproc_per_node=8 train_gpt2.py config/a100x8_10b.py
prepare = "python fineweb.py --dataset=fineweb --data_dir=fineweb10B"
data_dir = "fineweb10B"
log_dir = "log_a100x8_10b"
vocab_size = 50304
batch_size = 64
batch_tokens = 524_288
max_steps = 19_073
