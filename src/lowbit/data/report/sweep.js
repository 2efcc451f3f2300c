"use strict";

// Theme: the system's, until the reader chooses.
const root = document.documentElement;
const dark = () => (root.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
const toggle = document.getElementById("theme");
toggle.hidden = false;
toggle.addEventListener("click", () => { root.dataset.theme = dark() ? "light" : "dark"; });

const specs = JSON.parse(document.getElementById("charts").textContent);
for (const [name, spec] of Object.entries(specs)) {
  if (spec) vegaEmbed(`#chart-${name}`, spec, { renderer: "svg", ast: true, actions: false });
}

// Weights of the reader's own: the point with the largest weighted sum of scores.
const scores = Object.entries(JSON.parse(document.getElementById("scores").textContent));
const sliders = ["quality", "size", "speed"].map((name) => document.getElementById(`weigh-${name}`));
const yours = document.getElementById("yours");
const choose = () => {
  const weights = sliders.map((slider) => Number(slider.value));
  const sum = (marks) => marks.reduce((total, mark, at) => total + mark * weights[at], 0);
  const [name] = scores.reduce((best, each) => (sum(each[1]) > sum(best[1]) ? each : best));
  yours.textContent = name;
};
sliders.forEach((slider) => slider.addEventListener("input", choose));
if (scores.length) choose();
