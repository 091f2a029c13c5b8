"use strict";
(() => {
  const form = document.getElementById("filters");
  if (!form) return;
  const [group, label, score] = ["group", "class", "score"].map((id) => document.getElementById(id));
  const cards = [...document.querySelectorAll(".card")];

  function apply() {
    const steps = new Set([...form.querySelectorAll("[name=step]:checked")].map((box) => box.value));
    const least = Number(score.value);
    document.getElementById("score-shown").value = least.toFixed(2);
    let shown = 0;
    for (const card of cards) {
      const inGroup = !group.value || card.dataset.groups.split("|").includes(group.value);
      card.hidden = !inGroup || !(label.value === "" || card.dataset.classes.split(" ").includes(label.value));
      shown += !card.hidden;
      for (const panel of card.querySelectorAll(".panel")) panel.hidden = !steps.has(panel.dataset.step);
      for (const shape of card.querySelectorAll(".panel g")) {
        const { class: own, score: rated } = shape.dataset;
        const isOther = label.value !== "" && own !== undefined && own !== label.value;
        shape.style.display = isOther || (rated !== undefined && Number(rated) < least) ? "none" : "";
      }
    }
    for (const row of document.querySelectorAll("[data-row-class]"))
      row.hidden = label.value !== "" && row.dataset.rowClass !== label.value;
    for (const line of document.querySelectorAll(".chart [id*='-class-']"))
      line.style.display = label.value === "" || line.id.endsWith(`-class-${label.value}`) ? "" : "none";
    document.getElementById("count").textContent = `${shown} of ${cards.length} images`;
  }

  form.addEventListener("input", apply);
  form.addEventListener("submit", (event) => event.preventDefault());
  apply();

  const large = document.getElementById("large");
  document.addEventListener("click", (event) => {
    const button = event.target.closest(".zoom");
    if (button) {
      document.getElementById("large-picture").replaceChildren(button.querySelector("svg").cloneNode(true));
      document.getElementById("large-caption").textContent = button.parentElement.querySelector("figcaption").textContent;
      large.showModal();
    } else if (event.target === large) large.close();
  });
})();
