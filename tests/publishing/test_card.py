"""The card: what it says, and that its owner's words outlive every push."""

import dataclasses
import json

import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st

from latent_ddpm.publishing.card import Facts, figures, make_card, merge_cards, read_facts
from pipeline_latent_ddpm import RECORDED_STEPS

VQVAE = {"_class_name": "VQModel", "num_vq_embeddings": 512, "sample_size": 32, "block_out_channels": [16, 32, 64]}
VQVAE |= {"latent_channels": 4}
FACTS = Facts(
    autoencoder={"dataset_name": "embedded:mnist", "optimizer": "muon", "learning_rate": 2e-3},
    unet={"dataset_name": "embedded:mnist", "optimizer": "adamw", "learning_rate": 1e-3, "num_inference_steps": 20},
    training={"unet": {"step": 100, "images": 6400, "hours": 0.1, "device": "cpu, 2 threads", "training_images": 640}},
    evaluations={
        "pipeline": {
            "command": "python scripts/evaluate.py pipeline --config configs/mnist.yaml",
            "settings": [
                {
                    "scheduler": "ddim",
                    "steps": 20,
                    "samples": 1000,
                    "fd": 20.5,
                    "kid": 0.01,
                    "precision": 0.5,
                    "conditioning_psnr": 31.5,
                    "feature_extractor": "efficientnet-lite0",
                },
                {
                    "scheduler": "ddim",
                    "steps": 10,
                    "samples": 1000,
                    "fd": 21.5,
                    "kid": 0.02,
                    "precision": 0.4,
                    "feature_extractor": "efficientnet-lite0",
                },
            ],
        }
    },
    files={"samples.png"},
    configs={
        "vqvae": VQVAE,
        "unet": {"block_out_channels": [64, 128], "sample_size": 8},
        "scheduler": {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"},
    },
    parameters={"vqvae": 1_000_000, "unet": 2_000_000},
)


def test_hours_where_no_speed_was_measured(tmp_path):
    """As after a pause; earlier versions wrote 0."""
    lines = [
        {"stage": "unet", "step": step, "images": step, "loss": 1.0, "images_per_second": speed}
        for step, speed in [(360, 0.1), (720, 0.2), (1080, 0.0), (1440, None)]
    ]
    del lines[-1]["images_per_second"]
    lines.insert(2, {"stage": "unet", "step": 720, "images": 720, "validation_loss": 1.0})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    training = read_facts(tmp_path).training["unet"]
    assert training["hours"] == pytest.approx(1 + 0.5 + 0.5 + 0.5) and training["images"] == 1440
    assert training["images_per_second_median"] == pytest.approx(0.15)


CARD = make_card(FACTS, "someone/digits", "apache-2.0")


def head_of(card):
    return ModelCard(card).data.to_dict()


def test_it_says_what_was_measured_and_how():
    head = head_of(CARD)
    assert head["library_name"] == "diffusers" and head["pipeline_tag"] == "unconditional-image-generation"
    assert head["license"] == "apache-2.0" and head["datasets"] == ["ylecun/mnist"]
    metrics = {
        metric["name"]: metric["value"] for result in head["model-index"][0]["results"] for metric in result["metrics"]
    }
    assert metrics["Frechet distance (EfficientNet-Lite0, 1,000 samples, ddim, 20 steps)"] == 20.5
    assert "| Frechet distance (EfficientNet-Lite0, 1,000 samples, ddim, 20 steps) | 20.50 |" in CARD
    assert "the samples, downscaled again (EfficientNet-Lite0, 1,000 samples, ddim, 20 steps) | 31.50 |" in CARD
    assert "python scripts/evaluate.py pipeline --config configs/mnist.yaml" in CARD
    assert "![samples](samples.png)" in CARD and "neighbours.png" not in CARD
    assert "for 32x32 images" in CARD and "latents of 4x8x8" in CARD
    assert "10.0 epochs of 640" in CARD and "6.0 minutes on cpu, 2 threads" in CARD


def test_without_measurements_there_are_no_figures():
    facts = dataclasses.replace(FACTS, evaluations={}, training={})
    card = make_card(facts, "someone/digits")
    assert "model-index" not in head_of(card) and "## Evaluation" not in card and figures(facts) == []
    assert "license" not in head_of(card)


@pytest.mark.parametrize(
    ("counts", "said", "unsaid"),
    [
        ([4], ["in 4 steps.", "Each step was learned on the path"], "matching"),
        ([1], ["in 1 step.", "The first step was learned by distribution matching"], "path"),
        ([1, 4], ["in 1 or 4 steps.", "by distribution matching", "later ones on the path"], "Each step"),
    ],
)
def test_a_few_step_card_says_how_its_steps_were_learned(counts, said, unsaid):
    scheduler = {**FACTS.configs.get("scheduler", {}), RECORDED_STEPS: counts[-1]}
    training = {**FACTS.training, "few_steps": {**FACTS.training["unet"], "counts": counts, "finished_at": 8}}
    facts = dataclasses.replace(FACTS, configs={**FACTS.configs, "scheduler": scheduler}, training=training)
    about = make_card(facts, "someone/digits-few-steps").partition("## ")[0]
    assert all(words in about for words in said) and unsaid not in about


def test_a_new_card_replaces_an_unedited_one():
    changed = json.loads(json.dumps(FACTS.evaluations))
    changed["pipeline"]["settings"][0]["fd"] = 18.25
    new = make_card(dataclasses.replace(FACTS, evaluations=changed), "someone/digits", "apache-2.0")
    assert merge_cards(new, CARD) == new
    assert merge_cards(CARD, CARD) == CARD and merge_cards(CARD, None) == CARD and merge_cards(CARD, " \n") == CARD


WORDS = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"], exclude_characters="<>"), min_size=1)


@given(own=WORDS, place=st.integers(0, 7))
def test_words_between_the_parts_survive(own, place):
    paragraphs = CARD.split("\n\n<!-- made:")
    place = 1 + place % (len(paragraphs) - 1)
    theirs = (
        "\n\n<!-- made:".join(paragraphs[:place])
        + f"\n\n{own}\n\n<!-- made:"
        + "\n\n<!-- made:".join(paragraphs[place:])
    )
    merged = merge_cards(CARD, theirs)
    assert f"\n\n{own.strip()}\n\n" in merged
    assert merge_cards(CARD, merged) == merged


def test_an_edited_part_stays_and_a_removed_one_stays_away():
    theirs = CARD.replace("like those in its training set", "mostly digits, I promise")
    start, end = theirs.index("<!-- made:use"), theirs.index("<!-- end:use -->") + len("<!-- end:use -->")
    theirs = theirs[:start] + theirs[end:]
    merged = merge_cards(CARD, theirs)
    assert "mostly digits, I promise" in merged and "## Use" not in merged
    assert merged.count("## Intended use and limits") == 1


def test_a_part_that_is_new_comes_in_its_place():
    without = make_card(dataclasses.replace(FACTS, evaluations={}), "someone/digits", "apache-2.0")
    merged = merge_cards(CARD, without)
    assert merged.index("## Use") < merged.index("## Evaluation") < merged.index("## Training")
    assert head_of(merged)["model-index"] == head_of(CARD)["model-index"]


def test_the_heads_keys_are_the_owners_but_for_our_results():
    head, body = CARD.split("---\n", 2)[1:]
    theirs = yaml.safe_load(head)
    theirs |= {"license": "cc-by-4.0", "language": "en", "tags": ["mine"]}
    del theirs["datasets"]
    results = theirs["model-index"][0]["results"]
    results[0]["metrics"][0]["value"] = 99.0  # ours, outdated
    own = {"task": {"type": "unconditional-image-generation"}, "dataset": {"type": "x", "name": "x"},
           "metrics": [{"type": "opinion", "name": "My mother's opinion", "value": 10}]}  # fmt: skip
    results.append(own)
    merged = head_of(merge_cards(CARD, f"---\n{yaml.safe_dump(theirs)}---\n{body}"))
    assert merged["license"] == "cc-by-4.0" and merged["language"] == "en" and merged["tags"] == ["mine"]
    assert "datasets" not in merged
    values = {m["name"]: m["value"] for r in merged["model-index"][0]["results"] for m in r["metrics"]}
    assert values["My mother's opinion"] == 10 and 99.0 not in values.values()


@pytest.mark.parametrize("theirs", ["# My page\n\nAll mine.", "---\nlicense: mit\n---\n# My page\n\nAll mine."])
def test_a_card_of_ones_own_keeps_its_text(theirs):
    merged = merge_cards(CARD, theirs)
    assert "All mine." in merged and "## Use" not in merged
    assert head_of(merged)["model-index"] == head_of(CARD)["model-index"]


def test_a_head_alone_gets_our_text():
    merged = merge_cards(CARD, "---\nlicense: mit\n---\n")
    assert head_of(merged)["license"] == "mit" and "## Use" in merged


@pytest.mark.parametrize(
    "change",
    [
        lambda card: card.replace("\n", "\r\n"),
        lambda card: card.replace("<!-- ledger:{", "<!-- ledger:{{"),
        lambda card: card.replace("<!-- ledger:{", '<!-- ledger:["x"] {'),
        lambda card: card.replace("model-index:\n", "model-index: {a: 1}\nold:\n", 1),
        lambda card: card.replace("model-index:\n", "model-index: null\nold:\n", 1),
    ],
)
def test_odd_cards_are_merged(change):
    merged = merge_cards(CARD, change(CARD))
    assert head_of(merged)["model-index"] == head_of(CARD)["model-index"] and merged.count("## Use") == 1


def test_a_card_that_begins_with_a_rule_loses_nothing():
    theirs = "---\nMy words.\n---\n\nMore."
    merged = merge_cards(CARD, theirs)
    assert "My words." in merged and "More." in merged and head_of(merged)["library_name"] == "diffusers"
    theirs = "---\n---\n\nFirst.\n\n---\n\nSecond.\n\n\n\nThird."
    assert "First.\n\n---\n\nSecond.\n\n\n\nThird." in merge_cards(CARD, theirs)
    with pytest.raises(yaml.YAMLError):
        merge_cards(CARD, "---\nlicense: [mit\n---\nText.")


def test_a_card_of_ones_own_keeps_its_text_at_every_push():
    without = make_card(dataclasses.replace(FACTS, evaluations={}), "someone/digits")
    once = merge_cards(without, "# My page\n\nAll mine.")
    assert "## Evaluation" not in merge_cards(CARD, once)


TRAINED = {
    "autoencoder": {"step": 20, "images": 640, "hours": 0.1, "validation_images": 249, "validated_at": 20}
    | {"validation_psnr": 31.25, "validation_ssim": 0.984, "validation_codebook_usage": 1.0}
    | {"validation_perplexity": 411.6},
    "unet": {"step": 100, "images": 6400, "hours": 0.1, "validation_images": 249, "validated_at": 80}
    | {"validation_loss": 0.31254},
}


def test_without_an_evaluation_the_figures_of_training_are_the_results():
    unet = FACTS.unet | {"prediction_type": "v_prediction", "loss_weighting": "min_snr"}
    facts = dataclasses.replace(FACTS, evaluations={}, training=TRAINED, unet=unet)
    card = ModelCard(make_card(facts, "someone/digits", "apache-2.0"))
    found = {result.metric_name: result for result in card.data.eval_results}
    where = "249 held-out images, measured in training"
    assert {name: result.metric_value for name, result in found.items()} == {
        f"Reconstruction PSNR in dB ({where})": 31.25,
        f"Reconstruction SSIM ({where})": 0.984,
        f"Codes in use ({where})": 1.0,
        f"Perplexity of the codes ({where})": 411.6,
        f"Diffusion loss on latents (v_prediction, min_snr weighting, {where} at step 80)": 0.31254,
    }
    assert {result.dataset_split for result in found.values()} == {"held-out"}
    assert "python train_autoencoder.py --config train_autoencoder.yaml" in card.text and "| 31.25 |" in card.text
    assert "evaluation-*.json" not in card.text


def test_an_evaluation_takes_the_place_of_the_same_figure_of_training():
    measured = {"command": "python scripts/evaluate.py autoencoder", "images": 250, "psnr": 31.3, "rfd": 3.2}
    facts = dataclasses.replace(FACTS, evaluations={"autoencoder": measured}, training=TRAINED)
    names = [row.name for row in figures(facts)]
    assert len(names) == len(set(names)) and sum("PSNR" in name for name in names) == 1
    assert "Reconstruction PSNR in dB (250 held-out images)" in names
    assert "Reconstruction SSIM (249 held-out images, measured in training)" in names


def test_figures_of_training_are_read_from_the_metrics(tmp_path):
    lines = [
        {"stage": "unet", "step": 10, "images": 640, "loss": 1.0, "images_per_second": 64},
        {"stage": "unet", "step": 10, "images": 640, "validation_loss": 0.5},
        {"stage": "unet", "step": 20, "images": 1280, "loss": 0.9, "images_per_second": 64},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "run.json").write_text(json.dumps({"unet": {"validation_images": 12}}))
    (row,) = figures(dataclasses.replace(read_facts(tmp_path), configs={}))
    assert row.value == 0.5 and "12 held-out images, measured in training at step 10" in row.name


def test_the_owner_keeps_results_beside_those_of_training():
    facts = dataclasses.replace(FACTS, evaluations={}, training=TRAINED)
    ours = make_card(facts, "someone/digits")
    head, _, rest = ours.removeprefix("---\n").partition("---\n")
    edited = yaml.safe_load(head)
    own = {
        "task": {"type": "x"},
        "dataset": {"name": "y", "type": "y"},
        "metrics": [{"name": "mine", "type": "z", "value": 1}],
    }
    edited["model-index"][0]["results"].append(own)
    theirs = f"---\n{yaml.safe_dump(edited)}---\n{rest}"
    merged = yaml.safe_load(merge_cards(ours, theirs).split("---\n")[1])
    names = [m["name"] for result in merged["model-index"][0]["results"] for m in result["metrics"]]
    assert "mine" in names and len(names) == len(set(names)) == 6


KNOWN = {
    "looked_at": 640, "training": 600, "validation": 40, "undecodable": {"training": 2, "validation": 1},
    "undecodable_in_stream": 0, "resolution": 32, "image_channels": 3, "formats": {"JPEG": 500, "PNG": 140},
    "shorter_side": {"smallest": 20, "median": 640, "largest": 4000, "histogram": []}, "upscaled": 12, "gray": 3,
    "flat": 0, "transparent": 1, "left_out": {"HEIC: pip install pillow-heif": 7}, "complete": True,
    "classes": {"number": 4, "empty": 1, "unknown": 0, "smallest": 9, "largest": 300},
    "duplicates": {"same_file": 5, "same_pixels": 2, "near": 4, "mirrored": 1, "in_both_splits": 6},
}  # fmt: skip
COMMAND = "python scripts/inspect_data.py --config configs/mnist.yaml"


def test_what_is_known_of_the_images(tmp_path):
    (tmp_path / "data.json").write_text(json.dumps({"command": COMMAND, "facts": KNOWN}))
    data = read_facts(tmp_path).data
    trained = {"unet": FACTS.training["unet"] | {"training_images": 598, "validation_images": 40}}
    card = make_card(dataclasses.replace(FACTS, data=data, training=trained), "someone/digits")
    assert "## Training data" in card and f"```\n{COMMAND}\n```" in card
    for row in (
        "| images for training, for validation | 598, 40 |",  # as the run counted them
        "| images that cannot be decoded | 3 |",
        "| files left out: HEIC | 7 |",
        "| classes, images of a class | 4, 9 to 300 |",
        "| formats | JPEG 500, PNG 140 |",
        "| smallest, median and largest shorter side in pixels | 20, 640, 4,000 |",
        "| images smaller than 32 pixels, which were enlarged | 12 |",
        "| gray images | 3 |",
        "| exact copies of other images | 7 |",
        "| nearly equal images, mirrored copies | 4, 1 |",
        "| validation images with a copy among the training images | 6 |",
    ):
        assert row in card, row
    assert "of one colour" not in card
    sample = KNOWN | {"complete": False, "looked_at": 256}
    sample = {key: value for key, value in sample.items() if key not in ("duplicates", "undecodable")}
    card = make_card(dataclasses.replace(FACTS, data={"command": "x", "facts": sample}), "someone/digits")
    assert "| formats (in a sample of 256 images) | JPEG 500, PNG 140 |" in card and "copies" not in card
    assert "## Training data" not in make_card(FACTS, "someone/digits")


def test_guidance_that_is_in_the_weights_is_not_asked_for_again():
    configs = {**FACTS.configs, "unet": {**FACTS.configs["unet"], "num_class_embeds": 11}}
    facts = dataclasses.replace(FACTS, configs=configs, unet={**FACTS.unet, "guidance_scale": 2.0})
    assert "guidance_scale=2" in make_card(facts, "you/digits")
    for noted, asked in (({"scale": 2.0}, True), ({"scale": 2.0, "finished_at": 160}, False)):
        trained = {**FACTS.training, "self_guidance": {"step": 160, "images": 10240, "hours": 0.1, **noted}}
        assert ("guidance_scale=2" in make_card(dataclasses.replace(facts, training=trained), "you/digits")) == asked


def test_what_was_pretrained_is_named():
    measured = {"class": "AutoencoderDC", "revision": "a" * 40, "psnr": 27.5, "ssim": 0.9, "images": 200}
    unet = {**FACTS.unet, "autoencoder": "mit-han-lab/dc-ae", "resolution": 256}
    training = {"unet": {**FACTS.training["unet"], "autoencoder": measured}}
    configs = {**FACTS.configs, "vqvae": {"_class_name": "AutoencoderDC", "latent_channels": 32}}
    index = {"_class_name": ["pipeline", "LatentDDPMPipeline"], "latents_std": [1.0]}
    facts = dataclasses.replace(FACTS, unet=unet, training=training, configs=configs, index=index, autoencoder={})
    card = make_card(facts, "someone/cats", None)
    assert "for 256x256 images, trained from scratch with latent-ddpm" in card
    assert (
        "The autoencoder is that of [mit-han-lab/dc-ae](https://huggingface.co/mit-han-lab/dc-ae) at revision" in card
    )
    assert "reconstructs 200 of the training images with a PSNR of 27.50 dB and an SSIM of 0.900" in card
    assert "`AutoencoderDC` cannot hold the normalization" in card and 'custom_pipeline="someone/cats"' in card
    assert head_of(card)["base_model"] == ["mit-han-lab/dc-ae"]
    # a folder of the author's disk has no name
    private = dataclasses.replace(facts, unet={**unet, "autoencoder": "AUTOENCODER"})
    card = make_card(private, "someone/cats", None)
    assert "that of weights that are not published" in card and "base_model" not in head_of(card)


def test_what_was_fine_tuned_is_named():
    unet = {**FACTS.unet, "init_unet": "google/ddpm-cat-256"}
    autoencoder = {**FACTS.autoencoder, "init_from": "stabilityai/sd-vae-ft-mse", "freeze_encoder": True}
    card = make_card(dataclasses.replace(FACTS, unet=unet, autoencoder=autoencoder), "someone/cats", None)
    assert "fine-tuned from [google/ddpm-cat-256]" in card and "from scratch" not in card
    assert "The decoder of the autoencoder was fine-tuned from [stabilityai/sd-vae-ft-mse]" in card
    assert head_of(card)["base_model"] == ["google/ddpm-cat-256", "stabilityai/sd-vae-ft-mse"]
