#!/bin/sh
# Four vocabularies at equal training FLOPs, by bits per byte of the same text: 8 runs, 70 minutes of one core.
#     sh experiments/vocabularies.sh                           # needs openstax.parquet
# Run it again after a stop: it continues, and finished runs end in seconds. FLAGS goes to every run.
# The numbers of steps make the training FLOPs (GPT.flops_per_token times tokens) equal to those of 400 steps
# with 4,096 ids. Which documents are val depends on their text alone, and val loss is on all of val.
set -e
trap 'exit 1' INT TERM
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
logs=${LOGS:-log_vocabularies}
mkdir -p "$logs"

for k in 1 4 16; do
    python train_bpe.py --input=openstax.parquet --vocab_size=$((1024 * k)) --val_fraction=0 \
        --out=openstax${k}k.tiktoken
done
for k in 1 4 16 50; do
    tokenizer=openstax${k}k.tiktoken
    test $k = 50 && tokenizer=gpt2
    test -e openstax${k}k/manifest.json ||
        python fineweb.py --input=openstax.parquet --tokenizer=$tokenizer --data_dir=openstax${k}k
done

train() { # seed, thousands of ids, steps
    run=$logs/vocab${2}k_s$1
    echo "== $(date +%H:%M) $run"
    python train_gpt2.py config/openstax_cpu.py --resume --log_dir="$run" --data_dir=openstax${2}k \
        --seed="$1" --max_steps="$3" --warmup_steps=$(($3 / 8)) \
        --val_interval=$((($3 + 4) / 5)) --val_tokens=1e9 $FLAGS \
        > "$run.txt" 2>&1 || { cat "$run.txt"; exit 1; }
    tail -n 3 "$run.txt"
}

for seed in 1 2; do
    train $seed 1 549
    train $seed 4 400
    train $seed 16 192
    train $seed 50 79
done
