# Run A: 16M parameters on a 6 GB card, 23.3M tokens, each once.
#     python train_gpt2.py config/rtx4050_15m.py
# Its author states 10,369 tok/s, 37.5 min per epoch of 2,848 batches, loss 13.0 to train 5.3 / val 9.4. With
# this initialisation the loss starts near ln(50304) = 10.83. The stated total of 15,103,616 parameters does
# not follow from its own table: tied, with biases, it is 16,102,912.
prepare = "make prepare-small"
data_dir = "edu_fineweb25M"
log_dir = "log_rtx4050_15m"
n_layer = 4
n_head = 4
n_embd = 256
block_size = 256
vocab_size = 50304
dropout = 0.7
batch_size = 32
batch_tokens = 32 * 256
loss_chunk = 4096  # all 8,192 rows of logits at once would take most of the 6 GB
max_steps = 2848
warmup_steps = 100
max_lr = 3e-4
min_lr = 3e-5
weight_decay = 0.1
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0
val_interval = 200
val_tokens = 262_144
hellaswag_interval = 0
checkpoint_interval = 500
sample_interval = 500
