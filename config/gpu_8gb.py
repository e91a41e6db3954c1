# GPT-2 124M on a card of 8 GB, such as an RTX 4060 or an RTX 3070; docs/training.md has its memory.
#     python train_gpt2.py config/gpu_8gb.py
log_dir = "log_gpu_8gb"
batch_size = 8
checkpoint_interval = 100  # steps are long here
loss_chunk = 1024  # rows of logits at a time
