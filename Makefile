# `make demo` and `make test` need only Python, pip and make.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DOCS_VENV := $(VENV)/docs
# The models are small, so one core for each test is faster than all cores for one test.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4
# In the order of the files: by default files with few tests come last, and the few tests of test_export.py take longest.
BY_FILE := --dist loadfile --no-loadscope-reorder --durations 15
# the oldest timm that pyproject.toml allows
OLDEST_TIMM := $(shell sed -n 's/^ *"timm>=\([0-9.]*\)".*/\1/p' pyproject.toml)
OLDEST_TESTS := faithful method similarity eva taps short_block levit every_vit timm_api errors hub convert
# versions for `make tests-torch` and `make release-check`: a release such as 2.8.0, or the newest that works with the other
TORCH ?= newest
TIMM ?= newest
TORCH_VENV := $(VENV)/torch-$(TORCH)-timm-$(TIMM)
# a requirement for pip: name of the package, release
pin = $1$(addprefix ==,$(filter-out newest,$2))
# models for timm's own tests in `make timm-suite`, and in `make test`
MODELS ?= evo_* aimv2_* beit3_* deit* eva_* eva02_* flexivit_* levit_128s levit_128 levit_192 levit_256 levit_384 test_vit* vit_*
FEW_MODELS := evo_test_vit evo_test_vit2 evo_test_vit3 evo_vit_xsmall_patch16_clip_224 evo_vit_tiny_r_s16_p8_224 \
	evo_eva02_tiny_patch14_224 evo_deit3_small_patch16_224 evo_deit_tiny_patch16_224 \
	evo_deit_tiny_distilled_patch16_224 evo_levit_128s evo_levit_cls_128s

.PHONY: demo docs test lint tests tests-slow tests-oldest-timm tests-torch release-check timm-suite few-of-timm-suite clean

demo: $(VENV)/ready-for-demo
	$(BIN)/python examples/digits.py

# The documentation as a site in site/. A broken link is an error.
docs: $(DOCS_VENV)/ready
	$(DOCS_VENV)/bin/mkdocs build --strict

test: lint tests tests-oldest-timm few-of-timm-suite

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

tests: $(VENV)/ready
	$(PYTEST) $(BY_FILE) tests

# A dry run of a release in its own environment: build, check, install, use as in the README, uninstall.
release-check: $(VENV)/ready
	OMP_NUM_THREADS=1 $(BIN)/python tests/release_check.py --python $(PYTHON) --torch $(TORCH) --timm $(TIMM)

# The tests that `make tests` leaves out, mainly of compiled blocks with sharded weights.
tests-slow: $(VENV)/ready
	$(BIN)/python -m pytest tests -m slow

# The tests with the oldest timm. Tests that need their own process or the newest timm are left out, and so are tests that
# hardly depend on timm.
tests-oldest-timm: $(VENV)/timm-$(OLDEST_TIMM)
	PYTHONPATH=$< $(PYTEST) $(BY_FILE) -k 'not compile and not threads' $(OLDEST_TESTS:%=tests/test_%.py)

# All tests that another torch and another timm can run, in their own environment of about 7 GB.
tests-torch: BIN := $(TORCH_VENV)/bin
tests-torch: $(TORCH_VENV)/ready
	$(PYTEST) $(BY_FILE) tests

few-of-timm-suite: MODELS := $(FEW_MODELS)
few-of-timm-suite: SUITE := $(PYTEST)
# All evolved models and their dense twins, one at a time: the large ones need too much memory for two, and much time.
timm-suite: SUITE := $(BIN)/python -m pytest
timm-suite few-of-timm-suite: $(VENV)/timm-suite
	HF_HUB_OFFLINE=1 TIMEOUT=3600 PYTHONPATH=tests $(SUITE) -q -W ignore -p timm_suite \
		--timm-models $(foreach model,$(MODELS),'$(model)') -- $</tests/test_models.py

# An environment whose pip has --group. pip has it from 25.1 on, and a Python before 3.14 may install an older pip.
%/new-pip:
	$(PYTHON) -m venv $*
	$*/bin/python -m pip install --quiet 'pip>=25.1'
	touch $@

$(VENV)/ready: pyproject.toml | $(VENV)/new-pip
	$(BIN)/python -m pip install --quiet --editable . --group test
	touch $@

# Without the dependencies of the tests, which take minutes to install.
$(VENV)/ready-for-demo: pyproject.toml | $(VENV)/new-pip
	$(BIN)/python -m pip install --quiet --editable . --group demo
	touch $@

# Its own environment without this package: mkdocstrings reads the sources and imports neither torch nor timm.
$(DOCS_VENV)/ready: pyproject.toml | $(DOCS_VENV)/new-pip
	$(DOCS_VENV)/bin/python -m pip install --quiet --group docs
	touch $@

$(VENV)/timm-$(OLDEST_TIMM): $(VENV)/ready
	$(BIN)/python -m pip install --quiet --no-deps --target $@ timm==$(OLDEST_TIMM)
	touch $@

# One call, so that pip finds the torchvision for this torch.
$(TORCH_VENV)/ready: pyproject.toml | $(TORCH_VENV)/new-pip
	$(@D)/bin/python -m pip install --quiet $(call pin,torch,$(TORCH)) torchvision $(call pin,timm,$(TIMM)) \
		--editable . --group test
	# torchao does not declare which torch it needs, and peft and transformers fail with a torchao for another torch
	$(@D)/bin/python -c 'import torchao.quantization' || $(@D)/bin/python -m pip uninstall --quiet --yes torchao
	touch $@

# timm's tests are in its source distribution, not in its wheel.
$(VENV)/timm-suite: $(VENV)/ready
	rm -rf $@ $@.part && mkdir $@.part
	$(BIN)/python -m pip download --quiet --no-deps --no-binary timm --dest $@.part \
		timm==$$($(BIN)/python -c 'import timm; print(timm.__version__)')
	tar -xzf $@.part/timm-*.tar.gz -C $@.part --strip-components 1
	mv $@.part $@

clean:
	rm -rf $(VENV) build dist site *.egg-info
