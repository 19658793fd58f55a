"""How the page looks: variables for light, dark and paper, which the pictures use as well."""

from karakoram.train.report.heat import ABOVE, BELOW, DEAD

_LIGHT = """
  --paper: #fdfdfc; --card: #ffffff; --ink: #1b1d21; --muted: #5b616b; --grid: #e4e6ea; --alarm: #b3261e;
  --s0: #1f63c4; --s1: #d2691e; --s2: #1d8a57; --s3: #9a3fb5; --s4: #a8810a; --s5: #0c8696; --s6: #c2366b;
  --s7: #6b7280; --ramp: 62% 42%; color-scheme: light;"""
_DARK = """
  --paper: #131518; --card: #1a1d21; --ink: #e8e9eb; --muted: #9aa1ac; --grid: #2d3138; --alarm: #ff8a80;
  --s0: #74aaff; --s1: #ffa869; --s2: #5fce98; --s3: #d792ec; --s4: #e0bd4c; --s5: #4fcfdf; --s6: #ff86b0;
  --s7: #a3abb8; --ramp: 70% 64%; color-scheme: dark;"""


def _rgb(color: tuple[int, int, int], alpha: float = 1.0) -> str:
    return f"rgb({color[0]} {color[1]} {color[2]} / {alpha:g})"


SCALE = f"linear-gradient(to right, {_rgb(BELOW)}, {_rgb(BELOW, 0)} 50%, {_rgb(ABOVE, 0)} 50%, {_rgb(ABOVE)})"
DEAD_COLOR = _rgb(DEAD)

CSS = f"""
:root {{{_LIGHT}
}}
@media (prefers-color-scheme: dark) {{ :root {{{_DARK}
}} }}
* {{ box-sizing: border-box; }}
body {{ margin: 0 auto; max-width: 1180px; padding: 28px 24px 60px; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }}
h1 {{ font-size: 26px; margin: 0 0 2px; overflow-wrap: anywhere; }}
h2 {{ font-size: 19px; margin: 36px 0 12px; }}
p {{ margin: 4px 0; }}
.quiet, figcaption, .legend, th {{ color: var(--muted); }}
.note {{ border-left: 3px solid var(--alarm); padding-left: 10px; margin: 10px 0; }}
.tiles {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 10px; margin: 18px 0; }}
.tile, figure {{ background: var(--card); border: 1px solid var(--grid); border-radius: 8px; }}
.tile {{ padding: 10px 14px; }}
.tile b {{ display: block; font-size: 20px; font-weight: 600; font-variant-numeric: tabular-nums; }}
.tile span {{ color: var(--muted); font-size: 13px; }}
.panels {{ display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 14px; }}
.wide {{ grid-column: 1 / -1; }}
figure {{ margin: 0; padding: 12px 14px; break-inside: avoid; display: flex; flex-direction: column; }}
figure svg {{ margin-top: auto; }}
figcaption b {{ color: var(--ink); font-size: 16px; }}
figcaption, .legend {{ font-size: 13px; }}
svg {{ display: block; width: 100%; height: auto; font-family: inherit; stroke-linejoin: round; }}
.legend {{ display: flex; flex-wrap: wrap; gap: 2px 14px; margin: 4px 0; }}
.legend i {{ display: inline-block; width: 16px; height: 3px; margin-right: 5px; vertical-align: middle;
  border-radius: 2px; }}
.legend .scale {{ width: 190px; height: 11px; border: 1px solid var(--grid); background: {SCALE}; }}
.legend .dead {{ width: 11px; height: 11px; background: {DEAD_COLOR}; }}
table {{ border-collapse: collapse; width: 100%; font-size: 13.5px; }}
th, td {{ text-align: left; vertical-align: top; padding: 3px 14px 3px 0; border-bottom: 1px solid var(--grid);
  overflow-wrap: anywhere; }}
th {{ font-weight: 600; white-space: nowrap; }}
td.number {{ font-variant-numeric: tabular-nums; white-space: nowrap; }}
.settings {{ columns: 2; column-gap: 28px; }}
.settings div {{ break-inside: avoid; border-bottom: 1px solid var(--grid); padding: 2px 0; font-size: 13.5px;
  display: flex; gap: 12px; justify-content: space-between; }}
.settings span {{ color: var(--muted); overflow-wrap: anywhere; }}
.settings code {{ text-align: right; overflow-wrap: anywhere; font-size: 13px; }}
.tabs {{ display: flex; flex-wrap: wrap; gap: 4px; margin: 20px 0 8px; border-bottom: 1px solid var(--grid); }}
.tabs label {{ padding: 7px 15px; cursor: pointer; color: var(--muted); border-bottom: 2px solid transparent; }}
.choice {{ position: absolute; opacity: 0; }}
@media screen and (max-width: 760px) {{
  .panels {{ grid-template-columns: minmax(0, 1fr); }} .settings {{ columns: 1; }}
}}
@media print {{
  :root {{{_LIGHT}
  }}
  body {{ max-width: none; padding: 0; font-size: 11px; print-color-adjust: exact; -webkit-print-color-adjust: exact; }}
  .tabs, .choice {{ display: none; }}
  section.run {{ display: block !important; break-before: page; }}
  section.run:first-of-type {{ break-before: auto; }}
  .panels {{ gap: 8px; }} .tiles {{ gap: 6px; margin: 10px 0; }} figure, .tile {{ padding: 6px 8px; }}
  .tile b {{ font-size: 14px; }} figcaption b {{ font-size: 12px; }} h2 {{ margin: 18px 0 6px; font-size: 15px; }}
  figcaption, .legend, .tile span, .settings div, .settings code {{ font-size: 9.5px; }}
  h2 {{ break-after: avoid; }} table {{ font-size: 10px; }}
}}
"""


def tab_rules(count: int) -> str:
    """Of `count` sections only the chosen one is seen, by radio buttons alone."""
    rules = ["section.run { display: none; }"]
    for number in range(count):
        rules.append(f"#tab-{number}:checked ~ #run-{number} {{ display: block; }}")
        rules.append(
            f"#tab-{number}:checked ~ .tabs label[for=tab-{number}]"
            " { color: var(--ink); border-bottom-color: var(--s0); }"
        )
        rules.append(f"#tab-{number}:focus-visible ~ .tabs label[for=tab-{number}] {{ outline: 2px solid var(--s0); }}")
    return "\n".join(rules)
