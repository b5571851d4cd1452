"""`python -m scripts.demo_world.ensemble`: train the demonstration's ensemble.

`afa explain` and `afa ui` use this ensemble by default. It is saved beside its experts, in afa/demo/assets.
It takes two minutes on two cores. An ensemble that `afa demo` trained in that folder is not trained again.
"""

import argparse
from pathlib import Path

from afa.demo.data import ENSEMBLE, EXPERTS, TRAINING
from afa.demo.draw import draw
from afa.demo.run import training
from afa.demo.settings import DemoSettings
from afa.ensemble import Ensemble
from afa.training.run import train


def main() -> None:
    flags = argparse.ArgumentParser(prog="python -m scripts.demo_world.ensemble", description=__doc__)
    flags.add_argument(
        "--work", type=Path, default=Path("demo"), help="the demonstration's folder (default: demo)"
    )
    settings = DemoSettings(output=str(flags.parse_args().work))
    data = Path(settings.output) / "data"
    if not data.exists():
        draw(data, "mixed", settings.train_images, TRAINING + settings.seed)
    folder = Path(settings.output) / "ensemble"
    train(training(settings, folder, "layers", [str(path) for path in EXPERTS.values()]))
    ensemble = Ensemble.load(folder)
    assert ensemble.training is not None
    # The manifest's own, relative names of the experts, instead of paths of this machine.
    ensemble.training["settings"]["experts"] = [f"../{name}" for name in EXPERTS]
    ensemble.save(ENSEMBLE)
    print(f"the demonstration's ensemble is in {ENSEMBLE}")


if __name__ == "__main__":
    main()
