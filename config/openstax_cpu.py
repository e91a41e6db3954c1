# What experiments/optimizers.sh and vocabularies.sh train: a GPT-2 with 1.3M parameters, on textbooks, in
# minutes on one core. With 4,096 ids the blocks, not the output layer, are most of the work.
#     python train_gpt2.py config/openstax_cpu.py --optimizer=muon
prepare = ("python train_bpe.py --input=openstax.parquet --vocab_size=4096 --val_fraction=0 "
           "--out=openstax4k.tiktoken && python fineweb.py --input=openstax.parquet "
           "--tokenizer=openstax4k.tiktoken --data_dir=openstax4k")
data_dir = "openstax4k"
log_dir = "log_openstax_cpu"
n_layer = 4
n_head = 2  # of 64, as GPT-2's
n_embd = 128
block_size = 128
batch_size = 32
batch_tokens = 32 * 128
max_steps = 800
warmup_steps = 50
max_lr = 4e-3
min_lr = 4e-4
val_interval = 80
val_tokens = 65_536
hellaswag_interval = 0
checkpoint_interval = 0
sample_interval = 0
device = "cpu"
dtype = "float32"
compile = False  # compiling takes longer than it saves in a run this short
