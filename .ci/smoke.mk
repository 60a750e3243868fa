# Smoke runs of the published commands that no test runs. Independent ones go side by side, on one
# thread each: make -j2 --output-sync -f .ci/smoke.mk OUT=FOLDER, and DATA_DIR=FOLDER for CIFAR-10.
export OMP_NUM_THREADS = 1
PY = .venv/bin/python
RUN = $(OUT)/trained
BEST = $(RUN)/best.pth
BENCH = $(PY) -m lab.bench --output $(OUT)/benchmarks
QUANTIZE = $(PY) quantize.py --checkpoint $(BEST) --calibration-images 16

ON_CIFAR10 = $(if $(DATA_DIR),reproduce loader)
.PHONY: all reproduce loader minutes engines profile rows per-layer export training
# The long ones first, so that no core waits at the end.
all: $(ON_CIFAR10) rows engines profile per-layer export minutes training

reproduce:  # on two threads, as the rows were made: one adds up in another order
	OMP_NUM_THREADS=2 $(MAKE) -f Makefile reproduce TEST_IMAGES=100

loader:
	$(BENCH) loader --img-size 64 --seconds 0.2 --data-dir $(DATA_DIR)

training:
	$(BENCH) train --img-size 64 --seconds 0.2

$(BEST):
	$(PY) train.py --task synthetic --img-size 64 --epochs 3 --batch-size 32 --warmup-epochs 0.5 \
	    --augment none --output $(RUN)

minutes: $(BEST)
	$(PY) train.py --task synthetic --img-size 64 --minutes 0.3 --batch-size 32 \
	    --warmup-epochs 0.02 --augment none --optimizer muon --teacher $(BEST) --output $(OUT)/timed

engines: $(BEST)
	$(BENCH) engines --recipes w8a8 int8-fx --checkpoint $(BEST) --latency-runs 3

profile: $(BEST)
	$(BENCH) profile --checkpoint $(BEST) --latency-runs 3

rows: $(BEST)
	$(QUANTIZE) --model xxs --recipes mixed-5bits int8-nncf int8-ort int8-pt2e \
	    --latency-runs 5 --output $(OUT)/results

per-layer: $(BEST)
	$(QUANTIZE) --recipes w8a8 int8-fx --per-layer --output $(OUT)/results

export: $(BEST)
	$(QUANTIZE) --recipes w8a8-tensorrt --export $(OUT)/exported
