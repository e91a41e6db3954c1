# GPT-2 124M on a card of 24 GB, such as an RTX 3090 or an RTX 4090; docs/training.md has its memory.
#     python train_gpt2.py config/gpu_24gb.py
log_dir = "log_gpu_24gb"
batch_size = 32
checkpoint_interval = 100  # steps are long here
loss_chunk = 4096  # rows of logits at a time
