// The text of a completion: its colours, and the panel with the numbers of one token.
(() => {
  "use strict";
  const { data, make, welcomed, within } = window.HAPO;
  const SUFFIX = { entropy: " nats", logp: " nats", gap: " nats", kl_base: " nats", percentile: " %", temperature_move: " %" };
  const CLIPPED = { low: "stopped at the lower bound", high: "stopped at the upper bound" };
  let chosenQuantity = "entropy";

  function colour(section, quantity) {
    const all = data(section);
    if (!all || !all.colours[quantity]) return;
    const steps = all.colours[quantity], kind = all.kinds[quantity];
    section.querySelectorAll(".hapo-tokens > .t").forEach((token, i) => {
      token.className = token.className.replace(/\b[sdc][0-9a-f]\b/, kind + steps[i]);
    });
    section.querySelectorAll(".hapo-legend, .hapo-meaning").forEach((part) => {
      part.hidden = part.dataset.name !== quantity;
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
      const row = make("div");
      row.append(make("dt", "", all.labels[name].split(",")[0]), make("dd", "", values[i] + (SUFFIX[name] || "")));
      list.append(row);
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
  // A click or the keyboard keeps a token's numbers; a pointer shows another token's only while it is there.
  function pin(token) {
    const section = token.closest(".hapo-text"), kept = section.querySelector(".t.pinned");
    if (kept) kept.classList.remove("pinned");
    token.classList.add("pinned");
    show(token);
  }
  document.addEventListener("pointerover", (event) => {
    const token = tokenOf(event);
    if (token) show(token);
  });
  document.addEventListener("pointerout", (event) => {
    const token = tokenOf(event), to = event.relatedTarget;
    if (!token || to instanceof Element && to.closest(".hapo-tokens") === token.parentElement) return;
    const kept = token.closest(".hapo-text").querySelector(".t.pinned");
    if (kept) show(kept);
  });
  document.addEventListener("focusin", (event) => {
    const token = tokenOf(event);
    if (token) pin(token);
  });
  document.addEventListener("click", (event) => {
    const token = tokenOf(event);
    if (!token) return;
    pin(token);
    // On a narrow page the details lie below the tokens, often below the fold.
    token.closest(".hapo-text").querySelector(".hapo-details").scrollIntoView({ block: "nearest" });
  });
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

  const keys = new WeakMap();
  welcomed((root) => within(root, ".hapo-text").forEach((section) => {
    const known = keys.get(section);
    keys.set(section, section.dataset.key);
    const panel = section.querySelector(".hapo-details");
    if (panel && known && known !== section.dataset.key) panel.replaceChildren(make("p", "hapo-note", panel.dataset.hint));
    if (section.querySelector(".hapo-choose")) colour(section, chosenQuantity);
    // At first the numbers of the most uncertain token are kept, except on a phone, where they would cover the text.
    const first = section.querySelector(`.t[data-i="${section.dataset.first}"]`);
    if (first && known !== section.dataset.key && !matchMedia("(pointer: coarse)").matches) pin(first);
  }));
  Object.assign(window.HAPO, { pin });
})();
