# GPT-2 124M on a card of 4 GB, such as a GTX 1650 or an RTX 3050 laptop; docs/training.md has its memory.
#     python train_gpt2.py config/gpu_4gb.py
log_dir = "log_gpu_4gb"
batch_size = 4
checkpoint_interval = 100  # steps are long here
loss_chunk = 512  # rows of logits at a time
activation_checkpointing = True  # a quarter more compute
