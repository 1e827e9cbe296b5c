"use strict";
/* Without this all can be read as well: it sorts tables by a click on a heading, and points out a cell's row and column. */
const value = (row, column) => row.cells[column].textContent.trim();
const number = (text) => parseFloat(text.replace(/[,%+]/g, ""));
function compare(one, other, column) {
  const [a, b] = [value(one, column), value(other, column)];
  const [x, y] = [number(a), number(b)];
  return isNaN(x) || isNaN(y) ? isNaN(y) - isNaN(x) || a.localeCompare(b) : x - y;
}
for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0];
  const rows = [...body.rows];
  if (rows.length < 3) continue;
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    if (head.tagName !== "TH") return;
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    button.title = "sort";
    head.append(button);
    button.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") === "descending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const sorted = [...body.rows].sort((a, b) => (up ? 1 : -1) * compare(a, b, column));
      body.append(...sorted);
    });
  });
}
for (const heat of document.querySelectorAll("table.heat")) {
  const cells = (column) => [...heat.rows].map((row) => row.cells[column]);
  let marked = [];
  heat.addEventListener("mouseover", (event) => {
    const cell = event.target.closest("td");
    marked.forEach((one) => one.classList.remove("seen"));
    marked = cell && cell.cellIndex ? [cell.parentNode.cells[0], cells(cell.cellIndex)[0], cell] : [];
    marked.forEach((one) => one.classList.add("seen"));
  });
}
