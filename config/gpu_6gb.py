# GPT-2 124M on a card of 6 GB, such as an RTX 4050 laptop or an RTX 2060: 4 sequences and 1,024 rows of
# logits at a time. A step has 524,288 tokens, as on any other card.
#     make prepare
#     python train_gpt2.py config/gpu_6gb.py
#     python analyze_compute.py config/gpu_6gb.py --gpu_memory_gb=6
# Computed by the last command, not measured: a peak of 4,213 MiB, and with 10% lost to fragmentation and
# 0.6 GB for CUDA itself 5,207 of the card's 6,144 MiB.
data_dir = "edu_fineweb10B"
log_dir = "log_gpu_6gb"
vocab_size = 50304
block_size = 1024
batch_size = 4
batch_tokens = 524_288
loss_chunk = 1024
