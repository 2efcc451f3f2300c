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
