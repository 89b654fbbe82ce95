"use strict";
(() => {
  const board = document.getElementById("board");
  const controls = document.getElementById("controls");
  if (!board || !controls) return;
  // Columns of robust protection, each for what attackers hold.
  const accesses = [...board.tHead.querySelectorAll("[data-access]")].map((head) => head.dataset.column);
  // The small "?" of a column opens its definition; it must not sort.
  for (const button of board.querySelectorAll("button.what")) {
    for (const kind of ["click", "keydown", "keypress", "mousedown"]) {
      button.addEventListener(kind, (event) => event.stopPropagation());
    }
  }
  const table = new DataTable(board, {
    order: [],
    autoWidth: false,
    paging: board.tBodies[0].rows.length > 100,
    pageLength: 100,
    layout: { topStart: null, topEnd: null, bottomStart: null, bottomEnd: "paging" },
  });
  const columns = [...board.tHead.rows[0].cells].map((cell) => cell.dataset.column);
  const chosen = (name) => controls.elements[name].value;
  table.search.fixed("choices", (text, data, index) => {
    const row = table.row(index).node().dataset;
    const access = chosen("access");
    return (
      (!chosen("suite") || row.question === chosen("suite")) &&
      (!chosen("track") || row.track === chosen("track")) &&
      (!chosen("standing") || row.standing === chosen("standing")) &&
      (!chosen("flag") || (chosen("flag") === "none" ? !row.flags : row.flags.split(" ").includes(chosen("flag")))) &&
      (!access || row.accesses.split(" ").includes(access))
    );
  });
  table.on("draw", () => {
    const { recordsDisplay, recordsTotal } = table.page.info();
    document.getElementById("count").textContent = `${recordsDisplay} of ${recordsTotal} entries shown`;
  });
  let last = "";
  const apply = () => {
    const access = chosen("access");
    for (const name of accesses) table.column(columns.indexOf(name)).visible(!access || access === name, false);
    if (access !== last) table.order(access ? [[columns.indexOf(access), "desc"]] : []);
    last = access;
    table.search(chosen("find"));
    table.columns.adjust().draw();
    for (const figure of document.querySelectorAll("figure[data-question]")) {
      figure.hidden = Boolean(chosen("suite")) && figure.dataset.question !== chosen("suite");
    }
  };
  controls.addEventListener("input", apply);
  controls.addEventListener("change", apply);
  controls.addEventListener("reset", () => setTimeout(apply));
  controls.addEventListener("submit", (event) => event.preventDefault());
  controls.hidden = false;
  apply();
})();
