# GPT-2 124M on a card of 12 GB, such as an RTX 3060 or an RTX 4070; docs/training.md has its memory.
#     python train_gpt2.py config/gpu_12gb.py
log_dir = "log_gpu_12gb"
batch_size = 16
loss_chunk = 2048  # rows of logits at a time
