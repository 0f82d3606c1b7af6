"use strict";
const root = document.documentElement;
root.classList.add("script");

document.getElementById("theme").addEventListener("click", () => {
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
});

for (const table of document.querySelectorAll("table.groups")) {
  const rows = [...table.tBodies];
  for (const [column, head] of [...table.tHead.rows[0].cells].entries()) {
    head.querySelector("button").addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") !== "descending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const key = (body) => body.rows[0].cells[column].dataset.value ?? body.rows[0].cells[column].textContent.trim();
      const value = (text) => (text === "nan" ? Infinity : text === "" ? -Infinity : Number(text));
      const numbers = rows.every((body) => !Number.isNaN(value(key(body))));
      const order = (a, b) => (numbers ? value(a) - value(b) || 0 : a.localeCompare(b, "en", { numeric: true }));
      rows.sort((a, b) => (down ? order(key(b), key(a)) : order(key(a), key(b))));
      table.append(...rows);
    });
  }
  document.getElementById("search").addEventListener("input", (event) => {
    const words = event.target.value.toLowerCase().split(/\s+/);
    let shown = 0;
    for (const body of rows) {
      const text = body.rows[0].textContent.toLowerCase();
      body.hidden = !words.every((word) => text.includes(word));
      shown += !body.hidden;
    }
    document.getElementById("shown").textContent = `${shown} of ${rows.length} groups`;
  });
}
