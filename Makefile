# Every target makes .venv and installs what it needs; a machine needs only Python 3.11 or later and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PROTOS := $(wildcard proto/steepest/v1/*.proto)

define generate
PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m grpc_tools.protoc -I proto \
	--python_out=$(1) --grpc_python_out=$(1) --mypy_out=quiet:$(1) $(PROTOS)
endef

TWO := -n 2 --dist loadfile --no-loadscope-reorder  # at once
.PHONY: reference help demo gallery test test-full test-core coverage check format proto bench bench-full clean

help:  ## what there is
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

$(INSTALLED): constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"Python 3.11 or later is needed; {sys.executable} is {sys.version.split()[0]}; use make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[server,examples,dev]'
	@# It asks for torchvision, of which it uses nothing here, and whose wheels are for a torch with CUDA.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --constraint constraints.txt \
		curvlinops-for-pytorch backpack-for-pytorch einconv einops linear_operator opt_einsum unfoldNd
	@touch $@

demo: $(INSTALLED)  ## train the digits through a service of its own
	PATH="$(CURDIR)/$(BIN):$$PATH" sh examples/demo.sh

gallery: $(INSTALLED)  ## run what docs/gallery.md shows, and rebuild the page (five minutes)
	$(BIN)/python examples/gallery/make.py

test: $(INSTALLED)  ## the tests, without those that repeat others at more placements or run for long
	$(BIN)/python -m pytest -m "not full" $(TWO) --durations 10

test-full: $(INSTALLED)  ## all tests
	$(BIN)/python -m pytest $(TWO) --durations 10

test-core: $(INSTALLED)  ## the pure part: no Ray, no gRPC
	$(BIN)/python -m pytest -m "not cluster" tests/ps tests/worker tests/services tests/steepest

coverage: $(INSTALLED)  ## lines of the pure rooms that the pure tests run; fails below 90 %
	$(BIN)/python -m pytest -m "not cluster" tests/ps tests/worker --cov=ps --cov=worker --cov-report=
	$(BIN)/coverage report --fail-under=90 --include='ps/parameters/*,ps/memory/*,ps/numerics/*,ps/compression/*,ps/step/*,ps/checkpoint/*,ps/job/*,worker/task/*,worker/data/*,worker/gradients/*'

check: $(INSTALLED)  ## lint, types, import contracts, proto
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	@! wc -l $$(find ps worker services steepest harness tests benchmarks -name '*.py' -not -path '*/v1/*') | awk '$$2 != "total" && $$1 > 400 {print $$2 " has more than 400 lines"}' | grep .
	cd proto && ../$(BIN)/buf lint
	$(BIN)/python -m steepest.cli.reference --check
	@rm -rf build/stubs && mkdir -p build/stubs
	@$(call generate,build/stubs)
	@for f in build/stubs/steepest/v1/*; do cmp "$$f" "steepest/v1/$${f##*/}" || { echo "stubs differ: run make proto"; exit 1; }; done

format: $(INSTALLED)  ## lay the code out
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

reference: $(INSTALLED)  ## write the descriptions of the spec's fields to docs/jobs.md and the .proto file
	$(BIN)/python -m steepest.cli.reference

proto: $(INSTALLED)  ## generate steepest/v1 from proto/
	$(call generate,.)

bench: $(INSTALLED)  ## the server against memory bandwidth; step time against PyTorch DDP and a plain loop
	$(BIN)/python -m benchmarks.server_kernel
	$(BIN)/python -m benchmarks.step_time

bench-full: bench  ## all benchmarks (an hour; those between hosts need root and iproute2)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[server,examples,dev,benchmarks]'
	$(BIN)/python -m benchmarks.step_time --workers 2 --against zero ray --json benchmarks/results/step_time_peers.json
	$(BIN)/python -m benchmarks.telemetry
	$(BIN)/python -m benchmarks.checkpoint
	$(BIN)/python -m benchmarks.memory
	$(BIN)/python -m benchmarks.scaling
	$(BIN)/python -m benchmarks.accuracy
	$(BIN)/python -m benchmarks.network
	$(BIN)/python -m benchmarks.compression
	$(BIN)/python -m benchmarks.overlap
	$(BIN)/python -m benchmarks.plots

clean:  ## remove what make made
	rm -rf $(VENV) build *.egg-info
