"""The report's style sheet: readable on a phone, dark where the reader's system is dark."""

CSS = """
:root {
  color-scheme: light dark;
  --sans: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  --mono: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
  --paper: #f6f7f9; --card: #ffffff; --ink: #1b2129; --muted: #5b6675; --line: #dde2e8;
  --good: #1d7f4f; --warn: #a85b00; --good-paper: #e5f4ec; --warn-paper: #fcefdc;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #12161b; --card: #1a2027; --ink: #e4e8ee; --muted: #98a4b3; --line: #2f3843;
    --good: #62cf98; --warn: #f0ae55; --good-paper: #173326; --warn-paper: #3a2a13;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.5 var(--sans); -webkit-text-size-adjust: 100%; overflow-wrap: break-word;
}
main { max-width: 1180px; margin: 0 auto; padding: 28px 20px 40px; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 6px; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 36px 0 12px; }
h3 { font-size: 0.95rem; margin: 0; font-weight: 600; }
section > h3 { margin: 16px 0 8px; }
p { margin: 0 0 8px; }
.lead { color: var(--muted); }
.badge {
  display: inline-block; padding: 1px 10px; border-radius: 999px; font-size: 0.85rem;
  font-weight: 600; color: var(--warn); background: var(--warn-paper);
}
.badge.good { color: var(--good); background: var(--good-paper); }
.note { color: var(--warn); font-size: 0.9rem; }
.cards {
  display: grid; gap: 12px; margin-top: 20px;
  grid-template-columns: repeat(auto-fit, minmax(150px, 1fr));
}
.card, figure, .scroll, details {
  background: var(--card); border: 1px solid var(--line); border-radius: 10px;
}
.card { padding: 12px 16px; }
.card b {
  display: block; font-size: 1.45rem; line-height: 1.3; font-variant-numeric: tabular-nums;
}
.card span { color: var(--muted); font-size: 0.85rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 16px; text-align: left; vertical-align: top; }
tbody tr + tr > * { border-top: 1px solid var(--line); }
tbody th { font-weight: 400; color: var(--muted); width: 1%; white-space: nowrap; }
thead th { border-bottom: 2px solid var(--line); overflow-wrap: anywhere; min-width: 130px; }
td small { color: var(--muted); font-weight: 400; }
td.best { font-weight: 700; color: var(--good); }
.several th, .several td { padding: 6px 12px; font-size: 0.92em; }
.fields th, .fields td { font-family: var(--mono); font-size: 0.85rem; overflow-wrap: anywhere; }
.grid {
  display: grid; gap: 16px;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 460px), 1fr));
}
figure { margin: 0; padding: 14px 16px 8px; min-width: 0; }
figcaption { margin-bottom: 6px; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 16px; color: var(--muted); font-size: 0.85rem; }
.legend span { overflow-wrap: anywhere; }
.legend i, .key {
  display: inline-block; width: 18px; margin-right: 6px; vertical-align: middle; height: 0;
}
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--muted); }
details { margin-bottom: 10px; }
summary { padding: 10px 16px; cursor: pointer; overflow-wrap: anywhere; }
pre {
  margin: 0; padding: 12px 16px; border-top: 1px solid var(--line);
  font: 0.85rem/1.5 var(--mono); white-space: pre-wrap; overflow-wrap: anywhere;
}
footer { margin-top: 36px; color: var(--muted); font-size: 0.85rem; }
@media (max-width: 600px) {
  main { padding: 18px 12px 28px; }
  figure { padding: 12px 8px 6px; }
  figcaption { padding: 0 6px; }
  th, td { padding: 6px 8px; }
  tbody th, thead th:first-child { position: sticky; left: 0; background: var(--card); }
  tbody th { white-space: normal; min-width: 112px; }
  .one tbody th { width: 45%; }
  .several { font-size: 0.82rem; }
  .several td { overflow-wrap: anywhere; }
  .several thead th { min-width: 108px; }
  .fields th, .fields td { font-size: 0.75rem; }
  .fields tbody th { min-width: 140px; }
  .cards { grid-template-columns: 1fr 1fr; }
  .card b { font-size: 1.2rem; }
}
@media print { body { background: none; } figure, .card { break-inside: avoid; } }
"""
