# GPT-2 124M on a card of 6 GB, such as an RTX 4050 laptop or an RTX 2060; docs/training.md has its memory.
#     python train_gpt2.py config/gpu_6gb.py
log_dir = "log_gpu_6gb"
batch_size = 4
checkpoint_interval = 100  # steps are long here
loss_chunk = 1024  # rows of logits at a time
