"""Networks: what each metric makes of embeddings, by stand-ins whose answer is known; and loading from folders, by tiny random models."""

from __future__ import annotations

import sys
import types

import numpy
import pytest
import synthetic_videos as synthetic
import torch
from scipy.stats import linregress
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig, Dinov2Config, Dinov2Model, PreTrainedTokenizerFast
from typer.testing import CliRunner

from lvsa_compile.cli import app
from lvsa_compile.errors import VideoQualityError
from lvsa_compile.vqeval import Networks, evaluate, load_networks
from lvsa_compile.vqeval.scores import Metric, beside

pytestmark = pytest.mark.lab

FRAMES = synthetic.as_tensor(synthetic.healthy()[:40])


def turned(angles):
    """Unit vectors of two numbers."""
    return numpy.stack([numpy.cos(angles), numpy.sin(angles)], 1).astype(numpy.float32)


def by_brightness(frames):
    """An embedding that anyone can compute: an angle that goes with the mean brightness."""
    return turned(frames.reshape(len(frames), -1).mean(1) / 255)


def metric(scores, dimension, name):
    return next(metric for metric in scores.details["dimensions"][dimension].metrics if metric.name == name)


def ramped(brightness):
    """A video of single grey values."""
    return numpy.broadcast_to(numpy.asarray(brightness, numpy.float32)[:, None, None, None], (len(brightness), 3, 32, 32))


def test_text_is_the_mean_cosine_less_a_drift_that_is_sure():
    networks = Networks(clip_images=by_brightness, clip_text=lambda texts: turned(numpy.zeros(len(texts))))
    steady = evaluate(ramped([0.8] * 30), prompt="a dog", networks=networks)
    assert steady.text == pytest.approx(100, abs=0.1)  # cos(0.8) is above 0.45
    dark = Networks(clip_images=by_brightness, clip_text=lambda texts: turned(numpy.full(len(texts), 2.2)))
    value = evaluate(ramped([0.9] * 30), prompt="a dog", networks=dark).text
    assert value == pytest.approx(100 * numpy.cos(2.2 - round(0.9 * 255) / 255) / 0.45, abs=0.2)
    falling = numpy.linspace(0.95, 0.9, 30)
    scores = evaluate(ramped(falling), prompt="a dog", networks=dark)
    places = numpy.arange(29)
    cosines = numpy.cos(2.2 - numpy.round(falling[:-1] * 255) / 255)
    slope = linregress(places, cosines).slope
    assert slope < 0
    assert scores.text == pytest.approx(100 * cosines.mean() / 0.45 - min(15, 1000 * -slope), abs=0.3)
    assert "text" not in scores.missing
    assert "text" in scores.weights


def test_flicker_and_consistency_are_cosines_of_neighbours():
    jumps = numpy.tile([0.2, 0.5], 15)
    scores = evaluate(ramped(jumps), networks=Networks(clip_images=by_brightness, dino_images=by_brightness))
    apart = 1 - numpy.cos(round(0.5 * 255) / 255 - round(0.2 * 255) / 255)
    assert metric(scores, "temporal", "clip_flicker").measured == pytest.approx(apart, abs=1e-4)
    assert metric(scores, "temporal", "clip_flicker").value == pytest.approx(100 * (1 - apart / 0.15), abs=0.2)
    for name in ("subject", "background"):
        assert metric(scores, "temporal", name).value == pytest.approx(100 * (1 - apart), abs=0.1)
    assert metric(scores, "temporal", "flicker").weight == metric(scores, "temporal", "clip_flicker").weight == 0.125


def test_a_loop_that_only_an_embedding_sees_is_seen():
    """Pictures that never recur, of which the embedding says that they go round."""
    rounds = {"place": 0}

    def circling(frames):
        place = numpy.arange(len(frames)) // 2 + numpy.arange(len(frames)) % 2
        rounds["place"] += 1
        return turned(2 * numpy.pi * place / 8)

    plain = evaluate(FRAMES)
    scores = evaluate(FRAMES, networks=Networks(clip_images=circling))
    assert rounds["place"] == 1, "a clip is embedded once"
    assert metric(scores, "loop", "clip_cycle").value < 10
    assert metric(scores, "loop", "cycle").value > 90
    assert scores.loop < plain.loop - 20


def test_ratings_of_frames_are_ramps():
    likes = Networks(
        clip_images=lambda frames: turned(numpy.zeros(len(frames))),
        clip_text=lambda texts: turned(numpy.array([0.0 if text.split()[0] in ("Good", "Ugly") else 0.1 for text in texts])),
        brisque=lambda frames: numpy.full(len(frames), 20.0),
        niqe=lambda frames: numpy.full(len(frames), 4.0),
        contrast=100.0,
    )
    scores = evaluate(FRAMES, networks=likes)
    good = 1 / (1 + numpy.exp(-100 * (1 - numpy.cos(0.1))))
    assert metric(scores, "spatial", "brisque").value == pytest.approx(75)
    assert metric(scores, "spatial", "niqe").value == pytest.approx(75)
    assert metric(scores, "spatial", "clip_iqa").value == pytest.approx(100 * good, abs=0.01)
    assert metric(scores, "dynamics", "aesthetic").value == pytest.approx(100 * (1 - good), abs=0.01)


def test_a_stand_in_counts_whole_alone_and_half_beside():
    stand_in, network, none = Metric("a", 0.4, 50.0, surrogate=True), Metric("b", 0.4, 70.0), Metric("b", 0.4, None, why="no")
    assert [found.weight for found in beside(stand_in, network)] == [0.2, 0.2]
    assert [found.weight for found in beside(stand_in, none)] == [0.4, 0.4]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Tiny CLIP and DINOv2 with random weights, saved as their users have them."""
    folder = tmp_path_factory.mktemp("networks")
    torch.manual_seed(0)
    small = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    text = CLIPTextConfig(vocab_size=8, max_position_embeddings=6, eos_token_id=1, **small)
    vision = CLIPVisionConfig(image_size=32, patch_size=8, **small)
    CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=12)).save_pretrained(folder / "clip")
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", "a", "dog", "cat"])}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])  # CLIP's vector is that of its end
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    tokenizer.save_pretrained(folder / "clip")
    Dinov2Model(Dinov2Config(image_size=28, patch_size=14, **(small | {"mlp_ratio": 2}))).save_pretrained(folder / "dinov2")
    return folder


def test_networks_from_folders_give_what_transformers_gives(folders):
    networks = load_networks(clip=folders / "clip", dinov2=folders / "dinov2")
    frames = (numpy.random.default_rng(0).random((3, 32, 32, 3)) * 255).astype(numpy.uint8)  # of CLIP's own size: nothing is scaled
    model = CLIPModel.from_pretrained(folders / "clip")
    mean, std = numpy.array([0.48145466, 0.4578275, 0.40821073]), numpy.array([0.26862954, 0.26130258, 0.27577711])
    pixels = torch.tensor((frames / 255 - mean) / std).permute(0, 3, 1, 2).float()
    with torch.no_grad():
        wanted = model.visual_projection(model.vision_model(pixels).pooler_output)
    wanted = (wanted / wanted.norm(dim=1, keepdim=True)).numpy()
    assert numpy.allclose(networks.clip_images(frames), wanted, atol=1e-5)
    vectors = networks.clip_text(["a dog", "a cat and a very long list of words"])
    assert vectors.shape == (2, 12)
    assert numpy.allclose((vectors**2).sum(1), 1, atol=1e-5)
    assert not numpy.allclose(vectors[0], vectors[1])
    assert networks.contrast == pytest.approx(float(model.logit_scale.detach().exp()))
    assert networks.dino_images(frames).shape == (3, 16)
    scores = evaluate(FRAMES, prompt="a dog", networks=networks)
    assert all(getattr(scores, name) is not None for name in ("spatial", "temporal", "loop", "artefacts", "dynamics", "text"))
    assert {name for name in scores.missing if "." in name} == {"spatial.brisque", "spatial.niqe", "artefacts.anatomy"}


def test_the_command_takes_folders(folders, tmp_path):
    path = synthetic.written(tmp_path / "a.mp4", synthetic.healthy()[:20])
    arguments = ["--clip", folders / "clip", "--prompt", "a dog", "--csv", tmp_path / "a.csv", "--weights", "loop=1,text=1"]
    run = CliRunner().invoke(app, ["vqeval", str(path), *map(str, arguments)])
    assert run.exit_code == 0, run.output
    row = (tmp_path / "a.csv").read_text().splitlines()[1].split(",")
    loop, text = float(row[4]), float(row[7])
    assert float(row[1]) == pytest.approx((loop + text) / 2, abs=0.01)


@pytest.mark.parametrize(("given", "text"), [
    ({"clip": "nowhere"}, "clip 'nowhere': there is no such folder. Give a folder with config.json, model.safetensors and the tokenizer"),
    ({"dinov2": "empty"}, "dinov2 'empty': has no config.json. Give a folder with config.json and model.safetensors of a DINOv2 model"),
    ({"clip": "broken"}, "cannot be loaded: "),
    ({"clip": "dinov2"}, "a Dinov2Model does not compare images with text. Give a folder"),
    ({"dinov2": "clip"}, "a CLIPModel is no DINOv2. Give a folder"),
    ({"pyiqa": "empty"}, "pyiqa is not installed. pip install pyiqa"),
])  # fmt: skip
def test_folders_that_hold_something_else_are_errors_of_one_line(folders, tmp_path, monkeypatch, given, text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/config.json").write_text("{}")
    ((name, value),) = given.items()
    with pytest.raises(VideoQualityError) as raised:
        load_networks(**{name: folders / value if value in ("clip", "dinov2") else value})
    assert text in str(raised.value)
    assert "\n" not in str(raised.value)


def test_weights_that_would_be_unpickled_are_not_read(folders, tmp_path):
    model = Dinov2Model.from_pretrained(folders / "dinov2")
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(VideoQualityError, match="safetensors"):
        load_networks(dinov2=tmp_path)


def test_pyiqa_reads_from_the_folder_alone(tmp_path, monkeypatch):
    """A stand-in of pyiqa's interface: version 0.1.16 finds files in its cache, and fetches those that are not there."""
    (tmp_path / "niqe_modelparameters.mat").write_bytes(b"")
    download = types.ModuleType("pyiqa.utils.download_util")
    download.DEFAULT_CACHE_DIR = "the user's"
    asked = []

    def create_metric(name, device):
        asked.append((name, device, download.DEFAULT_CACHE_DIR))
        return lambda picture: picture.mean()[None, None] * 10

    made = {"pyiqa": types.ModuleType("pyiqa"), "pyiqa.utils": types.ModuleType("pyiqa.utils"), "pyiqa.utils.download_util": download}
    made["pyiqa"].create_metric = create_metric
    made["pyiqa"].__spec__ = types.SimpleNamespace()
    made["pyiqa.utils"].download_util = download
    for name, module in made.items():
        monkeypatch.setitem(sys.modules, name, module)
    networks = load_networks(pyiqa=tmp_path)
    assert asked == [("niqe", "cpu", str(tmp_path))]
    assert download.DEFAULT_CACHE_DIR == "the user's"
    assert networks.brisque is None
    small = evaluate(ramped([0.4] * 12), networks=networks)
    assert small.missing["spatial.niqe"] == "pyiqa has no number for frames as small as these"
    scores = evaluate(numpy.broadcast_to(ramped([0.4] * 12)[:, :, :1, :1], (12, 3, 96, 96)), networks=networks)
    assert metric(scores, "spatial", "niqe").value == pytest.approx(100 * (10 - 4) / 8, abs=0.2)
    assert "spatial.brisque" in scores.missing
    (tmp_path / "none").mkdir()
    with pytest.raises(VideoQualityError, match="holds none of pyiqa's files"):
        load_networks(pyiqa=tmp_path / "none")
