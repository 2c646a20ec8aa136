# Two commands do everything on a fresh machine:
#   make quickstart   install, train both stages on handwritten digits, show the result
#   make test         install, lint, pass the tests
# Both make .venv when it is missing and install nothing the second time.

PYTHON ?= python3
BIN := .venv/bin
RUN := outputs/mnist
LAUNCH := $(BIN)/accelerate launch --config_file configs/accelerate/one_process.yaml

.PHONY: quickstart test lint install clean

.venv/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	touch $@

.venv/.installed-test: pyproject.toml .venv/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[test]"
	touch $@

install: .venv/.installed

# A quickstart that was interrupted goes on where it was; remove outputs/mnist to start afresh.
quickstart: .venv/.installed
	$(LAUNCH) train_autoencoder.py --config configs/mnist.yaml --resume_from_checkpoint latest
	$(LAUNCH) train_unet.py --config configs/mnist.yaml --resume_from_checkpoint latest
	$(BIN)/python scripts/sample.py $(RUN)/pipeline --num_images 100 --batch_size 100 --output_dir $(RUN)/samples/final
	@echo
	@echo "New digits:      $(RUN)/samples/final/grid.png (and one file each beside it)"
	@echo "As it learned:   $(RUN)/samples/*.png and $(RUN)/metrics.jsonl"
	@echo "The pipeline:    $(RUN)/pipeline - three lines use it, with nothing but diffusers installed:"
	@echo
	@echo "    from diffusers import DiffusionPipeline"
	@echo "    pipeline = DiffusionPipeline.from_pretrained(\"$(RUN)/pipeline\")"
	@echo "    pipeline(batch_size=1, num_inference_steps=25).images[0].save(\"digit.png\")"

lint: .venv/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

test: lint
	$(BIN)/python -m pytest

clean:
	rm -rf .venv outputs
