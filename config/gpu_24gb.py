# GPT-2 124M on a card of 24 GB, such as an RTX 3090 or an RTX 4090: 32 sequences and 4,096 rows of logits
# at a time. A step has 524,288 tokens, as on any other card.
#     make prepare
#     python train_gpt2.py config/gpu_24gb.py
#     python analyze_compute.py config/gpu_24gb.py --gpu_memory_gb=24
# Computed by the last command, not measured: a peak of 15,369 MiB, and with 10% lost to fragmentation and
# 0.6 GB for CUDA itself 17,478 of the card's 24,576 MiB.
data_dir = "edu_fineweb10B"
log_dir = "log_gpu_24gb"
vocab_size = 50304
block_size = 1024
batch_size = 32
batch_tokens = 524_288
loss_chunk = 4096
