// A click on a token of a generation, or Enter on it, chooses it for a fork: its number goes into the box below.
(() => {
  "use strict";
  function choose(event) {
    const token = event.target instanceof Element && event.target.closest("#generated-tokens .t[data-i]");
    const box = document.querySelector("#fork-position input");
    if (!token || !box) return;
    document.querySelectorAll(".t.fork-at").forEach((one) => one.classList.remove("fork-at"));
    token.classList.add("fork-at");
    box.value = token.dataset.i;
    box.dispatchEvent(new Event("input", { bubbles: true }));
    box.dispatchEvent(new Event("change", { bubbles: true }));
  }
  document.addEventListener("click", choose);
  document.addEventListener("keydown", (event) => event.key === "Enter" && choose(event));
})();
