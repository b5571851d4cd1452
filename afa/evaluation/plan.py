"""What a comparison would do, before it does it."""

from typing import Any

from afa.evaluation.run import prepare
from afa.evaluation.settings import EvaluateSettings


def plan(settings: EvaluateSettings) -> dict[str, Any]:
    """Everything that would fail early fails here, too. Leaves nothing behind. Raises UserError."""
    comparison = prepare(settings, keep=False)
    setup, names = comparison.setup, comparison.names
    protocol = setup.protocol
    for_each = sum(name in names for name in ("single", "single_in_ensemble"))
    rows = len(names) + for_each * (len(setup.names) - 1) - ("best_of_n" in names)  # which makes no images of its own
    trained = [name for name in names if name.startswith("finetune") or name in ("prediction_router", "afa")]
    return {
        "ensemble": f"{setup.folder}: {', '.join(setup.names)}",
        "protocol": ", ".join(f"{name} {value}" for name, value in protocol.facts().items() if value is not None),
        "methods": ", ".join(names),
        "images": (rows + len(trained) * (settings.seeds - 1)) * len(protocol.items),
        "trained": f"{', '.join(trained)}; {settings.seeds} seed{'s' if settings.seeds > 1 else ''} each, the ensemble's first is there",
        "options_chosen_on": f"{len(comparison.tuner.captions)} images that are not judged" if comparison.tuner.able else "nothing: defaults are taken",
        "metrics": ", ".join(comparison.judge.notes()),
        "device": str(setup.device),
    }
