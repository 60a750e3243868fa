# make reproduce DATA_DIR=...   a part of the shipped rows measured again, beside the shipped numbers
# make test DATA_DIR=...        all tests; without DATA_DIR those on CIFAR-10 are skipped
# Both make the environment .venv. TEST_IMAGES=10000 reproduces on all test images.
PYTHON ?= python3
VENV ?= .venv
DATA_DIR ?= data
TEST_IMAGES ?= 1000
PY = $(VENV)/bin/python
XXS = results/mobilevit_xxs
ROWS = $(XXS)/fp32@torch-eager.json $(XXS)/fp16@published.json $(XXS)/int4-percentile@published.json \
    $(XXS)/w8a8@torch-eager.json $(XXS)/w8a8@onnxruntime.json $(XXS)/w8a8@openvino.json \
    results/mobilevit_xs/fp32@torch-eager.json results/mobilevit_s/fp32@torch-eager.json

.PHONY: reproduce test

reproduce: $(VENV)/dev
	$(PY) quantize.py --from $(ROWS) --data-dir $(DATA_DIR) --test-images $(TEST_IMAGES) \
	    --latency-runs 20 --output runs/results

test: $(VENV)/dev
	$(PY) -m pytest --numprocesses 2 --dist worksteal

$(VENV)/dev: requirements-dev.txt requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -r $<
	touch $@
