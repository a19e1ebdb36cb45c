// Tables can be sorted: a click on a heading sorts by that column, a second click the other way round.
// A table that is wider than its place scrolls in a box of its own, its first column fixed, with a line that says so.
(() => {
  const number = (text) => {
    const m = text.replace(/[,\u2009]/g, "").replace(/\u2212/g, "-").match(/^[<>≈×~\s]*([-+]?\d*\.?\d+(?:e[-+]?\d+)?)/i);
    return m ? parseFloat(m[1]) : NaN;
  };
  const compare = (a, b) => {
    const x = number(a), y = number(b);
    if (!isNaN(x) && !isNaN(y)) return x - y;
    return isNaN(x) !== isNaN(y) ? (isNaN(x) ? 1 : -1) : a.localeCompare(b);
  };
  const sortable = (table) => {
    const body = table.tBodies[0], head = table.tHead && table.tHead.rows.length === 1 && table.tHead.rows[0];
    const spans = [...table.querySelectorAll("th, td")].some((c) => c.colSpan > 1 || c.rowSpan > 1);
    if (table.closest(".knb, .knb-answer") || !head || !body || body.rows.length < 3 || spans) return;
    [...head.cells].forEach((cell, i) => {
      const button = document.createElement("button");
      button.type = "button";
      button.className = "sort";
      button.title = "sort by this column";
      button.append(...(cell.querySelector("p") || cell).childNodes);
      (cell.querySelector("p") || cell).append(button);
      button.addEventListener("click", () => {
        const down = cell.getAttribute("aria-sort") === "ascending";
        for (const other of head.cells) other.removeAttribute("aria-sort");
        cell.setAttribute("aria-sort", down ? "descending" : "ascending");
        const rows = [...body.rows].map((row) => [row.cells[i].textContent.trim(), row]);
        const empty = (t) => t === "" || t === "—";
        rows.sort(([a], [b]) => empty(a) - empty(b) || (down ? -1 : 1) * compare(a, b)); // what is missing stays last
        body.append(...rows.map(([, row]) => row));
      });
    });
  };
  const widen = (table) => {
    if (table.closest(".knb, .knb-answer, .knb-wide") || table.closest("details:not([open])")) return;
    const parent = table.parentElement;
    if (table.scrollWidth <= parent.clientWidth + 1) return;
    const box = document.createElement("div"), hint = document.createElement("p");
    box.className = "knb-wide";
    box.tabIndex = 0;
    box.setAttribute("role", "region");
    box.setAttribute("aria-label", "table, scrolls sideways");
    hint.className = "knb-hint";
    hint.textContent = "→ more columns: scroll sideways";
    parent.insertBefore(box, table);
    box.append(table);
    box.after(hint);
  };
  // A column of a table as pandas draws it is called as people would call it.
  const named = (table) => {
    for (const cell of table.tHead && table.matches(".dataframe") ? table.tHead.querySelectorAll("th") : [])
      if (/^[a-z]+(_[a-z]+)+$/.test(cell.textContent.trim())) cell.textContent = cell.textContent.trim().replaceAll("_", " ");
  };
  const all = (root = document) => [...root.querySelectorAll("article table")];
  document.addEventListener("DOMContentLoaded", () => {
    all().forEach(named);
    all().forEach(sortable);
    requestAnimationFrame(() => all().forEach(widen));
    document.addEventListener("toggle", (event) => [...event.target.querySelectorAll("table")].forEach(widen), true);
  });
})();
