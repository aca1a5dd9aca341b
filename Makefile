# `make demo` and `make test` each set up what they need, from a fresh clone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Two workers.
TWICE := --numprocesses 2
PIP := $(BIN)/python -m pip --disable-pip-version-check

# What importing FlashInfer takes, to test the calls of it; what running it takes is gigabytes and a GPU.
FLASHINFER := flashinfer-python apache-tvm-ffi nvidia-ml-py

.PHONY: demo lab test quick test-all test-ascend test-hosts docs fuzz bench lint clean

demo: $(VENV)/demo
	$(BIN)/python examples/wan_long_video.py

# Whether videos four times as long as a model was trained on stay alive, dense and sparse, in two minutes; docs/quality.md.
lab: $(VENV)/lab
	$(BIN)/python examples/quality_lab/run.py --quick

test: $(VENV)/test lint
	$(BIN)/python -m pytest $(TWICE)

# What can be tested in a few minutes: no pipelines, no other processes, no lab, no generated code.
quick: $(VENV)/test
	$(BIN)/python -m pytest $(TWICE) -m 'not slow and not pipeline and not process and not lab and not inductor'

# The slow gates beside: slow tests, the Triton kernel for every part, and the GPU benchmark's own code, on the CPU, the quality lab;
# some fifteen minutes more.
test-all: test
	$(BIN)/python -m pytest $(TWICE) -m slow
	$(BIN)/lvsa kernels
	$(BIN)/python benchmarks/gpu.py --device cpu --quick --rounds 2 --layers 1
	$(MAKE) lab
	$(MAKE) docs

# The lowerings for Ascend NPUs with the real torch_npu, over libraries of CANN that do nothing; in an environment of its own, since
# torch_npu without CANN keeps torch from being imported.
ASCEND := .venv-ascend
test-ascend: $(ASCEND)/ready
	@if [ -d $(ASCEND)/cann ]; then \
	LD_LIBRARY_PATH=$(CURDIR)/$(ASCEND)/cann TORCH_DEVICE_BACKEND_AUTOLOAD=0 LVSA_TORCH_NPU_WHEELS=$(CURDIR)/$(ASCEND)/wheels \
	$(ASCEND)/bin/python -m pytest $(TWICE) tests/ascend; \
	else echo 'skipped: torch_npu cannot be had here'; fi

# Hosts' own packages over two videos each, in an environment of its own and in a process each: they pin other versions, of which none is
# installed with them, and set up process groups.
HOSTS := .venv-hosts
test-hosts: $(HOSTS)/ready
	@for file in tests/hosts/test_*.py; do $(HOSTS)/bin/python -m pytest $$file || exit 1; done

# The documents as a site in out/site; a link that leads nowhere is an error.
docs: $(VENV)/docs
	$(BIN)/mkdocs build --quiet

# Random video DiTs against ground truth, as many as FUZZ says.
FUZZ ?= 500
fuzz: $(VENV)/test
	FUZZ=$(FUZZ) $(BIN)/python -m pytest -s tests/test_fuzz.py tests/test_masks.py tests/test_second_size.py -k "random or written_to or twenty_four"

# How fast it is here, beside its peers; half an hour on a quiet machine of two cores.
bench: $(VENV)/test
	$(BIN)/lvsa bench

lint: $(VENV)/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# torch first and pinned: any looser request may fetch gigabytes for a device that is not there.
$(VENV)/torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet torch==$$(sed -n 's/^torch==//p' constraints.txt)
	touch $@

$(VENV)/demo: $(VENV)/torch pyproject.toml
	$(PIP) install --quiet --constraint constraints.txt --editable '.[demo]'
	touch $@

$(VENV)/lab: $(VENV)/torch pyproject.toml
	$(PIP) install --quiet --constraint constraints.txt --editable '.[demo,vqeval]'
	touch $@

$(VENV)/test: $(VENV)/torch pyproject.toml
	$(PIP) install --quiet --constraint constraints.txt --editable '.[test]'
	$(PIP) install --quiet --constraint constraints.txt --no-deps $(FLASHINFER) || echo 'its tests will be skipped: no flashinfer'
	touch $@

$(VENV)/docs: $(VENV)/torch pyproject.toml
	$(PIP) install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@

$(HOSTS)/ready: constraints.txt pyproject.toml
	$(PYTHON) -m venv $(HOSTS)
	$(HOSTS)/bin/pip install --quiet torch==$$(sed -n 's/^torch==//p' constraints.txt)
	$(HOSTS)/bin/pip install --quiet --constraint constraints.txt --editable '.[test]'
	$(HOSTS)/bin/pip install --quiet --constraint constraints.txt --no-deps cache-dit xfuser fastvideo vllm-omni diffsynth
	touch $@

$(ASCEND)/ready: constraints.txt pyproject.toml tests/ascend/stub_cann.py
	$(PYTHON) -m venv $(ASCEND)
	$(ASCEND)/bin/pip install --quiet torch==$$(sed -n 's/^torch==//p' constraints.txt)
	$(ASCEND)/bin/pip install --quiet --constraint constraints.txt --editable '.[demo]' pytest pytest-xdist hypothesis
	if $(ASCEND)/bin/pip install --quiet --constraint constraints.txt --editable '.[ascend]'; then \
	$(ASCEND)/bin/python tests/ascend/stub_cann.py $$($(ASCEND)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') $(ASCEND)/cann; \
	$(ASCEND)/bin/pip download --quiet --no-deps --dest $(ASCEND)/wheels torch-npu==2.11.0.post3 || true; fi
	touch $@

clean:
	rm -rf $(VENV) $(ASCEND) $(HOSTS) out
