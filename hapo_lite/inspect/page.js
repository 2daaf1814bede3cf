// What the page's scripts share: window.HAPO. This file is loaded first, and the other ones in the order of their names.
// Listeners stand on the document, whatever the number of tokens. Everything that comes from a model is set as text, never
// as HTML.
(() => {
  "use strict";
  const hooks = [];

  const read = (root, name) => {
    const holder = root.querySelector(`:scope .${name}`);
    return holder ? JSON.parse(holder.textContent) : null;
  };
  const dataOf = new WeakMap();
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
  // The elements of a selector in new content, the content's own element among them.
  const within = (root, selector) => [...(root.matches(selector) ? [root] : []), ...root.querySelectorAll(selector)];
  // welcomed(hook): hook(root) is called with everything that comes to the page, and with what has got another data-key.
  const welcomed = (hook) => hooks.push(hook);
  const welcome = (root) => hooks.forEach((hook) => hook(root));

  function watch() {
    welcome(document.body);
    new MutationObserver((changes) => {
      for (const change of changes) {
        if (change.type === "attributes") welcome(change.target);
        for (const node of change.addedNodes) {
          // A node that a figure or a token panel adds to itself needs no handling.
          if (node instanceof Element && !node.closest(".hapo-plot .js-plotly-plot, .hapo-details, svg")) welcome(node);
        }
      }
    }).observe(document.body, { childList: true, subtree: true, attributes: true, attributeFilter: ["data-key"] });
  }
  window.HAPO = { dark, data, make, read, welcomed, within };
  if (document.readyState === "complete") setTimeout(watch);
  else window.addEventListener("DOMContentLoaded", watch);
})();
