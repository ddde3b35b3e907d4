"""Style sheet of the page, light and dark, and the script that shows values on hover.

Colours of runs: blue, vermilion, green, purple, ochre, slate; told apart with any colour vision, at
3:1 or more against the page in both themes.
"""

# A table as a list: on narrow screens, and of more runs than columns fit on any.
_STACKED = """
.T thead{position:absolute;clip-path:inset(50%);width:1px;height:1px;overflow:hidden}
.T,.T tbody{display:block}
.T tr{display:flex;flex-wrap:wrap;gap:.1rem 1.25rem;padding:.6rem .5rem;
border-top:1px solid var(--line)}
.T tr:first-child{border-top:0}
.T th,.T td,.T tbody th{border:0;padding:0;min-width:0}
.T th,.T .how{flex:1 0 100%}
.T .of{display:block;font-size:12px;color:var(--soft)}
"""

CSS = """
:root{color-scheme:light dark;--page:#f6f7f9;--card:#fff;--ink:#1b2026;--soft:#5a6470;
--line:#dfe3e8;--grid:#e9ecf0;--ok:#00744f;--warn:#8f5a00;--bad:#b3261e;--open:#56636f;
--c0:#0069a8;--c1:#c94f00;--c2:#00805c;--c3:#a3327f;--c4:#8a6d00;--c5:#56636f;--muted:#7c8794}
@media(prefers-color-scheme:dark){:root{--page:#101418;--card:#181d23;--ink:#e6e9ed;--soft:#9ba6b2;
--line:#2c333b;--grid:#242a31;--ok:#4fce9c;--warn:#f0b64f;--bad:#ff8a80;--open:#a9b6c2;
--c0:#5db4f0;--c1:#ff9d5c;--c2:#3fcf9f;--c3:#ef8fca;--c4:#e3c04b;--c5:#a9b6c2;--muted:#85919e}}
*{box-sizing:border-box}
html{scroll-padding-top:4rem}
body{margin:0;background:var(--page);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main,header,footer{max-width:1240px;margin:0 auto;padding:0 1.25rem}
header{padding-top:1.75rem}
h1{font-size:1.75rem;line-height:1.2;letter-spacing:-.015em;margin:0;overflow-wrap:anywhere}
header p{color:var(--soft);margin:.35rem 0 1rem}
section{margin:2.25rem 0}
section>h2{font-size:1.25rem;letter-spacing:-.01em;margin:0 0 .25rem}
section>p,.lead{color:var(--soft);margin:0 0 .9rem;max-width:75ch}
h3{font-size:1rem;margin:1.2rem 0 .5rem}
h4{font-size:.9rem;margin:.8rem 0 .3rem}
code{font:12px/1.4 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;color:var(--soft)}
nav{position:sticky;top:0;z-index:2;background:var(--page);border-bottom:1px solid var(--line)}
nav div{max-width:1240px;margin:0 auto;padding:.5rem 1.25rem;display:flex;flex-wrap:wrap;
gap:.15rem 1.1rem;font-size:13.5px}
nav a{color:var(--soft);text-decoration:none}
nav a:hover,nav a:focus{color:var(--ink);text-decoration:underline}
nav span{margin-left:auto;display:flex;flex-wrap:wrap;gap:.1rem .9rem}
.swatch{display:inline-block;width:1.1em;height:.28em;border-radius:2px;margin-right:.5em;
vertical-align:.25em;background:var(--run)}
.swatch.again{background:repeating-linear-gradient(90deg,var(--run) 0 4px,transparent 4px 6px)}
.c0{--run:var(--c0)}.c1{--run:var(--c1)}.c2{--run:var(--c2)}
.c3{--run:var(--c3)}.c4{--run:var(--c4)}.c5{--run:var(--c5)}.muted{--run:var(--muted)}
.runs{display:grid;gap:1rem;grid-template-columns:repeat(auto-fit,minmax(min(100%,380px),1fr))}
.run,.chart,.proto,.panel{background:var(--card);border:1px solid var(--line);border-radius:10px}
.run{padding:1rem 1.2rem;border-left:4px solid var(--state)}
.run.ok{--state:var(--ok)}.run.warn{--state:var(--warn)}.run.bad{--state:var(--bad)}
.run.open{--state:var(--open)}
.run h3{font-size:1.05rem;margin:0 0 .3rem;overflow-wrap:anywhere}
.verdict{margin:0 0 .8rem}.verdict b{color:var(--state);margin-right:.3em}
dl{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,145px),1fr));
gap:.5rem 1rem;margin:0}
dl.wide{grid-template-columns:repeat(auto-fill,minmax(min(100%,330px),1fr))}
dt{font-size:12px;color:var(--soft)}
dd{margin:0;overflow-wrap:anywhere}
.note{color:var(--warn);font-size:13.5px;margin:.7rem 0 0}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:.5rem .75rem;border-top:1px solid var(--line);vertical-align:top;
overflow-wrap:anywhere}
thead th{border-top:0;font-size:12.5px;font-weight:600;color:var(--soft);vertical-align:bottom}
tbody th{font-weight:500}
.keys tbody th{min-width:15.5rem}
.keys thead th{min-width:7rem}
tbody th code{display:block}
td data{font-weight:600;white-space:nowrap}
.none,.how{color:var(--soft)}.how{font-size:13px}
.keys .of{display:none}
.few{width:auto;min-width:min(100%,34rem)}
.few th,.few td{padding:.25rem .75rem}
.panel{padding:.35rem .5rem;margin:0 0 1rem}
.grid{display:grid;gap:1rem;grid-template-columns:repeat(auto-fit,minmax(min(100%,340px),1fr))}
figure{margin:0}
.chart{padding:.8rem .8rem .5rem;min-width:0;display:flex;flex-direction:column}
.chart figcaption{flex:1}
.chart h3{margin:0;font-size:.95rem}
.chart p{margin:.05rem 0 .45rem;color:var(--soft);font-size:12.5px;line-height:1.4}
svg{display:block;width:100%;height:auto;touch-action:pan-y}
svg text{fill:var(--soft);font:11px system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;
font-variant-numeric:tabular-nums}
svg .x{text-anchor:middle}svg .y{text-anchor:end}
svg .grid{stroke:var(--grid)}svg .axis{stroke:var(--muted)}svg .rule{stroke:var(--muted)}
svg path{fill:none}
.line path{stroke:var(--run);stroke-width:1.8;stroke-linejoin:round;stroke-linecap:round}
.line circle{fill:var(--run)}
.line.reference path{stroke-width:1.4;stroke-dasharray:4 4;stroke-linecap:butt}
.line.again path{stroke-dasharray:8 3}
.line.area path{fill:var(--run);fill-opacity:.18}
.line .gap{stroke:var(--bad);stroke-dasharray:none}
.tip{position:fixed;z-index:3;pointer-events:none;background:var(--ink);color:var(--page);
border-radius:6px;padding:.4rem .6rem;font-size:12.5px;line-height:1.45;max-width:320px;
font-variant-numeric:tabular-nums}
.tip b{display:block}
.protos{display:grid;gap:.75rem;grid-template-columns:repeat(auto-fill,minmax(min(100%,340px),1fr))}
.proto{padding:.65rem .75rem}
.proto p{margin:0 0 .45rem;font-size:13.5px}
.proto p span{color:var(--soft)}
.strip{display:grid;gap:3px;grid-template-columns:repeat(8,1fr)}
.strip img,.rows img{width:100%;height:auto;aspect-ratio:1;object-fit:cover;border-radius:3px;
display:block}
.strip .tiny,.rows .tiny{image-rendering:pixelated}
.scroll{overflow-x:auto}
.rows{display:grid;gap:.75rem 1.5rem;
grid-template-columns:repeat(auto-fill,minmax(min(100%,calc(var(--n)*94px)),1fr))}
.rows>div{display:grid;gap:.4rem;grid-template-columns:repeat(var(--n),minmax(0,1fr))}
.rows figcaption{font-size:11.5px;line-height:1.3;color:var(--soft);overflow-wrap:anywhere}
details{margin:.5rem 0}
summary{cursor:pointer;color:var(--soft)}
footer{color:var(--soft);font-size:13px;padding-bottom:2.5rem}
@media(max-width:760px){
body{font-size:14.5px}
STACKED
.few.keys tbody th{flex:1 1 60%}
.rows>div{grid-template-columns:repeat(auto-fill,minmax(64px,1fr))}
html{scroll-padding-top:6.5rem}
nav div{column-gap:.9rem}
nav span{margin-left:0;flex:0 0 100%;flex-wrap:nowrap;overflow-x:auto}
nav span:empty{display:none}
nav span>*,nav a{white-space:nowrap}
}
@media print{nav{display:none}.chart,.run,.proto{break-inside:avoid}}
MANY
.keys.many td:not(.how){flex:0 0 7.6rem}
"""
CSS = CSS.replace("STACKED", _STACKED.replace(".T", ".keys"))
CSS = CSS.replace("MANY", _STACKED.replace(".T", ".keys.many"))

SCRIPT = """
(() => {
  const LEFT = 46, RIGHT = 362, WIDTH = 380, TOP = 10, BOTTOM = 194;
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.hidden = true;
  document.body.append(tip);
  const write = x => Number(x.toPrecision(6)).toLocaleString("en");
  for (const svg of document.querySelectorAll("svg[data-lines]")) {
    const chart = JSON.parse(svg.dataset.lines);
    const rule = document.createElementNS(svg.namespaceURI, "path");
    rule.setAttribute("class", "rule");
    svg.append(rule);
    svg.addEventListener("pointermove", event => {
      const box = svg.getBoundingClientRect();
      const share = ((event.clientX - box.left) * WIDTH / box.width - LEFT) / (RIGHT - LEFT);
      if (share < -0.02 || share > 1.02) return hide();
      const wanted = chart.left + share * (chart.right - chart.left);
      let x = null;
      for (const line of chart.lines)
        for (const value of line.x)
          if (x === null || Math.abs(value - wanted) < Math.abs(x - wanted)) x = value;
      tip.replaceChildren();
      const head = document.createElement("b");
      head.textContent = chart.x + " " + write(x);
      tip.append(head);
      for (const line of chart.lines) {
        let best = -1;
        line.x.forEach((value, i) => {
          if (value <= x && (best < 0 || value >= line.x[best])) best = i;
        });
        if (best < 0) continue;
        const row = document.createElement("div");
        row.textContent = line.n + ": " + line.y[best];
        tip.append(row);
      }
      tip.hidden = false;
      const place = LEFT + (x - chart.left) / (chart.right - chart.left) * (RIGHT - LEFT);
      rule.setAttribute("d", `M${place} ${TOP}V${BOTTOM}`);
      const left = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8);
      tip.style.left = Math.max(8, left) + "px";
      tip.style.top = Math.max(8, event.clientY - tip.offsetHeight - 12) + "px";
    });
    const hide = () => { tip.hidden = true; rule.setAttribute("d", ""); };
    svg.addEventListener("pointerleave", hide);
  }
})();
"""
