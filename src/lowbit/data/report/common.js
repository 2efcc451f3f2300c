"use strict";

// Theme: the system's, until the reader chooses.
const root = document.documentElement;
const dark = () => (root.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
const toggle = document.getElementById("theme");
toggle.hidden = false;
toggle.addEventListener("click", () => { root.dataset.theme = dark() ? "light" : "dark"; });

// Charts: SVG whose colours are the page's variables. `ast` evaluates expressions without building functions from
// text, which the page's policy forbids.
const specs = JSON.parse(document.getElementById("charts").textContent);
for (const [name, spec] of Object.entries(specs)) {
  if (spec) vegaEmbed(`#chart-${name}`, spec, { renderer: "svg", ast: true, actions: false });
}

