# The model whose heads RESULTS.md studies: 48 heads, on textbooks. On 2 cores, 1 hour with
# bfloat16 and 2 to 3 without.
#     python train_gpt2.py config/openstax_heads.py
prepare = ("python train_bpe.py --input=openstax.parquet --vocab_size=8192 --val_fraction=0 "
           "--out=openstax8k.tiktoken && python fineweb.py --input=openstax.parquet "
           "--tokenizer=openstax8k.tiktoken --data_dir=openstax8k")
data_dir = "openstax8k"
log_dir = "log_openstax_heads"
n_layer = 6
n_head = 8  # of 32; more and smaller heads than GPT-2's, so that 5% is at least two heads
n_embd = 256
block_size = 256
batch_size = 16
batch_tokens = 16 * 256
max_steps = 2800  # 11.5M tokens, 0.7 of an epoch
warmup_steps = 100
optimizer = "muon"  # at AdamW's loss in half the steps or fewer
max_lr = 8e-3
min_lr = 4e-4
val_interval = 200
val_tokens = 131_072
hellaswag_interval = 0
checkpoint_interval = 400
sample_interval = 1400
prompt = "The cell"
