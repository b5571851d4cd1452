"""Names that become names of files: refused with a sentence that shows them, wherever they come from; nothing is written elsewhere."""

import pytest
from hostile import ASSETS, afa, downloaded, edit

from afa import Ensemble
from afa.errors import UserError
from afa.experts.spec import ExpertSpec
from afa.places import check_name, plain_name

BAD = [
    *("../x", "x/../../y", "/abs", "a\\b", "..", ".", ".hidden", "", " ", "a\0b", "a\nb", "a\x1b[2J", "\u202egnp", "C:x", "c:\\x", "con", "NUL"),
    *("nul.txt", "COM1", "x" * 101, "a|b", "a*b", "<b>", "trailing.", "trailing ", "\ud800"),
]
GOOD = ["curves", "my model (v2)", "Ünïted-Photo_1.5", "a..b", "x" * 100, "console", "+lora"]


@pytest.mark.parametrize("name", BAD)
def test_a_name_that_is_no_file_name_is_refused_and_shown(name):
    with pytest.raises(UserError, match="is called") as error:
        check_name(name, "an expert")
    assert str(error.value).isprintable() and len(str(error.value)) < 300


@pytest.mark.parametrize("name", GOOD)
def test_plain_names_pass(name):
    assert check_name(name, "an expert") == plain_name(name, "other") == name


@pytest.mark.parametrize("text", BAD)
def test_a_name_can_be_made_of_any_text(text):
    check_name(plain_name(text, "other"), "an expert")


@pytest.mark.parametrize("name", ["../x", "x/../../y", "/abs", "a\\b", "..", ".hidden", "", "a\nb", "C:x", "con", "x" * 101])
def test_names_typed_before_a_source_are_held_to_the_same(name):
    with pytest.raises(UserError, match="is called"):
        ExpertSpec.parse(f"{name}={ASSETS / 'curves'}")
    assert afa("generate", f"{name}={ASSETS / 'curves'}", "--prompt", "x", "--output", "out").refused


def test_a_path_with_an_equals_sign_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a=b" / "c=d").mkdir(parents=True)
    assert ExpertSpec.parse("a=b/c=d").source == "a=b/c=d"
    assert ExpertSpec.parse("x=a=b/c=d") == ExpertSpec("x", "a=b/c=d")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return downloaded(tmp_path_factory.mktemp("names"))


@pytest.mark.parametrize("name", ["../../OUT", "x/../../../OUT", "/tmp/OUT", "..", "a\0b", "CON", ""])
@pytest.mark.parametrize("place", [0, 2])
def test_names_in_a_manifest_are_refused_in_every_command(folder, tmp_path, name, place):
    (folder / "afa.json").write_bytes((ASSETS / "ensemble" / "afa.json").read_bytes())
    edit(folder / "afa.json", "experts", place, "name", value=name)
    before = {*folder.parent.rglob("*")}
    with pytest.raises(UserError, match=r"name|NUL"):
        Ensemble.load(folder)
    for command in (
        ["generate", folder, "--prompt", "x", "--output", tmp_path / "out"],
        ["inspect", folder],
        ["evaluate", "--ensemble", folder, "--protocol", "scenes", "--output", tmp_path / "out"],
        ["explain", folder, "--prompt", "x", "--output", tmp_path / "out"],
        ["train", "--start", folder, "--data", "scenes:16", "--output", tmp_path / "out"],
    ):
        run = afa(*command)
        assert run.refused, (command[0], run.err)
    assert {*folder.parent.rglob("*")} == before
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["../x", "a/b", "", "x" * 101])
def test_names_given_in_python_are_refused(folder, name):
    from diffusers import UNet2DConditionModel

    from afa.models.unet import UNetEnsemble

    model = UNet2DConditionModel.from_pretrained(ASSETS / "curves" / "unet")
    with pytest.raises(UserError, match="is called"):
        UNetEnsemble([model, model], [name, "other"])


def test_a_bundle_lies_in_its_target_alone(folder, tmp_path):
    (folder / "afa.json").write_bytes((ASSETS / "ensemble" / "afa.json").read_bytes())
    Ensemble.load(folder).save(tmp_path / "bundle", bundle=True)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    loaded = Ensemble.load(tmp_path / "bundle")
    assert all(tmp_path / "bundle" in expert.located.path.parents for expert in loaded.experts)
