# What `make experiment-norm` trains, with norm_position=pre and post: deep and narrow, so that the place of
# the norms matters, on the source of Python's standard library; minutes on one core.
#     python train_gpt2.py config/norm_cpu.py --norm_position=post
prepare = ("python train_bpe.py --dataset=python --vocab_size=4096 --val_fraction=0.05 "
           "--out=python4k.tiktoken && python fineweb.py --dataset=python --tokenizer=python4k.tiktoken "
           "--data_dir=python4k --val_fraction=0.05")
data_dir = "python4k"
log_dir = "log_norm_cpu"
n_layer = 12  # as GPT-2 small
n_head = 2
n_embd = 64
block_size = 64
batch_size = 8
batch_tokens = 8 * 64
max_steps = 1000
warmup_steps = 200
max_lr = 2e-3
min_lr = 2e-4
val_interval = 0
val_tokens = 131_072  # files come one after another: a part too short is one file's
hellaswag_interval = 0
checkpoint_interval = 0
sample_interval = 0
grad_norm_interval = 10
device = "cpu"
dtype = "float32"
compile = False  # compiling takes longer than it saves in a run this short
prompt = "def"
