"""How far ties by tensor is from ties by whole model: |one - other| / |other - base|, over all weights of the denoiser.

python benchmarks/ties.py --experts demo:curves demo:angles --base demo:base
"""

import argparse

import torch

from afa.experts.load import load_expert
from afa.merging.rules import ties


def flat(states: list[dict[str, torch.Tensor]], keys: list[str]) -> list[torch.Tensor]:
    """Each model's weights as one long tensor."""
    return [torch.cat([state[key].flatten().float() for key in keys]) for state in states]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--experts", nargs="+", required=True)
    parser.add_argument("--base", required=True)
    parser.add_argument("--density", type=float, default=0.2)
    asked = parser.parse_args()
    states = [load_expert(source).model.state_dict() for source in (*asked.experts, asked.base)]
    keys = [key for key, tensor in states[-1].items() if tensor.is_floating_point()]
    by_tensor = torch.cat(
        [
            ties(
                [state[key].float() for state in states[:-1]],
                base=states[-1][key].float(),
                density=asked.density,
            ).flatten()
            for key in keys
        ]
    )
    *experts, base = flat(states, keys)
    whole = ties(experts, base=base, density=asked.density)
    apart = (by_tensor - whole).norm() / (whole - base).norm()
    print(
        f"density {asked.density}: {apart:.1%} of |merge - base| over {len(base):,} weights of {len(experts)} experts"
    )


if __name__ == "__main__":
    main()
