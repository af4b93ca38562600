# Every target sets up what it needs: a virtual environment in .venv, pinned by constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# -P keeps the repository's own folders off the path: transformers probes for a package named "kernels".
PY := $(BIN)/python -P
READY := $(VENV)/.ready

.PHONY: demo test test-long lint format bench eval train-bundled wheel clean

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt "torch==$$(sed -n 's/^torch==//p' constraints.txt)"
	$(BIN)/pip install -q -c constraints.txt -e ".[dev,offline,pdf,triton,langchain,llamaindex,haystack,files]"
	touch $@

demo: $(READY)
	$(BIN)/ragkv demo

test: $(READY)
	$(BIN)/pytest -q

test-long: $(READY)
	$(BIN)/pytest -q -m long

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(READY)
	$(PY) benchmarks/ttft.py --json benchmarks/results/ttft-cpu.json

SWEPT := $(foreach share,0.05 0.2 0.3,sensitive-tokens:ratio=$(share)@document cache-blend:ratio=$(share)@document)

# Gates, rows, table and build/eval/report.html; stopped and started again, it goes on where it was.
eval: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/ragkv eval --out build/eval --limit 144 --jobs 2 --budgets 0.1 --max-new-tokens 16 \
	  --arms default $(SWEPT)

# Under three hours on two cores that compute in bf16; stop and start it at will.
train-bundled: $(READY)
	$(BIN)/python -m training.tokenizer
	$(BIN)/python -m training.train
	$(BIN)/python -m training.export

wheel: $(READY)
	$(BIN)/python -m build -q --outdir dist

clean:
	rm -rf $(VENV) build dist *.egg-info
