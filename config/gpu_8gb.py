# GPT-2 124M on a card of 8 GB, such as an RTX 4060 or an RTX 3070: 8 sequences and 1,024 rows of logits at
# a time. A step has 524,288 tokens, as on any other card.
#     make prepare
#     python train_gpt2.py config/gpu_8gb.py
#     python analyze_compute.py config/gpu_8gb.py --gpu_memory_gb=8
# Computed by the last command, not measured: a peak of 5,554 MiB, and with 10% lost to fragmentation and
# 0.6 GB for CUDA itself 6,682 of the card's 8,192 MiB.
data_dir = "edu_fineweb10B"
log_dir = "log_gpu_8gb"
vocab_size = 50304
block_size = 1024
batch_size = 8
batch_tokens = 524_288
loss_chunk = 1024
