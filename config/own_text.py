# Your own text: a small GPT-2 that learns 1 MB in minutes on two CPU cores. README.md has a table for other
# sizes, and fineweb.py prints the command that suits the data it has built.
#     python train_gpt2.py config/own_text.py --data_dir=plays_data --log_dir=log_plays
prepare = ("python train_bpe.py --input=TEXT --vocab_size=2048 --val_fraction=0.1 --out=own.tiktoken && "
           "python fineweb.py --input=TEXT --tokenizer=own.tiktoken --data_dir=own_data --val_fraction=0.1")
data_dir = "own_data"
log_dir = "log_own"
n_layer = 4
n_head = 2  # each 64 wide, as in GPT-2
n_embd = 128
block_size = 128
batch_size = 32
batch_tokens = 32 * 128
num_epochs = 4.5
warmup_steps = 20
optimizer = "muon"
max_lr = 0.016
min_lr = 1e-4
val_interval = 100
val_tokens = 262_144
hellaswag_interval = 0
checkpoint_interval = 200
sample_interval = 0
compile = False  # compiling takes longer than it saves in minutes on a CPU
