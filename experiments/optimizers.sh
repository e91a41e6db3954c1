#!/bin/sh
# Muon against AdamW: 13 runs of 400 steps and 3 of 160, 105 minutes of one core.
#     python train_bpe.py --input=openstax.parquet --vocab_size=4096 --val_fraction=0 \
#         --out=openstax4k.tiktoken
#     python fineweb.py --input=openstax.parquet --tokenizer=openstax4k.tiktoken --data_dir=openstax4k
#     sh experiments/optimizers.sh
# Run it again after a stop: it continues, and finished runs end in seconds. FLAGS goes to every run.
set -e
trap 'exit 1' INT TERM
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
logs=${LOGS:-log_optimizers}

train() { # name, optimizer, max_lr in units of 1e-3, seed, more flags
    run=$logs/${1}_lr${3}e-3_s$4 optimizer=$2 lr=$3 seed=$4
    shift 4
    echo "== $(date +%H:%M) $run"
    python train_gpt2.py config/openstax_cpu.py --resume --log_dir="$run" --optimizer="$optimizer" \
        --max_lr="${lr}e-3" --min_lr="${lr}e-4" --seed="$seed" --max_steps=400 --val_interval=40 "$@" $FLAGS \
        > "$run.txt" 2>&1 || { cat "$run.txt"; exit 1; }
    tail -n 3 "$run.txt"
}

mkdir -p "$logs"
for seed in 1 2 3; do # separate: AdamW's part of the weights at the rate that is best for AdamW
    train adamw adamw 4 $seed
    train muon muon 16 $seed
    train separate muon 16 $seed --adamw_lr_scale=0.25
done
for lr in 2 8; do train adamw adamw $lr 1; done # is the rate the best?
for lr in 8 32; do train muon muon $lr 1; done
for seed in 1 2 3; do train short muon 16 $seed --max_steps=160 --val_interval=16; done # 40% of the steps
