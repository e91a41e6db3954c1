#!/bin/sh
# Pre-LN against Post-LN, from GPT-2's initial weights and from Xavier's: 30 runs of 1,000 steps, 45 minutes
# of one idle core (computed from 90 s a run).
#     make experiment-norm                                     # the data too, and the figure
#     FLAGS="--max_steps=20 --warmup_steps=2" LOGS=log_try sh experiments/norm.sh   # flags for every run
# Run it again after a stop: it continues, and finished runs end in seconds. A run that diverges ends with an
# error; that is a result.
trap 'exit 1' INT TERM
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
logs=${LOGS:-log_norm}

train() { # seed, steps of warm-up, max_lr in units of 1e-4, norm_position, initial weights
    run=$logs/${4}_${5}_lr${3}e-4_w${2}_s$1
    echo "== $(date +%H:%M) $run"
    init=
    if [ "$5" = xavier ]; then
        init=$logs/${4}_xavier_s$1.pt
        test -e "$init" ||
            python experiments/xavier.py --norm_position="$4" --seed="$1" --out="$init" || exit 1
    fi
    python train_gpt2.py config/norm_cpu.py --resume --log_dir="$run" --norm_position="$4" \
        --init_from="$init" --max_lr="${3}e-4" --min_lr="${3}e-5" \
        --warmup_steps="$2" --seed="$1" $FLAGS > "$run.txt" 2>&1
    tail -n 4 "$run.txt"
}

mkdir -p "$logs"
for weights in gpt2 xavier; do
    for norm in pre post; do # three rates without warm-up, two with
        for lr in 20 5 80; do train 1 0 $lr $norm $weights; done
        for lr in 20 80; do train 1 200 $lr $norm $weights; done
    done
    for lr in 160 320; do train 1 200 $lr pre $weights; done # beyond Pre-LN's optimum
    train 1 200 5 post $weights # below Post-LN's
    for warmup in 0 200; do train 2 $warmup 20 post $weights; done # is it stuck with another seed, too?
done
