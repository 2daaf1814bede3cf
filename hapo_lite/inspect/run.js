// The page's address, and the table of prompts: sorted, filtered and searched here, without the server.
(() => {
  "use strict";
  const { make, welcomed, within } = window.HAPO;

  // --- the address ------------------------------------------------------------------------------------------------
  window.addEventListener("hashchange", (event) => {
    // The answer to an earlier event may already have put its own address in the place of this one.
    window.HAPO.asked = new URL(event.newURL).hash;
    const button = document.querySelector("#hapo-go");
    if (button) button.click();
  });
  welcomed((root) => within(root, ".hapo-crumbs").forEach((nav) => {
    const { address, history: kind } = nav.dataset;
    if (nav.dataset.written === address || !nav.offsetParent) return;
    // A reader who comes from the end of a long table is taken to the beginning of what the row opened.
    if (nav.dataset.written && nav.getBoundingClientRect().top < 0) nav.scrollIntoView();
    nav.dataset.written = address;
    if (location.hash === address) return;
    if (kind === "push") history.pushState(null, "", address);
    else history.replaceState(null, "", address);
  }));

  // --- the table of prompts ---------------------------------------------------------------------------------------
  // What a reader chose holds for the next iteration too, whose table is another element.
  const chosen = { words: "", outcome: "", mix: "", column: null, down: false };
  const cellValue = (row, column) => {
    const cell = row.cells[column];
    return cell.dataset.v === undefined ? cell.textContent.toLowerCase() : Number(cell.dataset.v);
  };

  function arrange(section) {
    const body = section.querySelector("tbody"), rows = [...body.rows];
    const words = chosen.words.toLowerCase();
    let count = 0;
    rows.forEach((row, i) => {
      row.dataset.at ??= i;
      const fits = row.dataset.words.includes(words)
        && (!chosen.outcome || JSON.parse(row.dataset.outcomes).includes(chosen.outcome))
        && (!chosen.mix || row.dataset.mix === chosen.mix);
      row.hidden = !fits;
      count += fits;
    });
    const heads = [...section.querySelectorAll("th")];
    const column = heads.findIndex((head) => head.textContent === chosen.column);
    heads.forEach((head, i) => head.setAttribute("aria-sort", i !== column ? "none" : chosen.down ? "descending" : "ascending"));
    const way = chosen.down ? -1 : 1;
    rows.sort((one, other) => {
      const [a, b] = column < 0 ? [] : [cellValue(one, column), cellValue(other, column)];
      if (a !== b) return (a < b ? -1 : 1) * way;
      return one.dataset.at - other.dataset.at;
    });
    body.append(...rows);
    section.querySelector(".hapo-count").textContent = `${count.toLocaleString("en")} of ${rows.length.toLocaleString("en")} prompts`;
  }

  const tables = new WeakMap();
  welcomed((root) => within(root, ".hapo-prompts").forEach((section) => {
    if (tables.get(section) === section.dataset.key) return;
    tables.set(section, section.dataset.key);
    section.querySelector(".hapo-search").value = chosen.words;
    const filter = section.querySelector(".hapo-filter");
    filter.value = chosen.outcome;
    if (filter.value !== chosen.outcome) {
      filter.append(make("option", "", chosen.outcome));
      filter.value = chosen.outcome;
    }
    section.querySelector(".hapo-mix").value = chosen.mix;
    arrange(section);
  }));
  const parts = { "hapo-search": "words", "hapo-filter": "outcome", "hapo-mix": "mix" };
  document.addEventListener("input", (event) => {
    const section = event.target instanceof Element && event.target.closest(".hapo-prompts");
    const part = section && parts[event.target.className];
    if (!part) return;
    chosen[part] = event.target.value;
    arrange(section);
  });
  document.addEventListener("click", (event) => {
    const target = event.target instanceof Element ? event.target : null;
    const head = target && target.closest(".hapo-sort");
    if (head) {
      const column = head.textContent;
      chosen.down = chosen.column === column ? !chosen.down : head.parentElement.classList.contains("n");
      chosen.column = column;
      arrange(head.closest(".hapo-prompts"));
      return;
    }
    // The whole row leads where its link leads; a drag that selects text does not.
    const row = target && !target.closest("a") && target.closest(".hapo-prompts tbody tr");
    if (row && getSelection().isCollapsed) row.querySelector("a").click();
  });
})();
