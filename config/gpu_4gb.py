# GPT-2 124M on a card of 4 GB, such as a GTX 1650 or an RTX 3050 laptop: 4 sequences and 512 rows of logits
# at a time; the blocks' activations are made again in the backward pass, which is a quarter more compute. A
# step has 524,288 tokens, as on any other card.
#     make prepare
#     python train_gpt2.py config/gpu_4gb.py
#     python analyze_compute.py config/gpu_4gb.py --gpu_memory_gb=4
# Computed by the last command, not measured: a peak of 2,763 MiB, and with 10% lost to fragmentation and
# 0.6 GB for CUDA itself 3,612 of the card's 4,096 MiB.
data_dir = "edu_fineweb10B"
log_dir = "log_gpu_4gb"
vocab_size = 50304
block_size = 1024
batch_size = 4
batch_tokens = 524_288
loss_chunk = 512
activation_checkpointing = True
