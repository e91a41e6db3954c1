# Run A's model, batch and number of tokens (2,848 x 8,192) with our settings: 4,096 ids of its own text in
# place of GPT-2's 50,304, no dropout, Muon, and a cosine to almost zero. Val loss 1.322 bits per byte; two
# hours on two CPU cores.
#     python train_gpt2.py config/rtx4050_15m_tuned.py
prepare = ("python train_bpe.py --input=openstax.parquet --vocab_size=4096 --val_fraction=0.07 "
           "--out=openstax_a.tiktoken && python fineweb.py --input=openstax.parquet "
           "--tokenizer=openstax_a.tiktoken --data_dir=openstax_a --max_tokens=5405000 --val_fraction=0.07")
data_dir = "openstax_a"  # the documents of RESULTS.md's run A, 5.1M train tokens: 4.6 epochs
log_dir = "log_rtx4050_15m_tuned"
n_layer = 4
n_head = 4
n_embd = 256
block_size = 256
batch_size = 32
batch_tokens = 32 * 256
loss_chunk = 4096
max_steps = 2848
warmup_steps = 50
optimizer = "muon"
max_lr = 0.012
min_lr = 1e-4
val_interval = 356
val_tokens = 333_312  # all of val
hellaswag_interval = 0
checkpoint_interval = 178
sample_interval = 1424
prompt = "The cell"
