"""Text: captions from everywhere, embedded once, chosen by number, left out at times; runs and exports keep it all."""

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tracemalloc
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    assert_same_tensors,
    checkpoint_tensors,
    command,
    environment,
    finished_script,
    launch,
    launch_and_stop,
    losses,
    run_script,
)
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from latent_ddpm.config import EMBEDDED_ENCODER, UNetConfig
from latent_ddpm.data.captions import Captions, TextEncoder, embed_captions, read_captions
from latent_ddpm.data.latents import images_for_run, record_type
from latent_ddpm.data.sources.embedded import DigitsSource
from latent_ddpm.data.sources.folder import FolderSource
from latent_ddpm.data.sources.hub import HubSource
from latent_ddpm.diffusion.conditions import make_conditions
from latent_ddpm.diffusion.unet import make_unet
from latent_ddpm.errors import UserError
from pipeline_latent_ddpm import LatentDDPMPipeline

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "blue", "picture", "of", "fish", "bird"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory):
    """A BERT of 8 channels that knows a few words."""
    from transformers import BertConfig, BertModel, BertTokenizer

    folder = tmp_path_factory.mktemp("encoder")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    torch.manual_seed(0)
    shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=len(WORDS), max_position_embeddings=32, **shape)).save_pretrained(folder)
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Red and blue images of fish and birds; captions in .txt (two lines), .json, metadata.csv, or missing."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    rows = []
    for i in range(40):
        kind, colour = ("fish", "bird")[i % 2], ("red", "blue")[i // 2 % 2]
        path = root / kind / f"{i:02d}.png"
        path.parent.mkdir(exist_ok=True)
        pixels = rng.integers(0, 90, (16, 16, 3), dtype=np.uint8)
        pixels[..., 0 if colour == "red" else 2] += 150
        Image.fromarray(pixels).save(path)
        if i == 7:
            continue
        if i < 10:
            path.with_suffix(".txt").write_text(f"a {colour} {kind}\na picture of a {colour} {kind}\n")
        elif i < 20:
            path.with_suffix(".json").write_text(json.dumps({"text": f"a {colour} {kind}", "other": 1}))
        else:
            rows.append(f"{i:02d}.png,{colour} {kind}" if kind == "fish" else None)
            if kind == "bird":
                path.with_suffix(".txt").write_text(f"a {colour} {kind}")
    (root / "fish" / "metadata.csv").write_text("file_name,text\n" + "\n".join(filter(None, rows)))
    return root


def config_of(data, encoder_folder, output_dir, **changes):
    values = {"train_data_dir": str(data), "resolution": 16, "max_validation_images": 4, "conditions": ["text"]}
    made = UNetConfig(output_dir=str(output_dir), text_encoder=str(encoder_folder), **{**values, **changes})
    made.validate()
    return made


# ------------------------------------------------------------------------------------------------ reading


def test_captions_beside_a_folders_images(data):
    source = FolderSource(data)
    assert set(source.caption_columns()) >= {"text", "other"}
    by_name = {source.name(i): source.captions(i, "text") for i in range(len(source))}
    assert by_name["fish/00.png"] == ["a red fish", "a picture of a red fish"]
    assert by_name["bird/11.png"] == "a blue bird" and by_name["fish/20.png"] == "red fish"
    assert by_name["bird/07.png"] is None


@pytest.mark.parametrize(
    ("name", "content"), [("metadata.jsonl", "{"), ("metadata.jsonl", '{"text": "x"}'), ("metadata.csv", "a,b\n1,2")]
)
def test_metadata_that_cannot_be_read_is_named(tmp_path, name, content):
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=re.escape(name)):
        FolderSource(tmp_path).caption_columns()


def test_a_folder_is_searched_for_captions_once(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    (tmp_path / "0.txt").write_text("a square")
    source = FolderSource(tmp_path)
    assert source.caption_columns() == ["text"]
    shutil.rmtree(tmp_path)
    assert source.caption_columns() == ["text"]


def test_a_caption_that_is_no_text_is_named(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    (tmp_path / "0.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"0.txt is not text in UTF-8 .byte 3.: save it as UTF-8"):
        FolderSource(tmp_path).captions(0, "text")


def test_an_encoder_is_looked_for_before_the_images(tmp_path, capsys):
    with pytest.raises(
        UserError, match="text_encoder embedded:mini does not exist; the embedded encoder is embedded:minilm"
    ):
        TextEncoder("embedded:mini", 77)


def test_captions_of_a_dataset_column_and_of_the_digits():
    rows = {"image": [{"bytes": b"x", "path": None}] * 3, "text": ["one", None, "two"], "many": [["a", "b"], [], ["c"]]}
    source = HubSource(datasets.Dataset.from_dict(rows), "train", "image")
    assert source.caption_columns() == ["text", "many"]
    assert [source.captions(i, "text") for i in range(3)] == ["one", None, "two"]
    assert list(source.captions(0, "many")) == ["a", "b"]
    digits = DigitsSource()
    assert "a " + {0: "zero", 5: "five"}.get(int(digits.labels[0]), "?") in digits.captions(0, "text")


@given(st.lists(st.lists(st.sampled_from(["a dog", "", "a cat", "é"]), max_size=3), max_size=9), st.integers(-9, 9))
def test_captions_are_those_that_were_given(of_images, i):
    captions = Captions(iter(of_images))
    assert list(captions) == of_images and len(captions) == len(of_images)
    assert captions.different == sorted({caption for own in of_images for caption in own})
    if -len(of_images) <= i < len(of_images):
        assert captions[i] == of_images[i]


def test_captions_take_little_memory():
    count = 50_000
    tracemalloc.start()
    captions = Captions([f"a {'fish' if i % 7 else 'bird'}", "seen"] for i in range(count))
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept / count < 7  # 4 bytes, and one for each caption
    assert captions[7] == ["a bird", "seen"] and len(captions.different) == 3


def test_missing_captions_are_counted_and_none_at_all_is_refused(data, encoder_folder, tmp_path, caplog):
    config = config_of(data, encoder_folder, tmp_path)
    images, _ = images_for_run(config, True, lambda: None)
    captions = read_captions(images, config)
    assert sum(not own for own in captions) <= 1
    assert "1 of 38 images have no caption" in caplog.text or all(captions)  # unless that one was held out
    with pytest.raises(UserError, match=r"no column 'caption' that holds text. Those that do: .*text"):
        read_captions(images, config_of(data, encoder_folder, tmp_path, caption_column="caption"))
    made = read_captions(images, config_of(data, encoder_folder, tmp_path, caption_templates=["a {}", "{} of a {}"]))
    assert {tuple(own) for own in made} == {("a fish", "fish of a fish"), ("a bird", "bird of a bird")}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"conditions": ["text"]}, "set text_encoder"),
        ({"text_encoder": "x"}, "text_encoder is for conditions that have text"),
        ({"conditions": ["text"], "text_encoder": "x", "caption_templates": ["a"]}, "caption_templates"),
        ({"conditions": ["text"], "text_encoder": "x", "streaming": True}, "set caption_templates"),
    ],
)
def test_impossible_configs(values, message):
    with pytest.raises(UserError, match=message):
        UNetConfig(dataset_name="somebody/images", **values).validate()


def test_an_encoder_that_is_none_is_one_sentence(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"text_encoder .* cannot be loaded: "):
        TextEncoder(str(tmp_path), 77)


# ---------------------------------------------------------------------------------------------- embedding


def test_embeddings_are_the_encoders_own_and_made_once(encoder_folder, tmp_path, monkeypatch):
    from transformers import AutoModel, AutoTokenizer

    captions = ["", "a red fish", "picture of a blue bird"]
    encoder = TextEncoder(str(encoder_folder), 77)
    cache = embed_captions(encoder, captions, tmp_path, CPU, lambda: None)
    records = cache.records(np.arange(3))
    assert records["label"].tolist() == [2, 5, 7] and cache.versions_shape == (1, 1, 7, 8)
    model, tokenizer = AutoModel.from_pretrained(encoder_folder).eval(), AutoTokenizer.from_pretrained(encoder_folder)
    for row, caption in enumerate(captions):
        alone = model(**tokenizer([caption], return_tensors="pt")).last_hidden_state[0].detach()
        found = torch.from_numpy(records["latents"][row, 0, 0].astype(np.float32))
        torch.testing.assert_close(found[: len(alone)], alone, rtol=2e-3, atol=2e-3)
        assert not found[len(alone) :].any()
    others = [*captions[:2], "picture of a red bird"]  # as many, as long, but other words
    again = embed_captions(encoder, others, tmp_path, CPU, lambda: None).records(np.arange(3))
    assert not np.array_equal(again["latents"][2], records["latents"][2])
    shard = cache.folder / "latents-00000.npy"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-9])
    assert embed_captions(encoder, captions, tmp_path, CPU, lambda: None).folder == cache.folder
    assert shard.read_bytes() == whole  # what is damaged is made anew
    monkeypatch.setattr(encoder, "embed", None)
    assert embed_captions(encoder, captions, tmp_path, CPU, lambda: None).folder == cache.folder
    assert TextEncoder(str(encoder_folder), 4).tokens(["a red fish a red fish"])["input_ids"].shape == (1, 4)


def test_the_embedded_encoder_knows_what_words_mean():
    encoder = TextEncoder(EMBEDDED_ENCODER, 77)
    captions = ["a photo of a frog", "picture of a toad", "a photo of a truck", "a seven", "the digit 7"]
    hidden, mask = encoder.embed(captions, 16, CPU)
    assert encoder.width == 384 and hidden.shape == (5, 16, 384)
    means = torch.nn.functional.normalize(hidden.sum(1) / mask.sum(1, keepdim=True), dim=1)
    frog, toad, truck, seven, digit = means
    assert frog @ toad > frog @ truck + 0.1 and seven @ digit > seven @ truck + 0.1


@pytest.mark.parametrize("kind", ["clip", "t5"])
def test_other_kinds_of_encoders(tmp_path, kind):
    """Of a whole CLIP or T5 only the text encoder is taken."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({word: k for k, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "eos_token": "[SEP]"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(tmp_path)
    torch.manual_seed(0)
    if kind == "clip":
        shape = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        text = {**shape, "vocab_size": len(WORDS), "eos_token_id": 3, "bos_token_id": 2}
        picture = {**shape, "image_size": 8, "patch_size": 4}
        config = transformers.CLIPConfig(text_config=text, vision_config=picture, projection_dim=8)
        whole = transformers.CLIPModel(config)
    else:
        shape = {"d_model": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "d_kv": 4, "vocab_size": len(WORDS)}
        whole = transformers.T5ForConditionalGeneration(transformers.T5Config(**shape, decoder_start_token_id=0))
    whole.save_pretrained(tmp_path)
    encoder = TextEncoder(str(tmp_path), 16)
    assert encoder.width == 8 and type(encoder.model).__name__ in ("CLIPTextModel", "T5EncoderModel")
    hidden, mask = encoder.embed(["a red fish", "a bird"], 4, CPU)
    assert hidden.shape == (2, 4, 8) and mask.tolist() == [[1, 1, 1, 0], [1, 1, 0, 0]]
    assert hidden[0, :3].any(1).all() and not hidden[0, 3:].any() and not torch.equal(hidden[0, 0], hidden[0, 1])


def test_captions_are_chosen_and_left_out_by_number_alone(data, encoder_folder, tmp_path):
    config = config_of(data, encoder_folder, tmp_path, caption_dropout=0.3)
    images, _ = images_for_run(config, True, lambda: None)
    conditions, _ = make_conditions(config, (images, images), 8, False, CPU, lambda: None)
    text = conditions.all[0]
    index = next(i for i in range(len(images)) if images.name(i) == "fish/00.png")
    records = np.zeros(2000, dtype=record_type((1, 1, 1, 1)))
    records["index"] = index
    numbers = torch.arange(2000)
    rows = text.rows(records["index"], numbers)
    assert len(set(rows)) == 2 and 0.4 < (rows == rows[0]).mean() < 0.6  # it has two captions
    assert np.array_equal(text.rows(records["index"][:7], numbers[90:97]), rows[90:97])
    encoder = TextEncoder(config.text_encoder, config.max_caption_tokens)
    length = text.nothing()["encoder_hidden_states"].shape[1]
    spoken = encoder.embed(["a red fish", "a picture of a red fish"], length, CPU)[0]
    found = text.values(records, None, numbers)["encoder_hidden_states"]
    same = torch.stack([torch.isclose(found, own, atol=1e-2).all(2).all(1) for own in spoken])
    assert (same.sum(0) == 1).all() and same.any(1).all()  # each in the words of the file, one or the other
    given = conditions.given(records, None, numbers)
    none = text._embedded(np.zeros(1, dtype=np.int64))
    left_out = (given["encoder_hidden_states"] == none["encoder_hidden_states"]).all(2).all(1)
    assert 0.25 < left_out.float().mean() < 0.35
    assert torch.equal(given["encoder_attention_mask"][left_out].sum(1), torch.full((int(left_out.sum()),), 2))


def test_the_unet_for_text_starts_at_zero_and_has_heads_of_the_asked_width(encoder_folder):
    config = UNetConfig(dataset_name="x", unet_block_out_channels=[32, 64], unet_attention_levels=[1],
                        unet_attention_head_dim=16, unet_norm_num_groups=8, unet_layers_per_block=1)  # fmt: skip
    unet = make_unet(config, 3, 8, cross_attention_dim=8, num_class_embeds=4)
    text = torch.randn(2, 5, 8)
    out = unet(torch.randn(2, 3, 8, 8), torch.tensor(5), encoder_hidden_states=text, class_labels=torch.tensor([0, 3]))
    assert not out.sample.any()
    heads = {m.heads for name, m in unet.named_modules() if type(m).__name__ == "Attention"}
    assert heads == {4}  # 64 channels of 16 each
    stays = [n for n, p in unet.named_parameters() if not p.any() and "bias" not in n]
    assert all("proj_out" in n or "conv2" in n or "conv_out" in n for n in stays) and any(
        "proj_out" in n for n in stays
    )


# --------------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def trained(data, encoder_folder, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("run") / "out"
    flags = {"train_data_dir": data, "resolution": 16, "max_train_steps": 4}
    launch("train_autoencoder.py", output_dir, **flags)
    flags |= {"conditions": "[class,text]", "text_encoder": encoder_folder, "unet_dropout": 0, "guidance_scale": 2.0}
    flags |= {"validation_steps": 4, "checkpointing_steps": 2, "autoencoder": output_dir / "autoencoder"}
    launch("train_unet.py", output_dir, **flags)
    return output_dir, flags


def test_a_run_that_is_killed_and_gone_on_with_ends_in_the_same_bits(trained, tmp_path):
    output_dir, flags = trained
    launch_and_stop("train_unet.py", tmp_path, 3, signal.SIGKILL, **flags)
    launch("train_unet.py", tmp_path, **flags)
    assert_same_tensors(checkpoint_tensors(output_dir, "unet", 4), checkpoint_tensors(tmp_path, "unet", 4))


@pytest.mark.long
def test_two_processes_see_the_same_captions(trained, tmp_path):
    output_dir, flags = trained
    launch("train_unet.py", tmp_path, processes=2, **{**flags, "train_batch_size": 4})
    one, two = losses(output_dir, "unet"), losses(tmp_path, "unet")
    assert one.keys() == two.keys() and max(abs(one[s] - two[s]) / one[s] for s in one) < 1e-4


LOAD = """
import sys, torch
from diffusers import DiffusionPipeline
folder, out = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(5))
torch.save(pipe(prompt=["a red fish", "a blue bird"], class_labels=["fish", "bird"], guidance_scale=3.0, latents=noise,
                num_inference_steps=3, output_type="latent").images, out)
assert "latent_ddpm" not in sys.modules
"""


def test_the_export_loads_with_diffusers_and_transformers_alone(trained, tmp_path):
    output_dir, _ = trained
    folder = output_dir / "pipeline"
    assert not list(folder.rglob("*.bin")) and (folder / "text_encoder" / "model.safetensors").exists()
    away = {key: value for key, value in environment().items() if key != "PYTHONPATH"}
    words = [sys.executable, "-P", "-c", LOAD, str(folder), str(tmp_path / "drawn.pt")]
    done = subprocess.run(words, cwd=tmp_path, env=away, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert torch.equal(draw(LatentDDPMPipeline.from_pretrained(folder)), torch.load(tmp_path / "drawn.pt"))


def draw(pipe, **changes):
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    words = {"prompt": ["a red fish", "a blue bird"], "class_labels": ["fish", "bird"], "guidance_scale": 3.0}
    words = {name: value for name, value in {**words, **changes}.items() if value is not None}
    return pipe(latents=noise, batch_size=2, num_inference_steps=3, output_type="latent", **words).images


def test_an_encoder_that_is_only_named_is_loaded_when_it_is_needed(trained, tmp_path):
    output_dir, flags = trained
    launch("train_unet.py", tmp_path, **{**flags, "export_text_encoder": "false", "max_train_steps": 1})
    index = json.loads((tmp_path / "pipeline" / "model_index.json").read_text())
    assert index["text_encoder_id"] == str(flags["text_encoder"]) and not (tmp_path / "pipeline/text_encoder").exists()
    pipe = LatentDDPMPipeline.from_pretrained(tmp_path / "pipeline")
    assert pipe.text_encoder is None and draw(pipe).isfinite().all() and pipe.text_encoder is not None
    done = run_script("push_to_hub.py", str(tmp_path), "--dry_run", str(tmp_path / "laid_out"), expect=2)
    assert "nobody else has the text_encoder" in done.stderr


def test_prompts_in_every_form(trained):
    pipe = LatentDDPMPipeline.from_pretrained(trained[0] / "pipeline")
    wanted = draw(pipe)
    embeds, mask = pipe.encode_prompt(["a red fish", "a blue bird"])
    given = {"prompt": None, "prompt_embeds": embeds, "prompt_attention_mask": mask}
    assert torch.equal(draw(pipe, **given), wanted)
    longer = torch.cat((embeds, torch.randn(2, 3, 8)), 1), torch.cat((mask, torch.zeros(2, 3, dtype=torch.bool)), 1)
    given = {"prompt": None, "prompt_embeds": longer[0], "prompt_attention_mask": longer[1]}
    torch.testing.assert_close(draw(pipe, **given), wanted, rtol=1e-4, atol=1e-4)  # what is masked does not count
    one = draw(pipe, prompt="a red fish")
    torch.testing.assert_close(one[0], wanted[0], rtol=1e-4, atol=1e-4)
    nothing = draw(pipe, prompt=None, class_labels=None)
    torch.testing.assert_close(draw(pipe, prompt="", class_labels=None), nothing, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(draw(pipe, guidance_scale=0.0), nothing, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="prompt: got 3 for 2 images"):
        draw(pipe, prompt=["a", "b", "c"])
    with pytest.raises(ValueError, match="not both"):
        draw(pipe, prompt_embeds=embeds)
    with pytest.raises(ValueError, match=r"must be \(B, T, 8\)"):
        draw(pipe, prompt=None, prompt_embeds=embeds[..., :4])


def test_what_is_published_has_the_encoder_and_a_card_whose_code_runs(trained, tmp_path, monkeypatch):
    from huggingface_hub import ModelCard

    output_dir, _ = trained
    run_script("push_to_hub.py", str(output_dir), "--dry_run", str(tmp_path / "laid"), "--hub_model_id", "me/fish")
    assert (tmp_path / "laid" / "text_encoder" / "model.safetensors").exists()
    card = ModelCard.load(tmp_path / "laid" / "README.md")
    assert card.data.pipeline_tag == "text-to-image" and "The classes are bird, fish" in card.text
    assert "It is conditioned on class and text only" in card.text
    assert str(tmp_path) not in card.content and str(output_dir) not in card.content
    code = re.search("```python\n(.*?)```", card.text, re.DOTALL)[1]
    assert "guidance_scale=2" in code
    (tmp_path / "code.py").write_text(code.replace("me/fish", str(tmp_path / "laid")))
    away = {key: value for key, value in environment().items() if key != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-P", "code.py"], cwd=tmp_path, env=away, capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path / "sample.png").exists(), done.stderr[-2000:]


def test_another_encoder_or_other_classes_are_no_reason_to_go_on(trained, encoder_folder, tmp_path):
    from transformers import AutoModel

    output_dir, flags = trained
    shutil.copytree(output_dir, tmp_path / "out")
    shutil.copytree(encoder_folder, tmp_path / "encoder")
    model = AutoModel.from_pretrained(encoder_folder)
    with torch.no_grad():
        model.embeddings.word_embeddings.weight.add_(0.1)
    model.save_pretrained(tmp_path / "encoder")
    flags = {**flags, "max_train_steps": 6}
    text = launch("train_unet.py", tmp_path / "out", expect=2, **{**flags, "text_encoder": tmp_path / "encoder"})
    assert "was trained with other conditions" in text
    shutil.copytree(flags["train_data_dir"], tmp_path / "data")
    os.rename(tmp_path / "data" / "bird", tmp_path / "data" / "zebra")  # the same images, another order of classes
    config = (tmp_path / "out" / "train_unet.yaml").read_text()
    (tmp_path / "out" / "train_unet.yaml").write_text(config.replace(str(flags["train_data_dir"]), f"{tmp_path}/data"))
    text = launch("train_unet.py", tmp_path / "out", expect=2, **{**flags, "train_data_dir": tmp_path / "data"})
    assert "was trained with other conditions: different class names" in text
    assert "resumed from step 4" in launch("train_unet.py", output_dir, **flags)


def test_training_never_asks_the_encoder_again(trained, monkeypatch):
    """Grids are drawn with embeddings from the cache: the encoder would fill a GPU that trains."""
    pipe = LatentDDPMPipeline.from_pretrained(trained[0] / "pipeline")
    embeds, mask = pipe.encode_prompt(["a red fish", "a blue bird"])
    nothing, nothing_mask = pipe.encode_prompt("")
    wanted = draw(pipe)
    monkeypatch.setattr(pipe, "encode_prompt", None)
    given = {"prompt": None, "prompt_embeds": embeds, "prompt_attention_mask": mask}
    given |= {"negative_prompt_embeds": nothing, "negative_prompt_attention_mask": nothing_mask}
    torch.testing.assert_close(draw(pipe, **given), wanted, rtol=1e-4, atol=1e-4)
    alone = {name: value for name, value in given.items() if "negative" not in name}
    draw(pipe, **{**alone, "guidance_scale": 1.0})  # for which nothing is not needed


@pytest.fixture(scope="module")
def evaluate_script():
    """scripts/evaluate.py as a module."""
    spec = importlib.util.spec_from_file_location("evaluate_script", ROOT / "scripts" / "evaluate.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def test_samples_asked_for_in_words_are_judged_by_the_images_classes(trained, data, tmp_path, evaluate_script):
    """Also in words of which the model knows nothing, and where the pipeline has no classes of its own."""
    pipe = LatentDDPMPipeline.from_pretrained(trained[0] / "pipeline")
    asked = []
    told_in_words = SimpleNamespace(
        class_names=None,
        takes_text=True,
        conditioning_channels=0,
        encode_prompt=lambda prompts: asked.extend(prompts) or pipe.encode_prompt(prompts),
    )
    alone = SimpleNamespace(is_main_process=True, wait_for_everyone=lambda: None)
    config = config_of(data, "unused", tmp_path, caption_templates=["{} picture"])
    given, labels, enlarges = evaluate_script.conditions_of(config, told_in_words, 30, None, alone)
    assert not enlarges
    assert set(given) == {"prompt_embeds", "prompt_attention_mask"}
    assert sorted(asked) == ["bird picture", "fish picture"] and 0 < labels.sum() < 30
    for kind in (0, 1):
        assert (given["prompt_embeds"][labels == kind] == given["prompt_embeds"][labels == kind][0]).all()
    assert not torch.equal(*(given["prompt_embeds"][labels == kind][0] for kind in (0, 1)))


def test_many_prompts_are_encoded_once_each_and_in_parts(trained, evaluate_script):
    script = evaluate_script
    pipe = LatentDDPMPipeline.from_pretrained(trained[0] / "pipeline")
    prompts = [" ".join(["a"] * (1 + n % 29)) for n in range(150)]
    found = script.embedded(pipe, prompts)
    assert len(found["prompt_embeds"]) == 150
    for n in (0, 28, 29, 149):
        embeds, mask = pipe.encode_prompt(prompts[n])
        length = embeds.shape[1]
        torch.testing.assert_close(found["prompt_embeds"][n, :length], embeds[0], rtol=1e-4, atol=1e-5)
        assert found["prompt_attention_mask"][n].sum() == mask.sum()


def test_an_encoder_that_nobody_else_has_is_not_published_by_name(trained, tmp_path):
    flags = {**trained[1], "export_text_encoder": "false", "push_to_hub": "true", "hub_model_id": "me/fish"}
    words = command("train_unet.py", tmp_path, **flags)
    settings = {"HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_x", "HF_HOME": str(tmp_path)}
    done = finished_script(words, {**environment(), **settings})
    assert done.returncode == 2 and "nobody else has the text_encoder" in done.stderr


def test_digits_in_words_of_the_embedded_encoder(tmp_path):
    config, names = ROOT / "configs" / "mnist_text.yaml", ["validation_steps", "checkpointing_steps", "max_train_steps"]
    flags = {"config": config, "codebook_start": 2, **dict.fromkeys(names, 4)}
    launch("train_autoencoder.py", tmp_path, **flags)
    del flags["codebook_start"]
    launch("train_unet.py", tmp_path, **flags)
    pipe = LatentDDPMPipeline.from_pretrained(tmp_path / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    seed = torch.Generator().manual_seed(0)
    images = pipe(prompt=["a seven", "the number 7"], generator=seed, num_inference_steps=2, output_type="pt").images
    assert images.shape == (2, 1, 32, 32) and pipe.text_encoder.config.hidden_size == 384
