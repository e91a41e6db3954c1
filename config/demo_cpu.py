# What `make demo` trains: a small GPT-2 on the source code of Python's standard library. Minutes
# on 2 cores. Most of the work is the output layer over 50,257 ids: a narrow model sees more text in the time.
#     python train_gpt2.py config/demo_cpu.py
prepare = "python fineweb.py --dataset=python --val_fraction=0.02 --data_dir=python_corpus"
data_dir = "python_corpus"
log_dir = "log_demo"
n_layer = 6
n_head = 4
n_embd = 128
block_size = 256
batch_size = 4
batch_tokens = 2 * 4 * 256  # two micro-steps on one process, one each on two
max_steps = 1200
warmup_steps = 50
max_lr = 2e-3
min_lr = 1e-4
val_interval = 400
val_tokens = 65_536
hellaswag_interval = 0
checkpoint_interval = 200
sample_interval = 400
prompt = "def"
num_samples = 1
max_new_tokens = 64
