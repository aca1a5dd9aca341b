"""Training horizons: from whatever holds a model's settings, of subclasses, wrappers and functions; what is said where none is known."""

from __future__ import annotations

import collections
import dataclasses
import sys
import types

import pytest
import torch
from tiny_models import VideoDiT, dit_inputs, randomise, wan, wan_inputs
from torch import nn

import lvsa_compile
from lvsa_compile.horizons import HORIZONS, Unreadable, horizon_of, rows_of
from lvsa_compile.passes.model_settings import reader

WAN = rows_of("WanModel")


@dataclasses.dataclass
class Data:
    in_channels: int


class Slots:
    __slots__ = ("in_dim",)

    def __init__(self, channels):
        self.in_dim = channels


class OnClass:
    in_channels = 48


class Fetched:
    """Settings that are there only when asked for."""

    def __init__(self, **inside):
        self._inside = inside

    def __getattr__(self, name):
        if name.startswith("_") or name not in self._inside:
            raise AttributeError(name)
        return self._inside[name]


class Anything:
    """Answers every question, with nothing of use."""

    def __getattr__(self, name):
        return None


class Raises:
    @property
    def in_channels(self):
        raise RuntimeError("not loaded")


class Pydantic:
    """As pydantic's models look: fields in the instance, and class attributes that are no settings."""

    model_fields = ("in_channels",)

    def __init__(self, channels):
        self.__dict__["in_channels"] = channels


class Missing(collections.abc.MutableMapping):
    """As omegaconf's DictConfig: a mandatory value that is not there raises."""

    def __init__(self, **inside):
        self.inside = inside

    def __getitem__(self, name):
        if self.inside[name] == "???":
            raise ValueError(f"missing mandatory value: {name}")
        return self.inside[name]

    def __setitem__(self, name, value):
        raise NotImplementedError

    __delitem__ = None

    def __iter__(self):
        return iter(self.inside)

    def __len__(self):
        return len(self.inside)


def with_config(config, name="config", **attributes):
    model = nn.Module()
    object.__setattr__(model, name, config)
    for key, value in attributes.items():
        setattr(model, key, value)
    return model


HOLD_48 = {
    "dict": {"in_channels": 48},
    "namespace": types.SimpleNamespace(in_dim=48),
    "attributes of its class": type("Config", (), {"in_channels": 48})(),
    "attribute of a base": type("Config", (OnClass,), {})(),
    "a class": None,
    "dataclass": Data(48),
    "slots": Slots(48),
    "__getattr__": Fetched(in_dim=48),
    "pydantic": Pydantic(48),
    "mapping": Missing(in_channels=48, other="???"),
    "nested": {"arch": {"in_channels": 48}, "in_channels_note": "x"},
    "nested in objects": types.SimpleNamespace(model=Data(48), depth=30),
    "float of a file": {"in_channels": 48.0},
    "named tuple": collections.namedtuple("Config", "in_channels depth")(48, 2),
}


@pytest.mark.parametrize("name", HOLD_48)
def test_whatever_holds_the_settings(name):
    model = with_config(HOLD_48[name]) if name != "a class" else with_config(None, in_dim=48)
    assert horizon_of(WAN, reader(model)).frames == 31


@pytest.mark.parametrize("attribute", ["cfg", "model_config", "params", "args"])
def test_configs_go_by_other_names(attribute):
    assert horizon_of(WAN, reader(with_config({"in_dim": 48}, attribute))).frames == 31
    assert horizon_of(WAN, reader(with_config({"in_dim": 16}, attribute))).frames == 21


@pytest.mark.parametrize(
    "config",
    [None, {}, Anything(), Raises(), Missing(in_channels="???"), {"in_channels": None}, {"in_channels": "many"}, {"in_channels": True},
     {"dit": {"in_dim": 48}, "vae": {"in_channels": 3}}, "config.json", types.SimpleNamespace(in_channels=48, in_dim=16)],
    ids=lambda config: type(config).__name__,
)  # fmt: skip
def test_a_question_that_cannot_be_answered_is_never_the_next_row(config):
    with pytest.raises(Unreadable, match="in_channels or in_dim"):
        horizon_of(WAN, reader(with_config(config)))


def test_a_config_of_something_else_is_not_believed_against_the_model():
    with pytest.raises(Unreadable):
        horizon_of(WAN, reader(with_config(types.SimpleNamespace(in_channels=3, lr=1e-4), "args", in_dim=48)))


def test_channels_that_come_out_tell_the_model_where_conditions_come_in_beside():
    assert horizon_of(WAN, reader(with_config({"in_dim": 100, "out_dim": 48}))).frames == 31
    assert horizon_of(WAN, reader(with_config({"in_dim": 36, "out_dim": 16}))).frames == 21


def test_settings_of_the_model_come_before_those_of_its_parts():
    assert horizon_of(WAN, reader(with_config({"vae": {"in_channels": 3}}, in_dim=48))).frames == 31


def test_skyreels_is_told_from_wan_by_a_setting_of_its_own():
    assert horizon_of(WAN, reader(with_config({"in_dim": 16, "inject_sample_info": False}))).frames == 25


def test_every_row_can_win():
    for name in {row.class_name for row in HORIZONS}:
        rows = rows_of(name)
        assert rows[-1].applies is not rows[0].applies or len(rows) == 1, name
        assert all(row.frames > 0 and row.seed for row in rows)


def horizon_told(function, *args, **kwargs):
    with torch.no_grad():
        torch.compile(function, backend="lvsa", options={"inner": "eager"})(*args, **kwargs)
    return lvsa_compile.reports()[-1].horizon


class HostWan(type(wan())):
    pass


class Around(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.anything = model

    def forward(self, **inputs):
        return self.anything(**inputs)


def subclass(channels):
    torch.manual_seed(0)
    config = dict(wan(in_channels=channels, out_channels=channels).config)
    return randomise(HostWan(**{name: value for name, value in config.items() if not name.startswith("_")}))


@pytest.mark.parametrize(("channels", "frames"), [(16, 21), (48, 31)])
def test_subclasses_wrappers_and_functions(channels, frames):
    model, inputs = subclass(channels), wan_inputs(channels=channels)

    def model_fn(models, scale, **inputs):
        return models["dit"](**inputs)[0] * scale

    def blocks_fn(dit, hidden_states, timestep):
        x = dit.patch_embedding(hidden_states).flatten(2).transpose(1, 2)
        emb, text = torch.zeros(1, 6, x.shape[-1]), torch.zeros(1, 5, x.shape[-1])
        return dit.blocks[0](x, text, emb + timestep, dit.rope(hidden_states))

    told = [
        horizon_told(model, **inputs),
        horizon_told(Around(Around(model)), **inputs),
        horizon_told(lambda **inputs: model(**inputs), **inputs),
        horizon_told(model_fn, {"dit": model, "vae": nn.Linear(1, 1)}, 2.0, **inputs),
        horizon_told(blocks_fn, model, inputs["hidden_states"], inputs["timestep"]),
    ]
    assert [text.split(" (")[0] for text in told] == [f"{frames} latent frames"] * 5
    assert lvsa_compile.reports()[0].model == "HostWan"


def test_a_function_whose_argument_holds_the_model_and_does_the_rest_itself():
    """As DiffSynth's model functions: of the model only blocks are called."""
    model = named("WanModel", in_dim=48)

    def model_fn(pipe, latents, timestep, text):
        return pipe.dit.block(pipe.dit, pipe.dit.patch(latents).flatten(2).transpose(1, 2), (9, 3, 4), text) + timestep

    assert "31 latent frames (table: WanModel" in horizon_told(model_fn, types.SimpleNamespace(dit=model), *dit_inputs())


def named(name, **attributes):
    """A hand-written model of a class of that name."""
    model = randomise(VideoDiT())
    model.__class__ = type(name, (VideoDiT,), {"__module__": "a_repository.model"})
    for key, value in attributes.items():
        setattr(model, key, value)
    return model


@pytest.mark.parametrize(
    ("name", "attributes", "frames"),
    [("WanModel", {"in_dim": 16}, 21), ("WanModel", {"in_dim": 48}, 31), ("WanModel", {"in_dim": 16, "inject_sample_info": True}, 25),
     ("HYVideoDiffusionTransformer", {}, 33), ("AsymmDiTJoint", {}, 28), ("StepVideoModel", {}, 36), ("MiniTrainDIT", {}, 24),
     ("LTXVModel", {"in_channels": 128}, 21), ("MiniMaxH3Transformer3DModel", {}, 107), ("MMDiTModel", {}, 33)],
)  # fmt: skip
def test_names_of_original_repositories(name, attributes, frames):
    assert horizon_told(named(name, **attributes), *dit_inputs()).startswith(f"{frames} latent frames (table: {name}")


def test_what_is_said_where_a_setting_cannot_be_read():
    model = named("WanModel")
    said = "which its config and attributes do not tell, or tell in two ways"
    assert horizon_told(model, *dit_inputs()) == f"unknown: the horizon of WanModel depends on in_channels or in_dim, {said}"
    (site,) = lvsa_compile.reports()[0].sites
    assert site.reason == "horizon_unknown"
    assert "WanModel" in site.detail
    assert "reference_frames" in site.remedy


def test_a_block_of_a_known_model_is_never_said_not_to_be_in_the_table():
    """A block gets tokens and shows no video; a model of one's own beside a known one in a file does, and is not taken for its part."""
    home = types.ModuleType("a_package.transformer")
    sys.modules["a_package.transformer"] = home

    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = VideoDiT().attention

        def forward(self, tokens):
            return self.inner(tokens)

    try:
        Part.__module__ = home.__name__
        for names, told in ((["StepVideoModel"], "StepVideoModel"), (["WanModel", "VaceWanModel"], "VaceWanModel or WanModel")):
            for name in [name for name in vars(home) if not name.startswith("__")]:
                delattr(home, name)
            vars(home).update({name: type(name, (), {"__module__": home.__name__}) for name in [*names, "Part"]})
            torch._dynamo.reset()
            whole = f"unknown: Part is a part of {told}, and only the whole model tells its horizon"
            assert horizon_told(randomise(Part()), torch.randn(1, 108, 16)) == whole
        home.StepVideoModel = type("StepVideoModel", (), {"__module__": home.__name__})
        own = randomise(VideoDiT())
        own.__class__ = type("MyOwnDiT", (VideoDiT,), {"__module__": home.__name__})
        torch._dynamo.reset()
        assert horizon_told(own, *dit_inputs()) == "unknown: MyOwnDiT is not in the table of training horizons"
    finally:
        del sys.modules["a_package.transformer"]


def test_of_two_models_among_the_arguments_the_one_whose_pieces_are_called_counts():
    models = types.SimpleNamespace(animate=named("WanAnimateModel"), dit=named("WanModel", in_dim=48))

    def model_fn(models, latents, timestep, text):
        tokens = models.dit.patch(latents).flatten(2).transpose(1, 2)
        return models.dit.attention(tokens) + timestep

    assert "31 latent frames" in horizon_told(model_fn, models, *dit_inputs())

    student = randomise(VideoDiT())
    torch._dynamo.reset()
    teacher = named("HunyuanVideo")
    told = horizon_told(lambda teacher, *inputs: student(*inputs), teacher, *dit_inputs())
    assert told == "unknown: VideoDiT is not in the table of training horizons"


@pytest.mark.parametrize(
    "module", ["transformer_wan", "transformer_ltx", "transformer_hunyuan_video", "transformer_mochi", "cogvideox_transformer_3d"]
)
def test_blocks_of_diffusers_are_known(module):
    import importlib

    from lvsa_compile.passes.find_horizon import _wholes

    home = importlib.import_module(f"diffusers.models.transformers.{module}")
    blocks = [value for name, value in vars(home).items() if name.endswith("Block") and value.__module__ == home.__name__]
    assert blocks
    assert all(_wholes([block]) for block in blocks)
    assert not _wholes([nn.Linear])
