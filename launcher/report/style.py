"""The style sheet of the report's page: light and dark, any width, and paper."""

from __future__ import annotations

STYLE = """
:root{color-scheme:light dark;--bg:#fff;--ink:#1b1f24;--soft:#57606a;--line:#d5dae0;--panel:#f5f7f9;
--train:#1f6fb5;--val:#c2500a;--good:#1a7037;--bad:#b3261e;--heat:31 111 181}
@media(prefers-color-scheme:dark){:root{--bg:#14181d;--ink:#e4e8ec;--soft:#9aa5b1;--line:#333b45;--panel:#1d232a;
--train:#6cb2f0;--val:#ff9f5e;--good:#62c584;--bad:#ff8a80;--heat:80 150 220}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:75rem;padding:1.25rem 1rem 3rem;background:var(--bg);color:var(--ink);
font:16px/1.5 system-ui,sans-serif;overflow-wrap:anywhere}
h1{font-size:1.5rem;line-height:1.25;margin:0}h2{font-size:1.15rem;margin:2.25rem 0 .6rem}
p{margin:.4rem 0;max-width:48rem}p.wide{max-width:none}.soft,caption,figcaption{color:var(--soft);font-size:.875rem}
code{font:.875em ui-monospace,monospace;background:var(--panel);padding:.1em .3em;border-radius:4px}
dl.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(9.5rem,1fr));gap:.6rem;margin:1.25rem 0}
dl.facts div{background:var(--panel);border:1px solid var(--line);border-radius:8px;padding:.6rem .8rem}
dt{color:var(--soft);font-size:.875rem}dd{margin:0}dl.facts dd{font-size:1.3rem;font-weight:600;line-height:1.3}
dd small{display:block;font-weight:400;font-size:.8rem;color:var(--soft)}
.good{color:var(--good)}.bad{color:var(--bad)}
.note{border-left:4px solid var(--val);background:var(--panel);padding:.5rem .9rem;margin:1rem 0}
ul{margin:.3rem 0;padding-left:1.2rem}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,21rem),1fr));gap:1rem}
figure{margin:0;max-width:38rem}figure h3{font-size:1rem;margin:0}svg{display:block;width:100%;height:auto}
svg text{fill:var(--soft);font-size:12px}.grid{stroke:var(--line);stroke-width:1}
.curve{fill:none;stroke-width:2;stroke-linejoin:round}.train{stroke:var(--train)}.val{stroke:var(--val)}
circle.train{fill:var(--train)}circle.val{fill:var(--val)}circle.best{fill:var(--bg);stroke-width:2.5}
circle.hit{fill:transparent;stroke:none}g:hover>circle.hit{fill:currentColor;fill-opacity:.2}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:.9rem;overflow-wrap:normal}
caption{text-align:left;padding-bottom:.3rem}
th,td{padding:.3rem .65rem;border-bottom:1px solid var(--line);text-align:left;vertical-align:top}
thead th{color:var(--soft);font-weight:600;vertical-align:bottom}tbody th{font-weight:500}
.num{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}.text{min-width:20rem}
tbody td:not(.text),tbody th{white-space:nowrap}
.heat th,.heat td{padding:.2rem .4rem}.heat thead th{writing-mode:vertical-rl;transform:rotate(180deg);text-align:left}
.heat thead td{border:0}.heat td{text-align:center;min-width:2.1rem;font-variant-numeric:tabular-nums}
.heat td.hit{font-weight:700}
details{margin:.6rem 0}summary{cursor:pointer;font-weight:600}
@media print{html{font-size:10px}body{max-width:none;padding:0;font-size:1rem}.scroll{overflow:visible}
.text{min-width:0}figure,tr,dl.facts div{break-inside:avoid}
h2{break-after:avoid}*{print-color-adjust:exact}details::details-content{content-visibility:visible;block-size:auto}}
"""
