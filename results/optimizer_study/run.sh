#!/bin/sh
# AdamW against Muon, and cosine against wsd: about an hour on one core that does nothing else. From the root:
#     python train_bpe.py --input=openstax.parquet --vocab_size=4096 --out=openstax4k.tiktoken
#     python fineweb.py --input=openstax.parquet --tokenizer=openstax4k.tiktoken --data_dir=openstax4k
#     sh results/optimizer_study/run.sh
# Run again, it goes on: what is finished is only judged once more. Keeps streams.txt, "run step stream value",
# of which study.py makes the table and the figure.
set -e
export OMP_NUM_THREADS=1
logs=log_optimizer_study
streams=results/optimizer_study/streams.txt

train() { # log folder, optimizer, thousandths of max_lr (min_lr is a tenth of it), seed, further flags
    folder=$logs/$1 optimizer=$2 lr=$3 seed=$4
    shift 4
    python train_gpt2.py config/openstax_cpu.py --device=cpu --dtype=bfloat16 --resume --log_dir=$folder \
        --optimizer=$optimizer --max_lr=${lr}e-3 --min_lr=${lr}e-4 --seed=$seed "$@"
}

for lr in 2 4 8 16; do # the grid
    train adamw_${lr}e-3_s1 adamw $lr 1
    train muon_${lr}e-3_s1 muon $lr 1
done
train muon_32e-3_s1 muon 32 1 # Muon's best was the last
for seed in 2 3; do # the best of each
    train adamw_4e-3_s$seed adamw 4 $seed
    train muon_16e-3_s$seed muon 16 $seed
done
for seed in 1 2 3; do # a shorter schedule
    train muon40_16e-3_s$seed muon 16 $seed --max_steps=320
done
train muon60_16e-3_s1 muon 16 1 --max_steps=480
train wsd_16e-3_s1 muon 16 1 --schedule=wsd
for log in $logs/*_s?/log.txt; do
    awk -v run=$(basename $(dirname $log)) '$2 == "val" { print run, $0 }' $log
done > $streams

for turn in 1 2 3; do # the clock: AdamW and Muon take turns, and the fastest step of each counts
    for optimizer in adamw muon; do
        folder=timing_${optimizer}_$turn
        train $folder $optimizer 4 1 --max_steps=50 --warmup_steps=10 --val_interval=0 --val_tokens=128
        awk -v run=${optimizer}_4e-3_s1 '$2 == "tok_s" && $3 > best { best = $3 }
            END { print run, 50, "ms", 4096000 / best }' $logs/$folder/log.txt >> $streams
    done
done
python results/optimizer_study/study.py
