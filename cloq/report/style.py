"""The style sheet of report.html. The pictures take their colours from the variables at its top."""

CSS = """
:root {
  color-scheme: light dark;
  --sans: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  --mono: ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", monospace;
  --paper: #ffffff; --panel: #f6f7f9; --ink: #1b1f27; --muted: #5d6675; --grid: #dfe3e9; --link: #2455b8;
  --before: #9aa3b0; --after: #2f62d9; --bad: #c8452d;
  --series-0: #3f66c9; --series-1: #d18a00; --series-2: #d9503f; --series-3: #3ba08c; --series-4: #348f46;
  --series-5: #d35f93; --series-6: #8d55d0; --series-7: #6d9bd6; --series-8: #8d6142; --series-9: #7d848e;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171c; --panel: #1c2027; --ink: #e8eaee; --muted: #9aa4b2; --grid: #323844; --link: #8fb1ff;
    --before: #7d8796; --after: #6d98ff; --bad: #ff7b61;
    --series-0: #6d8dee; --series-1: #efb118; --series-2: #ff7a66; --series-3: #6cc5b0; --series-4: #4dba62;
    --series-5: #ff8ab7; --series-6: #b183f0; --series-7: #97bbf5; --series-8: #b88a69; --series-9: #a2a9b3;
  }
}
@media print {
  :root {
    color-scheme: light;
    --paper: #ffffff; --panel: #f6f7f9; --ink: #000000; --muted: #444b57; --grid: #cfd4db; --link: #000000;
    --before: #8a93a0; --after: #1d4fc4; --bad: #b03019;
    --series-0: #3f66c9; --series-1: #d18a00; --series-2: #d9503f; --series-3: #3ba08c; --series-4: #348f46;
    --series-5: #d35f93; --series-6: #8d55d0; --series-7: #6d9bd6; --series-8: #8d6142; --series-9: #7d848e;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 1rem/1.55 var(--sans); }
main { max-width: 62rem; margin: 0 auto; padding: 3rem 1.5rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; font-weight: 650; letter-spacing: -0.015em; margin: 0 0 0.35rem;
  overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; font-weight: 650; letter-spacing: -0.005em; margin: 3rem 0 0.4rem; }
p { margin: 0 0 0.9rem; max-width: 46rem; }
.lead { color: var(--muted); margin-bottom: 1.8rem; }
a { color: var(--link); }
code, pre { font-family: var(--mono); font-size: 0.86em; }
pre { background: var(--panel); padding: 0.9rem 1.1rem; border-radius: 8px; overflow-x: auto; line-height: 1.5; }
.tiles { display: flex; flex-wrap: wrap; gap: 1px; background: var(--grid); border: 1px solid var(--grid); border-radius: 10px;
  overflow: hidden; }
.tile { flex: 1 1 17rem; background: var(--paper); padding: 1rem 1.2rem 1.05rem; }
.tile h3 { margin: 0; font-size: 0.83rem; font-weight: 500; color: var(--muted); }
.tile strong { display: block; font-size: 1.55rem; line-height: 1.35; font-weight: 600; letter-spacing: -0.02em;
  font-variant-numeric: tabular-nums; }
.tile small { font-size: 0.83rem; color: var(--muted); }
.was { color: var(--muted); font-weight: 400; }
figure { margin: 0.6rem 0 0; overflow-x: auto; }
figure svg { display: block; width: 100%; min-width: 40rem; height: auto; }
figcaption, .note { color: var(--muted); font-size: 0.86rem; max-width: none; margin: 0.4rem 0 1.4rem; }
.ramp { display: inline-block; width: 6rem; height: 0.65rem; margin: 0 0.4rem; border-radius: 2px; vertical-align: baseline;
  background: linear-gradient(to right, transparent, var(--after)); outline: 1px solid var(--grid); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.88rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.28rem 0.9rem 0.28rem 0; text-align: right; border-bottom: 1px solid var(--grid); white-space: nowrap;
  vertical-align: top; }
th { color: var(--muted); font-weight: 500; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; }
.left th, .left td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
.left td:first-child { color: var(--muted); white-space: nowrap; padding-right: 1.6rem; }
.columns { columns: 2 20rem; column-gap: 3rem; }
.columns div { break-inside: avoid; padding-bottom: 1.2rem; }
.columns table { width: 100%; } .columns td:first-child { width: 9rem; }
.columns h3 { font-size: 0.88rem; font-weight: 600; margin: 0 0 0.2rem; }
ul { padding-left: 1.2rem; margin: 0.3rem 0; } li { margin: 0.25rem 0; }
details { margin: 0.4rem 0; } summary { cursor: pointer; color: var(--link); }
li details { display: inline; } li summary { display: inline; }
footer { margin-top: 3.5rem; padding-top: 1rem; border-top: 1px solid var(--grid); color: var(--muted); font-size: 0.83rem; }
@media print {
  html { font-size: 13px; }
  figure { overflow: visible; } figure svg { min-width: 0; }
  main { max-width: none; padding: 0; }
  figure, .tiles, tr { break-inside: avoid; }
  h2, p:has(+ figure) { break-after: avoid; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""
