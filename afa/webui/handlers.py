"""What the page answers when something on it is touched."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from afa.errors import UserError
from afa.images import read_metadata
from afa.prompts import unread
from afa.webui import markup
from afa.webui.desk import Desk
from afa.webui.job import Job, follow
from afa.webui.order import MOST, text, whole
from afa.webui.reading import read_order


class Handlers:
    """One method an event. names: of the form's fields, in order; strengths of the experts come after them."""

    def __init__(self, desk: Desk, names: list[str]) -> None:
        self.desk, self.studio, self.names = desk, desk.studio, names
        self.experts = self.studio.ensemble.names

    def begin(self, request: gr.Request, *values: Any) -> list[Any]:
        """A new run."""
        given = dict(zip(self.names, values, strict=False))
        given["strengths"] = dict(zip(self.experts, values[len(self.names) :], strict=True))
        return self._begun(self.desk.begin(request.session_hash, given))

    def again(self, request: gr.Request, live: bool, *strengths: float) -> list[Any]:
        """The last run with the strengths as they are now, if that is wanted."""
        job = self.desk.again(request.session_hash, dict(zip(self.experts, strengths, strict=True))) if live else None
        return [gr.skip()] * 4 if job is None else self._begun(job)

    def draw(self, request: gr.Request) -> Iterator[list[Any]]:
        """Do the visitor's run, and say how it stands; one that is over already, or goes on, is left alone."""
        job = self.desk.job(request.session_hash)
        if job is None or job.state != "waiting":
            yield [gr.skip(), gr.skip()]
            return
        mark = None
        for _ in follow(self.studio.run, job):
            yield [markup.status(job, self.studio.turns.before(job)), gr.skip() if job.mark == mark else markup.results(job)]
            mark = job.mark
        yield [markup.status(job), markup.results(job)]

    def finish(self, request: gr.Request) -> list[Any]:
        """The buttons as before the run, and its pictures to look into."""
        job = self.desk.job(request.session_hash)
        if job is None or not job.over:
            return [gr.skip()] * 4
        made = [(column, picture) for column in job.columns for picture in column.pictures if picture.path.name in self.studio.shelf]
        looked = [(f"{column.title}, seed {picture.seed}", picture.path.name) for column, picture in made]
        chosen = gr.Dropdown(choices=looked, value=looked[0][1] if looked else None)
        return [gr.Button(interactive=True), gr.Button(interactive=False), markup.status(job), chosen]

    def fit(self, picture: str | None, step: float, stage: float) -> list[Any]:
        """The weights of another picture, and how far the sliders go there: where they stand they stay, as far as they can."""
        if not picture:
            return [gr.skip(), gr.skip(), self.look(picture, step, stage)]
        kept = self.studio.shelf.get(text("picture", picture))
        last = len(kept.timesteps), len(kept.maps)
        step, stage = (min(whole(name, value, 0, MOST), most) for name, value, most in zip(("step", "stage"), (step, stage), last, strict=True))
        return [gr.Slider(maximum=last[0], value=step), gr.Slider(maximum=last[1], value=stage), self.look(picture, step, stage)]

    def look(self, picture: str | None, step: float, stage: float) -> str:
        """The weights of a picture at a step and stage."""
        if not picture:
            return markup.note("None of these pictures was made by weighing experts.")
        kept = self.studio.shelf.get(text("picture", picture))
        stages = ["", *kept.maps]
        return markup.weights(kept, whole("step", step, 0, len(kept.timesteps)), stages[whole("stage", stage, 0, len(kept.maps))])

    def strengthen(self, request: gr.Request, *strengths: float) -> None:
        """Change the run that goes on."""
        self.desk.strengthen(request.session_hash, dict(zip(self.experts, strengths, strict=True)))

    def cancel(self, request: gr.Request) -> Any:
        """Stop the run after its present step."""
        self.desk.cancel(request.session_hash)
        return gr.Button(interactive=False)

    def pictures(self) -> list[Any]:
        """The gallery, the latest first, its names, and what cannot be shown."""
        found, broken = self.studio.gallery.pictures()
        left_out = markup.note(f"Left out: {'; '.join(broken)}.", "error") if broken else ""
        return [[(str(path), self._title(path)) for path in found], [path.name for path in found], left_out]

    def choose(self, event: gr.SelectData, names: list[str]) -> list[Any]:
        """How a picture of the gallery was made."""
        index = event.index if isinstance(event.index, int) else -1
        if not isinstance(names, list) or not 0 <= index < len(names):
            raise UserError("there is no such picture; look again")
        path = self.studio.gallery.find(names[index])
        return self._read(path, path.name)

    def read(self, upload: str | None) -> list[Any]:
        """How an uploaded picture was made; it is deleted when it was read."""
        if upload is None:
            raise UserError("nothing was uploaded; give a PNG that was made here or by afa generate")
        try:
            return self._read(Path(upload), Path(upload).name)
        finally:
            Path(upload).unlink(missing_ok=True)

    def use(self, metadata: dict[str, Any] | None) -> list[Any]:
        """Fill the form with a picture's settings, and show it."""
        if not isinstance(metadata, dict):
            raise UserError("no picture is chosen")
        found, notes = read_order(metadata, self.studio)
        for note in notes:
            gr.Warning(markup.warning(note))
        sides = {name: found[name] or 0 for name in ("width", "height")}
        values = found | sides | {"seed": str(found["seed"])}  # as text: a browser counts exactly only up to 2**53
        strengths = [found["strengths"][name] for name in self.experts]
        return [*(values[name] for name in self.names), *strengths, gr.Tabs(selected="create")]

    def _begun(self, job: Job) -> list[Any]:
        ensemble = self.studio.ensemble
        for words in filter(None, (job.order.prompt, job.order.negative_prompt)):
            for sentence in unread([words], ensemble.denoiser.call, ensemble.frame.tokenizers):
                gr.Warning(markup.warning(sentence))
        return [gr.Button(interactive=False), gr.Button(interactive=True), markup.status(job), markup.results(job)]

    def _read(self, path: Path, name: str) -> list[Any]:
        metadata = read_metadata(path, name)
        return [markup.settings(metadata, name), metadata, gr.Button(interactive=True)]

    def _title(self, path: Path) -> str:
        """Of a picture in the gallery: by which method and of what, as far as it says."""
        try:
            said = read_metadata(path)
        except UserError:
            return path.name
        known = [method.title for method in self.studio.methods.values() if method.made(said)]
        how = known[0] if known else str(said.get("method") or said.get("expert"))
        return f"{how}: {said.get('prompt')}"
