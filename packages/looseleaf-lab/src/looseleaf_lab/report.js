"use strict";
// The page is complete without this: it adds sorting and the choice of colours.
const theme = document.getElementById("theme");
const wantsDark = window.matchMedia("(prefers-color-scheme: dark)");
let dark = wantsDark.matches;
function show() {
  document.documentElement.dataset.theme = dark ? "dark" : "light";
  theme.textContent = dark ? "Light mode" : "Dark mode";
}
theme.hidden = false;
show();
theme.addEventListener("click", () => { dark = !dark; show(); });
wantsDark.addEventListener("change", (event) => { dark = event.matches; show(); });

function key(row, column) {
  const cell = row.cells[column];
  return cell.dataset.v !== undefined ? Number(cell.dataset.v) : cell.textContent.trim();
}
function compare(a, b) {
  const missingA = a === "–", missingB = b === "–";
  if (missingA || missingB) return Number(missingA) - Number(missingB);
  if (typeof a === "number" && typeof b === "number") return a - b;
  return String(a).localeCompare(String(b), "en", { numeric: true });
}
for (const table of document.querySelectorAll("table")) {
  table.querySelectorAll("thead th").forEach((head, column) => {
    const button = head.querySelector("button");
    if (!button) return;
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      for (const other of table.querySelectorAll("thead th")) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const body = table.tBodies[0];
      const rows = Array.from(body.rows);
      rows.sort((a, b) => {
        const x = key(a, column), y = key(b, column);
        const missing = x === "–" || y === "–"; // a dash stays at the end in both orders
        return compare(x, y) * (down && !missing ? -1 : 1);
      });
      body.append(...rows);
    });
  });
}
