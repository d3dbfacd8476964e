// The theme's menu switches are labels, which a keyboard cannot reach: make buttons of them.
document.addEventListener("DOMContentLoaded", () => {
  const names = { __navigation: "Site navigation", __toc: "Contents of this page" };
  for (const label of document.querySelectorAll("label.nav-overlay-icon, label.toc-overlay-icon")) {
    const box = document.getElementById(label.htmlFor);
    const tell = () => label.setAttribute("aria-expanded", String(box.checked));
    label.tabIndex = 0;
    label.setAttribute("role", "button");
    label.setAttribute("aria-label", names[label.htmlFor]);
    label.addEventListener("keydown", (event) => {
      if (event.key === "Enter" || event.key === " ") {
        event.preventDefault();
        box.checked = !box.checked;
        tell();
      }
    });
    box.addEventListener("change", tell);
    tell();
  }
});
