"""The nodes of ComfyUI without its core: what ComfyUI reads of them, how they are installed, and their pure parts."""

import importlib.util
import itertools
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

import afa
from afa import UserError
from afa.cli.main import main
from afa.comfyui.install import NAME, PACK, install
from afa.comfyui.maps import drawn
from afa.comfyui.nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS, AfaEncode, AfaEnsemble
from afa.comfyui.patches import options_of_expert
from afa.comfyui.texts import calls_of_experts
from afa.denoiser.strengths import Strength, factor_maps, for_rows

NODES = list(NODE_CLASS_MAPPINGS.values())
TYPES = {"MODEL", "CLIP", "CONDITIONING", "LATENT", "IMAGE", "MASK", "STRING", "INT", "FLOAT", "BOOLEAN"}


def load_pack(folder=PACK):
    """Import the folder as ComfyUI does: by its place, not by a name."""
    spec = importlib.util.spec_from_file_location("custom_nodes.afa_pack", folder / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("node", NODES, ids=lambda node: node.__name__)
def test_a_node_is_what_comfyui_asks_for(node):
    given = node.INPUT_TYPES()
    assert set(given) <= {"required", "optional", "hidden"}
    for name, (kind, *more) in {**given["required"], **given.get("optional", {})}.items():
        assert kind in TYPES if isinstance(kind, str) else kind == ["(by path)"], name
        assert len(more) <= 1 and all(isinstance(one, dict) for one in more)
    assert set(node.RETURN_TYPES) <= TYPES
    assert len(getattr(node, "RETURN_NAMES", node.RETURN_TYPES)) == len(node.RETURN_TYPES)
    assert callable(getattr(node(), node.FUNCTION)) and node.CATEGORY and node.DESCRIPTION
    assert set(NODE_CLASS_MAPPINGS) == set(NODE_DISPLAY_NAME_MAPPINGS)


def test_the_pack_loads_neither_the_core_nor_torch_before_a_node_runs():
    code = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("pack", {str(PACK / "__init__.py")!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
for node in module.NODE_CLASS_MAPPINGS.values():
    node.INPUT_TYPES()
print(sorted(module.NODE_CLASS_MAPPINGS), [name for name in ("comfy", "folder_paths", "torch", "diffusers") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "['AfaEncode', 'AfaEnsemble', 'AfaStrength', 'AfaWeights'] []\n"


def test_without_the_package_the_pack_says_what_to_install(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "afa"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModuleNotFoundError, match="install it there with: python -m pip install"):
        load_pack()


def test_the_packs_metadata_is_of_this_version():
    said = tomllib.loads((PACK / "pyproject.toml").read_text())
    assert said["project"]["version"] == afa.__version__ and said["project"]["name"] == NAME
    packaged = tomllib.loads((Path(afa.__file__).parents[1] / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert packaged["afa.comfyui"] == ["pack/**"]


# --- the example ---


def examples():
    return [json.loads((PACK / folder / "afa_two_experts.json").read_text()) for folder in ("example_workflows", "api")]


def test_comfyuis_page_offers_what_it_can_open():
    """It lists every .json of example_workflows among its templates, with the .jpg beside it."""
    for path in (PACK / "example_workflows").glob("*.json"):
        assert "nodes" in json.loads(path.read_text()) and path.with_suffix(".jpg").is_file()


def test_the_nodes_of_the_example_do_not_cover_each_other():
    title, places = 30, [(*node["pos"], *node["size"]) for node in examples()[0]["nodes"]]
    for (x, y, width, height), (u, v, wide, high) in itertools.combinations(places, 2):
        assert x + width <= u or u + wide <= x or y + height <= v - title or v + high <= y - title


def test_both_forms_of_the_example_are_one_workflow():
    shown, api = examples()
    links = {link[0]: link for link in shown["links"]}
    assert {str(node["id"]): node["type"] for node in shown["nodes"]} == {name: node["class_type"] for name, node in api.items()}
    for node in shown["nodes"]:
        inputs = dict(api[str(node["id"])]["inputs"])
        for place, one in enumerate(node["inputs"]):
            number, source, slot, target, target_slot, kind = links[one["link"]]
            assert inputs.pop(one["name"]) == [str(source), slot] and (target, target_slot) == (node["id"], place)
            output = next(other for other in shown["nodes"] if other["id"] == source)["outputs"][slot]
            assert output["type"] == kind == one["type"] and number in output["links"]
        values = [value for value in node["widgets_values"] if value != "fixed"]  # what follows a seed in the page alone
        assert values == list(inputs.values())


def test_the_example_fits_the_nodes():
    shown, api = examples()
    for node in api.values():
        if node["class_type"] in NODE_CLASS_MAPPINGS:
            given = NODE_CLASS_MAPPINGS[node["class_type"]].INPUT_TYPES()
            known = given["required"] | given.get("optional", {})
            assert set(given["required"]) <= set(node["inputs"]) <= set(known)
            widgets = [name for name, (kind, *_) in known.items() if kind in ("STRING", "INT", "FLOAT", "BOOLEAN") or isinstance(kind, list)]
            assert [name for name in widgets if name in node["inputs"]] == [name for name in node["inputs"] if name in widgets]
    for node in shown["nodes"]:
        if node["type"] in NODE_CLASS_MAPPINGS:
            assert [one["type"] for one in node["outputs"]] == list(NODE_CLASS_MAPPINGS[node["type"]].RETURN_TYPES)


# --- installing ---


@pytest.fixture
def comfyui(tmp_path):
    for name in ("comfy", "custom_nodes/another"):
        (tmp_path / "ComfyUI" / name).mkdir(parents=True)
    (tmp_path / "ComfyUI" / "main.py").write_text("")
    (tmp_path / "ComfyUI" / "custom_nodes" / "another" / "__init__.py").write_text("theirs")
    return tmp_path / "ComfyUI"


def content(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_nodes_are_copied_and_copied_again(comfyui, capsys):
    before = content(comfyui)
    assert main(["comfyui", "--install", str(comfyui)]) == 0
    target = comfyui / "custom_nodes" / NAME
    assert f"nodes copied to {target}" in capsys.readouterr().out
    after = content(comfyui)
    assert {name: data for name, data in after.items() if NAME not in name} == before
    example = "example_workflows/afa_two_experts"
    for name in ("__init__.py", "pyproject.toml", "README.md", f"{example}.json", f"{example}.jpg", "api/afa_two_experts.json"):
        assert (target / name).read_bytes() == (PACK / name).read_bytes()
    assert sorted(load_pack(target).NODE_CLASS_MAPPINGS) == sorted(NODE_CLASS_MAPPINGS)
    (target / "notes.txt").write_text("mine")
    install(comfyui)
    ours = {name.removeprefix(f"custom_nodes/{NAME}/"): data for name, data in after.items() if NAME in name}
    assert {name: data for name, data in content(target).items() if "__pycache__" not in name} == ours | {"notes.txt": b"mine"}
    # what an older afa wrote is replaced
    record = json.loads((target / ".afa-installed.json").read_text())
    (target / "README.md").write_text("old")
    record["files"]["README.md"] = afa.files.sha256(target / "README.md")
    (target / ".afa-installed.json").write_text(json.dumps(record))
    install(comfyui)
    assert (target / "README.md").read_bytes() == (PACK / "README.md").read_bytes()


@pytest.mark.parametrize("name", ["README.md", "__init__.py", "example_workflows/mine.json"])
def test_files_of_others_are_not_overwritten(comfyui, name, capsys):
    target = install(comfyui)
    (target / name).write_text("mine")
    before = content(comfyui)
    assert main(["comfyui", "--install", str(comfyui)]) == 2
    assert f"{target / name} is not as afa wrote it" in capsys.readouterr().err
    assert content(comfyui) == before


def test_a_folder_that_is_not_comfyuis_or_a_link_is_refused(comfyui, tmp_path, capsys):
    cases = ((tmp_path, "no main.py, comfy, custom_nodes"), (tmp_path / "nowhere", "no folder of ComfyUI"), (comfyui / "custom_nodes", "no main.py"))
    for folder, told in cases:
        assert main(["comfyui", "--install", str(folder)]) == 2
        assert told in capsys.readouterr().err
    (tmp_path / "elsewhere").mkdir()
    (comfyui / "custom_nodes" / NAME).symlink_to(tmp_path / "elsewhere")
    assert main(["comfyui", "--install", str(comfyui)]) == 2
    assert "is a link or a file" in capsys.readouterr().err
    assert list((tmp_path / "elsewhere").iterdir()) == []
    (comfyui / "custom_nodes" / NAME).unlink()
    target = install(comfyui)
    (target / "README.md").unlink()
    (target / "README.md").symlink_to(comfyui / "main.py")
    with pytest.raises(UserError, match="README.md is not as afa wrote it"):
        install(comfyui)
    assert (comfyui / "main.py").read_text() == ""
    (target / "README.md").unlink()
    for record in ("[]", '{"files": 3}', '{"files": {"README.md": 7}}', "{", "null"):
        (target / ".afa-installed.json").write_text(record)
        install(comfyui)


# --- the parts that need no core ---


def test_inputs_are_connected_without_a_gap(tmp_path):
    with pytest.raises(UserError, match="model_2 is not connected, but a later MODEL is"):
        AfaEnsemble().combine("(by path)", str(tmp_path), model_1=object(), model_3=object())
    with pytest.raises(UserError, match="clip_1 is not connected"):
        AfaEncode().encode("a", clip_2=object())
    for chosen, path, told in (("(by path)", " ", "no ensemble is chosen"), ("mine", "", "no ensemble in models/afa 'mine'")):
        with pytest.raises(UserError, match=told):
            AfaEnsemble().combine(chosen, path, model_1=object(), model_2=object())


def test_a_folder_that_is_wrong_is_said_before_any_checkpoint_is_loaded(tmp_path):
    valid = AfaEnsemble.VALIDATE_INPUTS
    assert "no ensemble is chosen" in valid("(by path)", " ")
    assert f"there is no folder {tmp_path / 'gone'}, and no ensemble" in valid("(by path)", str(tmp_path / "gone"))
    assert "is no ensemble: it has no afa.json" in valid("(by path)", str(tmp_path))
    (tmp_path / "afa.json").write_text("{")
    assert "afa.json" in valid("(by path)", str(tmp_path))
    assert "no ensemble in models/afa 'mine'" in valid("mine", "")
    for known_when_it_runs in ((None, ""), ("(by path)", None)):  # values that other nodes give
        assert valid(*known_when_it_runs) is True


def test_factors_are_those_of_the_strengths_at_every_place():
    left = torch.zeros(1, 4, 4)
    left[..., :2] = 1
    found = factor_maps((Strength("a", 3.0, left), Strength("b", 0.5), Strength("a", 2.0)), ("a", "b", "c"), (2, 2))
    assert torch.equal(found[0, 0], torch.tensor([[6.0, 2.0]] * 2))
    assert torch.equal(found[0, 1], torch.full((2, 2), 0.5)) and torch.equal(found[0, 2], torch.ones(2, 2))
    half = factor_maps((Strength("a", 0.0, torch.full((1, 1, 1), 0.25)),), ("a", "b"), (3, 5))
    assert torch.equal(half[0, 0], torch.full((3, 5), 0.75))
    two = factor_maps((Strength("a", 0.0, torch.stack([torch.zeros(4, 4), torch.ones(4, 4)])),), ("a", "b"), (1, 1))
    # two pictures, two prompts, and a row for each of two experts
    rows = for_rows(two, images=2, passes=2, rows=8)
    assert rows[:, 0].flatten().tolist() == [1, 1, 0, 0] * 2
    with pytest.raises(UserError, match="masks of 2, 3 pictures"):
        factor_maps((Strength("a", 0.5, torch.ones(2, 4, 4)), Strength("a", 0.5, torch.ones(3, 4, 4))), ("a", "b"), (1, 1))


def test_pooled_text_is_the_experts_own_and_sizes_are_shared():
    call = {"x": 1, "context": torch.zeros(1, 2, 3), "y": torch.tensor([[1.0, 2, 8, 9]])}
    for place in (0, 1):
        call |= {f"afa_text_{place}": torch.full((1, 2, 3), float(place)), f"afa_pooled_{place}": torch.tensor([[1.0 + place, 2.0 + place]])}
    first, second = calls_of_experts(call, 2)
    assert first["y"].tolist() == [[1, 2, 8, 9]] and second["y"].tolist() == [[2, 3, 8, 9]]
    assert torch.equal(second["context"], torch.ones(1, 2, 3))
    assert set(first) == set(second) == {"x", "context", "y"}


def test_patches_of_a_model_are_its_own_and_those_of_the_ensemble_are_for_all():
    first = {"patches": {"attn1_patch": ["a"]}, "patches_replace": {"attn1": {("input", 1): "a"}}}
    replaced = {"attn1": {("input", 1): "a", ("middle", 0): "all"}}
    runtime = {"patches": {"attn1_patch": ["a", "all"], "attn2_patch": ["all"]}, "patches_replace": replaced, "sigmas": 3}
    own = {"patches": {"attn1_patch": ["b"]}}
    assert options_of_expert(runtime, first, own) == {
        "patches": {"attn1_patch": ["b", "all"], "attn2_patch": ["all"]},
        "patches_replace": {"attn1": {("middle", 0): "all"}},
        "sigmas": 3,
    }
    assert runtime["patches"]["attn1_patch"] == ["a", "all"] and own == {"patches": {"attn1_patch": ["b"]}}


def test_maps_are_white_where_an_expert_weighs_nothing():
    weights = torch.zeros(1, 2, 2, 2)
    weights[:, 0] = 1
    maps, overlay = drawn(weights, None)
    assert maps.shape == (2, 16, 16, 3) and overlay.shape == (1, 16, 16, 3)
    assert torch.equal(maps[1], torch.ones(16, 16, 3)) and not torch.equal(maps[0], maps[1])
