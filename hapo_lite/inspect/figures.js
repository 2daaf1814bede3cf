// Figures: each is drawn when it comes into view.
(() => {
  "use strict";
  const { dark, read, welcomed, within } = window.HAPO;
  const CSV_ICON = { width: 24, height: 24, path: "M3 4h18v16H3zM5 6v3h6V6zM13 6v3h6V6zM5 11v3h6v-3zM13 11v3h6v-3zM5 16v2h6v-2zM13 16v2h6v-2z" };

  function figureCsv(plot, name) {
    const rows = [["series", "x", "y"]];
    for (const series of plot.data) {
      const values = series.y || series.x || [];
      Array.from(values).forEach((_, i) => {
        rows.push([series.name || "", series.x ? series.x[i] : i, series.y ? series.y[i] : ""]);
      });
    }
    window.HAPO.saveCsv(name, rows);
  }

  function draw(holder) {
    if (!window.Plotly) {
      setTimeout(draw, 200, holder);
      return;
    }
    const figure = holder.closest(".hapo-figure"), spec = read(figure, "hapo-spec");
    const layout = coloured(spec.layout);
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
    window.HAPO.pin(token);
  }
  const template = () => window.HAPO_TEMPLATES[dark() ? "dark" : "light"];
  function dress(holder) {
    if (window.Plotly && holder.data) Plotly.relayout(holder, template());
  }
  // A layout with the colours of the theme in it, since a figure that gets them afterwards is drawn twice.
  function coloured(layout) {
    const own = structuredClone(layout);
    for (const [path, value] of Object.entries(template())) {
      const names = path.split("."), last = names.pop();
      names.reduce((part, name) => (part[name] ??= {}), own)[last] = value;
    }
    return own;
  }

  const drawn = new WeakMap();
  const keyOf = (plot) => plot.closest(".hapo-figure").dataset.key;
  function drawOnce(plot) {
    if (drawn.get(plot) === keyOf(plot)) return;
    drawn.set(plot, keyOf(plot));
    draw(plot);
  }
  // Each figure has a turn of its own, those in view first, so that the page is painted and answers between two of them.
  const near = new Set(), far = new Set();
  const whenIdle = window.requestIdleCallback || ((work) => setTimeout(work, 50));
  let waiting = false;
  function wait() {
    if (waiting || !near.size && !far.size) return;
    waiting = true;
    whenIdle(takeTurn, { timeout: 300 });
  }
  // While a figure is drawn, no numbers can follow the pointer, so figures wait while a reader moves it over tokens.
  const POINTING = 250;
  let pointed = -POINTING;
  document.addEventListener("pointermove", (event) => {
    if (event.target instanceof Element && event.target.closest(".hapo-tokens")) pointed = performance.now();
  }, { passive: true });
  function takeTurn() {
    waiting = false;
    const left = pointed + POINTING - performance.now();
    if (left > 0) {
      waiting = true;
      setTimeout(takeTurn, left);
      return;
    }
    // Those that waited may have left the view since.
    const [plot] = near.size ? near : far;
    near.delete(plot);
    far.delete(plot);
    // One that is hidden by now is drawn when it comes into view again.
    if (plot?.isConnected && plot.offsetParent) drawOnce(plot);
    wait();
  }
  const inView = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (entry.isIntersecting) near.add(entry.target);
      else near.delete(entry.target);
    }
    wait();
  }, { rootMargin: "200px" });
  // A figure of few points is also drawn below the fold, as for a picture of the whole page.
  const SMALL = 100_000;
  const small = (plot) => plot.closest(".hapo-figure").querySelector(".hapo-spec").textContent.length < SMALL;
  function drawLater(plot) {
    if (small(plot)) far.add(plot);
    wait();
  }

  welcomed((root) => within(root, ".hapo-plot").forEach((plot) => {
    // An element that is observed again reports at once whether it is in view.
    inView.unobserve(plot);
    inView.observe(plot);
    drawLater(plot);
  }));
  function followTheme() {
    new MutationObserver(() => {
      document.querySelectorAll(".hapo-plot").forEach((plot) => drawn.has(plot) && dress(plot));
    }).observe(document.body, { attributeFilter: ["class"] });
  }
  Object.assign(window.HAPO, { small });
  if (document.body) followTheme();
  else document.addEventListener("DOMContentLoaded", followTheme);
})();
