// Plan: the first rows until asked for more, searched by text, sorted by column.
const FIRST = 15;
const table = document.getElementById("tensors");
const body = table.tBodies[0];
const rows = [...body.rows].map((row) => ({ row, text: row.textContent.toLowerCase() }));
const search = document.getElementById("search");
const more = document.getElementById("more");
const found = document.getElementById("found");
let all = false;

const show = () => {
  const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
  const match = rows.filter(({ text }) => words.every((word) => text.includes(word)));
  const shown = all ? match : match.slice(0, FIRST);
  body.replaceChildren(...shown.map(({ row }) => row));
  found.textContent = words.length ? `${match.length.toLocaleString("en")} found` : "";
  more.hidden = match.length <= FIRST;
  more.textContent = all ? `Show the first ${FIRST}` : `Show all ${match.length.toLocaleString("en")}`;
};

const key = (row, column) => {
  const cell = row.cells[column];
  return cell.dataset.value === undefined ? cell.textContent : Number(cell.dataset.value);
};
const sort = (header, column) => {
  const numeric = header.classList.contains("number");
  const up = header.ariaSort ? header.ariaSort !== "ascending" : !numeric;
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  header.ariaSort = up ? "ascending" : "descending";
  const order = (a, b) => {
    const [x, y] = [key(a.row, column), key(b.row, column)];
    if (x === "" || y === "") return (x === "") - (y === "");
    const by = typeof x === "number" ? x - y : x.localeCompare(y, "en", { numeric: true });
    return up ? by : -by;
  };
  rows.sort(order);
  show();
};
[...table.tHead.rows[0].cells].forEach((header, column) => {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = header.textContent;
  button.addEventListener("click", () => sort(header, column));
  header.replaceChildren(button);
});
search.addEventListener("input", show);
more.addEventListener("click", () => { all = !all; show(); });
for (const tools of document.querySelectorAll(".tools")) tools.hidden = false;
addEventListener("beforeprint", () => { all = true; show(); });
show();
