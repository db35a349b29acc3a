"use strict";
// The theme: the system's, until somebody asks for another one.
const root = document.documentElement;
const button = document.getElementById("theme");
const themes = ["system", "light", "dark"];
const show = (theme) => {
  if (theme === "system") delete root.dataset.theme;
  else root.dataset.theme = theme;
  button.querySelector("span").textContent = theme;
};
const remember = (act) => {
  try {
    return act(window.localStorage);
  } catch {
    return null; // a browser may keep nothing for a page from a file
  }
};
const kept = remember((storage) => storage.getItem("rilq-theme"));
show(themes.includes(kept) ? kept : "system");
button.hidden = false;
button.addEventListener("click", () => {
  const now = themes.indexOf(root.dataset.theme ?? "system");
  const next = themes[(now + 1) % themes.length];
  show(next);
  remember((storage) => storage.setItem("rilq-theme", next));
});

// Tables: a heading becomes a button that sorts; empty cells stay last.
const compare = (left, right) =>
  "sort" in left.dataset && "sort" in right.dataset
    ? Number(left.dataset.sort) - Number(right.dataset.sort)
    : left.textContent.localeCompare(right.textContent, undefined, { numeric: true });
const sort = (table, heading) => {
  const down = heading.getAttribute("aria-sort") === "ascending";
  for (const each of table.tHead.rows[0].cells) each.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", down ? "descending" : "ascending");
  const column = heading.cellIndex;
  const rows = [...table.tBodies[0].rows].sort((a, b) => {
    const [left, right] = [a.cells[column], b.cells[column]];
    const empty = (left.textContent === "") - (right.textContent === "");
    return empty || (down ? -compare(left, right) : compare(left, right));
  });
  table.tBodies[0].append(...rows);
};
for (const table of document.querySelectorAll("table.sortable")) {
  if (table.tBodies[0].rows.length < 2) continue;
  for (const heading of table.tHead.rows[0].cells) {
    const press = document.createElement("button");
    press.type = "button";
    press.append(...heading.childNodes);
    press.addEventListener("click", () => sort(table, heading));
    heading.append(press);
  }
}

// On paper nothing can be unfolded.
let folded = [];
window.addEventListener("beforeprint", () => {
  folded = [...document.querySelectorAll("details:not([open])")];
  for (const each of folded) each.open = true;
});
window.addEventListener("afterprint", () => {
  for (const each of folded) each.open = false;
});
