"""How the page looks: Gradio's own components in system fonts, ours beside them, light and dark, wide and narrow."""

FONT = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "Liberation Sans", "sans-serif"]
MONO = ["ui-monospace", "SFMono-Regular", "Consolas", "Liberation Mono", "monospace"]

CSS = """
.gradio-container { max-width: 1440px !important; width: 100% !important; margin: 0 auto; }
.gradio-container main, .gradio-container main > .wrap, .gradio-container .tabs { width: 100%; }
footer { display: none !important; }
.gradio-container .html-container { padding: 0 !important; }
.gradio-container { --body-text-color-subdued: #4d5864; --block-info-text-color: #4d5864; --input-placeholder-color: #66717d;
  --block-label-text-color: #3d4753; }
.dark .gradio-container, .gradio-container.dark { --body-text-color-subdued: #a9b4c0; --block-info-text-color: #a9b4c0; --input-placeholder-color: #8f9aa6;
  --block-label-text-color: #c3ccd6; }
#afa-head h1 { font-size: 1.35rem; margin: 0; } #afa-head p { margin: .1rem 0 0; color: var(--body-text-color-subdued); }
.afa-status { display: grid; gap: .4rem; font-size: .95rem; min-height: 2.6rem; align-content: center; }
.afa-status progress { appearance: none; width: 100%; height: .55rem; border: 0; border-radius: 3px; background: var(--border-color-primary);
  overflow: hidden; }
.afa-status progress::-webkit-progress-bar { background: var(--border-color-primary); }
.afa-status progress::-webkit-progress-value { background: var(--primary-500); } .afa-status progress::-moz-progress-bar { background: var(--primary-500); }
.afa-cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(46%, 190px), 1fr)); gap: .8rem; }
.afa-card { background: var(--block-background-fill); border: 1px solid var(--border-color-primary); border-radius: 8px; padding: .7rem; min-width: 0; }
.afa-card h4 { margin: 0 0 .5rem; font-size: .95rem; font-weight: 600; overflow-wrap: anywhere; }
.afa-pictures { display: grid; gap: .4rem; grid-template-columns: repeat(auto-fit, minmax(80px, 1fr)); }
.afa-pictures a { display: block; border-radius: 4px; padding: 0 !important; margin: 0 !important; }
.afa-pictures a:focus-visible { outline: 3px solid var(--primary-500); outline-offset: 2px; }
.afa-pictures img, .afa-maps img { display: block; width: 100%; height: auto; border-radius: 4px; margin: 0; }
.afa-maps img { border: 1px solid var(--border-color-primary); }
.afa-empty { aspect-ratio: 1; border: 1px dashed var(--border-color-primary); border-radius: 4px; display: grid; place-items: center;
  color: var(--body-text-color-subdued); font-size: .9rem; }
.afa-under, .afa-caption { color: var(--body-text-color-subdued); font-size: .87rem; margin: .45rem 0 0; min-height: 1.3em; }
.afa-note { color: var(--body-text-color-subdued); margin: .2rem 0; }
.afa-error { color: var(--error-text-color); background: var(--error-background-fill); border: 1px solid var(--error-border-color);
  border-radius: 6px; padding: .45rem .6rem; margin: .5rem 0 0; font-size: .9rem; overflow-wrap: anywhere; }
.afa-maps { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(45%, 112px), 1fr)); gap: .7rem; margin-top: .8rem; }
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
.gradio-container input[type=range]::-webkit-slider-thumb { border: 2px solid var(--primary-500); background: #fff; }
.gradio-container input[type=range]::-moz-range-thumb { border: 2px solid var(--primary-500); background: #fff; }
/* Wide: the form left, settings under it, pictures right. On a phone the pictures come right after the button. */
#afa-create { display: grid !important; gap: 1rem; grid-template-columns: minmax(0, 2fr) minmax(0, 3fr); grid-template-rows: auto 1fr;
  grid-template-areas: "ask shown" "tune shown"; }
#afa-ask { grid-area: ask; } #afa-shown { grid-area: shown; } #afa-tune { grid-area: tune; }
#afa-create > * { min-width: 0 !important; width: 100%; }
@media (max-width: 820px) {
  #afa-gallery .grid-container { grid-template-columns: repeat(2, minmax(0, 1fr)) !important; }
  .afa-settings { grid-template-columns: minmax(0, 1fr); } .afa-settings dd { margin: 0 0 .5rem; }
  #afa-methods label { padding: .3rem .55rem; }
  #afa-create { grid-template-columns: minmax(0, 1fr); grid-template-rows: none; grid-template-areas: "ask" "shown" "tune"; }
}
"""
HARD_EDGES = "#afa-gallery img, .afa-pictures img, .afa-maps img { image-rendering: pixelated; }"  # for experts that draw icons
