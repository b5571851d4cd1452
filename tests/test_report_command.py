"""`afa report`: three files and a table, or one sentence."""

import json

import pytest
from made_results import write_results

from afa.cli.main import main
from afa.evaluation.results import Results


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("command")
    for name, changes in (("first", {}), ("second", {"runs": 2})):
        write_results(
            root / name, **{"prompts": 5, "copies": 1, "runs": 1, "studies": False, "resamples": 50, "few": True, **changes}
        )
    return root


def test_report_leaves_three_files_and_prints_the_table(folders, tmp_path, capsys):
    assert main(["report", str(folders / "first"), "--output", str(tmp_path / "new" / "page.html")]) == 0
    said = capsys.readouterr().out
    assert "prediction router" in said and "By attributes (higher is better)" in said and said.endswith("page.html\n")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["page.csv", "page.html", "page.md"]


def test_markdown_and_csv_go_where_they_are_sent(folders, tmp_path):
    places = {"--output": "a.html", "--markdown": "b.txt", "--csv": "c.txt"}
    assert (
        main(
            ["report", str(folders / "first"), *(part for flag, name in places.items() for part in (flag, str(tmp_path / name)))]
        )
        == 0
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.html", "b.txt", "c.txt"]


def test_several_evaluations_stand_side_by_side(folders, tmp_path, capsys):
    assert main(["report", str(folders / "first"), str(folders / "second"), "--output", str(tmp_path / "both.html")]) == 0
    page, text = (tmp_path / "both.html").read_text(), (tmp_path / "both.md").read_text()
    said = capsys.readouterr().out
    assert "Side by side" in page and "## Side by side" in text
    for name in ("first", "second"):  # of one protocol, so the folders tell them apart
        assert f"scenes ({folders / name})" in page and f"{folders / name}\n\n" in said


def test_evaluations_with_other_metrics_are_reported_each_by_its_own(folders, tmp_path):
    results = Results.load(folders / "first")
    found = json.loads((folders / "first" / "results.json").read_text())
    found["metrics"] = {"colours": {**found["metrics"]["colours"], "primary": True}}
    found["protocol"]["name"] = "others"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "results.json").write_text(json.dumps(found))
    assert main(["report", str(folders / "first"), str(tmp_path / "other"), "--output", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert f"{results.protocol['name']}: attributes ↑" in page and "others: colours ↑" in page


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{root}/nowhere", "--output", "{tmp}/a.html"], "there is no folder {root}/nowhere; make it with: afa evaluate"),
        (["{tmp}", "--output", "{tmp}/a.html"], "{tmp} has no results.json"),
        (["{root}/first", "--output", "{tmp}/folder.html"], "--output {tmp}/folder.html is a folder; give a file, such as"),
        (["{root}/first", "--output", "{tmp}/a.pdf"], "--output {tmp}/a.pdf must end in .html"),
        (["{root}/first", "--output", "{tmp}/a.html", "--csv", "{tmp}/a.md"], "--csv {tmp}/a.md must be different files"),
        (["{root}/first", "{root}/../command0/first", "--output", "{tmp}/a.html"], "first is given twice"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_sentence(folders, tmp_path, capsys, arguments, said):
    (tmp_path / "folder.html").mkdir()
    places = {"root": str(folders), "tmp": str(tmp_path)}
    given = [argument.replace("../command0", f"../{folders.name}").format(**places) for argument in arguments]
    assert main(["report", *given]) == 2
    error = capsys.readouterr().err
    assert said.format(**places) in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["folder.html"]


def test_results_of_another_format_are_refused(folders, tmp_path, capsys):
    found = json.loads((folders / "first" / "results.json").read_text())
    (tmp_path / "results.json").write_text(json.dumps(found | {"format": 99}))
    assert main(["report", str(tmp_path), "--output", str(tmp_path / "a.html")]) == 2
    assert "is of format 99" in capsys.readouterr().err and not (tmp_path / "a.html").exists()
