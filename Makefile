# Targets; `make` alone prints them. Everything is installed into the active Python environment, once.
PYTHON ?= python3
# the stamps are inside the environment, so a new environment gets a new installation
PREFIX := $(shell $(PYTHON) -c 'import sys; print(sys.prefix)')
RUN_STAMP := $(PREFIX)/.gpt2-requirements
DEV_STAMP := $(PREFIX)/.gpt2-requirements-dev
# pip, or uv for an environment that uv made, without pip; a torch that is there already is kept
INSTALL = $(shell $(PYTHON) -c 'import sys; from importlib.util import find_spec as has; \
	print("$(PYTHON) -m pip install" if has("pip") else f"uv pip install --python={sys.executable}", \
	*([] if has("torch") else ["-c constraints.txt"]))')

.PHONY: help install vocabulary python4k demo prepare prepare-small test lint bench gpu gpu-data doctor compare experiment-norm figures rehearse

help:  ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-16s%s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(RUN_STAMP): pyproject.toml
	$(INSTALL) .
	touch $@

$(DEV_STAMP): pyproject.toml constraints.txt
	$(INSTALL) '.[dev]'
	touch $@

install: vocabulary  ## install what running needs, and fetch GPT-2's vocabulary

vocabulary: $(RUN_STAMP)  # where only the package index can be reached: openai-whisper's source has the same file
	$(PYTHON) bpe.py || { set -e; file=$$($(PYTHON) -c 'import bpe; print(bpe.cache_file())'); mkdir -p "$${file%/*}"; \
	$(PYTHON) -m pip download -q --no-deps --no-binary=openai-whisper -d "$$file.pip" openai-whisper==20250625; \
	tar -xzOf "$$file.pip"/*.tar.gz openai_whisper-20250625/whisper/assets/gpt2.tiktoken > "$$file"; \
	rm -r "$$file.pip"; $(PYTHON) bpe.py; }

python4k: $(RUN_STAMP)  # the data of demo and experiment-norm
	@echo 'Ctrl-C stops this at any time. The same make command continues.'
	$(PYTHON) train_bpe.py --dataset=python --vocab_size=4096 --val_fraction=0.05 --out=python4k.tiktoken
	$(PYTHON) fineweb.py --dataset=python --tokenizer=python4k.tiktoken --data_dir=python4k --val_fraction=0.05

demo: python4k  ## train a small GPT-2 on Python's standard library, in minutes; again = continue
	$(PYTHON) train_gpt2.py config/demo_cpu.py --resume
	$(PYTHON) generate.py --checkpoint=log_demo:best --prompt="    def read(self" --temperature=0.7 --num_samples=2 \
		--max_new_tokens=110
	$(PYTHON) plot_log.py --log_dir=log_demo
	@echo
	@echo 'next: python generate.py --checkpoint=log_demo:best --interactive'

prepare: install  ## build the FineWeb-Edu shards (10B tokens, 20 GB) that train_gpt2.py reads by default
	$(PYTHON) fineweb.py

prepare-small: install  ## the 25M tokens of it that config/rtx4050_15m.py needs: downloads about 100 MB
	$(PYTHON) fineweb.py --max_tokens=25e6 --data_dir=edu_fineweb25M

lint: $(DEV_STAMP)  ## check the style
	$(PYTHON) -m ruff check .

test: $(DEV_STAMP) vocabulary lint  ## install what tests need and run all tests
	$(PYTHON) -m pytest -n 3 --dist loadfile --no-loadscope-reorder --max-worker-restart=1

bench: install $(DEV_STAMP)  ## speeds beside their baselines, on Python's source; RESULTS.md has more flags
	$(PYTHON) bench.py

MINUTES ?= 6
GPU_DATA ?= gpu_data
SHARED ?= $(GPT2_SHARED_DATA)
gpu:  ## what needs a CUDA GPU, in MINUTES=6, with the inputs in GPU_DATA; again = the missing steps; installs nothing
	$(PYTHON) gpu.py --minutes=$(MINUTES) --data=$(GPU_DATA)

gpu-data: install  ## build what `make gpu` reads, 57 MiB: SHARED has openstax/, shakespeare/, hellaswag/, tokenizer/
	$(PYTHON) fineweb.py --input=$(SHARED)/shakespeare/input.txt --data_dir=$(GPU_DATA)/shakespeare
	$(PYTHON) fineweb.py --input=$(SHARED)/openstax/openstax.parquet --data_dir=$(GPU_DATA)/openstax4m \
		--max_tokens=43e5 --val_fraction=.07
	$(PYTHON) fineweb.py --input=$(SHARED)/openstax/openstax.parquet --data_dir=$(GPU_DATA)/openstax
	mkdir -p $(GPU_DATA)/tokenizer
	cp $(SHARED)/hellaswag/hellaswag_val.jsonl $(GPU_DATA)
	cp $(SHARED)/tokenizer/gpt2.tiktoken $(GPU_DATA)/tokenizer/0ea1e91bbb3a60f729a8dc8f777fd2fc07cd8df4

experiment-norm: python4k  ## Pre-LN against Post-LN: 30 short runs, an hour or less; again = continue
	PATH="$$(dirname "$$(command -v $(PYTHON))"):$$PATH" sh experiments/norm.sh
	$(PYTHON) experiments/plot.py norm

figures: $(RUN_STAMP)  ## redraw the figures of RESULTS.md from the logs in results/
	$(PYTHON) experiments/demo.py
	$(PYTHON) experiments/published.py
	set -e; for study in norm optimizers vocabularies; do $(PYTHON) experiments/plot.py $$study --redraw; done

rehearse: $(DEV_STAMP) vocabulary  ## runs C, D and E with a tiny model on a CPU, 5 to 7 minutes: download, kill, restart, figures
	$(PYTHON) experiments/rehearse.py

NPROC ?= $(shell $(PYTHON) -c 'import torch; print(max(1, torch.cuda.device_count()))')
doctor: $(RUN_STAMP)  ## check GPUs, network and folders before a long run; NPROC=8 processes
	$(PYTHON) -m torch.distributed.run --standalone --nproc_per_node=$(NPROC) doctor.py

REF ?= reference/demo_cpu.json
RUN ?= log_demo
compare: $(RUN_STAMP)  ## a run beside a reference: RUN=log_demo REF=reference/demo_cpu.json; draws RUN/comparison.png
	$(PYTHON) plot_log.py --log_dir=$(RUN) --ref=$(REF)
