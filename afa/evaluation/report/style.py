"""How the page looks: light and dark, wide and narrow, on paper.

Colours are after Okabe and Ito (2008), told apart by most kinds of eyes; light and dark shades of each read well on their ground.
"""

LIGHT = """
  --ink: #1d2228; --muted: #59626d; --paper: #ffffff; --card: #f5f7f9; --line: #dde2e7; --grid: #e8ebef; --strong: #fff3ea;
  --expert: #0072b2; --merge: #00805c; --sampling: #a8487f; --control: #b07400; --ours: #d04a00; --bound: #6b737c;
  --better: #00714f; --worse: #b3261e; color-scheme: light;
"""
DARK = """
  --ink: #e4e8ec; --muted: #9ba6b1; --paper: #14171b; --card: #1d2126; --line: #313840; --grid: #272d34; --strong: #33241a;
  --expert: #56b4e9; --merge: #2fc296; --sampling: #e093c0; --control: #e9b23c; --ours: #ff8a4c; --bound: #9aa3ad;
  --better: #4fd1a0; --worse: #ff8a80; color-scheme: dark;
"""
RULES = """
* { box-sizing: border-box; }
html { scroll-behavior: smooth; -webkit-text-size-adjust: 100%; }
body { font: 16px/1.55 -apple-system, "Segoe UI", Roboto, "Noto Sans", "Liberation Sans", Arial, sans-serif; color: var(--ink);
  background: var(--paper); max-width: 1240px; margin: 0 auto; padding: 2.2rem 1.25rem 4rem; }
h1 { font-size: 1.75rem; line-height: 1.25; margin: 0 0 .4rem; text-wrap: balance; }
h2 { font-size: 1.3rem; margin: 3rem 0 .7rem; }
h3 { font-size: 1.05rem; margin: 2rem 0 .5rem; }
h4 { font-size: .95rem; margin: 1.4rem 0 .5rem; }
p { max-width: 72ch; }
.facts, .note, figcaption, small { color: var(--muted); }
.facts { margin: 0 0 1.2rem; max-width: none; }
.note { font-size: .87rem; line-height: 1.5; max-width: 92ch; }
nav { font-size: .9rem; margin: 1.2rem 0; display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; }
a { color: var(--expert); text-decoration: none; }
a:hover { text-decoration: underline; }
.verdicts { background: var(--card); border-left: 4px solid var(--ours); border-radius: 0 8px 8px 0; padding: .9rem 1.2rem;
  margin: 1rem 0; }
.verdicts p { margin: .2rem 0; max-width: none; text-wrap: pretty; }
.verdicts .lead { font-size: 1.08rem; font-weight: 600; }
.verdicts dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1rem; margin: .6rem 0 .4rem;
  font-size: .95rem; }
.verdicts dt { color: var(--muted); }
.verdicts dd { margin: 0; }
.verdicts + .verdicts { margin-top: .8rem; }
.scroll { overflow-x: auto; border-radius: 6px; }
.scroll:focus-visible, a:focus-visible { outline: 2px solid var(--expert); outline-offset: 2px; }
table { border-collapse: collapse; font-size: .875rem; line-height: 1.35; font-variant-numeric: tabular-nums lining-nums; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: left; font-weight: 400; white-space: nowrap; }
thead th { vertical-align: bottom; font-weight: 600; border-bottom: 1.5px solid var(--muted); white-space: normal;
  min-width: 5.5rem; }
thead small { font-weight: 400; white-space: nowrap; }
th:first-child { padding-left: .5rem; position: sticky; left: 0; background: var(--paper); z-index: 1; }
tbody th { max-width: 17rem; white-space: normal; }
.num { text-align: right; }
.v { font-weight: 600; }
.ci { color: var(--muted); font-size: .95em; }
.verdict { display: inline-block; width: 1.3em; text-align: right; }
.better { color: var(--better); } .worse { color: var(--worse); } .undecided { color: var(--muted); }
tr.group th { font-weight: 600; padding-top: .9rem; white-space: nowrap; }
tr.group td { padding-top: .9rem; }
tr.ours > *, tr.ours th:first-child { background: var(--strong); }
tr.ours th { font-weight: 700; }
.key { width: 14px; height: 14px; margin-right: .45em; vertical-align: -2px; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.3rem; font-size: .87rem; color: var(--muted); max-width: none;
  margin: .4rem 0; }
.unseen { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }
.forest { width: 100%; }
.forest caption { text-align: left; color: var(--muted); font-size: .87rem; padding-bottom: .4rem; }
.forest th, .forest td { padding-top: 0; padding-bottom: 0; border-bottom: 0; height: 26px; }
.forest thead th { border-bottom: 1px solid var(--line); padding-bottom: .2rem; }
.forest td.draw { width: 55%; min-width: 190px; padding: 0; }
.draw svg { display: block; overflow: visible; }
.forest tbody th { line-height: 1.2; }
.forest td.p { color: var(--muted); }
.sides { display: flex; justify-content: space-between; color: var(--muted); font-weight: 400; }
.plot { width: 100%; height: auto; display: block; }
svg text { font: 12.5px -apple-system, "Segoe UI", Roboto, "Noto Sans", "Liberation Sans", Arial, sans-serif;
  fill: var(--ink); }
svg .tick, svg .axis { fill: var(--muted); font-variant-numeric: tabular-nums; font-size: 12px; }
svg .label.ours { font-weight: 700; }
svg .label.level { fill: var(--muted); }
.grid { stroke: var(--grid); } .zero { stroke: var(--muted); }
.reference { stroke: var(--muted); stroke-dasharray: 4 4; } .band { fill: var(--muted); opacity: .12; }
.leader { stroke: var(--muted); stroke-width: .8; }
.whisker { stroke-width: 2; } .faint { stroke-width: 1.4; opacity: .55; } .curve { stroke-width: 1.6; }
.expert { --own: var(--expert); } .merge { --own: var(--merge); } .sampling { --own: var(--sampling); }
.control { --own: var(--control); } .ours { --own: var(--ours); } .bound { --own: var(--bound); }
.whisker, .curve { stroke: var(--own); }
.mark { fill: var(--own); stroke: var(--paper); stroke-width: .8; }
.mark .open { stroke: var(--own); stroke-width: 2; fill: none; }
.sheet th { font-weight: 400; font-size: .8rem; line-height: 1.25; }
.sheet thead th { text-align: center; width: 104px; min-width: 104px; vertical-align: bottom; padding: .3rem .2rem; border: 0; }
.sheet thead th .key { margin: 0; }
.sheet tbody th { min-width: 9rem; max-width: 11rem; vertical-align: middle; border: 0; }
.sheet td { padding: 2px; border: 0; }
.scroll + .scroll { margin-top: 1.2rem; }
img, .no-image { display: block; width: 100px; height: auto; border-radius: 3px; }
.no-image { aspect-ratio: 1; border: 1px dashed var(--line); color: var(--muted); font-size: .75rem; display: grid;
  place-items: center; }
.cases { display: grid; grid-template-columns: repeat(auto-fill, minmax(250px, 1fr)); gap: 1rem; }
.cases figure { margin: 0; background: var(--card); border-radius: 8px; padding: .7rem; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: .5rem; font-size: .82rem; line-height: 1.3; }
.pair > div { display: flex; flex-direction: column; gap: .3rem; }
.pair img, .pair .no-image { width: 100%; }
figcaption { font-size: .82rem; line-height: 1.35; margin-top: .5rem; }
dl.made { display: grid; grid-template-columns: minmax(8rem, max-content) 1fr; gap: .3rem 1.2rem; font-size: .87rem; }
dl.made dt { color: var(--muted); max-width: 18rem; }
dl.made dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 640px) {
  body { padding: 1.2rem .8rem 3rem; font-size: 15px; }
  h1 { font-size: 1.4rem; }
  .verdicts dl, dl.made { grid-template-columns: 1fr; gap: 0; }
  .verdicts dd, dl.made dd { margin-bottom: .5rem; }
  th, td { padding: .3rem .5rem; }
  tbody th { max-width: 8.5rem; }
  .forest td.draw { min-width: 130px; width: auto; }
  .forest .ci { display: block; } .forest td.num { position: relative; line-height: 1.15; }
  .forest .verdict { position: absolute; right: 0; top: .35rem; } .forest td.num:has(.verdict) { padding-right: 1.5em; }
  .forest th, .forest td { height: 40px; }
  .forest tbody th { font-size: .8rem; line-height: 1.1; }
  .forest tr.axis td { height: 20px; }
  .forest tbody tr:not(.axis) .draw svg { height: 40px; } .forest .draw svg svg { height: auto; }
}
@media print {
  @page { margin: 12mm; }
  body { padding: 0; max-width: none; font-size: 10pt; }
  nav { display: none; }
  .scroll { overflow: visible; }
  table { font-size: 7pt; } th, td { padding: .15rem .3rem; }
  .sheet thead th { width: 64px; min-width: 64px; }
  .sheet img, .sheet .no-image { width: 62px; }
  .sheet tbody th { min-width: 0; }
  tr, figure, .verdicts, .plot { break-inside: avoid; }
  h2, h3, h4 { break-after: avoid; }
  .verdicts, tr.ours > *, .cases figure { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""
STYLE = f":root {{{LIGHT}}}\n@media screen and (prefers-color-scheme: dark) {{ :root {{{DARK}}} }}{RULES}"
