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

// Weights of the reader's own: the point whose largest weighted shortfall is the least (stages/_frontier.py).
const scores = Object.entries(JSON.parse(document.getElementById("scores").textContent));
const sliders = ["quality", "size", "speed"].map((name) => document.getElementById(`weigh-${name}`));
const yours = document.getElementById("yours");
const timed = yours.dataset.timed === "true";
const choose = () => {
  const [quality, size, speed] = sliders.map((slider) => Number(slider.value));
  const weights = timed ? [quality, size, speed] : [quality, size + speed, 0];
  const short = (marks) => marks.map((mark, at) => weights[at] * (1 - mark));
  const worse = (a, b) => Math.max(...a) - Math.max(...b) || a.reduce((x, y) => x + y) - b.reduce((x, y) => x + y);
  yours.textContent = scores.reduce((best, each) => (worse(short(each[1]), short(best[1])) < 0 ? each : best))[0];
};
sliders.forEach((slider) => slider.addEventListener("input", choose));
if (scores.length) choose();
