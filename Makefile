# `make demo` and `make test` each suffice on a fresh Debian or Ubuntu with Python 3.11 to 3.13 and make.
PYTHON ?= python3
# On the package index, torch is a CUDA build of several gigabytes. For a small one, or one for your CUDA version:
# make TORCH="torch==2.13.0 --index-url URL", with the URL that pytorch.org/get-started shows.
TORCH ?= torch==2.13.0
# What `make gpu-check` runs engines with: gpu for TensorRT-RTX; gpu,tensorrt for data-centre GPUs.
GPU_EXTRAS ?= gpu
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed

.PHONY: demo test test-quick test-matrix test-models test-cpu-kinds lint fuzz soak bench bench-gpu accuracy memory full-size image-check gpu-check clean

demo: $(INSTALLED)
	$(BIN)/python examples/first_picture.py models/flux-tiny --out out/demo

# Four processes for two cores, each of one thread: some wait for servers, and for what others trace.
PYTEST := -m pytest --numprocesses 4 --dist worksteal
# Which lines run: SlipCover's probes cost little once they are hit, where a tracer would double the time.
COVERAGE := -m slipcover --source client,engines,export,triton_repo,trunk --json --out $(VENV)/coverage.json
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python $(COVERAGE) $(PYTEST) -m "not matrix" --ignore tests/models

# TensorRT-RTX compiles all networks in all precisions for GPUs of all kinds, and blocks of FLUX.1 in their real width.
test-matrix: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST) -m matrix

# What nobody needs who does not train: the scripts in models/, in miniature, and the pictures of what they trained.
test-models: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST) tests/models

# What needs no export, compiler or server: under two minutes.
test-quick: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST) -m "not slow" --ignore tests/models

# What computes floats, with the kernels of other CPUs: PyTorch and MKL without AVX; oneDNN without it; and MKL's for
# SSE4.2, where the order of sums depends on how numbers lie in memory, as on AMD's CPUs (MKL_CBWR keeps it from that).
CPU_KINDS := "ATEN_CPU_CAPABILITY=default MKL_CBWR=COMPATIBLE" "ONEDNN_MAX_CPU_ISA=SSE41" "MKL_ENABLE_INSTRUCTIONS=SSE4_2"
test-cpu-kinds: $(INSTALLED)
	for kind in $(CPU_KINDS); do \
		echo "$$kind"; \
		env $$kind OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST) \
			tests/client tests/export tests/engines tests/trunk tests/models tests/chain || exit 1; \
	done

lint: $(INSTALLED)
	rm -rf build  # what an earlier wheel was made of, and would go into this one
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/hadolint Dockerfile
	rm -rf $(VENV)/typed && $(BIN)/pip install --quiet --no-deps --target $(VENV)/typed .
	MYPYPATH=$(VENV)/typed $(BIN)/mypy -p ditforge
	for folder in benchmarks examples; do MYPYPATH=$(VENV)/typed:tests/support:models $(BIN)/mypy $$folder/*.py || exit 1; done

# 20,000 requests to a real server, of a seed that is printed: SEED=7 make fuzz sends the same ones again.
SEED ?= $(shell date +%s)
fuzz: $(INSTALLED)
	@echo "seed $(SEED)"
	FUZZ_REQUESTS=10000 $(BIN)/python -m pytest tests/chain/test_fuzz.py --timeout 3600 \
		--hypothesis-profile default --hypothesis-seed $(SEED)

# Three servers, 64 clients, two minutes; a model's process is killed every 10 s and a server every 20 s.
soak: $(INSTALLED)
	$(BIN)/python benchmarks/soak.py models/flux-tiny --out docs/soak.md

bench: $(INSTALLED)
	$(BIN)/python benchmarks/first_picture.py models/flux-tiny models/sd35-tiny --out benchmarks/first_picture.md

# On a machine with a GPU, about an hour and a half: steps of the models in STEPS at full size beside diffusers', pictures and
# faults of the small models, and whole pictures on cards of 24 to 8 GB. Random weights; 90 GB of disk and 64 GB of memory.
STEPS ?= flux.1-dev sd3.5-large
bench-gpu: $(INSTALLED)
	mkdir -p docs/benchmarks out
	$(BIN)/pip install --quiet --editable '.[all,test,bench]'
	rm -f docs/benchmarks/steps.json  # whose rows would not be measured again
	$(BIN)/python benchmarks/gpu_steps.py $(STEPS) --profile --out docs/benchmarks/steps.json
	$(BIN)/python benchmarks/gpu_chain.py reference models/flux-tiny models/sd35-tiny --out out/gpu-reference
	$(BIN)/python benchmarks/gpu_chain.py run models/flux-tiny models/sd35-tiny --reference out/gpu-reference \
		--out docs/benchmarks/pictures.json
	$(BIN)/python benchmarks/gpu_pipeline.py flux.1-dev --out docs/benchmarks/pipeline.json

accuracy: $(INSTALLED)
	$(BIN)/python benchmarks/accuracy.py models/flux-tiny models/sd35-tiny --out docs/accuracy.md

memory: $(INSTALLED)
	$(BIN)/python benchmarks/memory.py --out docs/memory.md

# An hour on two cores, and 60 GB of disk; `apt install time` where /usr/bin/time is missing.
full-size: $(INSTALLED)
	$(BIN)/python benchmarks/full_size.py --out docs/full-size.md

# What the Dockerfile installs, in a bare virtual environment, and what it then runs, as far as that needs no GPU.
image-check:
	rm -rf out/image && mkdir -p out/image
	PYTHON="$(PYTHON)" TORCH="$(TORCH)" scripts/install out/image/venv
	cd out/image && venv/bin/ditforge doctor
	cd out/image && venv/bin/ditforge export ../../models/flux-tiny --precision fp8-weights --out onnx
	cd out/image && venv/bin/ditforge build onnx --gpu rtx4090 --out engines
	cd out/image && venv/bin/ditforge repo engines --out repo
	rm -rf out/image

gpu-check: $(INSTALLED)
	$(BIN)/pip install --quiet --editable '.[all,test,$(GPU_EXTRAS)]'
	$(BIN)/python examples/gpu_check.py models/flux-tiny --out out/gpu-check

$(INSTALLED): pyproject.toml setup.py Makefile
	$(PYTHON) -m venv $(VENV) || { echo "fix:   apt install python3-venv"; exit 1; }
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet --editable '.[all,test]'
	touch $@

clean:
	rm -rf $(VENV) out build *.egg-info
