"""Where the embedded world lies: three experts, the base they came from, their ensemble, the scorer that judges pictures, a reward."""

from pathlib import Path

ASSETS = Path(__file__).parent / "assets"
BASE = ASSETS / "base"
EXPERTS = {name: ASSETS / name for name in ("curves", "angles", "patterns")}
ENSEMBLE = ASSETS / "ensemble"  # of the three, as `afa demo` trains it
SCORER = ASSETS / "scorer.safetensors"
REWARD = ASSETS / "reward.safetensors"
RECORD = ASSETS / "build.json"  # steps and losses of everything above
