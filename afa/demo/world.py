"""Where the embedded world lies: three experts, the base they came from, the scorer that judges pictures, and a reward."""

from pathlib import Path

ASSETS = Path(__file__).parent / "assets"
BASE = ASSETS / "base"
EXPERTS = {name: ASSETS / name for name in ("curves", "angles", "patterns")}
SCORER = ASSETS / "scorer.safetensors"
REWARD = ASSETS / "reward.safetensors"
RECORD = ASSETS / "build.json"  # steps and losses of everything above
