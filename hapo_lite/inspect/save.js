// Pictures and CSV files of what is on the page.
(() => {
  "use strict";
  const { make } = window.HAPO;
  function save(name, url) {
    const link = Object.assign(make("a"), { download: name, href: url });
    link.click();
  }
  const saveCsv = (name, rows) => {
    const cell = (value) => (typeof value === "number" ? String(value) : `"${String(value ?? "").replaceAll('"', '""')}"`);
    const text = rows.map((row) => row.map(cell).join(",")).join("\n") + "\n";
    save(`${name}.csv`, URL.createObjectURL(new Blob([text], { type: "text/csv" })));
  };

  // A section as it stands on the page, painted box by box: a picture of HTML would need the browser's own renderer.
  function paint(section) {
    section.classList.add("hapo-unrolled");
    const frame = section.getBoundingClientRect(), edge = 12;
    const height = Math.max(frame.height, section.scrollHeight), scale = Math.min(2, 16000 / (height + 2 * edge));
    const canvas = Object.assign(document.createElement("canvas"), {
      width: (frame.width + 2 * edge) * scale, height: (height + 2 * edge) * scale,
    });
    const pen = canvas.getContext("2d"), left = edge - frame.left, top = edge - frame.top;
    pen.scale(scale, scale);
    pen.fillStyle = getComputedStyle(document.body).backgroundColor;
    pen.fillRect(0, 0, canvas.width, canvas.height);
    pen.textBaseline = "middle";
    const range = document.createRange();
    const mark = getComputedStyle(section).getPropertyValue("--hapo-mark");
    const bar = (r, y) => pen.fillRect(r.left + left, y + top, r.width, 2);

    function box(node) {
      const look = getComputedStyle(node);
      for (const r of node.getClientRects()) {
        pen.fillStyle = look.backgroundColor;
        pen.fillRect(r.left + left, r.top + top, r.width, r.height);
        pen.fillStyle = mark;
        if (node.matches(".differs, .clip-low")) bar(r, r.bottom - 2);
        if (node.matches(".clip-high")) bar(r, r.top);
      }
    }
    function words(node) {
      const look = getComputedStyle(node.parentElement);
      pen.font = `${look.fontWeight} ${look.fontSize} ${look.fontFamily}`;
      pen.fillStyle = look.color;
      pen.direction = look.direction;
      pen.textAlign = "left";
      let start = 0, row = null;
      const flush = (end) => {
        if (row === null || end <= start) return;
        range.setStart(node, start);
        range.setEnd(node, end);
        const r = range.getClientRects()[0];
        if (r) pen.fillText(node.data.slice(start, end).replace("\n", ""), r.left + left, r.top + top + r.height / 2);
      };
      for (let i = 0; i < node.length; i++) {
        range.setStart(node, i);
        range.setEnd(node, i + 1);
        const r = range.getClientRects()[0];
        if (r && (row === null || Math.abs(r.top - row) > 2)) {
          flush(i);
          [start, row] = [i, r.top];
        }
      }
      flush(node.length);
    }
    const walker = document.createTreeWalker(section, NodeFilter.SHOW_ELEMENT | NodeFilter.SHOW_TEXT, (node) =>
      node instanceof Element && (node.hidden || node.matches(".hapo-saves, .hapo-data, option"))
        ? NodeFilter.FILTER_REJECT : NodeFilter.FILTER_ACCEPT);
    for (let node = walker.nextNode(); node; node = walker.nextNode()) {
      if (node instanceof Text) words(node);
      else if (node instanceof HTMLSelectElement) {
        const r = node.getBoundingClientRect(), look = getComputedStyle(node);
        pen.font = `${look.fontSize} ${look.fontFamily}`;
        pen.fillStyle = look.color;
        pen.fillText(node.selectedOptions[0].text, r.left + left + 8, r.top + top + r.height / 2);
      } else box(node);
    }
    section.classList.remove("hapo-unrolled");
    save(`${section.dataset.name}.png`, canvas.toDataURL("image/png"));
  }

  function sectionCsv(section) {
    if (section.dataset.csv) {
      // Full precision, from the server.
      document.querySelector(`#${section.dataset.csv}`).click();
      return;
    }
    const text = (node) => node.textContent.trim();
    const rows = [...section.querySelectorAll("tr")].map((row) => [...row.cells].map(text));
    for (const card of section.querySelectorAll(".hapo-card")) {
      const head = card.querySelector("header"), outcome = text(head.querySelector("b"));
      rows.push([text(head.firstChild), outcome, text(card.querySelector(".hapo-tokens"))]);
    }
    saveCsv(section.dataset.name, section.querySelector("tr") ? rows : [["completion", "outcome", "tokens"], ...rows]);
  }
  document.addEventListener("click", (event) => {
    const button = event.target instanceof Element && event.target.closest(".hapo-save");
    if (!button) return;
    const section = button.closest("[data-name]");
    if (button.dataset.kind === "png") paint(section);
    else sectionCsv(section);
  });

  Object.assign(window.HAPO, { save, saveCsv });
})();
