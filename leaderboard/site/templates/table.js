"use strict";
(() => {
  const board = document.getElementById("board");
  const controls = document.getElementById("controls");
  if (!board || !controls) return;
  const tracks = ["weights", "unlabeled", "labeled", "task-aware"];
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
    const track = chosen("track");
    return (
      (!chosen("suite") || row.question === chosen("suite")) &&
      (!chosen("standing") || row.standing === chosen("standing")) &&
      (!chosen("flag") || (chosen("flag") === "none" ? !row.flags : row.flags.split(" ").includes(chosen("flag")))) &&
      (!track || row.tracks.split(" ").includes(track))
    );
  });
  table.on("draw", () => {
    const { recordsDisplay, recordsTotal } = table.page.info();
    document.getElementById("count").textContent = `${recordsDisplay} of ${recordsTotal} entries shown`;
  });
  let last = "";
  const apply = () => {
    const track = chosen("track");
    for (const name of tracks) table.column(columns.indexOf(name)).visible(!track || track === name, false);
    if (track !== last) table.order(track ? [[columns.indexOf(track), "desc"]] : []);
    last = track;
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
