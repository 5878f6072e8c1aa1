"""How pages look: plain, light and dark, narrow and printed."""

LIGHT = """
--paper: #ffffff; --ink: #1a1a1a; --faint: #5f5f5f; --rule: #b9b9b9; --grid: #e7e7e7; --box: #f5f5f3; --link: #1f5fa8;
--c0: #1f5fa8; --c1: #c2571a; --c2: #2b7f4e; --c3: #8a4f9e; --c4: #a8322d; --c5: #3b7280; --c6: #876614; --c7: #4a4a4a;
--kept: #3f7fb5; --start_up: #e0a63b; --lost: #b8322b; --stopping: #8566a8; --pending: #a9c7e0; --queued: #bdbdbd;
--sample: #4b9173; --evaluate: #7a8a3a;
"""
DARK = """
--paper: #161616; --ink: #e4e2dd; --faint: #a09d96; --rule: #55534f; --grid: #2c2b29; --box: #1f1f1e; --link: #8ab4e8;
--c0: #7fb2ea; --c1: #e89a62; --c2: #76c295; --c3: #c79bd8; --c4: #e58680; --c5: #84bcc9; --c6: #d3b45c; --c7: #b8b8b8;
--kept: #5b97cb; --start_up: #d9a441; --lost: #d9564e; --stopping: #9d80c0; --pending: #3f5f7c; --queued: #6f6f6f;
--sample: #5fa988; --evaluate: #98a855;
"""
STYLE = f"""
:root {{ {LIGHT} color-scheme: light; }}
@media (prefers-color-scheme: dark) {{ :root {{ {DARK} color-scheme: dark; }} }}
@media print {{ :root {{ {LIGHT} color-scheme: light; }} }}
* {{ box-sizing: border-box; }}
html {{ -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }}
body {{ margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.5 Charter, "Bitstream Charter", "Sitka Text", Cambria, Georgia, "Liberation Serif", serif; }}
main {{ max-width: 62rem; margin: 0 auto; padding: 2.5rem 1.25rem 3rem; }}
h1 {{ font-size: 1.9rem; line-height: 1.2; font-weight: 600; margin: 0 0 .3rem; overflow-wrap: anywhere; }}
h2 {{ font-size: 1.2rem; font-weight: 600; margin: 2.6rem 0 .8rem; }}
h3 {{ font-size: 1rem; font-weight: 600; font-style: italic; margin: 1.5rem 0 .4rem; }}
p {{ margin: .4rem 0; overflow-wrap: anywhere; }}
a {{ color: var(--link); }}
.lead {{ color: var(--faint); }}
.note {{ color: var(--faint); font-size: .9rem; }}
.warn {{ border-left: 3px solid var(--lost); padding-left: .8rem; margin: 1rem 0; }}
footer {{ margin-top: 3rem; padding-top: .6rem; border-top: 1px solid var(--rule); color: var(--faint);
  font-size: .85rem; overflow-wrap: anywhere; }}
dl.figures {{ display: flex; flex-wrap: wrap; gap: .9rem 2.4rem; margin: 1.2rem 0 0; padding: .9rem 0;
  border-top: 1px solid var(--rule); border-bottom: 1px solid var(--rule); }}
dl.figures div {{ min-width: 0; }}
dt {{ color: var(--faint); font-size: .85rem; }}
dd {{ margin: 0; font-size: 1.25rem; line-height: 1.3; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }}
dd small {{ display: block; font-size: .85rem; color: var(--faint); }}
.scroll {{ overflow-x: auto; max-width: 100%; background:
  linear-gradient(to right, var(--paper) 50%, transparent) 0 0 / 2.5rem 100% no-repeat local,
  linear-gradient(to left, var(--paper) 50%, transparent) 100% 0 / 2.5rem 100% no-repeat local,
  linear-gradient(to right, var(--rule), transparent) 0 0 / .7rem 100% no-repeat scroll,
  linear-gradient(to left, var(--rule), transparent) 100% 0 / .7rem 100% no-repeat scroll; }}
table {{ border-collapse: collapse; font-size: .9rem; line-height: 1.35; font-variant-numeric: tabular-nums;
  border-top: 1.5px solid var(--ink); border-bottom: 1.5px solid var(--ink); margin: .4rem 0; }}
th, td {{ text-align: left; vertical-align: top; padding: .22rem .9rem .22rem 0; white-space: nowrap; }}
th:last-child, td:last-child {{ padding-right: 0; }}
th {{ font-weight: 400; font-style: italic; border-bottom: 1px solid var(--rule); vertical-align: bottom; }}
th.r, td.r {{ text-align: right; }}
table.small, .small {{ font-size: .82rem; }}
table.facts td {{ white-space: normal; overflow-wrap: anywhere; }}
table.facts td:first-child {{ white-space: nowrap; font-style: italic; color: var(--faint); }}
td.wide {{ white-space: normal; min-width: 14rem; overflow-wrap: anywhere; }}
code, pre {{ font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: .84em; }}
pre {{ background: var(--box); padding: .6rem .8rem; margin: .4rem 0; overflow-x: auto; line-height: 1.45; }}
pre.command {{ white-space: normal; overflow-wrap: anywhere; }}
pre.command div {{ padding-left: 2em; text-indent: -2em; }}
pre.command span {{ display: inline-block; max-width: 100%; text-indent: 0; white-space: pre-wrap; }}
.charts {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1.6rem 2rem; }}
figure {{ margin: 0; min-width: 0; }}
figcaption {{ font-size: .9rem; color: var(--faint); line-height: 1.4; overflow-wrap: anywhere; }}
figcaption b {{ color: var(--ink); font-weight: 600; margin-right: .5em; }}
svg {{ display: block; width: 100%; height: auto; overflow: visible; }}
svg text {{ font: 12px system-ui, -apple-system, "Segoe UI", "Liberation Sans", sans-serif; fill: var(--faint); }}
svg .axis {{ stroke: var(--rule); }}
svg .grid {{ stroke: var(--grid); }}
svg path {{ fill: none; stroke: var(--c); stroke-width: 1.6; stroke-linejoin: round; }}
svg .raw path {{ stroke-width: 1; opacity: .3; }}
svg .dots path {{ stroke-width: 1; opacity: .7; }}
svg .dots .interval {{ stroke-width: 1.4; opacity: 1; }}
svg circle {{ fill: var(--c); stroke: var(--paper); }}
svg .second path {{ stroke-dasharray: 5 3; }}
.c0 {{ --c: var(--c0); }} .c1 {{ --c: var(--c1); }} .c2 {{ --c: var(--c2); }} .c3 {{ --c: var(--c3); }}
.c4 {{ --c: var(--c4); }} .c5 {{ --c: var(--c5); }} .c6 {{ --c: var(--c6); }} .c7 {{ --c: var(--c7); }}
.key {{ display: inline-block; margin-right: .9em; }}
.key::before {{ content: ""; display: inline-block; width: 1.4em; border-top: 2px solid var(--c); vertical-align: .28em;
  margin-right: .4em; }}
.key.raw::before {{ opacity: .4; border-top-width: 1px; }}
.key.second::before {{ border-top-style: dashed; }}
.timeline svg {{ min-width: 40rem; }}
svg .k {{ stroke: none; }}
svg path.save {{ stroke: var(--ink); stroke-width: 1; opacity: .7; }}
.swatch {{ display: inline-block; width: .85em; height: .85em; vertical-align: -.08em; }}
{
    " ".join(
        f"svg .{k} {{ fill: var(--{k}); }} .swatch.{k} {{ background: var(--{k}); }}"
        for k in ("kept", "start_up", "lost", "stopping", "pending", "queued", "sample", "evaluate")
    )
}
.pictures {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr)); gap: 1.2rem; }}
.pictures img {{ display: block; width: 100%; height: auto; margin-bottom: .3rem; }}
pre.config {{ columns: 25rem 2; column-gap: 2rem; white-space: pre-wrap; overflow-wrap: anywhere; }}
pre.config div {{ padding-left: 4ch; text-indent: -4ch; }}
@media (max-width: 640px) {{
  main {{ padding: 1.4rem 1rem 2rem; }}
  h1 {{ font-size: 1.5rem; }}
  .chart svg text {{ font-size: 15px; }}
  .timeline svg text {{ font-size: 15px; }}
  dl.figures {{ gap: .7rem 1.6rem; }}
  .pictures {{ grid-template-columns: 1fr 1fr; gap: .8rem; }}
}}
@page {{ margin: 16mm 14mm; }}
@media print {{
  html {{ font-size: 12.5px; }}
  body {{ font-size: 1rem; }}
  main {{ max-width: none; padding: 0; }}
  * {{ print-color-adjust: exact; -webkit-print-color-adjust: exact; }}
  h2, h3 {{ break-after: avoid; }}
  figure, tr, .figures, .timeline {{ break-inside: avoid; }}
  .scroll, pre {{ overflow: visible; }}
  .scroll {{ background: none; }}
  .charts {{ grid-template-columns: 1fr 1fr; }}
  .pictures {{ grid-template-columns: repeat(3, 1fr); }}
  table {{ font-size: .8rem; }}
  th, td {{ white-space: normal; padding-right: .5rem; overflow-wrap: anywhere; }}
  td.r, th.r {{ overflow-wrap: normal; }}
  pre {{ white-space: pre-wrap; overflow-wrap: anywhere; font-size: .75rem; background: none;
    border: 1px solid var(--grid); }}
  .timeline svg {{ min-width: 0; }}
  a {{ color: inherit; }}
}}
"""
