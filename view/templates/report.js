// Without this script the tables are whole, and stay as they are.
function sort(table, headings, column) {
  const heading = headings[column];
  const isNumber = heading.classList.contains("number");
  const [usual, other] = isNumber ? ["descending", "ascending"] : ["ascending", "descending"];
  const order = heading.getAttribute("aria-sort") === usual ? other : usual;
  const sign = order === "ascending" ? 1 : -1;
  const valueOf = (row) => (isNumber ? row.cells[column].dataset.value : row.cells[column].textContent);
  const rows = [...table.tBodies[0].rows].sort((one, another) => {
    const [a, b] = [valueOf(one), valueOf(another)];
    if (a === undefined || b === undefined) return (a === undefined) - (b === undefined);  // what is not known is last
    return sign * (isNumber ? a - b : a.localeCompare(b, undefined, { numeric: true }));
  });
  table.tBodies[0].append(...rows);
  headings.forEach((one) => one.removeAttribute("aria-sort"));
  heading.setAttribute("aria-sort", order);
}

for (const table of document.querySelectorAll("table.sortable")) {
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...heading.childNodes);
    button.addEventListener("click", () => sort(table, headings, column));
    heading.append(button);
  });
}

addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((one) => (one.open = true)));
