PYTHON ?= python3
BIN = .venv/bin

.PHONY: demo test test-slow lint

demo: .venv/installed
	$(BIN)/python main.py train --exp_name demo --dataset textures $(DEMO)

# What the demo changes of the defaults, so that it takes seconds on two CPU cores.
DEMO = --arch resnet18-imagenet --n_patches 8 --n_epochs 1 --bs 25 --n_images 2000 --h_dim 1024 --z_dim 256 \
	--test_patches 4 --print_freq 10

test: .venv/installed
	$(BIN)/python -m pip install -q pytest pytest-xdist hypothesis -r requirements-extra.txt
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: .venv/installed
	$(BIN)/python -m pip install -q pytest pytest-xdist hypothesis -r requirements-extra.txt
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --slow

lint: .venv/installed
	$(BIN)/python -m pip install -q ruff
	$(BIN)/ruff check
	$(BIN)/ruff format --check

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -r requirements.txt
	touch $@
