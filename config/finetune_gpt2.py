# Fine-tune GPT-2 on your own text: OpenAI's 124M (0.5 GB are downloaded once), or whatever --init_from names.
#     python train_gpt2.py config/finetune_gpt2.py
#     python generate.py --checkpoint=log_finetune
# Shape and vocabulary come with the weights. Two epochs are many for a small text: watch the val loss; the
# best checkpoint is kept (--checkpoint=log_finetune:best). Validation needs a window: with a tenth of the
# text and block_size=1024 that is a text of 50 kB; --block_size=256 needs a quarter of it.
init_from = "gpt2"  # or gpt2-medium, gpt2-large, gpt2-xl, a folder of Hugging Face's, a checkpoint
prepare = "python fineweb.py --input=my_text.txt --data_dir=my_text --val_fraction=0.1"
data_dir = "my_text"
log_dir = "log_finetune"
block_size = 1024  # or less, for memory
batch_size = 4
batch_tokens = 8 * 1024
num_epochs = 2.0
warmup_steps = 0
max_lr = 3e-5
min_lr = 3e-6
dropout = 0.1  # as GPT-2 was trained with
val_interval = 20
hellaswag_interval = 0
checkpoint_interval = 20
keep_checkpoints = 1
sample_interval = 40
prompt = ""
