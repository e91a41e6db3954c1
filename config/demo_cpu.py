# What `make demo` trains: a small GPT-2 on the source and documentation of the Python installation, minutes
# on 2 cores.
#     python fineweb.py --dataset=python --data_dir=python_corpus --max_tokens=12e6
#     python train_gpt2.py config/demo_cpu.py
data_dir = "python_corpus"
log_dir = "log_demo"
n_layer = 4
n_head = 4
n_embd = 256
block_size = 256
batch_size = 8
batch_tokens = 8 * 256
max_steps = 1000
warmup_steps = 50
max_lr = 2e-3
min_lr = 2e-4
val_interval = 100
val_tokens = 65_536
checkpoint_interval = 200
sample_interval = 250
prompt = "def "
num_samples = 1
