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

.PHONY: demo puzzles reproduce-small ablations test test-every lint docs bench
INSTALLED = $(VENV)/.adadepth-installed

$(INSTALLED): pyproject.toml $(CONSTRAINTS)
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(INSTALL) -e '.[dev]'
	touch $@

# make demo QUICK=1 SEED=1 POLICY=survival UPDATE=ponder TEXT='a.txt b.txt' OUT=somewhere
FLAGS = $(if $(QUICK),--quick) $(if $(SEED),--seed $(SEED)) $(if $(POLICY),--policy $(POLICY)) \
	$(if $(UPDATE),--update $(UPDATE)) $(if $(TEXT),--text $(TEXT)) $(if $(OUT),--out $(OUT))

demo: $(INSTALLED)  ## train small adaptive models on real text and show what came of it
	$(RUN) -m examples.demo $(FLAGS) $(ARGS)

# make puzzles QUICK=1 SEEDS='0 1' OUT=somewhere ARGS='--sizes 4'
puzzles: $(INSTALLED)  ## tiny recursive models that halt for each Sudoku, against fixed numbers of segments
	$(RUN) -m examples.puzzles $(if $(QUICK),--quick) $(if $(SEEDS),--seeds $(SEEDS)) $(if $(OUT),--out $(OUT)) $(ARGS)

# make reproduce-small QUICK=1 SEEDS='0 1' TEXT='a.txt b.txt' OUT=somewhere ARGS='train.steps=4800'
SWEEP = $(if $(QUICK),--quick) $(if $(SEEDS),--seeds $(SEEDS)) $(if $(TEXT),--text $(TEXT)) $(if $(OUT),--out $(OUT)) $(ARGS)

reproduce-small: $(INSTALLED)  ## fixed, adaptive and plain models on the same text, three seeds, in one table
	$(RUN) -m examples.adaponderlm.sweep small.yaml $(SWEEP)

ablations: $(INSTALLED)  ## the gates' recipe with one thing changed at a time
	$(RUN) -m examples.adaponderlm.sweep ablation.yaml $(SWEEP)

# A file of tests stays in one process; tests/conftest.py puts the longest first. Each takes up to 2 GB.
WORKERS ?= 2
PYTEST = $(RUN) -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder

# These reach every function whose shapes are annotated; tests marked `plain` cannot run with the hook.
SHAPES = contracts.py criteria.py diagnostics.py flops.py foreign_blocks.py gates.py hf_scoring.py losses.py masks.py \
	ponder.py rooms.py viz.py block_kwargs.py::test_gates_and_updates_know_where_a_token_stands \
	budget.py::test_hard_exits_by_hand hf.py::test_hidden_states_by_their_numbers \
	hf.py::test_several_texts_in_a_row_are_rows_of_their_own \
	hf_generate.py::test_a_cache_is_cropped_reordered_and_forgotten loop.py::test_packed_equals_dense_in_float32 \
	ranks.py::test_without_ranks_they_change_nothing \
	ranks.py::test_anchor_gives_what_was_not_reached_a_gradient_of_0 \
	self_check.py::test_check_looped_takes_the_call_as_it_will_be \
	$(addprefix serving.py::test_each_request_is_one_full_forward_over_it,[attention] [encoder] [iteration] [view]) \
	serving.py::test_a_token_that_is_no_number_reaches_no_other \
	serving.py::test_a_block_is_given_its_kwargs_and_knows_its_row \
	serving.py::test_rows_without_tokens_begin_nothing \
	serving.py::test_a_request_may_be_given_up_at_any_time

# All run as a user runs them; then some once more with jaxtyping's hook, which checks shapes and slows every call.
test: $(INSTALLED)  ## everything that CI runs
	$(MAKE) lint
	$(PYTEST) -m "not every"
	$(PYTEST) -m "not plain and not every" --jaxtyping-packages=adadepth,beartype.beartype $(SHAPES:%=tests/test_%)

test-every: $(INSTALLED)  ## what test leaves out: more cases of the same kinds
	$(PYTEST) --dist load -m every

lint: $(INSTALLED)  ## ruff and mypy
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

docs: $(INSTALLED)  ## build the documentation into site/
	$(INSTALL) -e '.[docs]'
	$(RUN) -m mkdocs build --strict

bench: $(INSTALLED)  ## all benchmarks, into benchmarks/RESULTS.md
	for b in skip overhead ponder decode single serving drafts; do $(RUN) -m benchmarks.$$b || exit 1; done
