// Click a heading to sort by it; click again to turn the order round. Numbers go by value, rows without one last.
document.querySelectorAll("th button").forEach((button) => button.addEventListener("click", () => {
  const heading = button.parentElement, place = heading.cellIndex, body = heading.closest("table").tBodies[0];
  const down = heading.getAttribute("aria-sort") === "ascending";
  heading.parentElement.querySelectorAll("th").forEach((other) => other.removeAttribute("aria-sort"));
  heading.setAttribute("aria-sort", down ? "descending" : "ascending");
  const numeric = [...body.rows].some((row) => row.cells[place].dataset.value !== undefined);
  const key = (row) => row.cells[place].dataset.value ?? (numeric ? null : row.cells[place].textContent);
  const order = (a, b) => numeric ? a - b : a.localeCompare(b);
  const compare = (a, b) => a === null ? (b === null ? 0 : 1) : b === null ? -1 : (down ? -1 : 1) * order(a, b);
  [...body.rows].sort((a, b) => compare(key(a), key(b))).forEach((row) => body.append(row));
}));
