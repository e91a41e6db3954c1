# Run D: 124M parameters, five reshuffled epochs of FineWeb-Edu 10B, 2 A100 of 80 GB, about 46 hours
# according to its author.
#     torchrun --standalone --nproc_per_node=2 train_gpt2.py config/fineweb_edu_5_epochs.py
# Its author's 95,365 steps are 5 x 19,073; here the steps follow from the tokens that are there.
data_dir = "edu_fineweb10B"
log_dir = "log_fineweb_edu_5_epochs"
batch_size = 64
batch_tokens = 524_288
num_epochs = 5
