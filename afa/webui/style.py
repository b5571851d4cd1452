"""How the page looks: Gradio's own components in system fonts, ours beside them, light and dark, wide and narrow."""

FONT = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "Liberation Sans", "sans-serif"]
MONO = ["ui-monospace", "SFMono-Regular", "Consolas", "Liberation Mono", "monospace"]

CSS = """
.gradio-container { max-width: 1440px !important; margin: 0 auto; }
footer { display: none !important; }
#afa-head h1 { font-size: 1.35rem; margin: 0; } #afa-head p { margin: .1rem 0 0; color: var(--body-text-color-subdued); }
.afa-status { display: grid; gap: .4rem; font-size: .95rem; min-height: 2.6rem; align-content: center; }
.afa-status progress { width: 100%; height: .55rem; accent-color: var(--primary-500); }
.afa-cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 190px), 1fr)); gap: .8rem; }
.afa-card { background: var(--block-background-fill); border: 1px solid var(--border-color-primary); border-radius: 8px; padding: .7rem; min-width: 0; }
.afa-card h4 { margin: 0 0 .5rem; font-size: .95rem; font-weight: 600; overflow-wrap: anywhere; }
.afa-pictures { display: grid; gap: .4rem; grid-template-columns: repeat(auto-fit, minmax(80px, 1fr)); }
.afa-pictures a { display: block; border-radius: 4px; }
.afa-pictures a:focus-visible { outline: 3px solid var(--primary-500); outline-offset: 2px; }
.afa-pictures img, .afa-maps img { display: block; width: 100%; height: auto; border-radius: 4px; margin: 0; }
.afa-small img { image-rendering: pixelated; }
.afa-empty { aspect-ratio: 1; border: 1px dashed var(--border-color-primary); border-radius: 4px; display: grid; place-items: center;
  color: var(--body-text-color-subdued); font-size: .9rem; }
.afa-under, .afa-caption { color: var(--body-text-color-subdued); font-size: .87rem; margin: .45rem 0 0; min-height: 1.3em; }
.afa-note { color: var(--body-text-color-subdued); margin: .4rem 0; }
.afa-error { color: var(--error-text-color); background: var(--error-background-fill); border: 1px solid var(--error-border-color);
  border-radius: 6px; padding: .45rem .6rem; margin: .5rem 0 0; font-size: .9rem; overflow-wrap: anywhere; }
.afa-maps { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(45%, 150px), 1fr)); gap: .7rem; margin-top: .8rem; }
.afa-maps figure { margin: 0; min-width: 0; } .afa-maps figcaption { font-size: .87rem; margin-top: .25rem; color: var(--body-text-color); }
.afa-shares { display: grid; gap: .3rem; margin-top: .5rem; max-width: 34rem; }
.afa-share { display: grid; grid-template-columns: 1rem minmax(4rem, 8rem) 1fr 3.2rem; gap: .5rem; align-items: center; font-size: .9rem; }
.afa-chip { width: .9rem; height: .9rem; border-radius: 3px; } .afa-name { overflow: hidden; text-overflow: ellipsis; }
.afa-track { height: .6rem; background: var(--border-color-primary); border-radius: 3px; overflow: hidden; } .afa-track span { display: block; height: 100%; }
.afa-value { text-align: right; font-variant-numeric: tabular-nums; }
.afa-prompt { font-size: 1rem; margin: 0 0 .5rem; overflow-wrap: anywhere; }
.afa-settings { display: grid; grid-template-columns: minmax(6rem, max-content) 1fr; gap: .2rem 1rem; font-size: .9rem; margin: 0; }
.afa-settings dt { color: var(--body-text-color-subdued); } .afa-settings dd { margin: 0; overflow-wrap: anywhere; }
.afa-report { width: 100%; height: 78vh; border: 1px solid var(--border-color-primary); border-radius: 8px; background: #fff; color-scheme: light; }
.dark .afa-report { color-scheme: dark; background: #14171b; }
.afa-about pre { overflow-x: auto; background: var(--background-fill-secondary); border: 1px solid var(--border-color-primary);
  padding: .8rem; border-radius: 8px; font-size: .85rem; }
.afa-about code { font-family: var(--font-mono); } .afa-about h3 { margin: 1.4rem 0 .5rem; font-size: 1.05rem; } .afa-about { overflow-wrap: anywhere; }
.afa-about table { border-collapse: collapse; font-size: .9rem; display: block; overflow-x: auto; } .afa-about td, .afa-about th { text-align: left;
  padding: .25rem .8rem .25rem 0; border-bottom: 1px solid var(--border-color-primary); vertical-align: top; }
#afa-gallery img { image-rendering: auto; }
"""
HARD_EDGES = "#afa-gallery img, .afa-pictures img, .afa-maps img { image-rendering: pixelated; }"  # for experts that draw icons
