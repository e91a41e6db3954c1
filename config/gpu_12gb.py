# GPT-2 124M on a card of 12 GB, such as an RTX 3060 or an RTX 4070: 16 sequences and 2,048 rows of logits
# at a time. A step has 524,288 tokens, as on any other card.
#     make prepare
#     python train_gpt2.py config/gpu_12gb.py
#     python analyze_compute.py config/gpu_12gb.py --gpu_memory_gb=12
# Computed by the last command, not measured: a peak of 8,826 MiB, and with 10% lost to fragmentation and
# 0.6 GB for CUDA itself 10,281 of the card's 12,288 MiB.
data_dir = "edu_fineweb10B"
log_dir = "log_gpu_12gb"
vocab_size = 50304
block_size = 1024
batch_size = 16
batch_tokens = 524_288
loss_chunk = 2048
