# Every target sets up what it needs: a virtual environment in .venv, pinned by constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# -P keeps the repository's own folders off the path: transformers probes for a package named "kernels".
PY := $(BIN)/python -P
READY := $(VENV)/.ready

.PHONY: demo test test-long lint format bench eval train-bundled docs wheel typing clean

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'ragkv needs Python 3.11 or newer: make PYTHON=python3.12 ...')"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt "torch==$$(sed -n 's/^torch==//p' constraints.txt)"
	$(BIN)/pip install -q -c constraints.txt -e ".[dev,offline,pdf,triton,langchain,llamaindex,haystack,files]"
	touch $@

# make demo MODEL=path: the same with a model of your own; DTYPE=float32 where the CPU does not compute in 16 bits.
demo: $(READY)
	$(BIN)/ragkv demo $(if $(MODEL),--model "$(MODEL)") $(if $(DTYPE),--dtype $(DTYPE))

test: $(READY)
	PYTHONDONTWRITEBYTECODE= $(BIN)/pytest -q -n 2 --dist loadfile --no-loadscope-reorder

# A cluster is heavy: only long tests start one, and type checkers look at its types. Mooncake's store also needs libibverbs1.
$(VENV)/.long: $(READY)
	$(BIN)/pip install -q -c constraints.txt -e ".[ray,mooncake]"
	touch $@

test-long: $(VENV)/.long
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

# The bundled model knows of a passage what its document says, and its method keeps that.
SWEPT := relevant-tokens:ratio=0.1,keep_document=true@document \
  $(foreach share,0.05 0.1 0.2 0.3,sensitive-tokens:ratio=$(share),keep_document=true@document cache-blend:ratio=$(share)@document)

# Gates, rows, table and build/eval/report.html; stopped and started again, it goes on where it was.
eval: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/ragkv eval --out build/eval --limit 144 --jobs 2 --budgets 0.1 --max-new-tokens 16 \
	  --arms default $(SWEPT)

# Under three hours on two cores that compute in bf16; stop and start it at will.
train-bundled: $(READY)
	$(BIN)/python -m training.tokenizer
	$(BIN)/python -m training.train
	$(BIN)/python -m training.export

# Where the pages' own tools are: what the library is tested with does not need them.
$(VENV)/.docs: $(READY)
	$(BIN)/pip install -q -c constraints.txt -e ".[docs]"
	touch $@

# Pages in build/site; a broken link or a docstring that cannot be read ends it.
docs: $(VENV)/.docs
	rm -rf build/lib build/api build/pages
	$(PY) -m pip install -q --no-deps --no-build-isolation --target build/api .
	mkdir -p build/pages/benchmarks
	cp -r *.md docs examples build/pages
	cp -r benchmarks/results build/pages/benchmarks
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build -q --strict -f docs/site/mkdocs.yml

$(VENV)/.release: $(READY)
	$(BIN)/pip install -q -c constraints.txt -e ".[release]"
	touch $@

wheel: $(VENV)/.release
	rm -rf build/lib build/bdist.* dist
	$(PY) -m build -q --outdir dist
	$(PY) -m twine check --strict dist/*
	$(PY) -m check_wheel_contents dist/*.whl

# The public face of the wheel, installed by itself beside the dependencies, where the sources are not found.
INSTALLED := build/installed
PURELIB := "import sysconfig; print(sysconfig.get_path('purelib'))"
# Types that torch, transformers and others leave unknown are theirs (--ignoreexternal): with them it is 71 %.
COMPLETE := "import json, sys; of = json.load(open(sys.argv[1]))['typeCompleteness']['completenessScore']; \
  print(f'{of:.1%} of the public symbols are fully typed'); sys.exit(of < 0.995)"

typing: wheel $(VENV)/.long
	$(PY) -m venv --clear --without-pip $(INSTALLED)
	$(PY) -m pip --python $(INSTALLED)/bin/python install -q --no-deps dist/*.whl
	$(PY) -c $(PURELIB) > $$($(INSTALLED)/bin/python -c $(PURELIB))/dependencies.pth
	cp tests/typed/face.py $(INSTALLED)
	echo '{"typeCheckingMode": "strict", "include": ["face.py"]}' > $(INSTALLED)/pyrightconfig.json
	cd $(INSTALLED) && bin/ragkv --help > help.txt
	cd $(INSTALLED) && $(CURDIR)/$(PY) -m mypy --strict --config-file= --python-executable bin/python face.py
	cd $(INSTALLED) && $(CURDIR)/$(PY) -m pyright -p . --pythonpath bin/python
	cd $(INSTALLED) && PATH=$(CURDIR)/$(INSTALLED)/bin:$$PATH $(CURDIR)/$(PY) -m pyright --ignoreexternal --outputjson --verifytypes ragkv > types.json || true
	$(PY) -c $(COMPLETE) $(INSTALLED)/types.json

clean:
	rm -rf $(VENV) build dist *.egg-info
