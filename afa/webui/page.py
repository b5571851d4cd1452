"""The page: its layout, and what happens when a visitor uses it."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from afa.errors import UserError
from afa.images import read_metadata
from afa.prompts import unread
from afa.webui import markup
from afa.webui.api import DRAWING, Api, Page, answering, offer
from afa.webui.controls import (
    CLEAR_MASK,
    READ_MASK,
    add_region,
    filled_options,
    given_options,
    option_fields,
    regions_of,
    settings_fields,
    shown_regions,
    strength_sliders,
)
from afa.webui.engine import Engine
from afa.webui.markup import Report
from afa.webui.queue import DrawingJob, follow
from afa.webui.request_validation import MOST, text, whole
from afa.webui.sessions import Sessions, request_from_metadata


class Handlers:
    """The event handlers of the page.

    names: of the form's fields, in order; the strengths of the experts follow them
    """

    def __init__(self, sessions: Sessions, names: list[str]) -> None:
        self.sessions, self.engine, self.names = sessions, sessions.engine, names
        self.experts = self.engine.ensemble.names

    def begin(self, request: gr.Request, *values: Any) -> list[Any]:
        """Create a new run."""
        given = dict(zip(self.names, values, strict=False))
        given["method_options"] = given_options(given, given["methods"] or ())
        given["strengths"] = dict(zip(self.experts, values[len(self.names) :], strict=True))
        return self._begun(self.sessions.begin(request.session_hash, given))

    def again(self, request: gr.Request, live: bool, *strengths: float) -> list[Any]:
        """Create the last run again with the present strengths, if live is set."""
        wanted = dict(zip(self.experts, strengths, strict=True))
        job = self.sessions.again(request.session_hash, wanted) if live else None
        return [gr.skip()] * 4 if job is None else self._begun(job)

    def draw(self, request: gr.Request) -> Iterator[list[Any]]:
        """Run the visitor's job and show its progress; does nothing unless the job is waiting."""
        job = self.sessions.job(request.session_hash)
        if job is None or job.state != "waiting":
            yield [gr.skip(), gr.skip()]
            return
        mark = None
        for _ in follow(self.engine.run, job):
            yield [
                markup.status(job, self.engine.queue.before(job)),
                gr.skip() if job.mark == mark else markup.results(job),
            ]
            mark = job.mark
        yield [markup.status(job), markup.results(job)]

    def finish(self, request: gr.Request) -> list[Any]:
        """Reset the buttons, and list the pictures that have weight maps."""
        job = self.sessions.job(request.session_hash)
        if job is None or not job.over:
            return [gr.skip()] * 4
        looked = [
            (f"{column.title}, seed {picture.seed}", picture.path.name)
            for column in job.columns
            for picture in column.pictures
            if picture.path.name in self.engine.shelf
        ]
        chosen = gr.Dropdown(choices=looked, value=looked[0][1] if looked else None)
        return [gr.Button(interactive=True), gr.Button(interactive=False), markup.status(job), chosen]

    def fit(self, picture: str | None, step: float, stage: float) -> list[Any]:
        """Show the weights of another picture, and set the range of the sliders to its steps and stages."""
        if not picture:
            return [gr.skip(), gr.skip(), self.look(picture, step, stage)]
        kept = self.engine.shelf.get(text("picture", picture))
        last = len(kept.timesteps), len(kept.maps)
        step, stage = (
            min(whole(name, value, 0, MOST), most)
            for name, value, most in zip(("step", "stage"), (step, stage), last, strict=True)
        )
        return [
            gr.Slider(maximum=last[0], value=step),
            gr.Slider(maximum=last[1], value=stage),
            self.look(picture, step, stage),
        ]

    def look(self, picture: str | None, step: float, stage: float) -> str:
        """Show the weights of a picture at a step and stage."""
        if not picture:
            return markup.note("None of these pictures has weight maps: their methods do not weigh experts.")
        kept = self.engine.shelf.get(text("picture", picture))
        stages = ["", *kept.maps]
        return markup.weights(
            kept,
            whole("step", step, 0, len(kept.timesteps)),
            stages[whole("stage", stage, 0, len(kept.maps))],
        )

    def strengthen(self, request: gr.Request, *strengths: float) -> None:
        """Change the strengths of the current run."""
        self.sessions.strengthen(request.session_hash, dict(zip(self.experts, strengths, strict=True)))

    def cancel(self, request: gr.Request) -> Any:
        """Cancel the run after its current step."""
        self.sessions.cancel(request.session_hash)
        return gr.Button(interactive=False)

    def pictures(self) -> list[Any]:
        """Return the gallery, the newest picture first, the names, and a note on unreadable files."""
        found, broken = self.engine.gallery.pictures()
        left_out = markup.note(f"Left out: {'; '.join(broken)}.", "error") if broken else ""
        return [[(str(path), self._title(path)) for path in found], [path.name for path in found], left_out]

    def choose(self, event: gr.SelectData, names: list[str]) -> list[Any]:
        """Show how a picture of the gallery was made."""
        index = event.index if isinstance(event.index, int) else -1
        if not isinstance(names, list) or not 0 <= index < len(names):
            raise UserError("there is no such picture; refresh the gallery")
        path = self.engine.gallery.find(names[index])
        return self._read(path, path.name)

    def read(self, upload: str | None) -> list[Any]:
        """Show how an uploaded picture was made, and delete the upload."""
        if upload is None:
            raise UserError("nothing was uploaded; give a PNG that was made here or by afa generate")
        try:
            return self._read(Path(upload), Path(upload).name)
        finally:
            Path(upload).unlink(missing_ok=True)

    def use(self, metadata: dict[str, Any] | None) -> list[Any]:
        """Fill the form with the settings of a picture, and show the form."""
        if not isinstance(metadata, dict):
            raise UserError("no picture is chosen")
        found, notes = request_from_metadata(metadata, self.engine)
        for note in notes:
            gr.Warning(markup.warning(note))
        sides = {name: found[name] or 0 for name in ("width", "height")}
        # The seed as text: a browser counts exactly only up to 2**53.
        options = filled_options(self.engine, found["method_options"])
        values = found | sides | options | {"seed": str(found["seed"])}
        strengths = [found["strengths"][name] for name in self.experts]
        return [*(values[name] for name in self.names), *strengths, gr.Tabs(selected="create")]

    def last_seed(self, request: gr.Request) -> str:
        """Return the seed of the visitor's last run, as text."""
        job = self.sessions.job(request.session_hash)
        if job is None:
            raise UserError("nothing has been made yet, so there is no last seed")
        return str(job.request.seed)

    def offer_options(self, methods: list[str]) -> list[Any]:
        """Show the options of the chosen methods."""
        return [
            gr.Accordion(visible=method.name in methods)
            for method in self.engine.methods.values()
            if method.options
        ]

    def add_region(self, *given: Any) -> list[dict[str, Any]]:
        """Return the regions with the one that is painted."""
        return add_region(self.experts, *given)

    def _begun(self, job: DrawingJob) -> list[Any]:
        ensemble = self.engine.ensemble
        asked, read_by = job.request, (ensemble.denoiser.interface, ensemble.frame.tokenizers)
        for words in filter(None, (asked.prompt, asked.negative_prompt)):
            for remark in unread([words], *read_by, syntax=asked.prompt_syntax):
                gr.Warning(markup.warning(remark))
        buttons = [gr.Button(interactive=False), gr.Button(interactive=True)]
        return [*buttons, markup.status(job), markup.results(job)]

    def _read(self, path: Path, name: str) -> list[Any]:
        metadata = read_metadata(path, name)
        return [markup.settings(metadata, name), metadata, gr.Button(interactive=True)]

    def _title(self, path: Path) -> str:
        """Return the caption of a picture in the gallery: its method and prompt."""
        try:
            found = read_metadata(path)
        except UserError:
            return path.name
        known = [method.title for method in self.engine.methods.values() if method.made(found)]
        how = known[0] if known else str(found.get("method") or found.get("expert"))
        return f"{how}: {found.get('prompt')}"


TITLE = "Adaptive Feature Aggregation"
NO_REPORTS = (
    "No report was given. Make one with afa evaluate --ensemble my-ensemble --protocol prompts.txt"
    " --output compared, and name it at the start: afa ui my-ensemble --reports compared"
)

# These events do not wait for the running job. They are queued, since Gradio shows no errors of other events.
QUICK: dict[str, Any] = {"concurrency_limit": None, "show_progress": "hidden", "api_visibility": "private"}


def build(
    sessions: Sessions,
    reports: Sequence[Report],
    examples: Sequence[str],
    steps: int,
    guidance: float | None,
    url: str,
) -> gr.Blocks:
    """Build the page.

    sessions: of the visitors
    reports:  to show
    examples: prompts that are offered
    steps:    initial value of the form
    guidance: initial value of the form
    url:      of the page
    """
    engine = sessions.engine
    with Page(title=f"afa: {TITLE}", analytics_enabled=False, delete_cache=(3600, 24 * 3600)) as page:
        gr.HTML(markup.head(TITLE, engine.ensemble.names), elem_id="afa-head")
        with gr.Tabs() as tabs:
            with gr.Tab("Create", id="create"), gr.Row(elem_id="afa-create"):
                with gr.Column(elem_id="afa-ask"):
                    form = _form(engine, examples)
                with gr.Column(elem_id="afa-shown"):
                    shown = _results()
                with gr.Column(elem_id="afa-tune"):
                    form |= strength_sliders(engine)
                    form["parts"] = regions_of(engine)
                    options, form["options"] = option_fields(engine)
                    settings = settings_fields(engine, steps, guidance)
                    form["last"] = settings.pop("last")
                    form["fields"] |= settings | options | {"regions": form["parts"]["regions"]}
            with gr.Tab("Gallery", id="gallery"):
                shown |= _gallery()
            with gr.Tab("Reports", id="reports") as tab:
                _reports(reports, tab)
            with gr.Tab("About", id="about"):
                gr.HTML(markup.about(engine, url))
        shown["tabs"] = tabs
        offer(Api(sessions))  # first: Gradio numbers later events of the same name
        _wire(Handlers(sessions, list(form["fields"])), form, shown, page)
    return page


def _form(engine: Engine, examples: Sequence[str]) -> dict[str, Any]:
    """Add prompt, methods and buttons; "fields" holds the inputs by their names in a request."""
    prompt = gr.Textbox(
        label="Prompt", lines=2, max_lines=6, placeholder="what the images should show", elem_id="afa-prompt"
    )
    if examples:
        gr.Examples([[one] for one in examples], inputs=prompt, label="Examples")
    choices = [(method.title, method.name) for method in engine.methods.values()]
    methods = gr.CheckboxGroup(choices, value=[choices[0][1]], label="Methods", elem_id="afa-methods")
    with gr.Row():
        run = gr.Button("Create", variant="primary", min_width=110, elem_id="afa-run")
        cancel = gr.Button("Cancel", variant="stop", interactive=False, min_width=110, elem_id="afa-cancel")
    return {"fields": {"prompt": prompt, "methods": methods}, "run": run, "cancel": cancel}


def _results() -> dict[str, Any]:
    status = gr.HTML(markup.status(None), elem_id="afa-status")
    results = gr.HTML("", elem_id="afa-results")
    gr.Markdown("### Weights: which expert drew what")
    none = markup.note(
        "Make a picture with a method that weighs experts, such as the first;"
        " then look at any step and stage of it."
    )
    with gr.Row():
        picture = gr.Dropdown([], label="Picture", interactive=True, elem_id="afa-picture", min_width=200)
        mean: dict[str, Any] = {"value": 0, "step": 1, "info": "0: mean over all", "min_width": 180}
        step = gr.Slider(0, 1, label="Step", elem_id="afa-step", **mean)
        stage = gr.Slider(0, 1, label="Stage", elem_id="afa-stage", **mean)
    weights = gr.HTML(none, elem_id="afa-weights")
    found = {"status": status, "results": results, "picture": picture}
    return found | {"step": step, "stage": stage, "weights": weights}


def _gallery() -> dict[str, Any]:
    with gr.Row():
        with gr.Column(scale=3, min_width=320):
            pictures = gr.Gallery(
                label="The latest pictures", show_label=False, columns=4, height="auto", object_fit="contain",
                allow_preview=False, buttons=[], elem_id="afa-gallery",
            )  # fmt: skip
            left_out = gr.HTML("")
            refresh = gr.Button("Refresh", size="sm")
        with gr.Column(scale=2, min_width=320):
            settings = gr.HTML(markup.note("Choose a picture to see how it was made."), elem_id="afa-chosen")
            use = gr.Button("Use these settings", interactive=False, elem_id="afa-use")
            gr.HTML(markup.note("Or read the settings of a PNG that was made here or by afa generate:"))
            upload = gr.File(
                label="PNG",
                show_label=False,
                file_types=[".png"],
                type="filepath",
                height=120,
                elem_id="afa-upload",
            )
    names, chosen = gr.State([]), gr.State(None)
    found = {"pictures": pictures, "refresh": refresh, "names": names, "left_out": left_out}
    return found | {"settings": settings, "use": use, "upload": upload, "chosen": chosen}


def _reports(reports: Sequence[Report], outer: gr.Tab) -> None:
    """Add a tab for each report; it is filled when it is opened, since reports are large."""
    if not reports:
        gr.HTML(markup.note(NO_REPORTS))
        return
    with gr.Tabs():
        for report in reports:
            with gr.Tab(report.name) as tab:
                place = gr.HTML(markup.note("Reading the report …"))
            looked = [tab.select, *([outer.select] if report is reports[0] else [])]
            gr.on(looked, lambda frame=report.frame: frame, None, place, **QUICK)


def _wire(do: Handlers, form: dict[str, Any], shown: dict[str, Any], page: gr.Blocks) -> None:
    """Connect the events with their handlers. Only sampling waits in the queue."""
    looks = [shown["picture"], shown["step"], shown["stage"]]
    asked = [*form["fields"].values(), *form["strengths"]]
    started = [form["run"], form["cancel"], shown["status"], shown["results"]]

    begun = gr.on(
        [form["run"].click, form["fields"]["prompt"].submit], answering(do.begin), asked, started, **QUICK
    )
    moved = gr.on(
        [slider.release for slider in form["strengths"]],
        answering(do.again),
        [form["live"], *form["strengths"]],
        started,
        **QUICK,
    )
    gallery = [shown["pictures"], shown["names"], shown["left_out"]]
    fitted = [shown["step"], shown["stage"], shown["weights"]]
    for first in (begun, moved):
        drawn = first.success(
            answering(do.draw), None, [shown["status"], shown["results"]], show_progress="hidden",
            concurrency_id=DRAWING, concurrency_limit=None, api_visibility="private",
        )  # fmt: skip
        ended = drawn.then(
            answering(do.finish),
            None,
            [form["run"], form["cancel"], shown["status"], shown["picture"]],
            **QUICK,
        )
        ended.then(answering(do.fit), looks, fitted, **QUICK).then(
            answering(do.pictures), None, gallery, **QUICK
        )
    form["cancel"].click(answering(do.cancel), None, [form["cancel"]], **QUICK)
    for slider in form["strengths"]:
        slider.input(answering(do.strengthen), form["strengths"], None, **QUICK)
    shown["picture"].input(answering(do.fit), looks, fitted, **QUICK)
    for slider in (shown["step"], shown["stage"]):
        slider.input(answering(do.look), looks, shown["weights"], trigger_mode="always_last", **QUICK)
    form["last"].click(answering(do.last_seed), None, form["fields"]["seed"], **QUICK)
    methods, groups = form["fields"]["methods"], list(form["options"].values())
    if groups:
        methods.change(answering(do.offer_options), methods, groups, **QUICK)
    parts = form["parts"]
    regions = parts["regions"]
    added = parts["add"].click(answering(do.add_region), parts["given"], regions, js=READ_MASK, **QUICK)
    added.success(None, None, None, js=CLEAR_MASK, api_visibility="private")
    parts["undo"].click(lambda given: given[:-1], regions, regions, **QUICK)
    regions.change(answering(shown_regions), regions, parts["listed"], **QUICK)
    _wire_gallery(do, form, shown, page)


def _wire_gallery(do: Handlers, form: dict[str, Any], shown: dict[str, Any], page: gr.Blocks) -> None:
    """Connect the events of the tab Gallery."""
    gallery = [shown["pictures"], shown["names"], shown["left_out"]]
    chosen = [shown["settings"], shown["chosen"], shown["use"]]
    shown["pictures"].select(answering(do.choose), shown["names"], chosen, **QUICK)
    shown["upload"].upload(answering(do.read), shown["upload"], chosen, **QUICK)
    back = [*form["fields"].values(), *form["strengths"], shown["tabs"]]
    shown["use"].click(answering(do.use), shown["chosen"], back, **QUICK)
    gr.on([shown["refresh"].click, page.load], answering(do.pictures), None, gallery, **QUICK)
