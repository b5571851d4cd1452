"""To add a method is one file and one line of its registry: a toy of each kind, through every command that reads registries."""

import importlib
import json
from dataclasses import dataclass, replace

import numpy as np
import pytest
from PIL import Image
from tiny import ONE_LEVEL, sd_pipeline

from afa import Ensemble, UserError
from afa.aggregators.options import AggregatorOptions, SABWOptions
from afa.aggregators.registry import AGGREGATORS, AggregatorType
from afa.aggregators.settings import option_fields
from afa.checkpoint.manifest import read_manifest
from afa.cli.main import main
from afa.evaluation.names import known_methods
from afa.evaluation.recorded import recorded_settings
from afa.evaluation.results import Results
from afa.images import read_metadata
from afa.merging.registry import MERGES
from afa.metrics.registry import METRICS, MetricEntry
from afa.sampling.registry import SAMPLING_METHODS, SamplingMethod
from afa.settings import option, read_recipe
from afa.training.objective_registry import OBJECTIVES, ObjectiveEntry
from afa.training.run import finished
from afa.training.settings import TrainSettings
from afa.webui.engine import find_methods

FILES = {
    "toy_aggregator": """
import torch
from torch import nn
from afa.aggregators.base import Aggregator

class Toy(Aggregator):
    def __init__(self, *, experts, channels, time_width, text_width, toy_strength):
        super().__init__()
        self.logits = nn.Parameter(toy_strength * (torch.arange(experts) == 0))

    def weigh(self, features, temb, text, text_mask=None):
        batch, _, height, width = features[0].shape
        return self.logits.softmax(0).view(1, -1, 1, 1).expand(batch, -1, height, width)
""",
    "toy_aggregator_options": """
from dataclasses import dataclass
from afa.aggregators.options import AggregatorOptions
from afa.settings import option, read_recipe

@dataclass(frozen=True)
class ToyOptions(AggregatorOptions):
    toy_strength: float = option(2.0, least=0, most=9, help="how far the first expert is ahead at first")
""",
    "toy_sampling": """
from dataclasses import dataclass
from afa.sampling.base import Alone
from afa.sampling.options import MethodOptions
from afa.sampling.sample import PipelineSampler, in_frame
from afa.settings import option, read_recipe

@dataclass(frozen=True)
class ToyOptions(MethodOptions):
    place: int = option(0, least=0, most=9, help="of the expert that draws")

def make(ensemble, options):
    return PipelineSampler(in_frame(ensemble, Alone(ensemble.denoiser, options.place)))
""",
    "toy_merge": """
from afa.merging.rules import Merge

def toy_merge(tensors):
    return tensors[0].clone()

TOY = Merge(toy_merge, title="toy merge", help="the expert itself", row="the best expert alone", experts=1)
""",
    "toy_metric": """
import numpy as np
from afa.metrics.base import ImageMetric

class Red(ImageMetric):
    names = ("toy_metric",)
    identity = {"toy_metric": 1}

    def score(self, pictures):
        return {"toy_metric": np.asarray([picture.image[..., 0].mean() / 255 for picture in pictures])}

def make(resources):
    return Red()
""",
    "toy_objective": """
from afa.training.objectives import Objective

class Absolute(Objective):
    def __init__(self, noising):
        self.noising = noising

    def loss(self, work):
        return (work.prediction - self.noising.target(work.batch)).abs().mean((1, 2, 3))

def make(context):
    return Absolute(context.noising)
""",
}


def entries():
    """One line of each registry."""
    modules = (importlib.import_module(name) for name in ("toy_aggregator_options", "toy_sampling", "toy_merge"))
    toy_aggregator_options, toy_sampling, toy_merge = modules
    places = {"candidates": lambda names, ranking: [{"place": place} for place in range(len(names))]}
    says = {"title": "toy sampler", "help": "One expert draws.", "row": "one expert draws", "options": toy_sampling.ToyOptions}
    return [
        (AGGREGATORS, "toy", AggregatorType("toy_aggregator:Toy", "the same weights everywhere, learnt", toy_aggregator_options.ToyOptions)),
        (SAMPLING_METHODS, "toy_sampling", SamplingMethod("toy_sampling:make", **says, **places)),
        (MERGES, "toy_merge", toy_merge.TOY),
        (METRICS, "toy_metric", MetricEntry("toy_metric:make", "How red an image is.")),
        (OBJECTIVES, "toy_objective", ObjectiveEntry("toy_objective:make", "the absolute error")),
    ]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The toys' files and lines; two experts, captioned images."""
    folder = tmp_path_factory.mktemp("toys")
    for name, text in FILES.items():
        (folder / f"{name}.py").write_text(text)
    for seed, name in enumerate(("photo", "paint")):
        sd_pipeline(seed, **ONE_LEVEL).save_pretrained(folder / name)
    (folder / "data").mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (8, 32, 32, 3), dtype=np.uint8)
    for index, image in enumerate(pixels):
        Image.fromarray(image).save(folder / "data" / f"{index}.png")
        (folder / "data" / f"{index}.txt").write_text(f"picture {index}")
    (folder / "prompts.txt").write_text("a cat\na dog\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        for registry, name, entry in entries():
            patch.setitem(registry, name, entry)
        yield folder


@pytest.fixture(scope="module")
def trained(world):
    """An ensemble of toy aggregators, trained by `afa train` with the toy objective."""
    experts = ["--experts", str(world / "photo"), str(world / "paint"), "--aggregator", "toy", "--toy-strength", "3"]
    run = ["--objective", "mse+toy_objective", "--steps", "4", "--batch-size", "2", "--lr", "0.1", "--warm-up", "0", "--ema", "0"]
    place = ["--data", str(world / "data"), "--resolution", "32", "--held-out", "4", "--device", "cpu", "--output", str(world / "afa")]
    assert main(["train", *experts, *run, *place]) == 0
    return world / "afa"


def test_inspect_counts_a_toy_aggregator(world, capsys):
    for flags, strength in ([], 2.0), (["--toy-strength", "4"], 4.0):
        assert main(["inspect", str(world / "photo"), str(world / "paint"), "--aggregator", "toy", "--json", *flags]) == 0
        found = json.loads(capsys.readouterr().out)["aggregators"]
        assert found["kind"] == "toy" and found["options"] == {"toy_strength": strength} and found["parameters"] == 2 * found["fused"]


def test_a_toy_aggregator_is_trained_by_a_toy_objective(trained):
    manifest = read_manifest(trained)
    assert manifest.aggregator["kind"] == "toy" and manifest.aggregator["options"] == {"toy_strength": 3.0}
    assert manifest.training["settings"]["toy_strength"] == 3.0
    assert set(manifest.training["history"][-1]["terms"]) == {"mse", "toy_objective"}
    learnt = [aggregator.logits.detach() for aggregator in Ensemble.load(trained).denoiser.aggregators.values()]
    assert any(weights[0] < 3 for weights in learnt)  # where one expert began alone, the others are asked


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--aggregator toy --hidden 64", "--hidden 64 is no option of --aggregator toy; it has toy_strength"),
        ("--aggregator stitch --toy-strength 1", "--toy-strength 1.0 is no option of --aggregator stitch; it has hidden, heads"),
        ("--aggregator toy --toy-strength 10", "--toy-strength 10 is too large; the most is 9"),
    ],
)
@pytest.mark.parametrize("verb", ["train", "inspect"])
def test_an_option_that_the_chosen_aggregator_has_not_is_refused(world, capsys, verb, flags, sentence):
    experts = [str(world / "photo"), str(world / "paint")]
    place = ["--data", str(world / "data"), "--output", str(world / "no"), "--device", "cpu"]
    assert main(["inspect", *experts, *flags.split()] if verb == "inspect" else ["train", "--experts", *experts, *place, *flags.split()]) == 2
    assert sentence in capsys.readouterr().err
    assert not (world / "no").exists()


def test_the_help_names_the_options_of_a_toy_aggregator_and_who_has_them(world, capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "of toy: how far the first expert is ahead at first (default: 2.0)" in said
    assert "of sabw, stitch: width inside the aggregators" in said


def test_a_finished_run_of_a_toy_aggregator_is_known_again(world, trained, capsys):
    settings = read_manifest(trained).training["settings"]
    again = TrainSettings.current()(**settings)
    assert finished(again)["steps"] == 4
    with pytest.raises(UserError, match="begun with --toy-strength 3"):
        finished(replace(again, toy_strength=1.0))


def test_a_recipe_may_set_an_option_of_a_toy_aggregator_and_a_comparison_takes_the_recorded_one(world, trained, tmp_path):
    (tmp_path / "mine.toml").write_text('aggregator = "toy"\ntoy-strength = 5\n')
    found = read_recipe("train", str(tmp_path / "mine.toml"), TrainSettings.current())
    assert found == {"aggregator": "toy", "toy_strength": 5.0}
    recorded = recorded_settings(read_manifest(trained), trained)
    assert recorded["toy_strength"] == 3.0
    settings = TrainSettings.current()(**recorded, experts=["a", "b"], data="x", output="y")
    other = replace(settings, **settings.other_aggregator("sabw"))  # as an ablation changes it: what sabw has not is reset
    assert (other.aggregator, other.toy_strength, other.aggregator_options()) == ("sabw", 2.0, {"dropout": 0.0})


def test_options_that_share_a_name_must_be_declared_alike():
    @dataclass(frozen=True)
    class Other(AggregatorOptions):
        hidden: int = option(64, least=1, most=9999, help="width")

    with pytest.raises(ValueError, match="aggregators 'sabw' and 'other' differ in option 'hidden'"):
        option_fields({"sabw": SABWOptions, "other": Other})


def test_generate_draws_with_a_toy_method_and_its_options(world, tmp_path):
    sources = [str(world / "photo"), str(world / "paint"), "--method", "toy_sampling", "--method-option", "place=1"]
    call = ["--prompt", "a cat", "--steps", "1", "--width", "32", "--height", "32", "--device", "cpu", "--output", str(tmp_path / "out")]
    assert main(["generate", *sources, *call]) == 0
    said = read_metadata(tmp_path / "out" / "00000-00.png")
    assert said["method"] == "toy_sampling" and said["method_options"] == {"place": 1}


def test_a_comparison_has_rows_of_toys_and_a_column_of_the_toy_metric(world, trained):
    what = ["--methods", "toy_sampling", "toy_merge", "--metrics", "toy_metric", "--ensemble", str(trained)]
    size = ["--steps", "1", "--width", "32", "--height", "32", "--guidance", "2", "--tuning", "2", "--device", "cpu"]
    place = ["--protocol", str(world / "prompts.txt"), "--train-data", str(world / "data"), "--output", str(world / "compared")]
    assert main(["evaluate", *what, *size, *place]) == 0
    results = Results.load(world / "compared")
    rows = {method.name: method for method in results.methods}
    assert list(rows) == ["single:photo", "single:paint", "toy_merge", "toy_sampling", "afa"]
    assert rows["toy_sampling"].title == "toy sampler" and "place" in rows["toy_sampling"].note
    assert rows["toy_merge"].title == "toy merge"
    assert all(len(method.runs[0].scores["toy_metric"]) == 2 for method in results.methods) and results.errors == []


def test_lists_and_the_page_name_toys(world, trained, capsys):
    for flag, name, help in (("methods", "toy_merge", "the best expert alone"), ("metrics", "toy_metric", "How red an image is.")):
        assert main(["evaluate", "--ensemble", "x", "--protocol", "x", "--output", "x", f"--{flag}", "list"]) == 0
        assert any(line.split()[:1] == [name] and help in line for line in capsys.readouterr().out.splitlines())
    names = list(known_methods())
    assert names.index("slerp") < names.index("toy_merge") < names.index("toy_sampling") < names.index("afa")
    methods, refused = find_methods(Ensemble.load(trained), trained=True)
    assert list(refused) == ["LoRAtorio"] and (methods["toy_sampling"].title, methods["toy_sampling"].about) == ("Toy sampler", "one expert draws")
