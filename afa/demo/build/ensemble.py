"""`python -m afa.demo.build.ensemble`: train the demonstration's ensemble and put it beside the experts it is made of.

`afa explain` and `afa ui` begin with it. Two minutes on two cores; what `afa demo` has trained in the same folder is taken as it is.
"""

import argparse
from pathlib import Path

from afa.demo.data import ENSEMBLE, EXPERTS
from afa.demo.run import TRAINING_SCENES, training
from afa.demo.scenes import draw
from afa.demo.settings import DemoSettings
from afa.ensemble import Ensemble
from afa.training.run import train


def main() -> None:
    flags = argparse.ArgumentParser(prog="python -m afa.demo.build.ensemble", description=__doc__)
    flags.add_argument("--work", type=Path, default=Path("demo"), help="the demonstration's folder (default: demo)")
    settings = DemoSettings(output=str(flags.parse_args().work))
    data = Path(settings.output) / "data"
    if not data.exists():
        draw(data, "mixed", settings.train_images, TRAINING_SCENES + settings.seed)
    folder = Path(settings.output) / "ensemble"
    train(training(settings, folder, "layers", [str(path) for path in EXPERTS.values()]))
    ensemble = Ensemble.load(folder)
    assert ensemble.training is not None
    ensemble.training["settings"]["experts"] = [f"../{name}" for name in EXPERTS]  # as the manifest names them, not where they lie on this machine
    ensemble.save(ENSEMBLE)
    print(f"the demonstration's ensemble is in {ENSEMBLE}")


if __name__ == "__main__":
    main()
