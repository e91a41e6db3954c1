# What `make demo` trains: a small GPT-2 on the source code of Python's standard library, in minutes on two
# cores. docs/log.md has what else was tried in the same time.
#     python train_gpt2.py config/demo_cpu.py
prepare = "make python4k"
data_dir = "python4k"
log_dir = "log_demo"
n_layer = 2
n_head = 3  # each 64 wide, as in GPT-2
n_embd = 192
block_size = 128
batch_size = 32
batch_tokens = 32 * 128
max_steps = 320
warmup_steps = 20
optimizer = "muon"
max_lr = 0.016
min_lr = 1e-4
val_interval = 80
val_tokens = 131_072  # all of val
hellaswag_interval = 0
checkpoint_interval = 80
sample_interval = 160
compile = False  # compiling takes longer than it saves in a run this short
prompt = "    def read(self"
num_samples = 1
max_new_tokens = 64
