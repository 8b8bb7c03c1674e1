"use strict";
// Shows what is known of the cell of a map that the pointer is over or that has the focus. Arrow keys move in a map.
const details = JSON.parse(document.getElementById("details").textContent);
const panel = document.getElementById("detail");

function element(name, content) {
  const made = document.createElement(name);
  made.textContent = content;
  return made;
}

function show(cell) {
  const map = cell.closest("table");
  const layer = cell.parentElement.cells[0].textContent;
  const path = map.tHead.rows[0].cells[cell.cellIndex].textContent;
  const parts = [map.dataset.prefix, layer, path].filter((part) => part !== "");
  panel.replaceChildren(element("h3", parts.join(".")));
  for (const entry of cell.dataset.k.split(" ")) {
    const [kind, count] = entry.split(":").map(Number);
    const list = document.createElement("dl");
    const lines = count > 1 ? [["modules", `${count} alike; what follows is of each`]] : [];
    for (const [label, value] of [...lines, ...details[kind]]) list.append(element("dt", label), element("dd", value));
    panel.append(list);
  }
  panel.hidden = false;
}

function next(cell, key) {
  const row = cell.parentElement;
  const body = row.parentElement;
  const [across, down] = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1] }[key] ?? [0, 0];
  if (key === "Home" || key === "End") {
    const cells = [...row.cells].filter((other) => other.dataset.k);
    return key === "Home" ? cells[0] : cells[cells.length - 1];
  }
  let x = cell.cellIndex + across;
  let y = row.sectionRowIndex + down;
  // Layers lack some modules: the next cell that has one gets the focus.
  while (across || down) {
    const other = body.rows[y]?.cells[x];
    if (!other || x < 1) return null;
    if (other.dataset.k) return other;
    x += across;
    y += down;
  }
  return null;
}

for (const map of document.querySelectorAll("table.map")) {
  const cells = [...map.tBodies[0].querySelectorAll("td[data-k]")];
  for (const cell of cells) {
    cell.tabIndex = -1;
    cell.setAttribute("role", "gridcell");
  }
  if (cells.length) cells[0].tabIndex = 0;
  map.addEventListener("mouseover", (event) => {
    const cell = event.target.closest("td[data-k]");
    if (cell) show(cell);
  });
  map.addEventListener("mouseleave", () => {
    if (!map.contains(document.activeElement)) panel.hidden = true;
  });
  map.addEventListener("focusin", (event) => {
    const cell = event.target.closest("td[data-k]");
    if (!cell) return;
    for (const other of map.querySelectorAll("td[tabindex='0']")) other.tabIndex = -1;
    cell.tabIndex = 0;
    show(cell);
  });
  map.addEventListener("focusout", () => {
    panel.hidden = true;
  });
  map.addEventListener("keydown", (event) => {
    if (event.key === "Escape") panel.hidden = true;
    const cell = event.target.closest("td[data-k]");
    const other = cell && next(cell, event.key);
    if (other) {
      event.preventDefault();
      other.focus();
    }
  });
}
