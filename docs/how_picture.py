"""`python docs/how_picture.py`: draw docs/images/how.svg, the drawing of docs/how_it_works.md. Light or dark, as the system is set."""

from pathlib import Path

OUTPUT = Path(__file__).parent / "images" / "how.svg"
COLOURS = ("#e69f00", "#56b4e9", "#009e73")  # of experts, as in afa.pictures
STYLE = """
    text { font: 15px system-ui, sans-serif; fill: #202124; text-anchor: middle }
    .small { font-size: 13px; fill: #5f6368 }
    .box { fill: #ffffff; stroke: #80868b }
    .line { fill: none; stroke: #80868b; stroke-width: 1.5; marker-end: url(#tip) }
    .tip { fill: #80868b }
    .back { fill: #ffffff }
    @media (prefers-color-scheme: dark) {
      text { fill: #e8eaed }
      .small { fill: #bdc1c6 }
      .box { fill: #2b2f36; stroke: #9aa0a6 }
      .line { stroke: #9aa0a6 }
      .tip { fill: #9aa0a6 }
      .back { fill: #1e2129 }
    }"""
STAGES = (("IN00", 210), ("IN01", 440), ("OUT", 670))  # name, left edge
ROWS = (70, 140, 210)  # of the experts' boxes


def box(x: float, y: float, width: float, height: float, words: str, more: str = "", colour: str = "") -> str:
    style = f' style="stroke:{colour};stroke-width:3"' if colour else ""
    shape = f'<rect class="box" x="{x}" y="{y}" width="{width}" height="{height}" rx="8"{style}/>'
    middle = y + height / 2 + (-3 if more else 5)
    second = f'<text class="small" x="{x + width / 2}" y="{middle + 18}">{more}</text>' if more else ""
    return f'{shape}<text x="{x + width / 2}" y="{middle}">{words}</text>{second}'


def line(*points: tuple[float, float]) -> str:
    return f'<path class="line" d="M{" L".join(f"{x} {y}" for x, y in points)}"/>'


def drawing() -> str:
    """Three experts, three stages; after each an aggregator blends the features and gives the blend to all."""
    parts = [box(10, 130, 120, 68, "noisy latents", "prompt, timestep")]
    parts += [f'<text class="small" x="{x + 45}" y="48">stage {name}</text>' for name, x in STAGES]
    for index, (name, x) in enumerate(STAGES):
        before = 130 if index == 0 else STAGES[index - 1][1] + 190
        blend = x + 140
        for row, colour in zip(ROWS, COLOURS, strict=True):
            middle = row + 24
            parts.append(line((before, 164), (x - 24, 164), (x - 24, middle), (x - 3, middle)))
            parts.append(box(x, row, 90, 48, f"expert {'ABC'[ROWS.index(row)]}", colour=colour))
            parts.append(line((x + 90, middle), (blend - 3, 164 + (middle - 164) * 0.55)))
        parts.append(box(blend, 112, 50, 104, "Σ"))
        parts.append(f'<text class="small" x="{blend + 25}" y="236">aggregator</text>' if name else "")
    parts.append(line((860, 164), (897, 164)))
    parts.append(box(900, 130, 90, 68, "prediction"))
    # What an aggregator does, below: weight maps that sum to one.
    parts.append('<text x="505" y="292">An aggregator reads features, prompt and timestep, and gives each expert a weight at every place:</text>')
    for index, (colour, word) in enumerate(zip(COLOURS, ("A", "B", "C"), strict=True)):
        left = 180 + index * 210
        cells = []
        for row in range(3):
            for column in range(3):
                share = (0.75, 0.2, 0.05) if column == 0 else (0.15, 0.7, 0.15) if row < 2 else (0.1, 0.2, 0.7)
                cells.append(
                    f'<rect x="{left + 22 * column}" y="{318 + 22 * row}" width="21" height="21" fill="{colour}" fill-opacity="{share[index]}" '
                    f'stroke="{colour}"/>'
                )
        parts.append("".join(cells))
        parts.append(f'<text x="{left + 122}" y="356">× features {word}</text>')
        parts.append(f'<text x="{left + 192}" y="356">{"+" if index < 2 else "="}</text>')
    parts.append('<text x="835" y="356">blend</text>')
    parts.append('<text class="small" x="505" y="412">The weights of a place sum to 1. Experts stay frozen; only aggregators are trained.</text>')
    tip = '<path class="tip" d="M0 0L8 4L0 8z"/>'
    marker = f'<marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">{tip}</marker>'
    title = "<title>How an ensemble makes one prediction: the experts run side by side, stage by stage, and aggregators blend their features</title>"
    body = "\n  ".join(part for part in parts if part)
    head = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1010 430" role="img">'
    back = '<rect class="back" width="1010" height="430" rx="12"/>'
    return f"{head}\n  {title}\n  <style>{STYLE}\n  </style>\n  <defs>{marker}</defs>\n  {back}\n  {body}\n</svg>\n"


def main() -> None:
    OUTPUT.write_text(drawing())
    print(OUTPUT)


if __name__ == "__main__":
    main()
