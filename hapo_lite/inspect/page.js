// The page's only script: one set of listeners on the document, whatever the number of tokens.
// Everything that comes from a model is set as text, never as HTML.
(() => {
  "use strict";
  const SUFFIX = { entropy: " nats", logp: " nats", percentile: " %", temperature_move: " %" };
  const CLIPPED = { low: "stopped at the lower bound", high: "stopped at the upper bound" };
  const dataOf = new WeakMap();
  let chosenQuantity = "entropy";

  const read = (root, name) => {
    const holder = root.querySelector(`:scope .${name}`);
    return holder ? JSON.parse(holder.textContent) : null;
  };
  // Gradio keeps an element and changes what is in it, so what was read from it is kept by its content's key.
  const data = (section) => {
    const key = section.dataset.key, known = dataOf.get(section);
    if (known && known.key === key) return known.value;
    const value = read(section, "hapo-data");
    dataOf.set(section, { key, value });
    return value;
  };
  const make = (tag, className, text) => {
    const node = document.createElement(tag);
    if (className) node.className = className;
    if (text !== undefined) node.textContent = text;
    return node;
  };
  const dark = () => document.body.classList.contains("dark");

  // --- token text -------------------------------------------------------------------------------------------------
  function colour(section, quantity) {
    const all = data(section);
    if (!all || !all.colours[quantity]) return;
    const steps = all.colours[quantity], kind = all.kinds[quantity];
    section.querySelectorAll(".hapo-tokens > .t").forEach((token, i) => {
      token.className = token.className.replace(/\b[sd][0-9a-f]\b/, kind + steps[i]);
    });
    section.querySelectorAll(".hapo-legend").forEach((legend) => {
      legend.hidden = legend.dataset.name !== quantity;
    });
    section.querySelector(".hapo-choose").value = quantity;
  }

  function show(token) {
    const section = token.closest(".hapo-text");
    const all = data(section), panel = section.querySelector(".hapo-details");
    if (!all || !all.rows || !panel) return;
    const i = Number(token.dataset.i);
    const previous = section.querySelector(".t.pointed");
    if (previous) previous.classList.remove("pointed");
    token.classList.add("pointed");
    const title = make("p", "hapo-token-title");
    title.append(make("b", "", `${i}`), " ", Object.assign(make("bdi", "", all.shown[i].replace("\n", "")), { dir: "auto" }));
    const list = make("dl");
    for (const [name, values] of Object.entries(all.rows)) {
      list.append(make("dt", "", all.labels[name].split(",")[0]), make("dd", "", values[i] + (SUFFIX[name] || "")));
    }
    panel.replaceChildren(title);
    if (all.parts.length && all.parts[i]) panel.append(make("p", "hapo-note", `part ${all.parts[i]}`));
    if (all.clipped.length && all.clipped[i]) panel.append(make("p", "hapo-note", CLIPPED[all.clipped[i]]));
    panel.append(list);
    const choices = all.alternatives[i];
    if (choices && choices.length) {
      const table = make("table", "hapo-table"), head = make("tr");
      for (const name of ["next token", "at base T", "at its T"]) head.append(make("th", head.cells.length ? "n" : "", name));
      table.append(head);
      for (const [text, base, own] of choices) {
        const row = make("tr", text === all.shown[i] ? "chosen" : "");
        const cell = make("td");
        cell.append(make("bdi", "", text.replace("\n", "")));
        row.append(cell, make("td", "n", base), make("td", "n", own));
        table.append(row);
      }
      panel.append(table);
    }
  }

  function move(token, step) {
    const all = token.parentElement.querySelectorAll(".t");
    const next = all[Number(token.dataset.i) + step];
    if (!next) return;
    token.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  }

  const tokenOf = (event) => event.target instanceof Element && event.target.closest(".hapo-text .t[data-i]");
  for (const kind of ["pointerover", "click", "focusin"]) {
    document.addEventListener(kind, (event) => {
      const token = tokenOf(event);
      if (!token) return;
      show(token);
      // On a narrow page the details lie below the tokens, often below the fold.
      if (kind === "click") token.closest(".hapo-text").querySelector(".hapo-details").scrollIntoView({ block: "nearest" });
    });
  }
  document.addEventListener("keydown", (event) => {
    const token = tokenOf(event);
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!token || !step) return;
    event.preventDefault();
    move(token, getComputedStyle(token).direction === "rtl" ? -step : step);
  });
  document.addEventListener("change", (event) => {
    if (!event.target.matches || !event.target.matches(".hapo-choose")) return;
    chosenQuantity = event.target.value;
    document.querySelectorAll(".hapo-text").forEach((section) => {
      if (section.querySelector(".hapo-choose")) colour(section, chosenQuantity);
    });
  });

  // --- pictures and files -----------------------------------------------------------------------------------------
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

  function figureCsv(plot, name) {
    const rows = [["series", "x", "y"]];
    for (const series of plot.data) {
      const values = series.y || series.x || [];
      Array.from(values).forEach((_, i) => {
        rows.push([series.name || "", series.x ? series.x[i] : i, series.y ? series.y[i] : ""]);
      });
    }
    saveCsv(name, rows);
  }

  // --- figures ----------------------------------------------------------------------------------------------------
  const CSV_ICON = { width: 24, height: 24, path: "M3 4h18v16H3zM5 6v3h6V6zM13 6v3h6V6zM5 11v3h6v-3zM13 11v3h6v-3zM5 16v2h6v-2zM13 16v2h6v-2z" };

  function draw(holder) {
    if (!window.Plotly) {
      setTimeout(draw, 200, holder);
      return;
    }
    const figure = holder.closest(".hapo-figure"), spec = read(figure, "hapo-spec");
    const layout = { ...spec.layout };
    // Where fingers point, a drag across a figure scrolls the page.
    if (matchMedia("(pointer: coarse)").matches) layout.dragmode = false;
    if (holder.data) Plotly.purge(holder);
    Plotly.newPlot(holder, spec.data, layout, {
      displaylogo: false,
      displayModeBar: true,
      responsive: true,
      modeBarButtons: [[
        "toImage",
        { name: "csv", title: "Download the numbers as CSV", icon: CSV_ICON, click: (plot) => figureCsv(plot, spec.name) },
        "zoom2d", "resetScale2d",
      ]],
      toImageButtonOptions: { format: "png", filename: spec.name, scale: 2 },
    }).then(() => {
      dress(holder);
      if (!spec.tokens) return;
      holder.removeAllListeners("plotly_click");
      holder.on("plotly_click", (event) => pick(holder, event.points[0].x));
    });
  }
  // A point of a figure that was clicked: its token is shown in the text above it.
  function pick(holder, position) {
    const sections = [...document.querySelectorAll(".hapo-text[data-key]")].filter((section) => section.offsetParent);
    const section = sections.findLast((one) => one.compareDocumentPosition(holder) & Node.DOCUMENT_POSITION_FOLLOWING);
    const token = section && section.querySelector(`.t[data-i="${position}"]`);
    if (!token) return;
    token.scrollIntoView({ block: "nearest" });
    show(token);
  }
  function dress(holder) {
    if (window.Plotly && holder.data) Plotly.relayout(holder, window.HAPO_TEMPLATES[dark() ? "dark" : "light"]);
  }

  const drawn = new WeakMap();
  const keyOf = (plot) => plot.closest(".hapo-figure").dataset.key;
  const inView = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting || drawn.get(entry.target) === keyOf(entry.target)) continue;
      drawn.set(entry.target, keyOf(entry.target));
      draw(entry.target);
    }
  }, { rootMargin: "200px" });

  function welcome(root) {
    const sections = root.matches(".hapo-text") ? [root] : root.querySelectorAll(".hapo-text");
    sections.forEach((section) => section.querySelector(".hapo-choose") && colour(section, chosenQuantity));
    const plots = root.matches(".hapo-plot") ? [root] : root.querySelectorAll(".hapo-plot");
    plots.forEach((plot) => {
      // An element that is observed again reports at once whether it is in view.
      inView.unobserve(plot);
      inView.observe(plot);
    });
  }
  function watch() {
    welcome(document.body);
    new MutationObserver((changes) => {
      for (const change of changes) {
        if (change.type === "attributes") {
          const panel = change.target.querySelector(".hapo-details");
          if (panel) panel.replaceChildren(make("p", "hapo-note", panel.dataset.hint));
          welcome(change.target);
        }
        for (const node of change.addedNodes) {
          // A node that a figure or a token panel adds to itself needs no handling.
          if (node instanceof Element && !node.closest(".hapo-plot .js-plotly-plot, .hapo-details, svg")) welcome(node);
        }
      }
    }).observe(document.body, { childList: true, subtree: true, attributes: true, attributeFilter: ["data-key"] });
    new MutationObserver(() => {
      document.querySelectorAll(".hapo-plot").forEach((plot) => drawn.has(plot) && dress(plot));
    }).observe(document.body, { attributeFilter: ["class"] });
  }
  if (document.body) watch();
  else document.addEventListener("DOMContentLoaded", watch);
})();
