"use strict";
// Sorting, following the ARIA authoring practices. Unknown values stay last in both directions.
const table = document.getElementById("runs");
const body = table.tBodies[0];
const heads = [...table.tHead.rows[0].cells];
const compare = new Intl.Collator(undefined, { numeric: true });
function key(row, column) {
  const value = row.cells[column].dataset.value;
  if (value === undefined || value === "") return null;
  return value.trim() !== "" && Number.isFinite(Number(value)) ? Number(value) : value;
}
function sortBy(column) {
  const head = heads[column];
  const down = head.getAttribute("aria-sort") === "ascending";
  for (const other of heads) other.setAttribute("aria-sort", "none");
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const rows = [...body.rows].map((row) => [key(row, column), row]);
  rows.sort(([a], [b]) => {
    if (a === null || b === null) return (a === null) - (b === null);
    const order = typeof a === "number" && typeof b === "number" ? a - b : compare.compare(String(a), String(b));
    return down ? -order : order;
  });
  body.append(...rows.map(([, row]) => row));
}
heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => sortBy(column)));

// Tooltips with column descriptions, placed next to the title; Escape hides them.
let placeTooltip = () => {};
for (const button of table.tHead.querySelectorAll("button")) {
  const description = button.nextElementSibling;
  const place = () => {
    const box = button.getBoundingClientRect();
    description.style.left = `${Math.max(8, Math.min(box.left, document.documentElement.clientWidth - description.offsetWidth - 8))}px`;
    const below = box.bottom + description.offsetHeight <= document.documentElement.clientHeight;
    description.style.top = `${below ? box.bottom : Math.max(0, box.top - description.offsetHeight)}px`;
  };
  const show = () => {
    document.body.classList.remove("tooltips-hidden"); // at once: Escape may come before the next frame
    placeTooltip = place;
    requestAnimationFrame(place);
  };
  button.addEventListener("pointerenter", show);
  button.addEventListener("focus", show);
}
document.addEventListener("scroll", () => placeTooltip(), { capture: true, passive: true });
document.addEventListener("keydown", (event) => { if (event.key === "Escape") document.body.classList.add("tooltips-hidden"); });

const filter = document.getElementById("filter");
const count = document.getElementById("count");
filter.addEventListener("input", () => {
  const terms = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
  let shown = 0;
  for (const row of body.rows) {
    const text = `${row.cells[0].textContent} ${row.cells[row.cells.length - 1].textContent}`.toLowerCase();
    row.hidden = !terms.every((term) => text.includes(term));
    shown += !row.hidden;
  }
  count.textContent = terms.length ? `${shown} of ${body.rows.length}` : "";
});

// A shadow and a hint where a table continues to the right.
function markCut(box) {
  box.toggleAttribute("data-scrollable", box.scrollWidth > box.clientWidth + 1);
  box.toggleAttribute("data-cut", box.scrollLeft + box.clientWidth < box.scrollWidth - 1);
  box.toggleAttribute("data-cut-below", box.scrollTop + box.clientHeight < box.scrollHeight - 1);
}
for (const box of document.querySelectorAll(".scroll")) {
  new ResizeObserver(() => markCut(box)).observe(box);
  box.addEventListener("scroll", () => markCut(box), { passive: true });
  markCut(box);
}

const downloads = JSON.parse(document.getElementById("downloads").textContent);
for (const button of document.querySelectorAll("[data-download]")) {
  button.addEventListener("click", () => {
    const { name, type, text } = downloads[button.dataset.download];
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type }));
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60000);
  });
}

// Charts use Vega's expression interpreter (ast), since the page's CSP forbids eval; SVG for screen readers and print.
const specs = JSON.parse(document.getElementById("charts").textContent);
for (const box of document.querySelectorAll("[data-chart]")) {
  vegaEmbed(box, specs[box.dataset.chart], { actions: false, ast: true, renderer: "svg", tooltip: { disableDefaultStyle: false } })
    .then(() => { box.dataset.drawn = "yes"; })
    .catch((error) => { box.classList.add("failed"); box.textContent = `This chart could not be drawn: ${error.message}`; });
}
